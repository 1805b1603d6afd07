"""Axes of slices and paddings, written where onnxruntime looks for them.

Moving them between memory layouts, its optimizer (1.32) forgets the steps of a ``Slice`` that leaves its axes out, and
takes the few amounts of a ``Pad`` that names its axes (operator set 18) for those of all axes.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from deploycnn.graph.model import infer_shapes, initializers, shape_of, value_types
from deploycnn.graph.names import names_taken, unique


def spell_out_axes(model: ModelProto) -> int:
    """Give each ``Slice`` its axes and each ``Pad`` the amounts of all axes, in place; return how many changed.

    Those whose lists are computed, or whose input has no known rank, stay as they are.
    """
    slices = [node for node in model.graph.node if node.op_type == "Slice" and _leaves_axes_out(node)]
    pads = [node for node in model.graph.node if node.op_type == "Pad" and any(node.input[3:])]
    types = value_types(infer_shapes(model)) if pads else {}
    changed = 0
    for node in slices:
        starts = _list(model, node.input[1])
        if starts is not None:
            inputs = [*node.input, *[""] * (4 - len(node.input))]
            inputs[3] = _store(model, f"{node.output[0]}/axes", list(range(len(starts))))
            node.input[:] = inputs
            changed += 1
    for node in pads:
        amounts, axes = _list(model, node.input[1]), _list(model, node.input[3])
        shape = shape_of(types[node.input[0]]) if node.input[0] in types else None
        if amounts is not None and axes is not None and shape is not None:
            whole = np.zeros((2, len(shape)), np.int64)
            whole[:, axes] = np.reshape(amounts, (2, len(axes)))
            node.input[1] = _store(model, f"{node.output[0]}/pads", whole.ravel().tolist())
            del node.input[3:]
            changed += 1
    return changed


def _leaves_axes_out(node: NodeProto) -> bool:
    # Before operator set 10 axes were an attribute.
    return len(node.input) > 2 and not any(node.input[3:4])


def _list(model: ModelProto, name: str) -> list[int] | None:
    """A constant list; ``None`` where it is computed."""
    tensor = initializers(model.graph).get(name)
    return None if tensor is None else cast("list[int]", numpy_helper.to_array(tensor).tolist())


def _store(model: ModelProto, wanted: str, content: list[int]) -> str:
    name = unique(wanted, names_taken(model.graph))
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(content, np.int64), name))
    return name
