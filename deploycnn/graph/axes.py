"""Axes of slices and paddings, written where onnxruntime looks for them.

Moving them between memory layouts, its optimizer (1.32) forgets the steps of a ``Slice`` that leaves its axes out, and
takes the few amounts of a ``Pad`` that names its axes (operator set 18) for those of all axes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, numpy_helper

from deploycnn.graph.model import infer_shapes, initializers, shape_of, value_types
from deploycnn.graph.names import names_taken, unique


def spell_out_axes(model: ModelProto) -> int:
    """Give each ``Slice`` its axes and each ``Pad`` the amounts of all axes, in place; return how many changed.

    Those whose lists are computed or wrong, or whose input has no known rank, stay as they are.
    """
    slices = [node for node in model.graph.node if node.op_type == "Slice" and _leaves_axes_out(node)]
    pads = [node for node in model.graph.node if node.op_type == "Pad" and any(node.input[3:])]
    if not slices and not pads:
        return 0
    types = value_types(infer_shapes(model)) if pads else {}
    constants, taken = initializers(model.graph), names_taken(model.graph)

    def listed(name: str) -> list[int] | None:
        """A constant list; ``None`` where it is computed."""
        return numpy_helper.to_array(constants[name]).tolist() if name in constants else None

    def store(wanted: str, content: npt.ArrayLike) -> str:
        name = unique(wanted, taken)
        taken.add(name)
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(content, np.int64), name))
        return name

    changed = 0
    for node in slices:
        starts = listed(node.input[1])
        if starts is not None:
            inputs = [*node.input, *[""] * (4 - len(node.input))]
            inputs[3] = store(f"{node.output[0]}/axes", np.arange(len(starts)))
            node.input[:] = inputs
            changed += 1
    for node in pads:
        amounts, axes = listed(node.input[1]), listed(node.input[3])
        shape = shape_of(types[node.input[0]]) if node.input[0] in types else None
        if amounts is None or axes is None or shape is None:
            continue
        # What is not even valid is for the runtime to refuse.
        if len(amounts) == 2 * len(axes) and all(-len(shape) <= axis < len(shape) for axis in axes):
            whole = np.zeros((2, len(shape)), np.int64)
            whole[:, axes] = np.reshape(amounts, (2, len(axes)))
            node.input[1] = store(f"{node.output[0]}/pads", whole.ravel())
            del node.input[3:]
            changed += 1
    return changed


def _leaves_axes_out(node: NodeProto) -> bool:
    # Before operator set 10 axes were an attribute.
    return len(node.input) > 2 and not any(node.input[3:4])
