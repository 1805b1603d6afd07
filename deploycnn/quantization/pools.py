"""Average pools on integers as depthwise convolutions.

onnxruntime's ``QLinearAveragePool`` computes in float, one number at a time; the same means as a depthwise convolution
with equal weights take a thirtieth of it (2x2 windows of DenseNet). In 8 bits such weights are exact: all are the same
integer, whose scale makes it the share of a pixel.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import cast

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from deploycnn.graph.model import (
    attribute,
    consumers,
    initializers,
    lasting_names,
    producers,
    shape_of,
    sort_nodes,
)
from deploycnn.graph.names import names_taken, unique

#: The integer that every weight is: two products with uint8 do not saturate, on CPUs without VNNI.
_WEIGHT = 64


def convolve_pools(model: ModelProto, types: Mapping[str, ValueInfoProto]) -> int:
    """Make pools between DQ and Q convolutions where every window has as many pixels, in place; return how many.

    Args:
        model: With Q/DQ.
        types: Of the values that the pools read and make.
    """
    graph = model.graph
    makers, readers, constants = producers(graph), consumers(graph), initializers(graph)
    taken, lasting, changed = names_taken(graph), lasting_names(graph), 0
    for node in [held for held in graph.node if held.op_type == "AveragePool"]:
        rounded = makers.get(node.input[0])
        read = readers.get(node.output[0], [])
        if rounded is None or rounded.op_type != "DequantizeLinear" or node.output[0] in lasting:
            continue
        scale = constants.get(rounded.input[1])
        if scale is None or scale.data_type != TensorProto.FLOAT or scale.dims:
            continue
        if not read or any(reader.op_type != "QuantizeLinear" for reader in read):
            continue
        shapes = [
            shape_of(types[name]) if name in types else None for name in (rounded.output[0], node.output[0])
        ]
        if shapes[0] is None or shapes[0][1] is None or not _alike(node, shapes[0], shapes[1]):
            continue
        kernel, channels = cast("list[int]", attribute(node, "kernel_shape")), shapes[0][1]
        arrays: dict[str, npt.NDArray[np.generic]] = {
            "weight": np.full((channels, 1, *kernel), _WEIGHT, np.int8),
            "weight_scale": np.full(channels, 1 / (_WEIGHT * prod(kernel)), np.float32),
            "weight_zero_point": np.zeros(channels, np.int8),
        }
        names = [unique(f"{node.name}.{suffix}", taken) for suffix in arrays]
        weight = unique(f"{node.name}.weight_DequantizeLinear_Output", taken)
        taken |= {*names, weight}
        graph.initializer.extend(
            numpy_helper.from_array(array, name) for name, array in zip(names, arrays.values(), strict=True)
        )
        graph.node.append(helper.make_node("DequantizeLinear", names, [weight], name=weight, axis=0))
        kept = [held for held in node.attribute if held.name not in {"count_include_pad", "ceil_mode"}]
        options = {held.name: helper.get_attribute_value(held) for held in kept}
        inputs = [node.input[0], weight]
        made = helper.make_node("Conv", inputs, list(node.output), name=node.name, group=channels, **options)
        node.CopyFrom(made)
        changed += 1
    if changed:
        sort_nodes(model)
    return changed


def is_mean(weight: npt.NDArray[np.generic]) -> bool:
    """Whether a convolution with these integers is what a pool became."""
    return bool(
        weight.dtype == np.int8 and weight.ndim == 4 and weight.shape[1] == 1 and (weight == _WEIGHT).all()
    )


def _alike(node: NodeProto, source: tuple[int | None, ...], result: tuple[int | None, ...] | None) -> bool:
    """Whether every window of a pool of images has as many pixels."""
    if len(source) != 4 or attribute(node, "auto_pad", b"NOTSET") != b"NOTSET":
        return False
    pads = cast("list[int]", attribute(node, "pads", [0] * 4))
    if any(pads) and not attribute(node, "count_include_pad", 0):
        return False
    if not attribute(node, "ceil_mode", 0):
        return True
    # Windows that reach beyond the padding count what is there.
    kernel = cast("list[int]", attribute(node, "kernel_shape"))
    strides = cast("list[int]", attribute(node, "strides", [1, 1]))
    dilations = cast("list[int]", attribute(node, "dilations", [1, 1]))
    for axis in (0, 1):
        size, windows = source[2 + axis], result[2 + axis] if result is not None else None
        if size is None or windows is None:
            return False
        reach = dilations[axis] * (kernel[axis] - 1) + 1
        if windows != (size + pads[axis] + pads[2 + axis] - reach) // strides[axis] + 1:
            return False
    return True
