"""Average pools as depthwise convolutions.

onnxruntime's ``QLinearAveragePool`` computes in float, one number at a time; the same means as a depthwise convolution
with equal weights take a thirtieth of it (2x2 windows of DenseNet). In 8 bits such weights are exact: each is 127 steps
of a scale.
"""

from __future__ import annotations

from math import prod
from typing import cast

import numpy as np
from onnx import ModelProto, helper, numpy_helper

from deploycnn.graph.model import attribute, infer_shapes, shape_of, value_types
from deploycnn.graph.names import names_taken, unique


def convolve_pools(model: ModelProto) -> int:
    """Make ``AveragePool`` a ``Conv`` where every window has the same number of pixels, in place; return how many.

    Args:
        model: A simplified float32 model whose nodes are named and whose shapes are inferred.
    """
    shapes = {name: shape_of(value) for name, value in value_types(model).items()}
    taken, changed = names_taken(model.graph), 0
    for node in model.graph.node:
        if node.op_type != "AveragePool":
            continue
        source, result = shapes.get(node.input[0]), shapes.get(node.output[0])
        kernel = cast("list[int]", attribute(node, "kernel_shape"))
        pads = cast("list[int]", attribute(node, "pads", [0] * 4))
        strides = cast("list[int]", attribute(node, "strides", [1] * len(kernel)))
        dilations = cast("list[int]", attribute(node, "dilations", [1] * len(kernel)))
        if source is None or result is None or len(kernel) != 2 or source[1] is None:
            continue
        if any(pads) and not attribute(node, "count_include_pad", 0):
            continue
        if attribute(node, "auto_pad", b"NOTSET") != b"NOTSET":
            continue
        if attribute(node, "ceil_mode", 0) and not all(
            _fits(*sizes)
            for sizes in zip(
                source[2:], result[2:], kernel, strides, dilations, pads[:2], pads[2:], strict=True
            )
        ):
            continue
        name = unique(f"{node.name}.weight", taken)
        taken.add(name)
        weight = np.full((source[1], 1, *kernel), 1 / prod(kernel), np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
        node.CopyFrom(
            helper.make_node(
                "Conv",
                [node.input[0], name],
                [node.output[0]],
                name=node.name,
                group=source[1],
                kernel_shape=kernel,
                pads=pads,
                strides=strides,
                dilations=dilations,
            )
        )
        changed += 1
    if changed:
        model.CopyFrom(infer_shapes(model))
    return changed


def _fits(
    size: int | None, windows: int | None, kernel: int, stride: int, dilation: int, before: int, behind: int
) -> bool:
    """Whether no window reaches beyond the padding."""
    if size is None or windows is None:
        return False
    return windows == (size + before + behind - dilation * (kernel - 1) - 1) // stride + 1
