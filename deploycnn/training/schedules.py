"""Learning-rate schedules: pure functions of the step, so that a resumed run continues exactly.

Each returns the factor, in [0, 1], by which the peak learning rate is multiplied at a step. Steps count from
0 to ``total - 1``; they need not be whole, as a schedule may be stretched while it runs (see ``budget``). Standard
library only.
"""

from __future__ import annotations

import math

from deploycnn.training.settings import Schedule

#: OneCycle starts at the peak divided by this, and ends at its start divided by ONE_CYCLE_END.
ONE_CYCLE_START = 25.0
ONE_CYCLE_END = 1e4


def cosine(step: float, total: float, warmup: float) -> float:
    """Linear warm-up over ``warmup`` steps, then half a cosine down to 0 at ``total``.

    SGDR without restarts (Loshchilov & Hutter 2017) behind the warm-up of Goyal et al. (2017). The first
    warm-up step has factor 1 / warmup, the last 1.
    """
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def linear(step: float, total: float, warmup: float) -> float:
    """Linear warm-up over ``warmup`` steps, then a straight line down to 0 at ``total``.

    The budgeted-training schedule (Li, Yumer & Ramanan 2020, "Budgeted Training: Rethinking Deep Neural Network
    Training Under Resource Constraints"): a short run spends more of its steps at rates that still move weights,
    and as many at small ones, as it has steps for.
    """
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    return (total - step) / (total - warmup)


def one_cycle(step: float, total: float, warmup: float) -> float:
    """Half a cosine up to 1 over ``warmup`` steps, then half a cosine down to nearly 0.

    The 1cycle policy (Smith & Topin 2018) with cosine annealing, as
    ``torch.optim.lr_scheduler.OneCycleLR`` has it with ``cycle_momentum=False``.
    """
    start, end = 1 / ONE_CYCLE_START, 1 / (ONE_CYCLE_START * ONE_CYCLE_END)
    top = warmup - 1
    if step <= top:
        return _half_cosine(start, 1.0, step / top if top > 0 else 1.0)
    return _half_cosine(1.0, end, (step - top) / (total - 1 - top))


def _half_cosine(first: float, last: float, progress: float) -> float:
    return last + (first - last) / 2 * (1 + math.cos(math.pi * progress))


_SCHEDULES = {"cosine": cosine, "linear": linear, "one_cycle": one_cycle}


def factor(name: Schedule, step: float, total: float, warmup: float) -> float:
    """The factor of schedule ``name`` at ``step`` of ``total``; the first ``warmup`` < ``total`` rise."""
    return _SCHEDULES[name](step, total, warmup)
