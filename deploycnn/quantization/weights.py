"""Weights to integers: symmetric, per output channel or per tensor, with scales that every kernel can divide by."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from deploycnn.errors import PassRequirementError
from deploycnn.quantization.types import FEW_BITS, IntegerWeight, NumberFormat, WeightPlan

#: Largest magnitude of an int32 bias: as much again is left for the products that are added to it.
MAX_BIAS = 2**30

#: Shares of the widest scale that are tried.
_SHARES = np.linspace(1.0, 0.3, 71)

_TINY = float(np.finfo(np.float32).tiny)


def quantize_weight(array: npt.NDArray[np.float32], plan: WeightPlan) -> IntegerWeight:
    """Round to nearest, with the smallest scale that clips nothing; for 4 bits, with that of least squared error.

    A channel of zeros takes the tensor's largest scale, so that an int32 bias is not rounded to it too coarsely
    or beyond its range.

    Args:
        array: The constant.
        plan: Axis and number format, which must be symmetric and signed.

    Raises:
        PassRequirementError: a weight is NaN or infinite; names the constant.
    """
    number = plan.number
    if not number.symmetric or number.dtype.startswith("u"):
        raise ValueError(f"weights must be symmetric and signed, not {number}")
    if not np.isfinite(array).all():
        raise PassRequirementError(
            f'weights "{plan.initializer}" of node "{plan.node}" hold NaN or infinity; mend or fetch the model again'
        )
    values = array.astype(np.float64)
    peaks = np.abs(values) if plan.axis is None else np.abs(np.moveaxis(values, plan.axis, 0))
    peak = (
        peaks.max(initial=0.0)
        if plan.axis is None
        else peaks.reshape(len(peaks), -1).max(axis=1, initial=0.0)
    )
    exact = np.asarray(peak, dtype=np.float64) / number.qmax
    widest = float(exact.max(initial=0.0)) or 1.0 / number.qmax
    scale = np.asarray(np.where(exact == 0.0, widest, np.maximum(exact, _TINY)), dtype=np.float32)
    if number.bits <= FEW_BITS:  # clipping the outermost weights pays
        scale = _least_error(values, scale, plan.axis, number)
    return IntegerWeight(integers=_round(values, scale, plan.axis, number), scale=scale, axis=plan.axis)


def _least_error(
    values: npt.NDArray[np.float64], widest: npt.NDArray[np.float32], axis: int | None, number: NumberFormat
) -> npt.NDArray[np.float32]:
    """Of each channel's scales from ``widest`` down, that whose rounding errors have the least sum of squares."""
    axes = tuple(index for index in range(values.ndim) if index != axis)
    best, least = widest, np.full(widest.shape, np.inf)
    for share in _SHARES:
        scale = np.asarray(np.maximum(widest * share, _TINY), dtype=np.float32)
        rounded = _round(values, scale, axis, number) * along(scale, axis, values.ndim)
        error = np.square(rounded - values).sum(axis=axes)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return np.asarray(best, dtype=np.float32)


def dequantize(weight: IntegerWeight) -> npt.NDArray[np.float64]:
    """The real numbers that integers stand for."""
    return weight.integers * along(weight.scale, weight.axis, weight.integers.ndim)


def with_room_for_bias(
    weight: IntegerWeight, bias: npt.NDArray[np.floating], input_scale: float, number: NumberFormat
) -> IntegerWeight:
    """``weight`` with scales raised where its int32 bias would overflow, or its scale be no normal float32.

    Only channels whose weights are vanishingly small beside their bias change; they lose nothing that counts.

    Args:
        weight: The integers.
        bias: Shape (channels,) or (); what is added, in real numbers.
        input_scale: Scale of the activations that are multiplied.
        number: Format of the weights.
    """
    needed = np.maximum(np.abs(bias.astype(np.float64)) / (input_scale * MAX_BIAS), _TINY / input_scale)
    if weight.axis is None:
        needed = np.asarray(needed.max(initial=0.0))
    # A little more, so that rounding to float32 does not fall below it.
    wanted = np.maximum(weight.scale.astype(np.float64), needed * (1 + 1e-6))
    low = weight.scale < needed
    if not low.any():
        return weight
    scale = np.where(low, wanted, weight.scale).astype(np.float32)
    integers = _round(dequantize(weight), scale, weight.axis, number)
    return replace(weight, integers=integers, scale=scale)


def quantize_bias(
    bias: npt.NDArray[np.floating], input_scale: np.float32, weight_scale: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """A bias as int32 and its scale, which is the product of those of the input and of the weights."""
    scale = (np.float32(input_scale) * weight_scale).astype(np.float32)
    integers = np.rint(bias.astype(np.float64) / scale.astype(np.float64))
    limit = np.iinfo(np.int32)
    return np.clip(integers, limit.min, limit.max).astype(np.int32), scale


def along(scale: npt.NDArray[np.float32], axis: int | None, rank: int) -> npt.NDArray[np.float64]:
    """``scale`` in a shape that broadcasts over a constant of ``rank`` axes."""
    wide = scale.astype(np.float64)
    return wide if axis is None else wide.reshape([-1 if index == axis else 1 for index in range(rank)])


def _round(
    values: npt.NDArray[np.float64], scale: npt.NDArray[np.float32], axis: int | None, number: NumberFormat
) -> npt.NDArray[np.int8]:
    integers = np.rint(values / along(scale, axis, values.ndim))
    return np.clip(integers, number.qmin, number.qmax).astype(np.int8)
