"""What training minimizes: labels alone, or labels together with a teacher's outputs.

Legend: N images, K classes, T the temperature. ``student_NK`` and ``teacher_NK`` are logits. Whatever the
precision of the forward pass, losses are computed in float32.

Functions that compare logits return the mean over the batch, scaled by T squared: a soft target's gradients
shrink as 1 / T squared, and the factor keeps their share when the temperature is changed (Hinton et al. 2015,
section 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - what everybody calls it
from torch import Tensor, nn

Method = Literal["kd", "dkd", "dist"]


class Loss(Protocol):
    """What the training loop minimizes."""

    def __call__(self, logits_NK: Tensor, labels_N: Tensor, images_NCHW: Tensor) -> Tensor:
        """The loss of a batch, a scalar."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy:
    """Cross-entropy with the labels, of which ``label_smoothing`` is spread evenly over all K classes."""

    label_smoothing: float = 0.0

    def __call__(self, logits_NK: Tensor, labels_N: Tensor, images_NCHW: Tensor) -> Tensor:  # noqa: ARG002
        """The loss of a batch, a scalar."""
        return F.cross_entropy(logits_NK.float(), labels_N, label_smoothing=self.label_smoothing)


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
class Distillation:
    """``label_weight`` * cross-entropy + the teacher's term of ``method``.

    Attributes:
        teacher: In evaluation mode, on the device that trains; sees the student's augmented images.
        method: "kd" (weighed by ``alpha``), "dkd" or "dist" (``alpha`` and ``beta`` weigh their two parts).
        temperature: Greater than 0.
        label_weight: Of the cross-entropy with the labels.
        label_smoothing: Of that cross-entropy.
    """

    teacher: nn.Module
    method: Method
    temperature: float
    alpha: float
    beta: float
    label_weight: float
    label_smoothing: float = 0.0

    def __call__(self, logits_NK: Tensor, labels_N: Tensor, images_NCHW: Tensor) -> Tensor:
        """The loss of a batch, a scalar."""
        with torch.no_grad():
            teacher_NK = self.teacher(images_NCHW)
        loss = self._teacher_term(logits_NK, teacher_NK, labels_N)
        if self.label_weight > 0:
            hard = F.cross_entropy(logits_NK.float(), labels_N, label_smoothing=self.label_smoothing)
            loss = loss + self.label_weight * hard
        return loss

    def _teacher_term(self, student_NK: Tensor, teacher_NK: Tensor, labels_N: Tensor) -> Tensor:
        if self.method == "kd":
            return self.alpha * kd(student_NK, teacher_NK, self.temperature)
        weights = {"alpha": self.alpha, "beta": self.beta, "temperature": self.temperature}
        if self.method == "dkd":
            return dkd(student_NK, teacher_NK, labels_N, **weights)
        return dist(student_NK, teacher_NK, **weights)
