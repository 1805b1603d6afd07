"""From raw blocks to numbers that may be compared.

The model. Run ``k`` of block ``b`` of round ``r`` of model ``v`` has the log-latency::

    mu_v  +  machine_rb  +  session_vr  +  block_vrb  +  run_vrbk

``machine_rb`` is common to all models of a block and cancels in the difference of two models. ``run`` and
``block`` noise average out within a session. ``session`` noise does not: it is the reason why sessions are
opened anew, and why a round, not a run, is the unit that is counted and resampled (a cluster bootstrap:
Davison and Hinkley 1997, section 3.8; Cameron, Gelbach and Miller 2008).

The estimate. Each block is summarised by its median, each round by the median over its blocks of the
difference of log-medians, and the rounds by their 20% trimmed mean. Disturbed runs, blocks and whole rounds
are outvoted at their own level: a neighbour that takes a CPU for a second makes two-threaded runs half as
slow again.

The interval. A symmetric bootstrap-t over rounds: the trimmed mean is studentized with Yuen's winsorized
standard error, and the critical value is the quantile of ``|t*|`` over resampled rounds, at least Student's
(Yuen 1974; Hall 1992, section 3.5; Wilcox 2017, section 4.4). Studentizing is what corrects for the small
number of rounds: percentile intervals of so few clusters are too short. Where many rounds are disturbed
``|t*|`` has no useful quantile; then the order statistics of the rounds bound the interval (sign test, at a
quarter of the error). Below ten rounds nothing is trimmed, and the interval is Student's.

The verdict. ``faster`` or ``slower`` only if the interval lies beyond 1 by more than ``RESOLUTION``: two
copies of one file can differ by that much for as long as a process lives, however many runs are taken. The
confidence is 0.99, not 0.95, because a report compares many variants, and one false "faster" in twenty is one
too many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, stdtrit

from deploycnn.profiling.rows import TimingRow

Verdict = Literal["faster", "slower", "indistinguishable", "baseline"]

CONFIDENCE = 0.99
RESAMPLES = 4000
#: Smallest relative difference of latency that the method claims to tell apart from none.
RESOLUTION = 0.005
#: Share of the rounds that is trimmed at each end, and the rounds from which on it is.
TRIM, TRIM_FROM = 0.2, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One row in short.

    Attributes:
        median_ms: Of all runs, for one whole batch; so are the others.
        p90_ms: 90% of the runs took no longer.
        p99_ms: 99% of the runs took no longer.
        median_interval_ms: Where the median over many sessions lies.
        throughput_ips: Images per second at the median.
        sessions: Opened and timed.
        runs: Timed.
    """

    median_ms: float
    p90_ms: float
    p99_ms: float
    median_interval_ms: tuple[float, float]
    throughput_ips: float
    sessions: int
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Baseline latency / latency: above 1 is faster. ``low`` and ``high`` bound it at ``confidence``."""

    ratio: float
    low: float
    high: float
    verdict: Verdict
    confidence: float


def summarize(row: TimingRow, *, confidence: float = CONFIDENCE) -> Summary:
    """Median, tails and throughput of a measured row.

    The interval of the median is the sign test's: from the k-th smallest to the k-th largest session median,
    whatever the distribution. Below eight sessions even the extremes hold less than 0.99 and are given.

    Raises:
        ValueError: the row was not measured.
    """
    samples = np.array(_measured(row).flat_ms)
    median, p90, p99 = (float(value) for value in np.quantile(samples, (0.5, 0.9, 0.99)))
    sessions = sorted(float(np.median(blocks)) for blocks in np.exp(log_medians(row)))
    skipped = _sign_test_rank(len(sessions), confidence) - 1
    # stretched to hold the median of all runs, which is another summary than the median session
    low, high = min(median, sessions[skipped]), max(median, sessions[-1 - skipped])
    return Summary(
        median_ms=median,
        p90_ms=p90,
        p99_ms=p99,
        median_interval_ms=(low, high),
        throughput_ips=row.batch_size / (median / 1e3),
        sessions=len(row.samples_ms),
        runs=len(samples),
    )


def compare(
    baseline: TimingRow,
    row: TimingRow,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Ratio:
    """How much faster ``row`` is than ``baseline``, which must have been timed side by side with it.

    Raises:
        ValueError: one was not measured, or they were not timed together.
    """
    if baseline.group != row.group:
        raise ValueError(f'"{baseline.label}" and "{row.label}" were not timed side by side')
    if _measured(row).label == _measured(baseline).label:
        return Ratio(ratio=1.0, low=1.0, high=1.0, verdict="baseline", confidence=confidence)
    rounds = np.median(log_medians(baseline) - log_medians(row), axis=1)
    limits = trimmed_interval(rounds, confidence=confidence, resamples=resamples, seed=seed)
    ratio, low, high = (math.exp(limit) for limit in limits)
    return Ratio(ratio=ratio, low=low, high=high, verdict=verdict(low, high), confidence=confidence)


def verdict(low: float, high: float) -> Verdict:
    """What an interval of the ratio says."""
    if low > 1 + RESOLUTION:
        return "faster"
    if high < 1 / (1 + RESOLUTION):
        return "slower"
    return "indistinguishable"


def log_medians(row: TimingRow) -> npt.NDArray[np.float64]:
    """Natural logarithm of the median milliseconds of each block, shape (rounds, blocks)."""
    return np.log([[np.median(block) for block in blocks] for blocks in row.samples_ms])


def trimmed_interval(
    values: npt.NDArray[np.float64], *, confidence: float, resamples: int, seed: int
) -> tuple[float, float, float]:
    """Trimmed mean of independent ``values`` (R,), and the limits of its interval.

    Raises:
        ValueError: fewer than three values: no interval can be given.
    """
    count = len(values)
    if count < 3:
        raise ValueError(f"{count} rounds are too few for an interval; at least 3 are needed")
    center, error = (float(value) for value in _trimmed(values))
    cut = _cut(count)
    critical = float(stdtrit(count - 2 * cut - 1, 0.5 + confidence / 2))
    if cut == 0:
        return center, center - critical * error, center + critical * error
    drawn = values[np.random.default_rng(seed).integers(0, count, (resamples, count))]
    centers, errors = _trimmed(drawn)
    # Resamples of (nearly) equal values would divide by nothing, or overflow: their errors count as what is far too
    # small to matter, and the order statistics below bound what comes of them.
    least = max(1e-9 * error, 1e-18 * float(np.ptp(values)), float(np.finfo(float).tiny))
    t = np.abs(centers - center) / np.maximum(errors, least)
    half = error * max(critical, float(np.quantile(t, confidence)))
    ordered = np.sort(values)
    skipped = _sign_test_rank(count, 1 - (1 - confidence) / 4) - 1
    return (
        center,
        max(center - half, float(ordered[skipped])),
        min(center + half, float(ordered[-1 - skipped])),
    )


def _cut(count: int) -> int:
    """How many of ``count`` rounds are trimmed at each end."""
    return int(TRIM * count) if count >= TRIM_FROM else 0


def _trimmed(values: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Trimmed mean and its standard error (Yuen 1974) along the last axis."""
    count = values.shape[-1]
    cut = _cut(count)
    kept = count - 2 * cut
    ordered = np.sort(values, axis=-1)
    winsorized = np.clip(ordered, ordered[..., cut, None], ordered[..., count - cut - 1, None])
    spread = winsorized.std(axis=-1, ddof=1)
    error = spread * math.sqrt((count - 1) / (kept * (kept - 1)))
    return ordered[..., cut : count - cut].mean(axis=-1), error


def _sign_test_rank(count: int, confidence: float) -> int:
    """The largest k whose interval between the k-th order statistics from both ends holds the median."""
    rank = 1
    while rank < count / 2 and 1 - 2 * bdtr(rank, count, 0.5) >= confidence:
        rank += 1
    return rank


def _measured(row: TimingRow) -> TimingRow:
    if not row.measured:
        raise ValueError(f'"{row.label}" was not measured: {row.why}')
    return row
