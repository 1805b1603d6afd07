"""What training minimizes: labels alone, or labels together with a teacher's outputs.

Legend: N images, K classes, T the temperature. ``student_NK`` and ``teacher_NK`` are logits. Whatever the
precision of the forward pass, losses are computed in float32.

Functions that compare logits return the mean over the batch, scaled by T squared: a soft target's gradients
shrink as 1 / T squared, and the factor keeps their share when the temperature is changed (Hinton et al. 2015,
section 2).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - what everybody calls it
from torch import Tensor, nn

from deploycnn.training.features import Features
from deploycnn.training.logit_cache import LogitCache
from deploycnn.training.teaching import Method
from deploycnn.training.view import View


class Loss(ABC):
    """What the training loop minimizes."""

    __slots__ = ()

    @abstractmethod
    def __call__(self, logits_NK: Tensor, view: View) -> Tensor:
        """The loss of a batch, a scalar."""

    @property
    def trained(self) -> nn.Module:
        """What is trained along with the model and thrown away afterwards; empty by default."""
        return nn.Module()


def cross_entropy(logits_NK: Tensor, view: View, label_smoothing: float) -> Tensor:
    """Cross-entropy with labels: by their shares where images are mixed, smoothed over all K classes.

    Mixed labels are smoothed once: the smoothed cross-entropy is linear in them.
    """

    def of(labels_N: Tensor) -> Tensor:
        return F.cross_entropy(logits_NK.float(), labels_N, label_smoothing=label_smoothing)

    if view.others is None:
        return of(view.labels)
    return view.share * of(view.labels) + (1 - view.share) * of(view.others)


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy(Loss):
    """Cross-entropy with the labels, of which ``label_smoothing`` is spread evenly over all K classes."""

    label_smoothing: float = 0.0

    def __call__(self, logits_NK: Tensor, view: View) -> Tensor:
        """The loss of a batch, a scalar."""
        return cross_entropy(logits_NK, view, self.label_smoothing)


def kd(student_NK: Tensor, teacher_NK: Tensor, temperature: float) -> Tensor:
    """KL divergence of the student's softened distribution from the teacher's, times T squared.

    Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network".
    """
    student = F.log_softmax(student_NK.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_NK.float() / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def decoupled_terms(
    student_NK: Tensor, teacher_NK: Tensor, labels_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The two parts of :func:`kd` for each image, shape (N,), not yet times T squared.

    The first (TCKD) compares the probabilities of target and not target, the second (NCKD) the
    distributions among the classes that are not the target. With p the teacher's probability of the target,
    ``kd = mean(TCKD + (1 - p) * NCKD) * T**2`` (Zhao et al. 2022, "Decoupled Knowledge Distillation",
    equation 5).
    """
    is_target_NK = F.one_hot(labels_N, student_NK.shape[1]).bool()
    student_binary, student_others = _decouple(student_NK.float() / temperature, is_target_NK)
    teacher_binary, teacher_others = _decouple(teacher_NK.float() / temperature, is_target_NK)
    tckd_N = F.kl_div(student_binary, teacher_binary, reduction="none", log_target=True).sum(dim=1)
    nckd_N = F.kl_div(student_others, teacher_others, reduction="none", log_target=True).sum(dim=1)
    return tckd_N, nckd_N


