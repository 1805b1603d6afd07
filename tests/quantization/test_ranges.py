from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploycnn.quantization.isa import detect_isa
from deploycnn.quantization.ranges import choose_range, entropy_range, mse_range, percentile_range
from deploycnn.quantization.types import NumberFormat
from tests.quantization.summaries import summarize

FORMATS = [
    NumberFormat(),
    NumberFormat(reduced=True),
    NumberFormat(dtype="int8", symmetric=True),
    NumberFormat(dtype="int8"),
    NumberFormat(dtype="uint8", symmetric=True),
    NumberFormat(dtype="uint4"),
]


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


def test_the_calibrators_differ() -> None:
    values = np.concatenate([np.random.default_rng(7).standard_normal(100_000), [50.0]])
    statistics = summarize(values)
    found = {
        "minmax": choose_range(statistics, "minmax"),
        "moving_average": choose_range(statistics, "moving_average"),
        "percentile": choose_range(statistics, "percentile", 99.99),
        "entropy": choose_range(statistics, "entropy"),
        "mse": choose_range(statistics, "mse", number=NumberFormat(dtype="int4", symmetric=True)),
    }
    assert found["minmax"][1] == 50
    assert len(set(found.values())) == len(found)
    assert max(bounds[1] for name, bounds in found.items() if name != "minmax") < 25


@pytest.mark.parametrize("spread", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("number", [FORMATS[0], FORMATS[2]])
def test_entropy_is_not_minmax(spread: float, number: NumberFormat) -> None:
    """Tools whose histogram has no more bins than levels find the whole range best, always."""
    values = np.maximum(np.random.default_rng(8).standard_t(5, 200_000), 0) * spread
    statistics = summarize(values)
    assert 0.1 * statistics.high < entropy_range(statistics, number)[1] < 0.8 * statistics.high


def rounded(values: np.ndarray, bounds: tuple[float, float], number: NumberFormat) -> np.ndarray:
    """Quantize and dequantize element by element, by the formula of ONNX's QuantizeLinear."""
    scale, zero_point = number.scale_and_zero_point(bounds)
    integers = np.clip(np.rint(values / float(scale)) + zero_point, number.qmin, number.qmax)
    return (integers - zero_point) * float(scale)


@given(st.integers(0, 2**16), st.sampled_from(FORMATS), st.floats(1.0, 12.0), st.floats(-2, 2))
@settings(max_examples=40, deadline=None)
def test_mse_is_never_worse_than_minmax(seed: int, number, tail: float, shift: float) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.standard_t(tail, 4000) + shift).astype(np.float32)
    statistics = summarize(values)
    errors = {
        name: float(
            np.square(rounded(values, choose_range(statistics, name, number=number), number) - values).sum()
        )
        for name in ("minmax", "mse")
    }
    # The search sees the histogram, whose bins are an eighth of a level or less.
    assert errors["mse"] <= errors["minmax"] * 1.02


@pytest.mark.parametrize("number", FORMATS)
def test_mse_is_as_good_as_a_brute_search_over_both_ends(number) -> None:
    values = np.random.default_rng(11).standard_t(3, 5000).astype(np.float32)
    values = np.where(values < 0, values * 0.2, values)
    shares = np.geomspace(0.02, 1, 40)
    best = min(
        float(np.square(rounded(values, (values.min() * a, values.max() * b), number) - values).sum())
        for a in shares
        for b in shares
    )
    found = mse_range(summarize(values), number)
    assert float(np.square(rounded(values, found, number) - values).sum()) < 1.03 * best


def test_fewer_bits_clip_more() -> None:
    statistics = summarize(np.random.default_rng(12).standard_normal(100_000))
    eight, four = (
        mse_range(statistics, NumberFormat(dtype=dtype, symmetric=True))[1] for dtype in ("int8", "int4")
    )
    # 3.9 and 2.6 standard deviations: Banner et al. 2019, table 1 in the Gaussian case.
    assert four == pytest.approx(2.6, abs=0.3)
    assert eight == pytest.approx(3.9, abs=0.3)


@pytest.mark.parametrize("number", FORMATS)
@pytest.mark.parametrize("calibrator", ["minmax", "moving_average", "percentile", "entropy", "mse"])
@pytest.mark.parametrize(
    "values", [np.zeros(10), np.array([1e-30]), np.array([1e30, -1e30]), np.array([2.5] * 9)]
)
def test_odd_streams_have_a_range_that_holds_zero(calibrator, number, values: np.ndarray) -> None:
    low, high = choose_range(summarize(values, np.zeros(0)), calibrator, 99.0, number)
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
