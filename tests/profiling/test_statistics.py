"""The statistics against simulated machines whose truth is known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from deploycnn.profiling.statistics import (
    RESOLUTION,
    Ratio,
    compare,
    summarize,
    trimmed_interval,
    verdict,
)
from tests.profiling.fakes import row_of

ROUNDS, BLOCKS, RUNS = 20, 3, 11


def machine(
    generator: np.random.Generator,
    *,
    slowdown: float,
    session_sd: float,
    bursts: float = 0.0,
    rounds: int = ROUNDS,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Log-milliseconds of two models, (rounds, blocks, runs), the second ``slowdown`` slower.

    Common drift of 5%; a session effect for each model and round; 1% from block to block; runs with a heavy tail
    to the slow side; and with probability ``bursts`` a block in which a neighbour makes everything up to twice
    as slow.
    """
    shape = (2, rounds, BLOCKS, RUNS)
    drift = (
        0.05 * np.cumsum(generator.standard_normal((rounds, BLOCKS)), axis=0)[None, :, :, None] / rounds**0.5
    )
    session = session_sd * generator.standard_normal((2, rounds, 1, 1))
    block = 0.01 * generator.standard_normal((2, rounds, BLOCKS, 1))
    run = 0.01 * generator.pareto(2.0, shape)
    burst = (
        (generator.random((2, rounds, BLOCKS, 1)) < bursts) * generator.random((2, rounds, BLOCKS, 1)) * 0.7
    )
    first, second = drift + session + block + run + burst
    return first, second + math.log1p(slowdown)


def verdicts(slowdown: float, trials: int, **noise: float) -> list[Ratio]:
    found = []
    for seed in range(trials):
        generator = np.random.default_rng([seed, 7])
        first, second = machine(generator, slowdown=slowdown, **noise)  # type: ignore[arg-type]
        found.append(compare(row_of("a", first), row_of("b", second), resamples=600, seed=seed))
    return found


@pytest.mark.parametrize("noise", [{"session_sd": 0.003}, {"session_sd": 0.01}, {"session_sd": 0.03}])
def test_equal_models_are_called_indistinguishable(noise: dict[str, float]) -> None:
    found = verdicts(0.0, 200, **noise)
    wrong = sum(ratio.verdict != "indistinguishable" for ratio in found)
    covered = sum(ratio.low <= 1 <= ratio.high for ratio in found)
    # nominal 1%: more than 5% of 200 would be a false-positive rate nobody should accept
    assert wrong <= 4
    assert covered >= 192


@pytest.mark.parametrize(
    ("noise", "least"),
    [({"session_sd": 0.003}, 0.99), ({"session_sd": 0.01}, 0.99), ({"session_sd": 0.02}, 0.9)],
)
def test_a_model_that_is_five_percent_slower_is_found(noise: dict[str, float], least: float) -> None:
    found = verdicts(0.05, 100, **noise)
    assert sum(ratio.verdict == "slower" for ratio in found) >= least * 100
    assert not any(ratio.verdict == "faster" for ratio in found)
    assert np.median([ratio.ratio for ratio in found]) == pytest.approx(1 / 1.05, abs=0.004)


def test_disturbed_blocks_are_outvoted() -> None:
    equal = verdicts(0.0, 100, session_sd=0.005, bursts=0.15)
    slower = verdicts(0.05, 100, session_sd=0.005, bursts=0.15)
    assert sum(ratio.verdict != "indistinguishable" for ratio in equal) <= 2
    assert sum(ratio.verdict == "slower" for ratio in slower) >= 90


def test_few_sessions_are_not_trusted_more_than_they_deserve() -> None:
    """Six rounds with large session effects: counting runs would find a difference nearly always."""
    found = verdicts(0.0, 300, session_sd=0.03, rounds=6)
    assert sum(ratio.verdict != "indistinguishable" for ratio in found) <= 6
    naive = 0
    for seed in range(50):
        first, second = machine(np.random.default_rng([seed, 7]), slowdown=0.0, session_sd=0.03, rounds=6)
        naive += stats.ttest_ind(first.ravel(), second.ravel()).pvalue < 0.01
    assert naive > 25


def test_the_ratio_is_reciprocal_and_scale_free() -> None:
    first, second = machine(np.random.default_rng(0), slowdown=0.3, session_sd=0.01)
    forward = compare(row_of("a", first), row_of("b", second))
    backward = compare(row_of("b", second), row_of("a", first))
    scaled = compare(row_of("a", first + 3.0), row_of("b", second + 3.0))
    assert forward.verdict == "slower"
    assert backward.verdict == "faster"
    assert forward.ratio * backward.ratio == pytest.approx(1.0)
    assert forward.low * backward.high == pytest.approx(1.0)
    assert scaled.ratio == pytest.approx(forward.ratio)
    assert scaled.low == pytest.approx(forward.low)


def test_the_same_samples_give_the_same_answer() -> None:
    first, second = machine(np.random.default_rng(0), slowdown=0.02, session_sd=0.01)
    assert compare(row_of("a", first), row_of("b", second)) == compare(
        row_of("a", first), row_of("b", second)
    )


def test_the_baseline_is_not_compared_with_itself() -> None:
    row = row_of("a", np.zeros((6, 1, 3)))
    assert compare(row, row) == Ratio(ratio=1.0, low=1.0, high=1.0, verdict="baseline", confidence=0.99)