def _decouple(scaled_NK: Tensor, is_target_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (target, not target), and of the other K - 1 classes given that they are others.

    No probability is formed that could round to 0 or 1, so a very confident model gives no infinity.
    """
    target_N1 = scaled_NK[is_target_NK].unsqueeze(1)
    others = scaled_NK[~is_target_NK].view(len(scaled_NK), -1)
    binary_N2 = torch.cat((target_N1, others.logsumexp(dim=1, keepdim=True)), dim=1)
    return F.log_softmax(binary_N2, dim=1), F.log_softmax(others, dim=1)


def dkd(
    student_NK: Tensor, teacher_NK: Tensor, labels_N: Tensor, *, alpha: float, beta: float, temperature: float
) -> Tensor:
    """``(alpha * TCKD + beta * NCKD) * T**2``: Zhao et al. 2022, equation 7.

    A confident teacher makes plain KD ignore what it knows of the other classes, the factor 1 - p being
    small; here ``beta`` weighs that knowledge on its own.
    """
    tckd_N, nckd_N = decoupled_terms(student_NK, teacher_NK, labels_N, temperature)
    return (alpha * tckd_N + beta * nckd_N).mean() * temperature**2


def pearson_distance(first: Tensor, second: Tensor) -> Tensor:
    """1 - Pearson's correlation of each row of ``first`` with the same row of ``second``, averaged over rows.

    In [0, 2], and unchanged by ``a * row + b`` with a > 0. A constant row has distance 1.
    """
    first = first - first.mean(dim=1, keepdim=True)
    second = second - second.mean(dim=1, keepdim=True)
    return 1 - F.cosine_similarity(first, second, dim=1, eps=1e-8).mean()


def dist(student_NK: Tensor, teacher_NK: Tensor, *, alpha: float, beta: float, temperature: float) -> Tensor:
    """Match the teacher's rankings instead of its exact probabilities, times T squared.

    ``alpha`` weighs the relation among classes for each image (inter-class; beta in the paper), ``beta`` that
    among the batch's images for each class (intra-class; gamma in the paper): Huang et al. 2022, "Knowledge
    Distillation from A Stronger Teacher", equations 6 to 10.
    """
    student = F.softmax(student_NK.float() / temperature, dim=1)
    teacher = F.softmax(teacher_NK.float() / temperature, dim=1)
    inter = pearson_distance(student, teacher)
    intra = pearson_distance(student.T, teacher.T)
    return (alpha * inter + beta * intra) * temperature**2


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation(Loss):
    """``label_weight`` * cross-entropy + the teacher's term of ``method`` + ``feature_weight`` * that of features.

    The teacher sees the images that the student sees, augmented and mixed; smoothing and mixing of labels touch
    the cross-entropy alone, as the teacher's outputs for a mixed image are mixed already. Only dkd needs a label
    in its teacher's term; for mixed images that term is the sum over both labels by their shares.

    Attributes:
        teacher: In evaluation mode, on the device that trains.
        method: "kd" (weighed by ``alpha``), "dkd" or "dist" (``alpha`` and ``beta`` weigh their two parts).
        temperature: Greater than 0.
        label_weight: Of the cross-entropy with the labels.
        label_smoothing: Of that cross-entropy.
        features: Compares what is inside; with the same teacher.
        feature_weight: Of its term.
        cache: Of the teacher's logits; not together with features.
    """

    teacher: nn.Module
    method: Method
    temperature: float
    alpha: float
    beta: float
    label_weight: float
    label_smoothing: float = 0.0
    features: Features | None = None
    feature_weight: float = 0.0
    cache: LogitCache | None = None

    @property
    def trained(self) -> nn.Module:
        """Regressors of feature maps."""
        return nn.Module() if self.features is None else self.features.regressors

    def __call__(self, logits_NK: Tensor, view: View) -> Tensor:
        """The loss of a batch, a scalar."""
        with torch.no_grad():
            cache = self.cache
            teacher_NK = self.teacher(view.images) if cache is None else cache(view, self.teacher)
        loss = self._teacher_term(logits_NK, teacher_NK, view)
        if self.features is not None:
            loss = loss + self.feature_weight * self.features.term()
        if self.label_weight > 0:
            loss = loss + self.label_weight * cross_entropy(logits_NK, view, self.label_smoothing)
        return loss

    def _teacher_term(self, student_NK: Tensor, teacher_NK: Tensor, view: View) -> Tensor:
        if self.method == "kd":
            return self.alpha * kd(student_NK, teacher_NK, self.temperature)
        weights = {"alpha": self.alpha, "beta": self.beta, "temperature": self.temperature}
        if self.method == "dist":
            return dist(student_NK, teacher_NK, **weights)
        first = dkd(student_NK, teacher_NK, view.labels, **weights)
        if view.others is None:
            return first
        return view.share * first + (1 - view.share) * dkd(student_NK, teacher_NK, view.others, **weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class Averaged(Loss):
    """Several losses, one for each teacher, by weights that sum to 1.

    For kd its gradient is that of distilling from the average of the teachers' softened probabilities.
    """

    losses: tuple[Loss, ...]
    weights: tuple[float, ...]

    @property
    def trained(self) -> nn.Module:
        """What any of them trains."""
        return nn.ModuleList([loss.trained for loss in self.losses])

    def __call__(self, logits_NK: Tensor, view: View) -> Tensor:
        """The loss of a batch, a scalar."""
        terms = [w * loss(logits_NK, view) for w, loss in zip(self.weights, self.losses, strict=True)]
        return torch.stack(terms).sum()
