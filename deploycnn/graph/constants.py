"""Other content for the constants that nodes read."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, NodeProto, numpy_helper

from deploycnn.graph.model import initializers, lasting_names, names_used
from deploycnn.graph.names import unique


def replace_constant(
    graph: GraphProto, node: NodeProto, position: int, values: npt.NDArray[np.generic], taken: set[str]
) -> str:
    """Give one constant input other values, under its own name unless something else reads it too; return the name.

    Args:
        graph: That ``node`` is in.
        node: It must read an initializer at ``position``.
        position: Of the input.
        values: They are stored in the dtype that the constant has.
        taken: Names that are in use; a new one is added.
    """
    constants = initializers(graph)
    name = str(node.input[position])
    dtype = numpy_helper.to_array(constants[name]).dtype
    stored = np.asarray(values, dtype, order="C")
    readers = sum(list(names_used(held)).count(name) for held in graph.node)
    if readers == 1 and name not in lasting_names(graph):
        constants[name].CopyFrom(numpy_helper.from_array(stored, name))
        return name
    fresh = unique(name, taken)
    taken.add(fresh)
    graph.initializer.append(numpy_helper.from_array(stored, fresh))
    node.input[position] = fresh
    return fresh