def test_rows_of_different_timings_are_not_paired() -> None:
    with pytest.raises(ValueError, match="side by side"):
        compare(row_of("a", np.zeros((6, 1, 3)), "g"), row_of("b", np.zeros((6, 1, 3)), "h"))


def test_rows_without_samples_are_refused() -> None:
    row = row_of("a", np.zeros((6, 1, 3)))
    empty = dataclasses.replace(row, label="b", samples_ms=(), why="no device")
    with pytest.raises(ValueError, match="no device"):
        compare(row, empty)
    with pytest.raises(ValueError, match="no device"):
        summarize(empty)


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (1.006, 1.1, "faster"),
        (0.8, 0.99, "slower"),
        (0.99, 1.2, "indistinguishable"),
        (1.001, 1.004, "indistinguishable"),  # certain, but below the resolution
        (0.996, 0.999, "indistinguishable"),
    ],
)
def test_verdicts(low: float, high: float, says: str) -> None:
    assert verdict(low, high) == says


def test_differences_below_the_resolution_are_not_claimed_however_certain() -> None:
    first = np.zeros((20, 3, 5))
    found = compare(row_of("a", first), row_of("b", first + RESOLUTION / 2))
    assert found.low == pytest.approx(found.high)
    assert found.verdict == "indistinguishable"


def test_the_trimmed_mean_and_its_error_are_yuens() -> None:
    """Against scipy: the mean of the trimmed sample, and the winsorized variance."""
    values = np.random.default_rng(3).standard_normal(20)
    center, low, high = trimmed_interval(values, confidence=0.99, resamples=2000, seed=0)
    assert center == pytest.approx(stats.trim_mean(values, 0.2))
    winsorized = np.asarray(stats.mstats.winsorize(values, limits=(0.2, 0.2)))
    error = winsorized.std(ddof=1) * math.sqrt(19 / (12 * 11))
    assert stats.t.ppf(0.995, 11) <= (high - center) / error <= 2 * stats.t.ppf(0.995, 11)
    assert high - center == pytest.approx(center - low)


def test_wildly_disturbed_rounds_are_bounded_by_order_statistics() -> None:
    """Ten good rounds of twenty leave the bootstrap without a scale; the interval stays within the rounds."""
    values = np.concatenate([np.zeros(10), np.random.default_rng(0).normal(0.0, 5.0, 10)])
    _, low, high = trimmed_interval(values, confidence=0.99, resamples=2000, seed=0)
    ordered = np.sort(values)
    assert ordered[2] <= low <= 0 <= high <= ordered[-3]


def test_below_ten_rounds_it_is_students_interval() -> None:
    values = np.random.default_rng(3).standard_normal(8)
    expected = stats.t.interval(0.99, 7, loc=values.mean(), scale=stats.sem(values))
    found = trimmed_interval(values, confidence=0.99, resamples=2000, seed=0)
    assert found == pytest.approx((values.mean(), *expected))


def test_two_rounds_are_too_few() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        trimmed_interval(np.zeros(2), confidence=0.99, resamples=10, seed=0)


@settings(deadline=None, max_examples=50)
@given(
    values=st.lists(st.floats(-10, 10), min_size=3, max_size=24),
    shift=st.floats(-5, 5),
)
@example(values=[0.0] * 7 + [5.0] * 3, shift=0.0)  # resamples of equal values far from the center
@example(values=[5e-324] * 17 + [10.0] * 3, shift=0.0)
@example(values=[0.0] * 9 + [1e-300] + [10.0] * 2, shift=1.0)
def test_intervals_are_finite_and_move_with_the_values(values: list[float], shift: float) -> None:
    array = np.array(values)
    center, low, high = trimmed_interval(array, confidence=0.99, resamples=200, seed=1)
    assert np.isfinite([low, center, high]).all()
    assert low - 1e-9 <= center <= high + 1e-9
    assert array.min() - 1e-9 <= center <= array.max() + 1e-9
    moved, moved_low, moved_high = trimmed_interval(array + shift, confidence=0.99, resamples=200, seed=1)
    assert moved == pytest.approx(center + shift, abs=1e-6)
    if len(values) < 10:  # beyond, rounding may decide which (nearly) equal resamples set the quantile
        assert (moved_low, moved_high) == pytest.approx((low + shift, high + shift), abs=1e-6)


def test_a_summary_is_of_all_runs() -> None:
    log_ms = np.random.default_rng(0).normal(0.0, 0.1, (20, 3, 50))
    row = row_of("a", log_ms)
    summary = summarize(row)
    samples = np.exp(log_ms).ravel()
    assert summary.median_ms == pytest.approx(np.median(samples))
    assert summary.p90_ms == pytest.approx(np.quantile(samples, 0.9))
    assert summary.p99_ms == pytest.approx(np.quantile(samples, 0.99))
    assert summary.throughput_ips == pytest.approx(4 / (np.median(samples) / 1000))
    assert (summary.sessions, summary.runs) == (20, 3000)
    assert summary.median_interval_ms[0] <= summary.median_ms <= summary.median_interval_ms[1]


def test_the_interval_of_a_median_holds_the_true_one() -> None:
    """Twenty sessions with a spread of 3% around 1 ms."""
    held = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        log_ms = 0.03 * generator.standard_normal((20, 1, 1)) + 0.01 * generator.standard_normal((20, 3, 25))
        low, high = summarize(row_of("a", log_ms)).median_interval_ms
        held += low <= 1.0 <= high
    assert held >= 195
