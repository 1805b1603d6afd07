"""Intervals and tests for accuracies on the same images.

Two models that were tested on the same images are paired: what tells them apart are only the images on which
they disagree. Treating them as two independent samples would need many times the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable

CONFIDENCE = 0.95


def _z(confidence: float) -> float:
    from scipy.special import ndtri

    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must be between 0 and 1")
    return float(ndtri(0.5 + confidence / 2))


def wilson_interval(successes: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927).

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes of {trials} trials")
    z = _z(confidence)
    rate = successes / trials
    center = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == trials else min(1.0, center + half)
    return low, high


def paired_difference_interval(
    only_first: int, only_second: int, trials: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Score interval of the difference of two proportions from the same trials (Tango 1998).

    The limits are the differences whose score test is just significant, with the nuisance parameter at its
    restricted maximum likelihood; found by bisection. Unlike Wald's interval it keeps its coverage where only
    few trials disagree, which is the case here, and unlike it, it has a width where none do.

    Args:
        only_first: Trials in which only the first succeeded.
        only_second: Trials in which only the second succeeded.
        trials: All trials.
        confidence: Coverage.

    Returns:
        Limits of first minus second, in [-1, 1].

    Raises:
        ValueError: no trials, or counts that do not fit.
    """
    if only_first < 0 or only_second < 0 or only_first + only_second > trials or trials < 1:
        raise ValueError(f"{only_first} and {only_second} of {trials} trials")
    z = _z(confidence)

    def outside(difference: float) -> bool:
        return abs(_tango_score(difference, only_first, only_second, trials)) > z

    estimate = (only_first - only_second) / trials
    return _boundary(-1.0, estimate, outside), _boundary(1.0, estimate, outside)


def _tango_score(difference: float, only_first: int, only_second: int, trials: int) -> float:
    """Tango's statistic of the hypothesis that first minus second is ``difference``."""
    distance = only_first - only_second - trials * difference
    # the restricted maximum likelihood of P(only second) solves  2n q^2 + linear q + constant = 0
    linear = -only_first - only_second + (2 * trials - only_first + only_second) * difference
    constant = -only_second * difference * (1 - difference)
    root = math.sqrt(max(0.0, linear * linear - 8 * trials * constant))
    rate = (root - linear) / (4 * trials)
    variance = trials * (2 * rate + difference * (1 - difference))
    if variance <= 0:
        return 0.0 if abs(distance) < 1e-12 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def _boundary(outer: float, inner: float, outside: Callable[[float], bool]) -> float:
    """Where ``outside`` changes between ``outer`` (true, or the end of the range) and ``inner`` (false)."""
    if not outside(outer):
        return outer
    for _ in range(80):
        middle = (outer + inner) / 2
        if outside(middle):
            outer = middle
        else:
            inner = middle
    return inner


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of the hypothesis that both succeed equally often (McNemar 1947).

    Under it, each trial in which they disagree is a fair coin.
    """
    from scipy.special import bdtr

    disagreements = only_first + only_second
    if disagreements == 0:
        return 1.0
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), disagreements, 0.5)))
