"""An ONNX model at other widths, without exporting it again: for timing, where only shapes matter.

One export is made of the dense model; every width configuration slices its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from deploycnn.graph.model import attribute
from deploycnn.pruning.layers import Side
from deploycnn.pruning.splits import Split, sizes_after
from deploycnn.pruning.surgery import Removals

_COMPUTE = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


class FixedWidthsError(Exception):
    """The graph of a model fits its own widths alone; a module may fit others all the same."""


@dataclass(slots=True)
class _Graph:
    """The parts of a graph that are asked for by name."""

    model: ModelProto
    constants: dict[str, TensorProto] = field(init=False)
    own: int = 0

    def __post_init__(self) -> None:
        self.constants = {tensor.name: tensor for tensor in self.model.graph.initializer}

    def take(
        self, node: NodeProto, index: int, keep: Sequence[int] | npt.NDArray[np.int64], axis: int
    ) -> None:
        """Keep some indices along an axis of a constant that a node reads; nothing where there is none."""
        if self.constant(node, index):
            self._replace(node, index, np.take(self.value(node, index), keep, axis=axis))

    def constant(self, node: NodeProto, index: int) -> bool:
        """Whether a node has a constant input there."""
        return index < len(node.input) and node.input[index] in self.constants

    def value(self, node: NodeProto, index: int) -> npt.NDArray[np.generic]:
        """The constant that a node reads."""
        found: npt.NDArray[np.generic] = numpy_helper.to_array(self.constants[node.input[index]])
        return found

    def _replace(self, node: NodeProto, index: int, value: npt.NDArray[np.generic]) -> None:
        """Give a node a constant of its own: others may read the old one."""
        name = f"{node.input[index].rpartition('@')[0] or node.input[index]}@{self.own}"
        self.own += 1
        tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
        self.model.graph.initializer.append(tensor)
        self.constants[name] = tensor
        node.input[index] = name


def narrowed(
    model: ModelProto, cuts: Removals, widths: Mapping[tuple[str, Side | Split], tuple[int, ...]]
) -> ModelProto:
    """A copy of an exported model without some channels; what is left computes what the pruned module computes.

    Grouped convolutions get the right shape but, per group, the first group's channels: this is for timing.

    Args:
        model: Of ``export_onnx``; nodes are named after their modules.
        cuts: Channels that each side of a layer loses.
        widths: ``surgery.channels_at``.

    Raises:
        FixedWidthsError: a layer that is to be narrowed is not found in the graph, or shapes no longer fit together.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = _Graph(copy)
    by_layer: dict[str, list[NodeProto]] = {}
    for node in copy.graph.node:
        by_layer.setdefault(node.name.rpartition("/")[0], []).append(node)
    for (layer, side), removed in cuts.items():
        keep = np.setdiff1d(np.arange(sum(widths[layer, side])), removed)
        nodes = by_layer.get(layer, [])
        if isinstance(side, Split):
            for node in nodes:
                _narrow_split(graph, node, widths[layer, side], removed)
        elif not any(_narrow(graph, node, side, keep, removed) for node in nodes) and any(
            node.op_type in _COMPUTE for node in nodes
        ):
            raise FixedWidthsError(f'no weights of "{layer}"')
    _free_shapes(graph)
    used = {name for node in copy.graph.node for name in node.input}
    kept = [tensor for tensor in copy.graph.initializer if tensor.name in used]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(kept)
    del copy.graph.value_info[:]
    try:
        onnx.shape_inference.infer_shapes(copy, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise FixedWidthsError(str(error)) from error
    return copy


def _narrow(
    graph: _Graph,
    node: NodeProto,
    side: str,
    keep: npt.NDArray[np.int64],
    removed: npt.NDArray[np.int64],
) -> bool:
    """Cut one node; whether it is one that holds channels."""
    kind = node.op_type
    if kind in {"Conv", "ConvTranspose"}:
        _narrow_convolution(graph, node, side, keep, transposed=kind == "ConvTranspose")
    elif kind in {"Gemm", "MatMul"}:
        rows_out = kind == "Gemm" and bool(attribute(node, "transB", 0))
        graph.take(node, 1, keep, axis=0 if (side == "out") == rows_out else 1)
        if side == "out" and kind == "Gemm":
            graph.take(node, 2, keep, axis=0)
    elif kind == "BatchNormalization":
        for index in range(1, 5):
            graph.take(node, index, keep, axis=0)
    elif kind == "PRelu":
        graph.take(node, 1, keep, axis=0)
    elif kind == "Pad":
        pads = graph.value(node, 1).astype(np.int64)
        before, after = int(pads[1]), int(pads[len(pads) // 2 + 1])
        end = len(keep) + len(removed) - after
        pads[1] = before - int((removed < before).sum())
        pads[len(pads) // 2 + 1] = after - int((removed >= end).sum())
        graph._replace(node, 1, pads)
    else:
        return False
    return True


def _narrow_split(
    graph: _Graph, node: NodeProto, before: tuple[int, ...], removed: npt.NDArray[np.int64]
) -> None:
    """Make parts smaller whose sizes are named; such as are only counted follow by themselves."""
    if node.op_type != "Split" or not graph.constant(node, 1):
        return
    sizes = graph.value(node, 1).astype(np.int64).tolist()
    if tuple(sizes) == before:
        graph._replace(node, 1, np.array(sizes_after(sizes, removed), dtype=np.int64))


def _narrow_convolution(
    graph: _Graph, node: NodeProto, side: str, keep: npt.NDArray[np.int64], *, transposed: bool
) -> None:
    groups = int(attribute(node, "group", 1))  # type: ignore[call-overload] # an integer attribute
    if not graph.constant(node, 1):
        return
    shape = graph.value(node, 1).shape
    depthwise = groups > 1 and shape[1] == 1 and shape[0] == groups
    if depthwise:
        graph.take(node, 1, keep, axis=0)
        graph.take(node, 2, keep, axis=0)
        next(item for item in node.attribute if item.name == "group").i = len(keep)
        return
    axis = 0 if (side == "out") != transposed else 1
    grouped_axis = groups > 1 and axis == 1
    inner = keep[keep < shape[1]] if grouped_axis else keep
    if grouped_axis:
        inner = np.arange(len(keep) // groups)
    graph.take(node, 1, inner.tolist(), axis=axis)
    if side == "out":
        graph.take(node, 2, keep.tolist(), axis=0)


def _free_shapes(graph: _Graph) -> None:
    """Flattening names the number of features in the file: leave it to be found."""
    for node in graph.model.graph.node:
        if node.op_type == "Reshape" and node.input[1] in graph.constants:
            shape = graph.value(node, 1)
            if shape.size == 2:
                graph._replace(node, 1, np.array([0, -1], dtype=np.int64))
