"""First layers in a shape that onnxruntime's fast integer convolution takes.

On x86 it has two: one that copies windows into a matrix, and one that reads the image in place. The latter wants input
channels in fours and output channels in eights (``MlasConvSym``), which images do not have. Exact ways out::

    stride s:  SpaceToDepth(s), then a convolution of stride 1 over s * s times the channels
    else:      a channel of zeros

The kernel grows to a multiple of s, and its new weights are zero. The image is moved in float and rounded behind that:
the runtime has no way to leave Q/DQ out on both sides of these operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from deploycnn.graph.cleanup import remove_unused
from deploycnn.graph.model import (
    attribute,
    infer_shapes,
    initializers,
    names_used,
    shape_of,
    sort_nodes,
    value_types,
)
from deploycnn.graph.names import names_taken, unique

#: What ``MlasConvSym`` asks of input and output channels on x86.
_INPUTS, _OUTPUTS = 4, 8
#: Weights may become so many times as many: what the kernel saves is no more.
_GROWTH = 2.0
#: Side of the largest kernel that a channel of zeros pays for: that of a 7x7 costs more than it saves.
_LARGEST_PADDED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Blocks:
    """A convolution over blocks: stride 1, ``kernel`` taps a side, so much padding before and after."""

    stride: int
    kernel: int
    before: tuple[int, int]
    after: tuple[int, int]
    #: Zero taps in front of the old kernel, by axis.
    shift: tuple[int, int]


def align_first_layers(model: ModelProto) -> int:
    """Rewrite convolutions that read the model's input, in place; return how many.

    Args:
        model: A simplified float32 model whose nodes are named and whose shapes are inferred.
    """
    weights, types = initializers(model.graph), value_types(model)
    inputs = {value.name for value in model.graph.input}
    taken, changed = names_taken(model.graph), 0
    for node in list(model.graph.node):
        if node.op_type != "Conv" or node.input[0] not in inputs or node.input[1] not in weights:
            continue
        weight = numpy_helper.to_array(weights[node.input[1]])
        outputs, channels, *kernel = weight.shape
        if (
            len(kernel) != 2
            or attribute(node, "group", 1) != 1
            or outputs % _OUTPUTS
            or channels % _INPUTS == 0
        ):
            continue
        blocks = _blocks(node, weight.shape, shape_of(types[node.input[0]]))
        if blocks is not None:
            mover = helper.make_node("SpaceToDepth", [node.input[0]], [""], blocksize=blocks.stride)
            weight = _gathered(weight, blocks)
            _set(node, kernel_shape=[blocks.kernel] * 2, strides=[1, 1], pads=[*blocks.before, *blocks.after])
        elif max(kernel) <= _LARGEST_PADDED:
            missing = -channels % _INPUTS
            amounts = unique(f"{node.name}/pads", taken)
            held = numpy_helper.from_array(np.array([0, 0, 0, 0, 0, missing, 0, 0], np.int64), amounts)
            model.graph.initializer.append(held)
            mover = helper.make_node("Pad", [node.input[0], amounts], [""])
            weight = np.pad(weight, ((0, 0), (0, missing), (0, 0), (0, 0)))
        else:
            continue
        mover.name = unique(f"{node.name}/{mover.op_type}", taken)
        mover.output[0] = unique(f"{node.name}/{mover.op_type}_output", taken)
        stored = node.input[1]
        if sum(list(names_used(other)).count(stored) for other in model.graph.node) > 1:
            stored = unique(f"{stored}_aligned", taken)
            model.graph.initializer.append(TensorProto(name=stored))
            weights[stored] = model.graph.initializer[-1]
        taken |= {mover.name, mover.output[0], stored}
        weights[stored].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(weight), stored))
        model.graph.node.append(mover)
        node.input[0], node.input[1] = mover.output[0], stored
        changed += 1
    if changed:
        sort_nodes(model)
        remove_unused(model)
        model.CopyFrom(infer_shapes(model))
    return changed


def _blocks(node: NodeProto, weight: tuple[int, ...], image: tuple[int | None, ...] | None) -> _Blocks | None:
    """The same convolution over blocks of its stride; ``None`` where it is none, or grows too much."""
    strides, dilations = _whole(node, "strides", [1, 1]), _whole(node, "dilations", [1, 1])
    stride = strides[0]
    if stride == 1 or strides[1] != stride or dilations != [1, 1] or image is None or len(image) != 4:
        return None
    if attribute(node, "auto_pad", b"NOTSET") not in {b"NOTSET", "NOTSET"}:
        return None
    pads = _whole(node, "pads", [0, 0, 0, 0])
    shifts, sides, afters = [], [], []
    for axis in range(2):
        size, kernel, front, back = image[2 + axis], weight[2 + axis], pads[axis], pads[2 + axis]
        if size is None or size % stride:
            return None
        shift = -front % stride
        shifts.append(shift)
        sides.append(-(-(shift + kernel) // stride))
        results = (size + front + back - kernel) // stride + 1
        afters.append(results - 1 - size // stride - (front + shift) // stride)
    side = max(sides)
    before = ((pads[0] + shifts[0]) // stride, (pads[1] + shifts[1]) // stride)
    after = (afters[0] + side, afters[1] + side)
    if min(after) < 0 or (side * stride) ** 2 > _GROWTH * weight[2] * weight[3]:
        return None
    if weight[1] * stride**2 % _INPUTS:
        return None
    return _Blocks(stride=stride, kernel=side, before=before, after=after, shift=(shifts[0], shifts[1]))


def _whole(node: NodeProto, name: str, default: list[int]) -> list[int]:
    return list(cast("Sequence[int]", attribute(node, name, default)))


def _gathered(weight: npt.NDArray[np.float32], blocks: _Blocks) -> npt.NDArray[np.float32]:
    """Weights (O, C, H, W) for an image by blocks, whose channels are counted (row, column, channel)."""
    outputs, channels, rows, columns = weight.shape
    side, stride, (top, left) = blocks.kernel, blocks.stride, blocks.shift
    grown = np.zeros((outputs, channels, side * stride, side * stride), weight.dtype)
    grown[:, :, top : top + rows, left : left + columns] = weight
    taps = grown.reshape(outputs, channels, side, stride, side, stride)
    return taps.transpose(0, 3, 5, 1, 2, 4).reshape(outputs, stride * stride * channels, side, side)


def _set(node: NodeProto, **attributes: list[int]) -> None:
    kept = [held for held in node.attribute if held.name not in attributes]
    del node.attribute[:]
    node.attribute.extend(
        [*kept, *(helper.make_attribute(name, value) for name, value in attributes.items())]
    )
