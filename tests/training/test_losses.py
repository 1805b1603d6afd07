"""Losses against float64 NumPy, written from the papers' formulas."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - what everybody calls it
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploycnn.training import losses
from deploycnn.training.teaching import Method
from deploycnn.training.view import View

Array = npt.NDArray[np.float64]


def softmax(logits: Array) -> Array:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def reference_kd(student: Array, teacher: Array, temperature: float) -> float:
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return float((p * np.log(p / q)).sum(axis=1).mean() * temperature**2)


def reference_dkd(
    student: Array,
    teacher: Array,
    labels: npt.NDArray[np.int64],
    alpha: float,
    beta: float,
    temperature: float,
) -> float:
    total = 0.0
    for s, t, label in zip(student / temperature, teacher / temperature, labels, strict=True):
        p, q = softmax(t[None])[0], softmax(s[None])[0]
        b_t, b_s = np.array([p[label], 1 - p[label]]), np.array([q[label], 1 - q[label]])
        p_hat, q_hat = (softmax(np.delete(z, label)[None])[0] for z in (t, s))
        total += alpha * (b_t * np.log(b_t / b_s)).sum() + beta * (p_hat * np.log(p_hat / q_hat)).sum()
    return total / len(labels) * temperature**2


def reference_dist(student: Array, teacher: Array, alpha: float, beta: float, temperature: float) -> float:
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    inter = np.mean([1 - np.corrcoef(u, v)[0, 1] for u, v in zip(q, p, strict=True)])
    intra = np.mean([1 - np.corrcoef(u, v)[0, 1] for u, v in zip(q.T, p.T, strict=True)])
    return float((alpha * inter + beta * intra) * temperature**2)


def logits(seed: int, images: int = 6, classes: int = 5, scale: float = 3.0) -> Array:
    return np.random.default_rng(seed).normal(0, scale, (images, classes))


LABELS = np.array([0, 4, 2, 1, 3, 3])


@pytest.mark.parametrize("temperature", [1.0, 4.0, 0.5])
def test_kd_is_the_papers(temperature: float) -> None:
    ours = losses.kd(torch.from_numpy(logits(0)), torch.from_numpy(logits(1)), temperature)
    assert ours.item() == pytest.approx(reference_kd(logits(0), logits(1), temperature), rel=1e-5)


@pytest.mark.parametrize(
    ("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (0.0, 1.0, 1.0), (2.0, 0.0, 0.7)]
)
def test_dkd_is_the_papers(alpha: float, beta: float, temperature: float) -> None:
    student, teacher = logits(2), logits(3)
    ours = losses.dkd(
        torch.from_numpy(student),
        torch.from_numpy(teacher),
        torch.from_numpy(LABELS),
        alpha=alpha,
        beta=beta,
        temperature=temperature,
    )
    assert ours.item() == pytest.approx(
        reference_dkd(student, teacher, LABELS, alpha, beta, temperature), rel=1e-5
    )


@pytest.mark.parametrize(
    ("alpha", "beta", "temperature"), [(1.0, 1.0, 1.0), (2.0, 0.0, 4.0), (0.0, 3.0, 2.0)]
)
def test_dist_is_the_papers(alpha: float, beta: float, temperature: float) -> None:
    ours = losses.dist(
        torch.from_numpy(logits(4)),
        torch.from_numpy(logits(5)),
        alpha=alpha,
        beta=beta,
        temperature=temperature,
    )
    assert ours.item() == pytest.approx(
        reference_dist(logits(4), logits(5), alpha, beta, temperature), rel=1e-5
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_is_spread_over_all_classes(smoothing: float) -> None:
    z = logits(6)
    targets = np.eye(5)[LABELS] * (1 - smoothing) + smoothing / 5
    expected = -(targets * np.log(softmax(z))).sum(axis=1).mean()
    loss = losses.CrossEntropy(label_smoothing=smoothing)
    ours = loss(torch.from_numpy(z), View(images=torch.empty(0), labels=torch.from_numpy(LABELS)))
    assert ours.item() == pytest.approx(expected, rel=1e-5)


@given(seed=st.integers(0, 10_000), temperature=st.floats(0.5, 20), scale=st.floats(0.01, 20))
@settings(max_examples=40, deadline=None)
def test_kd_is_the_sum_of_its_decoupled_parts(seed: int, temperature: float, scale: float) -> None:
    student = torch.from_numpy(logits(seed, scale=scale))
    teacher = torch.from_numpy(logits(seed + 1, scale=scale))
    labels = torch.from_numpy(LABELS)
    tckd_N, nckd_N = losses.decoupled_terms(student, teacher, labels, temperature)
    p_N = F.softmax(teacher.float() / temperature, dim=1).gather(1, labels[:, None])[:, 0]
    joined = (tckd_N + (1 - p_N) * nckd_N).mean() * temperature**2
    assert joined.item() == pytest.approx(losses.kd(student, teacher, temperature).item(), rel=1e-3, abs=1e-4)


@given(seed=st.integers(0, 10_000), temperature=st.floats(0.5, 20), shift=st.floats(-50, 50))
@settings(max_examples=40, deadline=None)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(
    seed: int, temperature: float, shift: float
) -> None:
    teacher = torch.from_numpy(logits(seed))
    student = (teacher + shift).float().requires_grad_()
    labels = torch.from_numpy(LABELS)
    terms = (
        losses.kd(student, teacher, temperature),
        losses.dkd(student, teacher, labels, alpha=1, beta=8, temperature=temperature),
        losses.dist(student, teacher, alpha=1, beta=1, temperature=temperature),
    )
    for term in terms:
        assert abs(term.item()) < 1e-4 * max(1, temperature**2)


@given(seed=st.integers(0, 10_000), temperature=st.floats(0.5, 10))
@settings(max_examples=40, deadline=None)
def test_divergences_are_never_negative(seed: int, temperature: float) -> None:
    student, teacher = torch.from_numpy(logits(seed)), torch.from_numpy(logits(seed + 1))
    tckd_N, nckd_N = losses.decoupled_terms(student, teacher, torch.from_numpy(LABELS), temperature)
    assert losses.kd(student, teacher, temperature).item() >= -1e-6
    assert tckd_N.min().item() >= -1e-6
    assert nckd_N.min().item() >= -1e-6
    assert 0 <= losses.dist(student, teacher, alpha=1, beta=0, temperature=1.0).item() <= 2


@given(seed=st.integers(0, 10_000), a=st.floats(0.1, 100), b=st.floats(-10, 10))
@settings(max_examples=40, deadline=None)
def test_correlation_ignores_scale_and_shift(seed: int, a: float, b: float) -> None:
    first, second = torch.from_numpy(logits(seed)), torch.from_numpy(logits(seed + 1))
    plain = losses.pearson_distance(first, second).item()
    assert losses.pearson_distance(first, a * second + b).item() == pytest.approx(plain, abs=1e-9)
    assert losses.pearson_distance(first, -a * second + b).item() == pytest.approx(2 - plain, abs=1e-9)


@pytest.mark.parametrize("method", ["kd", "dkd", "dist"])
def test_gradients_stay_finite_for_certain_models_and_single_images(method: Method) -> None:
    student = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    teacher = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        teacher.weight.copy_(torch.diag(torch.tensor([-300.0, 300.0, 0.0])))
    loss = losses.Distillation(
        teacher=teacher, method=method, temperature=1.0, alpha=1.0, beta=1.0, label_weight=0.5
    )
    value = loss(student, View(images=torch.ones(1, 3), labels=torch.tensor([1])))
    value.backward()
    assert torch.isfinite(value)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert teacher.weight.grad is None


def test_the_parts_of_distillation_are_weighed() -> None:
    images, labels = torch.randn(6, 4), torch.from_numpy(LABELS)
    teacher, student = nn.Linear(4, 5), torch.from_numpy(logits(8)).float()
    loss = losses.Distillation(
        teacher=teacher,
        method="kd",
        temperature=3.0,
        alpha=0.7,
        beta=0.0,
        label_weight=0.2,
        label_smoothing=0.1,
    )
    soft = losses.kd(student, teacher(images), 3.0)
    hard = F.cross_entropy(student, labels, label_smoothing=0.1)
    torch.testing.assert_close(loss(student, View(images=images, labels=labels)), 0.7 * soft + 0.2 * hard)


def test_losses_of_half_precision_logits_are_computed_in_float32() -> None:
    student, teacher = torch.from_numpy(logits(9)).bfloat16(), torch.from_numpy(logits(10)).bfloat16()
    assert losses.kd(student, teacher, 2.0).dtype == torch.float32
    view = View(images=student, labels=torch.from_numpy(LABELS))
    assert losses.CrossEntropy()(student, view).dtype == torch.float32
    expected = reference_kd(student.double().numpy(), teacher.double().numpy(), 2.0)
    assert losses.kd(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-5)


# -- mixed images, several teachers --------------------------------------------------------------

OTHERS = np.array([1, 4, 0, 2, 2, 1])


def mixed_view(share: float) -> View:
    return View(
        images=torch.randn(6, 4, generator=torch.Generator().manual_seed(0)),
        labels=torch.from_numpy(LABELS),
        others=torch.from_numpy(OTHERS),
        share=share,
    )


@pytest.mark.parametrize(("share", "smoothing"), [(0.3, 0.0), (0.8, 0.1), (1.0, 0.2)])
def test_mixed_labels_count_by_their_shares_and_are_smoothed_once(share: float, smoothing: float) -> None:
    z = logits(11)
    targets = share * np.eye(5)[LABELS] + (1 - share) * np.eye(5)[OTHERS]
    targets = (1 - smoothing) * targets + smoothing / 5
    expected = -(targets * np.log(softmax(z))).sum(axis=1).mean()
    ours = losses.CrossEntropy(label_smoothing=smoothing)(torch.from_numpy(z), mixed_view(share))
    assert ours.item() == pytest.approx(expected, rel=1e-5)


def distillation(teacher: nn.Module, method: Method, **options: object) -> losses.Distillation:
    weights: dict[str, object] = {"temperature": 2.0, "alpha": 0.7, "beta": 1.5, "label_weight": 0.4}
    return losses.Distillation(teacher=teacher, method=method, **{**weights, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["kd", "dkd", "dist"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothing_and_mixing_leave_the_teachers_term_alone(method: Method, smoothing: float) -> None:
    view, teacher, z = mixed_view(0.3), nn.Linear(4, 5), logits(12)
    loss = distillation(teacher, method, label_smoothing=smoothing)
    answers = teacher(view.images).detach().double().numpy()
    if method == "kd":
        soft = 0.7 * reference_kd(z, answers, 2.0)
    elif method == "dist":
        soft = reference_dist(z, answers, 0.7, 1.5, 2.0)
    else:
        soft = 0.3 * reference_dkd(z, answers, LABELS, 0.7, 1.5, 2.0)
        soft += 0.7 * reference_dkd(z, answers, OTHERS, 0.7, 1.5, 2.0)
    hard = losses.CrossEntropy(label_smoothing=smoothing)(torch.from_numpy(z), view).item()
    assert loss(torch.from_numpy(z), view).item() == pytest.approx(soft + 0.4 * hard, rel=1e-4)


@pytest.mark.parametrize("method", ["kd", "dkd", "dist"])
def test_several_teachers_are_averaged_and_labels_count_once(method: Method) -> None:
    view, teachers = mixed_view(0.9), [nn.Linear(4, 5), nn.Linear(4, 5)]
    single = [distillation(teacher, method) for teacher in teachers]
    z = torch.from_numpy(logits(13)).float()
    together = losses.Averaged(losses=tuple(single), weights=(0.25, 0.75))
    expected = 0.25 * single[0](z, view) + 0.75 * single[1](z, view)
    torch.testing.assert_close(together(z, view), expected)
    apart = [distillation(teacher, method, label_weight=0.0) for teacher in teachers]
    hard = losses.CrossEntropy()(z, view)
    expected = 0.25 * apart[0](z, view) + 0.75 * apart[1](z, view) + 0.4 * hard
    torch.testing.assert_close(together(z, view), expected)


def test_kd_from_several_teachers_pulls_towards_their_average() -> None:
    view, teachers = mixed_view(1.0), [nn.Linear(4, 5), nn.Linear(4, 5)]
    z = torch.from_numpy(logits(14)).requires_grad_()
    terms = tuple(distillation(teacher, "kd", label_weight=0.0, alpha=1.0) for teacher in teachers)
    losses.Averaged(losses=terms, weights=(0.5, 0.5))(z, view).backward()
    p = sum(softmax(teacher(view.images).detach().double().numpy() / 2.0) for teacher in teachers) / 2
    expected = (softmax(z.detach().numpy() / 2.0) - p) * 2.0 / len(z)  # of T**2 * KL, by the logits
    assert z.grad is not None
    np.testing.assert_allclose(z.grad.numpy(), expected, atol=1e-6)
