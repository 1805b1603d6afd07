"""From a value's statistics to the range that is quantized, for a given number format.

The best range depends on the numbers that it is for: fewer bits want more clipping, and a symmetric format cannot
shift its levels to the side where the values are. So each method sees the format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from deploycnn.quantization.statistics import BINS, Statistics
from deploycnn.quantization.types import Calibrator, NumberFormat, Range

__all__ = ["choose_range", "entropy_range", "mse_range", "percentile_range", "squared_error"]

#: Share by which thresholds shrink from one candidate to the next.
_SHRINK = 0.97

#: Candidate thresholds of the first, joint search: down to a twentieth of the largest magnitude.
_CANDIDATES = 100

#: Candidates for each end in the grid over both.
_GRID = 12

UINT8 = NumberFormat()

Counts = npt.NDArray[np.float64]

_Error = Callable[[Range], float]


def choose_range(
    statistics: Statistics,
    calibrator: Calibrator,
    percentile: float = 99.999,
    number: NumberFormat = UINT8,
) -> Range:
    """The range (low, high) to quantize, low <= 0 <= high.

    Args:
        statistics: With a histogram, unless ``calibrator`` is "minmax" or "moving_average".
        calibrator: "minmax": all that was seen. "moving_average": averages of the images' own ends, as Jacob et
            al. 2018 (section 3.1) track ranges. "percentile", "entropy", "mse": see the functions below.
        percentile: For "percentile".
        number: What the value will be stored as.
    """
    if calibrator == "moving_average":
        return statistics.average_low, statistics.average_high
    if calibrator == "minmax" or statistics.counts is None or not statistics.counts.any():
        return statistics.low, statistics.high
    if calibrator == "percentile":
        return percentile_range(statistics, percentile)
    if calibrator == "mse":
        return mse_range(statistics, number)
    return entropy_range(statistics, number)


def percentile_range(statistics: Statistics, percentile: float) -> Range:
    """Range with at most ``100 - percentile`` percent of all values, zeros included, beyond each end."""
    assert statistics.counts is not None  # noqa: S101 - callers have a histogram
    if percentile >= 100:  # the histogram may be of a sample; the ends are exact
        return statistics.low, statistics.high
    counts = statistics.counts.astype(np.float64)
    allowed = (counts.sum() + statistics.zeros) * (1.0 - percentile / 100.0)
    high = BINS - _cut(counts[: BINS - 1 : -1], allowed)
    low = -BINS + _cut(counts[:BINS], allowed)
    width = statistics.bin_width
    return max(statistics.low, min(low * width, 0.0)), min(statistics.high, max(high * width, 0.0))


def _cut(counts: Counts, allowed: float) -> float:
    """How many bins hold ``allowed`` counts, from the first on, with a fraction of the last."""
    cumulative = np.cumsum(counts)
    index = int(np.searchsorted(cumulative, allowed, side="right"))
    if index == len(counts):
        return float(index)
    before = cumulative[index - 1] if index else 0.0
    return float(index + (allowed - before) / counts[index])


def entropy_range(statistics: Statistics, number: NumberFormat = UINT8) -> Range:
    """Range that minimizes the KL divergence of the quantized from the original distribution.

    After Migacz, "8-bit inference with TensorRT" (GTC 2017): for each threshold, values beyond it are moved
    to its edge (P), values within it are merged into the format's levels and spread again over the bins they
    came from (Q); the threshold with the least KL(P || Q) wins. The threshold cuts magnitudes. In an asymmetric
    format a side where no values lie takes no levels. Exact zeros are left out: any range represents them
    exactly.
    """
    assert statistics.counts is not None  # noqa: S101 - callers have a histogram
    counts = statistics.counts.astype(np.float64)
    levels = number.qmax - number.qmin + 1
    first, last = _occupied(counts)
    reach = max(BINS - first, last - BINS)
    best, best_divergence = reach, np.inf
    for share in _SHRINK ** np.arange(_CANDIDATES):
        threshold = round(reach * float(share))
        if number.symmetric:
            start, stop = BINS - threshold, BINS + threshold
        else:
            start, stop = max(BINS - threshold, min(first, BINS)), min(BINS + threshold, max(last, BINS))
        if stop - start < levels:
            break
        divergence = _divergence(counts, start, stop, levels)
        if divergence < best_divergence:
            best, best_divergence = threshold, divergence
    bound = best * statistics.bin_width
    return max(statistics.low, -bound), min(statistics.high, bound)


def _occupied(counts: Counts) -> tuple[int, int]:
    """First bin with a count, and one past the last."""
    places = np.flatnonzero(counts)
    return int(places[0]), int(places[-1]) + 1


def _divergence(counts: Counts, start: int, stop: int, levels: int) -> float:
    within = counts[start:stop]
    original = within.copy()
    original[0] += counts[:start].sum()
    original[-1] += counts[stop:].sum()
    edges = np.linspace(0, stop - start, levels + 1).astype(np.int64)[:-1]
    sums = np.add.reduceat(within, edges)
    occupied = np.add.reduceat((within > 0).astype(np.float64), edges)
    widths = np.diff(edges, append=stop - start)
    spread = np.where(within > 0, np.repeat(sums / np.maximum(occupied, 1), widths), 0.0)
    if not spread.any():
        return float("inf")
    # A bin that only the moved outliers occupy has no mass in Q; a floor keeps the divergence finite.
    held = original > 0
    p = original[held] / original.sum()
    q = np.maximum(spread[held] / spread.sum(), 1e-9)
    return float((p * np.log(p / q)).sum())


def mse_range(statistics: Statistics, number: NumberFormat = UINT8) -> Range:
    """Range with the least mean squared error between the values and what the format makes of them.

    The threshold is searched on magnitudes, both ends at once; in asymmetric formats then over a coarse grid of
    both ends and along each end. The whole range is a candidate, so the error is never larger than that of
    "minmax". After Banner et
    al. 2019 ("Post training 4-bit quantization"), but by search on the histogram instead of an assumed
    distribution.
    """
    assert statistics.counts is not None  # noqa: S101 - callers have a histogram
    places = np.flatnonzero(statistics.counts)
    counts = statistics.counts[places].astype(np.float64)
    centres = np.clip(
        (places - BINS + 0.5) * statistics.bin_width, statistics.low or None, statistics.high or None
    )

    def error(bounds: Range) -> float:
        return squared_error(centres, counts, bounds, number)

    best = (statistics.low, statistics.high)
    least = error(best)
    for bounds in _candidates(*best, number):
        if (found := error(bounds)) < least:
            best, least = bounds, found
    if number.symmetric:
        return best
    for factor in (_SHRINK, _SHRINK**0.25):
        best, least = _refine(best, least, factor, statistics, error)
    return best


def _candidates(low: float, high: float, number: NumberFormat) -> Iterator[Range]:
    peak = max(-low, high)
    for share in _SHRINK ** np.arange(1, _CANDIDATES):
        bound = peak * float(share)
        yield max(low, -bound), min(high, bound)
    if low < 0 < high and not number.symmetric:
        shares = [float(share) for share in np.geomspace(0.05, 1, _GRID)]
        yield from ((low * first, high * second) for first in shares for second in shares)


def _refine(
    best: Range, least: float, factor: float, statistics: Statistics, error: _Error
) -> tuple[Range, float]:
    """Move one end at a time, in steps of ``factor``, as long as that helps; at most a few dozen steps."""
    for _ in range(8):
        before = least
        for end in (0, 1):
            for step in (factor, 1 / factor):
                for _ in range(8):
                    moved = best[end] * step
                    bounds = (
                        (max(statistics.low, moved), best[1])
                        if end == 0
                        else (best[0], min(statistics.high, moved))
                    )
                    found = error(bounds)
                    if not found < least:
                        break
                    best, least = bounds, found
        if least == before:
            break
    return best, least


def squared_error(centres: Counts, counts: Counts, bounds: Range, number: NumberFormat) -> float:
    """Sum over ``counts`` of the squared difference between ``centres`` and their quantized values."""
    scale, zero_point = number.scale_and_zero_point(bounds)
    step = float(scale)
    levels = centres / step
    np.rint(levels, out=levels)
    # Cheaper than np.clip on arrays of this size.
    np.maximum(levels, number.qmin - zero_point, out=levels)
    np.minimum(levels, number.qmax - zero_point, out=levels)
    levels *= step
    levels -= centres
    np.square(levels, out=levels)
    return float(levels @ counts)
