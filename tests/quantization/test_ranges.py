from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploycnn.quantization.isa import detect_isa
from deploycnn.quantization.ranges import BINS, Statistics, choose_range, entropy_range, percentile_range


def summarize(*batches: np.ndarray) -> Statistics:
    statistics = Statistics(histogram=True)
    for batch in batches:
        statistics.update(batch.astype(np.float32))
    return statistics


@given(st.integers(0, 2**16), st.floats(1e-6, 1e6), st.integers(2, 6))
@settings(max_examples=50, deadline=None)
def test_the_histogram_does_not_depend_on_order_or_batches(seed: int, spread: float, parts: int) -> None:
    values = (np.random.default_rng(seed).standard_normal(600) * spread).astype(np.float32)
    values[:50] = 0
    whole = summarize(values)
    pieces = summarize(
        *np.array_split(np.sort(np.abs(values)) * np.sign(values[np.argsort(np.abs(values))]), parts)
    )
    assert whole.exponent == pieces.exponent
    assert whole.zeros == pieces.zeros == 50
    assert np.array_equal(whole.counts, pieces.counts)
    assert (whole.low, whole.high) == (min(values.min(), 0), max(values.max(), 0))


def test_bins_hold_the_values_that_they_say() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    statistics = summarize(*np.array_split(values, 7))
    edges = np.arange(-BINS, BINS + 1) * statistics.bin_width
    expected, _ = np.histogram(values.astype(np.float64), edges)
    assert np.array_equal(statistics.counts, expected)
    assert 2 * np.abs(values).max() >= edges[-1] >= np.abs(values).max()


def test_percentiles_agree_with_numpy() -> None:
    rng = np.random.default_rng(3)
    values = np.concatenate([rng.standard_normal(50_000), rng.standard_normal(50) * 30])
    low, high = percentile_range(summarize(values), 99.9)
    want_low, want_high = np.quantile(values, [0.001, 0.999])
    assert low == pytest.approx(want_low, rel=0.02)
    assert high == pytest.approx(want_high, rel=0.02)
    assert percentile_range(summarize(values), 100) == (
        values.astype(np.float32).min(),
        values.astype(np.float32).max(),
    )


def test_zeros_count_in_percentiles() -> None:
    values = np.concatenate([np.zeros(99_000), np.random.default_rng(1).uniform(1, 2, 1000)])
    low, high = percentile_range(summarize(values), 99.5)
    assert low == 0
    assert high == pytest.approx(np.quantile(values, 0.995), rel=0.02)


def kl_of_range(values: np.ndarray, high: float) -> float:
    """Divergence of the 256-level quantization of ``values`` clipped at ``high``, on a fine grid."""
    grid = np.linspace(0, values.max(), 4001)
    original, _ = np.histogram(np.minimum(values, high), grid)
    step = high / 255
    quantized = np.minimum(np.round(values[values <= high] / step), 255) * step
    jitter = np.random.default_rng(0).uniform(-step / 2, step / 2, len(quantized))
    spread, _ = np.histogram(np.clip(quantized + jitter, 0, high), grid)
    p, q = original / original.sum(), np.maximum(spread / spread.sum(), 1e-9)
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


def test_entropy_clips_rare_outliers_and_keeps_a_full_range() -> None:
    rng = np.random.default_rng(5)
    bulk = np.abs(rng.standard_normal(200_000))
    outliers = np.concatenate([bulk, [60.0]])
    low, high = entropy_range(summarize(outliers))
    assert low == 0
    assert bulk.max() * 0.6 < high < 30
    assert kl_of_range(outliers, high) < kl_of_range(outliers, 60.0)
    even = rng.uniform(0, 1, 200_000)
    assert entropy_range(summarize(even))[1] > 0.95


def test_entropy_of_signed_values_clips_both_ends() -> None:
    rng = np.random.default_rng(6)
    values = np.concatenate([rng.standard_normal(100_000), [-80.0, 70.0]])
    low, high = entropy_range(summarize(values))
    assert -40 < low < -2
    assert 2 < high < 40


def test_the_three_calibrators_differ() -> None:
    values = np.concatenate([np.random.default_rng(7).standard_normal(100_000), [50.0]])
    statistics = summarize(values)
    minmax = choose_range(statistics, "minmax")
    percentile = choose_range(statistics, "percentile", 99.99)
    entropy = choose_range(statistics, "entropy")
    assert minmax[1] == 50
    assert len({minmax, percentile, entropy}) == 3
    assert max(percentile[1], entropy[1]) < 25


@pytest.mark.parametrize("calibrator", ["minmax", "entropy", "percentile"])
@pytest.mark.parametrize(
    "values", [np.zeros(10), np.array([1e-30]), np.array([1e30, -1e30]), np.array([2.5] * 9)]
)
def test_odd_streams_have_a_range_that_holds_zero(calibrator, values: np.ndarray) -> None:
    low, high = choose_range(summarize(values, np.zeros(0)), calibrator, 99.0)
    assert low <= 0 <= high
    assert np.isfinite([low, high]).all()


def cpuinfo(tmp_path: Path, flags: str) -> Path:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\nflags\t\t: fpu sse2 {flags}\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    return path


@pytest.mark.parametrize(
    ("flags", "machine", "name", "saturates"),
    [
        ("avx2 avx512_vnni", "x86_64", "avx512_vnni", False),
        ("avx_vnni", "AMD64", "avx_vnni", False),
        ("amx_int8 avx512_vnni", "x86_64", "amx_int8", False),
        ("avx2 avx512f", "x86_64", "x86 without VNNI", True),
        ("", "aarch64", "aarch64", False),
    ],
)
def test_instruction_sets(tmp_path, flags: str, machine: str, name: str, saturates: bool) -> None:
    found = detect_isa(cpuinfo(tmp_path, flags), machine)
    assert (found.name, found.saturates) == (name, saturates)


def test_an_unknown_x86_is_taken_to_saturate(tmp_path) -> None:
    assert detect_isa(tmp_path / "missing", "x86_64").saturates
