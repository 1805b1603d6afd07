"""The rounding of one layer, learned: AdaRound's relaxation (Nagel et al. 2020, "Up or Down? Adaptive Rounding").

Whether a weight is rounded up or down is a number ``h`` in [0, 1] that is learned with the layer's error as loss, and
driven to 0 or 1 by a term that sharpens while it is learned.

Legend: S samples (image and position), G groups, K inputs of one output (channels x kernel), O outputs of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: The stretch of the rectified sigmoid (section 3.2): it reaches 0 and 1 at finite arguments.
GAMMA, ZETA = -0.1, 1.1

#: Samples whose errors are computed at a time where all are wanted.
_CHUNK = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to round.

    Attributes:
        iterations: Steps of Adam for each layer.
        batch_size: Samples in a step.
        samples: Output positions that a layer is shown, over all images.
        lr: Of Adam.
        weight: Of the term that drives each weight to a decision, against the error relative to nearest rounding.
        warmup: Share of the iterations before that term sets in.
        beta: Its sharpness at first and at last (annealed by a cosine).
        holdout: Share of the images that only judge: there rounding is held against nearest rounding.
        cache_bytes: For the values that are kept between layers; fewer images are used where they need more.
        threads: CPU threads.
        seed: Of the samples and of their order.
    """

    iterations: int = 1000
    batch_size: int = 512
    samples: int = 8192
    lr: float = 1e-2
    weight: float = 10.0
    warmup: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    holdout: float = 0.125
    cache_bytes: int = 2**30
    threads: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A layer's samples.

    Attributes:
        inputs: (S, G, K), in real units, as the quantized graph has them.
        targets: (S, G, O); what should come out behind the activation.
        addend: (S, G, O); what is added before the activation, if anything.
        weight: (G, O, K), float.
        scale: (G, O, 1), of the integers.
        bias: (G, O), as deployed.
        low: Smallest integer.
        high: Largest integer.
        activate: The activation.
        judged: How many of the last samples only judge.
    """

    inputs: Tensor
    targets: Tensor
    addend: Tensor | None
    weight: Tensor
    scale: Tensor
    bias: Tensor
    low: int
    high: int
    activate: Callable[[Tensor], Tensor]
    judged: int = 0

    @property
    def trained(self) -> int:
        """How many samples there are to learn from."""
        return len(self.inputs) - self.judged

    def errors(self, weight_GOK: Tensor, which: slice) -> Tensor:
        """Error of each output on some samples, shape (S, G, O)."""
        inputs_GSK = self.inputs[which].transpose(0, 1)
        outputs_SGO = torch.bmm(inputs_GSK, weight_GOK.transpose(1, 2)).transpose(0, 1) + self.bias
        if self.addend is not None:
            outputs_SGO = outputs_SGO + self.addend[which]
        return self.activate(outputs_SGO) - self.targets[which]

    def real(self, integers_GOK: Tensor) -> Tensor:
        """Weights in real units, from integers that are first clipped."""
        return integers_GOK.clamp(self.low, self.high) * self.scale

    def mse(self, integers_GOK: Tensor, first: int, last: int) -> float:
        """Mean squared error of integers on samples ``first`` to ``last``."""
        weight, total = self.real(integers_GOK), 0.0
        for start in range(first, last, _CHUNK):
            errors = self.errors(weight, slice(start, min(start + _CHUNK, last)))
            total += float(errors.double().square().mean(dim=(1, 2)).sum())
        return total / max(1, last - first)

    def shuffled(self, generator: torch.Generator) -> Problem:
        """With the samples to learn from in random order, so that any stretch of them is a batch."""
        order = torch.cat(
            (
                torch.randperm(self.trained, generator=generator),
                torch.arange(self.trained, len(self.inputs)),
            )
        )
        return Problem(
            inputs=self.inputs[order],
            targets=self.targets[order],
            addend=None if self.addend is None else self.addend[order],
            weight=self.weight,
            scale=self.scale,
            bias=self.bias,
            low=self.low,
            high=self.high,
            activate=self.activate,
            judged=self.judged,
        )


def rectified_sigmoid(v: Tensor) -> Tensor:
    """``clip(sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0, 1)``: equation 23."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The ``v`` at which :func:`rectified_sigmoid` is ``h``, for h in [0, 1]."""
    return torch.logit((h - GAMMA) / (ZETA - GAMMA))


def annealed(beta: tuple[float, float], progress: float) -> float:
    """From the first to the last value along half a cosine, for progress in [0, 1]."""
    return beta[1] + 0.5 * (beta[0] - beta[1]) * (1 + math.cos(math.pi * progress))


def solve(problem: Problem, settings: Settings, generator: torch.Generator) -> Tensor:
    """Integers (G, O, K), each the float weight rounded up or down, then clipped.

    Minimizes ``error / error of nearest + weight * mean(1 - |2 h - 1|**beta)`` (equation 21). Errors are taken
    relative to those of nearest rounding, so that ``weight`` means the same for every layer.

    Args:
        problem: With at least one sample to learn from.
        settings: See :class:`Settings`.
        generator: Of the order of the samples.
    """
    steps_GOK = problem.weight / problem.scale
    floor_GOK = steps_GOK.floor()
    with torch.no_grad():
        nearest_mse = problem.mse(steps_GOK.round(), 0, problem.trained)
    if nearest_mse == 0.0:
        return steps_GOK.round().clamp(problem.low, problem.high)
    problem = problem.shuffled(generator)
    v_GOK = inverse_rectified_sigmoid(steps_GOK - floor_GOK).requires_grad_()
    optimizer = torch.optim.Adam([v_GOK], lr=settings.lr)
    warm = int(settings.warmup * settings.iterations)
    size = min(settings.batch_size, problem.trained)
    starts = torch.randint(problem.trained - size + 1, (settings.iterations,), generator=generator).tolist()
    for step, start in enumerate(starts):
        h_GOK = rectified_sigmoid(v_GOK)
        weight_GOK = problem.real(floor_GOK + h_GOK)
        loss = problem.errors(weight_GOK, slice(start, start + size)).square().mean() / nearest_mse
        if step >= warm:
            beta = annealed(settings.beta, (step - warm) / max(1, settings.iterations - 1 - warm))
            loss = loss + settings.weight * (1 - (2 * h_GOK - 1).abs().pow(beta)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return (floor_GOK + (rectified_sigmoid(v_GOK) >= 0.5)).clamp(problem.low, problem.high)
