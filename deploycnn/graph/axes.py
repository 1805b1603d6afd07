"""Axes of slices, paddings and resizes, written where onnxruntime looks for them.

Moving them between memory layouts, its optimizer (1.32) forgets the steps of a ``Slice`` that leaves its axes out, and
takes the few amounts of a ``Pad`` or ``Resize`` that names its axes (operator set 18) for those of all axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, numpy_helper

from deploycnn.graph.model import attribute, infer_shapes, initializers, shape_of, value_types
from deploycnn.graph.names import names_taken, unique


def spell_out_axes(model: ModelProto) -> int:
    """Give each ``Slice`` its axes, each ``Pad`` and ``Resize`` the amounts of all axes, in place.

    ``AveragePool`` loses dilations of 1, which onnxruntime's integer kernel does not know. Returns how many changed.
    Those whose lists are computed or wrong, or whose input has no known rank, stay as they are.
    """
    slices = [node for node in model.graph.node if node.op_type == "Slice" and _leaves_axes_out(node)]
    pads = [node for node in model.graph.node if node.op_type == "Pad" and any(node.input[3:])]
    resizes = [node for node in model.graph.node if node.op_type == "Resize" and _resizes_some_axes(node)]
    changed = sum(_drop_unit_dilations(node) for node in model.graph.node if node.op_type == "AveragePool")
    if not slices and not pads and not resizes:
        return changed
    types = value_types(infer_shapes(model)) if pads or resizes else {}
    constants, taken = initializers(model.graph), names_taken(model.graph)

    def listed(name: str) -> list[Any] | None:
        """A constant list; ``None`` where it is computed."""
        return numpy_helper.to_array(constants[name]).tolist() if name in constants else None

    def store(wanted: str, content: npt.ArrayLike, kind: npt.DTypeLike = np.int64) -> str:
        name = unique(wanted, taken)
        taken.add(name)
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(content, kind), name))
        return name

    def shaped(name: str) -> tuple[int | None, ...] | None:
        return shape_of(types[name]) if name in types else None

    for node in slices:
        starts = listed(node.input[1])
        if starts is not None:
            inputs = [*node.input, *[""] * (4 - len(node.input))]
            inputs[3] = store(f"{node.output[0]}/axes", np.arange(len(starts)))
            node.input[:] = inputs
            changed += 1
    for node in pads:
        amounts, axes, shape = listed(node.input[1]), listed(node.input[3]), shaped(node.input[0])
        if amounts is None or axes is None or shape is None:
            continue
        # What is not even valid is for the runtime to refuse.
        if len(amounts) == 2 * len(axes) and all(-len(shape) <= axis < len(shape) for axis in axes):
            whole = np.zeros((2, len(shape)), np.int64)
            whole[:, axes] = np.reshape(amounts, (2, len(axes)))
            node.input[1] = store(f"{node.output[0]}/pads", whole.ravel())
            del node.input[3:]
            changed += 1
    for node in resizes:
        axes, shape = cast("list[int]", attribute(node, "axes")), shaped(node.input[0])
        if shape is None or not all(-len(shape) <= axis < len(shape) for axis in axes):
            continue
        sizes = listed(node.input[3]) if len(node.input) > 3 else None
        scales = listed(node.input[2]) or _scales_of(sizes, [shape[axis] for axis in axes])
        if scales and len(scales) == len(axes):
            every = np.ones(len(shape), np.float32)
            every[axes] = scales
            node.input[2] = store(f"{node.output[0]}/scales", every, np.float32)
            del node.input[3:]
            node.attribute.remove(next(held for held in node.attribute if held.name == "axes"))
            changed += 1
    return changed


def _resizes_some_axes(node: NodeProto) -> bool:
    # A region to resize from is given for the same axes; what keeps the aspect has other scales than sizes say.
    plain = attribute(node, "coordinate_transformation_mode") != b"tf_crop_and_resize"
    stretched = attribute(node, "keep_aspect_ratio_policy", b"stretch") == b"stretch"
    return bool(plain and stretched and attribute(node, "axes") is not None and len(node.input) > 2)


def _scales_of(sizes: list[int] | None, before: Sequence[int | None]) -> list[float] | None:
    """By how much axes grow to ``sizes``; ``None`` where that is not known, or a runtime would come to other sizes."""
    if sizes is None or len(sizes) != len(before) or not all(before):
        return None
    scales = [np.float32(size / (old or 1)) for size, old in zip(sizes, before, strict=True)]
    made = [int(np.floor(np.float32(old or 0) * scale)) for old, scale in zip(before, scales, strict=True)]
    return [float(scale) for scale in scales] if made == list(sizes) else None


def _drop_unit_dilations(node: NodeProto) -> bool:
    held = next((item for item in node.attribute if item.name == "dilations"), None)
    if held is None or set(held.ints) != {1}:
        return False
    node.attribute.remove(held)
    return True


def _leaves_axes_out(node: NodeProto) -> bool:
    # Before operator set 10 axes were an attribute.
    return len(node.input) > 2 and not any(node.input[3:4])
