"""From streams of activations to quantization ranges, in memory that does not grow with the stream.

A value is summed up by its exact minimum and maximum and a histogram over [-w, w], where w is a power of two.
When a larger magnitude arrives, w doubles and neighbouring bins merge: bin edges then coincide, so the result
does not depend on the order of the batches.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from deploycnn.quantization.settings import Calibrator

#: Bins on each side of zero. The largest magnitude lies in the outer half, so at least half of a side is in
#: use: eight bins for each of 256 levels.
BINS = 4096

#: Levels of an 8-bit number.
LEVELS = 256

_CHUNK = 2**20


class Statistics:
    """Running summary of one value: ``low``, ``high``, and the histogram where ``histogram`` is set."""

    def __init__(self, *, histogram: bool) -> None:
        self.low = 0.0
        self.high = 0.0
        self.zeros = 0
        self.exponent: int | None = None
        #: Counts of non-zero values; bin i covers [(i - BINS), (i - BINS + 1)) * 2**exponent / BINS.
        self.counts = np.zeros(2 * BINS, dtype=np.int64) if histogram else None

    @property
    def bin_width(self) -> float:
        """Width of a bin in the value's own unit."""
        return 2.0 ** (self.exponent or 0) / BINS

    def update(self, values: npt.NDArray[np.float32]) -> None:
        """Take in more finite values. The range always includes zero, which 8 bits must represent exactly."""
        if values.size == 0:
            return
        low, high = float(values.min()), float(values.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.counts is None:
            return
        peak = max(-low, high)
        if peak > 0:
            self._widen(peak)
        flat = values.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            self._count(flat[start : start + _CHUNK])

    def _widen(self, peak: float) -> None:
        assert self.counts is not None  # noqa: S101 - only called with a histogram
        _, needed = np.frexp(peak)  # peak < 2**needed
        if self.exponent is None:
            self.exponent = int(needed)
        while self.exponent < needed and self.counts.any():
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts[:] = 0
            self.counts[BINS // 2 : BINS // 2 + BINS] = merged
            self.exponent += 1
        self.exponent = max(self.exponent, int(needed))

    def _count(self, values: npt.NDArray[np.float32]) -> None:
        assert self.counts is not None  # noqa: S101 - only called with a histogram
        nonzero = values[values != 0]
        self.zeros += values.size - nonzero.size
        # Scaling by a power of two is exact, except that a product may underflow to zero, which floors right.
        places = np.floor(nonzero.astype(np.float64) / self.bin_width).astype(np.int64) + BINS
        self.counts += np.bincount(places, minlength=2 * BINS)


def choose_range(
    statistics: Statistics, calibrator: Calibrator, percentile: float = 99.999
) -> tuple[float, float]:
    """The range (low, high) to quantize, low <= 0 <= high."""
    if calibrator == "minmax" or statistics.counts is None or not statistics.counts.any():
        return statistics.low, statistics.high
    if calibrator == "percentile":
        return percentile_range(statistics, percentile)
    return entropy_range(statistics)


def percentile_range(statistics: Statistics, percentile: float) -> tuple[float, float]:
    """Range with at most ``100 - percentile`` percent of all values, zeros included, beyond each end."""
    assert statistics.counts is not None  # noqa: S101 - callers have a histogram
    counts = statistics.counts.astype(np.float64)
    allowed = (counts.sum() + statistics.zeros) * (1.0 - percentile / 100.0)
    high = BINS - _cut(counts[: BINS - 1 : -1], allowed)
    low = -BINS + _cut(counts[:BINS], allowed)
    width = statistics.bin_width
    return max(statistics.low, min(low * width, 0.0)), min(statistics.high, max(high * width, 0.0))


def _cut(counts: npt.NDArray[np.float64], allowed: float) -> float:
    """How many bins hold ``allowed`` counts, from the first on, with a fraction of the last."""
    cumulative = np.cumsum(counts)
    index = int(np.searchsorted(cumulative, allowed, side="right"))
    if index == len(counts):
        return float(index)
    before = cumulative[index - 1] if index else 0.0
    return float(index + (allowed - before) / counts[index])


def entropy_range(statistics: Statistics) -> tuple[float, float]:
    """Range that minimizes the KL divergence of the quantized from the original distribution.

    After Migacz, "8-bit inference with TensorRT" (GTC 2017): for each threshold, values beyond it are moved
    to its edge (P), values within it are merged into 256 levels and spread again over the bins they came from
    (Q); the threshold with the least KL(P || Q) wins. Here the range is asymmetric: the threshold cuts
    magnitudes, and a side where no values lie takes no levels. Exact zeros are left out: any range represents
    them exactly.
    """
    assert statistics.counts is not None  # noqa: S101 - callers have a histogram
    counts = statistics.counts.astype(np.float64)
    width = statistics.bin_width
    first = int(np.flatnonzero(counts)[0])
    last = int(np.flatnonzero(counts)[-1]) + 1
    reach = max(BINS - first, last - BINS)
    thresholds = range(LEVELS // 2, reach + 1, max(1, LEVELS // 16))
    best, best_divergence = reach, np.inf
    for threshold in (*thresholds, reach):
        start, stop = max(BINS - threshold, min(first, BINS)), min(BINS + threshold, max(last, BINS))
        if stop - start < LEVELS:
            continue
        divergence = _divergence(counts, start, stop)
        if divergence < best_divergence:
            best, best_divergence = threshold, divergence
    return max(statistics.low, -best * width), min(statistics.high, best * width)


def _divergence(counts: npt.NDArray[np.float64], start: int, stop: int) -> float:
    within = counts[start:stop]
    original = within.copy()
    original[0] += counts[:start].sum()
    original[-1] += counts[stop:].sum()
    edges = np.linspace(0, stop - start, LEVELS + 1).astype(np.int64)[:-1]
    sums = np.add.reduceat(within, edges)
    occupied = np.add.reduceat((within > 0).astype(np.float64), edges)
    level = np.searchsorted(edges, np.arange(stop - start), side="right") - 1
    spread = np.where(within > 0, (sums / np.maximum(occupied, 1))[level], 0.0)
    if not spread.any():
        return float("inf")
    # A bin that only the moved outliers occupy has no mass in Q; a floor keeps the divergence finite.
    p = original / original.sum()
    q = np.maximum(spread / spread.sum(), 1e-9)
    held = p > 0
    return float((p[held] * np.log(p[held] / q[held])).sum())
