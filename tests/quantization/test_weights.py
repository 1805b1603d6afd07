from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploycnn.errors import PassRequirementError
from deploycnn.quantization.types import NumberFormat, WeightPlan
from deploycnn.quantization.weights import dequantize, quantize_bias, quantize_weight, with_room_for_bias

INT4 = NumberFormat(dtype="int4", symmetric=True)
INT8 = NumberFormat(dtype="int8", symmetric=True)


def plan(axis: int | None = 0, number: NumberFormat = INT8) -> WeightPlan:
    return WeightPlan(initializer="w", node="c", axis=axis, number=number)


@given(
    st.integers(0, 2**16),
    st.sampled_from([None, 0, 1]),
    st.sampled_from([INT8, replace(INT8, reduced=True)]),
    st.floats(-30, 30),
)
@settings(max_examples=60, deadline=None)
def test_rounding_errs_by_half_a_step_at_most(
    seed: int, axis: int | None, number: NumberFormat, exponent: float
) -> None:
    rng = np.random.default_rng(seed)
    array = (rng.standard_normal((5, 4, 3)) * 10.0**exponent).astype(np.float32)
    array[1] = 0
    weight = quantize_weight(array, plan(axis, number))
    assert np.abs(weight.integers).max() <= number.qmax
    assert (weight.scale > 0).all()
    assert weight.scale.shape == (() if axis is None else (array.shape[axis],))
    step = weight.scale if axis is None else np.expand_dims(weight.scale, [i for i in range(3) if i != axis])
    assert (np.abs(dequantize(weight) - array) <= step.astype(np.float64) * 0.5001).all()


@given(st.integers(0, 2**16), st.sampled_from([None, 0, 1]), st.floats(-30, 30))
@settings(max_examples=40, deadline=None)
def test_four_bits_are_clipped_where_that_errs_less(seed: int, axis: int | None, exponent: float) -> None:
    rng = np.random.default_rng(seed)
    array = (rng.standard_t(3, (6, 5, 16)) * 10.0**exponent).astype(np.float32)
    array[2, :, :] = 0
    weight = quantize_weight(array, plan(axis, INT4))
    assert weight.integers.min() >= -7
    assert weight.integers.max() <= 7
    real = array.astype(np.float64)
    channels = real[None] if axis is None else np.moveaxis(real, axis, 0)
    found = dequantize(weight)[None] if axis is None else np.moveaxis(dequantize(weight), axis, 0)
    for channel, mine in zip(channels, found, strict=True):
        error = np.square(mine - channel).sum()
        # An independent, coarser search over scales finds nothing better by more than its own grid explains.
        peak = np.abs(channel).max()
        for scale in [peak / 7 * share for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)] if peak else []:
            other = np.clip(np.rint(channel / scale), -7, 7) * scale
            assert error <= np.square(other - channel).sum() * (1 + 1e-5) + 1e-300


def test_zero_channels_and_tensors_have_scales_to_divide_by() -> None:
    array = np.zeros((3, 2), np.float32)
    array[0] = [1.0, -2.0]
    array[1] = 1e-42
    weight = quantize_weight(array, plan())
    assert weight.scale[2] == weight.scale[0]
    assert weight.scale[1] >= np.finfo(np.float32).tiny
    assert (quantize_weight(np.zeros((2, 2), np.float32), plan()).scale > 0).all()


@given(st.integers(0, 2**16), st.floats(1e-6, 10), st.booleans())
@settings(max_examples=60, deadline=None)
def test_biases_fit_and_keep_their_value(seed: int, input_scale: float, per_channel: bool) -> None:
    rng = np.random.default_rng(seed)
    array = rng.standard_normal((6, 4)).astype(np.float32) * np.float32(10) ** rng.integers(-38, 3, (6, 1))
    bias = (rng.standard_normal(6) * 100).astype(np.float32)
    weight = quantize_weight(array.astype(np.float32), plan(0 if per_channel else None))
    roomy = with_room_for_bias(weight, bias, input_scale, INT8)
    integers, scale = quantize_bias(bias, np.float32(input_scale), roomy.scale)
    assert np.abs(integers.astype(np.int64)).max() <= 2**30 * 1.0001
    assert (scale >= np.finfo(np.float32).tiny * 0.99).all()
    assert np.allclose(integers * scale.astype(np.float64), bias, atol=float(scale.max()) * 0.51, rtol=1e-6)
    # What was fine stays as it is.
    needed = np.abs(bias) / (input_scale * 2**30)
    fine = weight.scale > needed.max() * 2 if not per_channel else weight.scale > needed * 2
    assert np.array_equal(np.where(fine, roomy.scale, 0), np.where(fine, weight.scale, 0))


def test_what_is_no_number_is_refused_by_name() -> None:
    with pytest.raises(PassRequirementError, match='weights "w" of node "c" hold NaN'):
        quantize_weight(np.array([[np.nan]], np.float32), plan())
    with pytest.raises(ValueError, match="symmetric and signed"):
        quantize_weight(np.ones((1, 1), np.float32), plan(number=NumberFormat(dtype="uint8")))
