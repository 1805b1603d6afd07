"""Lint rules about the numbers: types, zero points, scales, biases."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto

from deploycnn.graph.model import initializers
from deploycnn.quantization.packs import RulePack
from deploycnn.quantization.placement import output_axis
from deploycnn.quantization.reading import Reading, Rounding
from deploycnn.quantization.structure import COMPUTE

#: Rule, node, what is wrong.
Found = tuple[str, str, str]

_TINY = float(np.finfo(np.float32).tiny)

#: Bias scales may differ from the product by rounding to float32, no more.
_SCALE_TOLERANCE = 1e-4

#: Weights up to this fit the 7 bits that do not saturate (onnxruntime's own reduced range goes to 64).
_REDUCED = 64

_FOUR_BITS = frozenset({TensorProto.INT4, TensorProto.UINT4})

#: Targets that convert stored weights once, when they compile the graph.
_FOLDS_WEIGHTS = frozenset({"openvino"})

#: Targets whose integer kernels take float biases as well.
_ANY_BIAS = frozenset({"openvino"})


def number_findings(reading: Reading, pack: RulePack) -> Iterator[Found]:
    """Findings in graph order, each kind together."""
    pairs = {pair.node: pair for pair in (*reading.activations.values(), *reading.outputs.values())}
    for pair in pairs.values():
        yield from _activation(pair, pack)
    constants = {constant.node: constant for constant in reading.constants.values()}
    for constant in constants.values():
        yield from _scale(constant)
    for node in reading.model.graph.node:
        weight = reading.constants.get((node.name, 1))
        if node.op_type in COMPUTE and weight is not None:
            yield from _weight(node, weight, pack)
            yield from _bias(node, weight, reading, pack)
    if pack.style == "weights" and constants:
        yield "QDQ011", next(iter(constants)), "no activation is quantized"


def storage_findings(model: ModelProto, pack: RulePack, *, only_weights: bool) -> Iterator[Found]:
    """How integer weights are stored in the file as it is, before anything is unpacked."""
    weights = initializers(model.graph)
    for node in model.graph.node:
        tensor = weights.get(node.input[0]) if node.op_type in {"DequantizeLinear", "Cast"} else None
        if tensor is None or len(tensor.dims) < 2:
            continue
        direct, four = node.op_type == "DequantizeLinear", tensor.data_type in _FOUR_BITS
        if pack.style != "units":
            if four:
                yield "QDQ014", node.name, f"{tensor.name} has 4 bits; {pack.target} convolves with 8"
        elif direct and only_weights and pack.target not in _FOLDS_WEIGHTS:
            yield "QDQ015", node.name, f"{tensor.name} is converted to float at every call"
        elif direct and four and not only_weights and pack.target not in _FOLDS_WEIGHTS:
            yield "QDQ013", node.name, f"{tensor.name} has 4 bits, and no Cast stands in front"


def _activation(pair: Rounding, pack: RulePack) -> Iterator[Found]:
    yield from _scale(pair)
    offset = 0 if pair.zero_point is None else next((int(zero) for zero in pair.zero_point.flat if zero), 0)
    formats = [number for number in (pack.activation, pack.signed) if number is not None]
    if not any(number.dtype == pair.dtype and not (number.symmetric and offset) for number in formats):
        if pair.dtype == pack.activation.dtype:
            yield "QDQ003", pair.node, f"zero point {offset}; {pack.target} wants 0"
        else:
            found = f"{pair.dtype} with zero point {offset}" if offset else pair.dtype
            yield "QDQ002", pair.node, f"{found}; {pack.target} wants {pack.activation.dtype}"
    if pair.per_channel and pair.scale is not None:
        yield "QDQ004", pair.node, f"{pair.scale.size} scales along axis {pair.axis}"


def _scale(pair: Rounding) -> Iterator[Found]:
    if pair.scale is None or pair.zero_point is None:
        yield "QDQ008", pair.node, "its scale or zero point is computed at run time"
        return
    bad = ~np.isfinite(pair.scale) | (pair.scale < _TINY)
    if bad.any():
        yield "QDQ008", pair.node, f"scale {float(pair.scale[bad].flat[0]):g}"


def _weight(node: NodeProto, weight: Rounding, pack: RulePack) -> Iterator[Found]:
    if weight.dtype not in {"int8", "int4"}:
        yield "QDQ005", node.name, f"weights are {weight.dtype}"
    elif weight.zero_point is not None and weight.zero_point.any():
        yield (
            "QDQ005",
            node.name,
            f"weights have zero point {int(weight.zero_point[weight.zero_point != 0].flat[0])}",
        )
    rank = 0 if weight.integers is None else weight.integers.ndim
    axis = output_axis(node)
    if weight.scale is not None and weight.scale.ndim > 1:
        yield "QDQ006", node.name, f"blocks of weights with scales of shape {weight.scale.shape}"
    elif (
        pack.per_channel
        and not weight.per_channel
        # A vector, or a matrix on the left, has no axis of output channels.
        and (weight.integers is None or (rank > axis and weight.integers.shape[axis] > 1))
    ):
        yield "QDQ006", node.name, "one scale for all output channels"
    elif weight.per_channel and rank and weight.axis % rank != axis:
        yield "QDQ006", node.name, f"scales along axis {weight.axis}; the output channels are axis {axis}"
    if (
        pack.weight.reduced
        and weight.integers is not None
        and np.abs(weight.integers).max(initial=0) > _REDUCED
    ):
        yield "QDQ007", node.name, f"weights up to {int(np.abs(weight.integers).max())}"
    if weight.quantizer:
        yield "QDQ012", node.name, "its weights are stored in float32"


def _bias(node: NodeProto, weight: Rounding, reading: Reading, pack: RulePack) -> Iterator[Found]:
    data = reading.activations.get((node.name, 0))
    if data is None or len(node.input) < 3 or not node.input[2]:
        return
    bias = reading.constants.get((node.name, 2))
    if not pack.integer_bias:
        if bias is not None:
            yield "QDQ009", node.name, f"its bias is {bias.dtype}; {pack.target} wants it in float"
        return
    if bias is None or bias.dtype != "int32":
        if pack.target not in _ANY_BIAS:
            is_what = "float, and rounded whenever the file is loaded" if bias is None else bias.dtype
            yield "QDQ009", node.name, f"its bias is {is_what}; {pack.target} wants int32"
        return
    if bias.scale is None or data.scale is None or weight.scale is None:
        return
    wanted, held = data.scale.reshape(-1)[:1] * weight.scale.reshape(-1), bias.scale.reshape(-1)
    if held.size > 1 and wanted.size > 1 and held.size != wanted.size:
        yield "QDQ010", node.name, f"{held.size} bias scales; the weights have {wanted.size}"
        return
    held, wanted = np.broadcast_arrays(held, wanted)
    if not np.allclose(held, wanted, rtol=_SCALE_TOLERANCE, atol=0.0) or (
        bias.zero_point is not None and bias.zero_point.any()
    ):
        worst = int(np.argmax(np.abs(held - wanted)))
        yield "QDQ010", node.name, f"bias scale {held[worst]:g}; input x weight scale is {wanted[worst]:g}"
