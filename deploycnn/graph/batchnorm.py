"""Fold batch normalization into the convolution before it, in float64.

A convolution y = W*x + b followed by inference batch norm z = scale * (y - mean) / sqrt(var + epsilon) +
shift is the convolution with weights W * g and bias (b - mean) * g + shift, where g = scale / sqrt(var +
epsilon) per output channel (Jacob et al. 2018, section 3.2).
"""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from deploycnn.graph.model import (
    attribute,
    consumers,
    infer_shapes,
    initializers,
    lasting_names,
    producers,
    shape_of,
    value_types,
)
from deploycnn.graph.names import unique

Array = npt.NDArray[np.float64]


def _gain_and_shift(node: NodeProto, weights: dict[str, TensorProto]) -> tuple[Array, Array] | None:
    """Batch norm as per-channel ``x * gain + shift``, or ``None`` where its parameters are not constant."""
    if any(name not in weights for name in node.input[1:5]) or attribute(node, "training_mode", 0):
        return None
    scale, bias, mean, var = (
        numpy_helper.to_array(weights[name]).astype(np.float64) for name in node.input[1:5]
    )
    gain = scale / np.sqrt(var + cast("float", attribute(node, "epsilon", 1e-5)))
    return gain, bias - mean * gain


def _scale_weight(convolution: NodeProto, weight: Array, gain: Array) -> Array:
    """Scale output channels: axis 0 of Conv's (M, C/group, kH, kW), axes (group, 1) of ConvTranspose's."""
    if convolution.op_type == "Conv":
        return weight * gain.reshape(-1, *([1] * (weight.ndim - 1)))
    groups = cast("int", attribute(convolution, "group", 1))
    inputs, outputs, *kernel = weight.shape
    grouped = weight.reshape(groups, inputs // groups, outputs, *kernel)
    return (grouped * gain.reshape(groups, 1, outputs, *([1] * len(kernel)))).reshape(weight.shape)


def fold_batchnorm(model: ModelProto) -> int:
    """Fold every batch norm that alone follows a convolution with constant weights; return how many.

    The convolution's weight keeps its name where no other node uses it. Others (before a convolution, after a
    concatenation) stay: there is nothing to fold them into.
    """
    graph = model.graph
    made_by = producers(graph)
    read_by = consumers(graph)
    weights = initializers(graph)
    outputs = lasting_names(graph)
    taken = set(weights) | set(made_by) | {value.name for value in graph.input}
    removed: list[NodeProto] = []
    for node in graph.node:
        convolution = made_by.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if (
            convolution is None
            or convolution.op_type not in {"Conv", "ConvTranspose"}
            or len(read_by[node.input[0]]) != 1
            or node.input[0] in outputs
            or any(name not in weights for name in convolution.input[1:] if name)
        ):
            continue
        affine = _gain_and_shift(node, weights)
        if affine is None:
            continue
        gain, shift = affine
        weight_name = convolution.input[1]
        weight = numpy_helper.to_array(weights[weight_name])
        has_bias = len(convolution.input) > 2 and convolution.input[2]
        bias = numpy_helper.to_array(weights[convolution.input[2]]).astype(np.float64) if has_bias else 0.0
        folded = {
            1: _scale_weight(convolution, weight.astype(np.float64), gain).astype(weight.dtype),
            2: (bias * gain + shift).astype(weight.dtype),
        }
        stem = weight_name.removesuffix(".weight")
        del convolution.input[1:]
        for position, wanted in ((1, weight_name), (2, f"{stem}.bias")):
            shared = len(read_by.get(wanted, [])) > 1 or (position == 2 and wanted in taken)
            name = unique(wanted, taken) if shared else wanted
            taken.add(name)
            tensor = numpy_helper.from_array(folded[position], name)
            if name in weights:
                weights[name].CopyFrom(tensor)
            else:
                weights[name] = graph.initializer.add()
                weights[name].CopyFrom(tensor)
            convolution.input.append(name)
        convolution.output[0] = node.output[0]
        made_by[node.output[0]] = convolution
        removed.append(node)
    for node in removed:
        graph.node.remove(node)
    return len(removed)


def batchnorm_to_depthwise(model: ModelProto) -> int:
    """Turn the remaining 4-D batch norms into 1x1 depthwise convolutions; return how many.

    Convolutions have INT8 kernels, batch norms have none. Exact up to float32 rounding.
    """
    types = value_types(infer_shapes(model))
    graph = model.graph
    weights = initializers(graph)
    taken = set(weights)
    changed = 0
    for node in graph.node:
        if node.op_type != "BatchNormalization" or node.input[0] not in types:
            continue
        affine = _gain_and_shift(node, weights)
        shape = shape_of(types[node.input[0]])
        if affine is None or shape is None or len(shape) != 4:
            continue
        gain, shift = affine
        stem = node.name or node.output[0]
        names = []
        for suffix, values in (("weight", gain.reshape(-1, 1, 1, 1)), ("bias", shift)):
            name = unique(f"{stem}.{suffix}", taken)
            taken.add(name)
            graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
            names.append(name)
        source, target = node.input[0], node.output[0]
        replacement = helper.make_node(
            "Conv", [source, *names], [target], name=node.name, group=len(gain), kernel_shape=[1, 1]
        )
        node.CopyFrom(replacement)
        changed += 1
    return changed
