"""Which values of a float graph may be rescaled channel by channel without changing what the graph computes.

Dividing each channel of a value by a positive number changes nothing if every layer that makes the value divides
its output channel by it, every layer that reads it multiplies its input channel by it, and what stands between them
commutes with positive scales (ReLU, pooling, additions of equally scaled values). Such values form a group. A value
that meets anything else (a sigmoid, an unknown operator, the graph's input or output) is held at a scale of one, and
its whole group with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, numpy_helper

from deploycnn.graph.model import attribute, shape_of, value_types
from deploycnn.quantization.disjoint import DisjointSets
from deploycnn.quantization.structure import Structure

#: Operators that commute with positive scales of each channel, on their first input.
_COMMUTE = frozenset(
    {
        "Relu", "LeakyRelu", "PRelu", "Identity", "Dropout", "MaxPool", "AveragePool", "GlobalAveragePool",
        "GlobalMaxPool",
    }
)  # fmt: skip


@dataclass(kw_only=True)
class ChannelGroup:
    """Values that must share one scale for each channel.

    Attributes:
        channels: How many.
        values: Their names, in graph order.
        makers: Convolutions and matrix products whose output is in the group.
        readers: Those whose input is.
        bounds: ``Clip`` and ``Min`` nodes that bound the values from above.
        gates: Sigmoids of ``x * sigmoid(x)`` with x in the group.
    """

    channels: int
    values: list[str] = field(default_factory=list)
    makers: list[NodeProto] = field(default_factory=list)
    readers: list[NodeProto] = field(default_factory=list)
    bounds: list[NodeProto] = field(default_factory=list)
    gates: list[NodeProto] = field(default_factory=list)


def channel_groups(model: ModelProto, *, through_gates: bool = False) -> list[ChannelGroup]:
    """The groups that can be rescaled: made and read by layers with constant weights only.

    Args:
        model: Float, simplified, with inferred shapes and named nodes.
        through_gates: Also rescale x of ``x * sigmoid(x)`` (SiLU). That needs ``sigmoid(x / (1/s))``, a product
            at inference that no weight can absorb.
    """
    return _Analysis(model, through_gates).groups()


class _Analysis:
    """Joins values into groups, then leaves out the groups that something holds."""

    def __init__(self, model: ModelProto, through_gates: bool) -> None:
        self._graph = Structure(model)
        self._through_gates = through_gates
        self._shapes = {name: shape_of(value) for name, value in value_types(model).items()}
        self._sets = DisjointSets()
        self._held: set[str] = set()
        self._layers: list[NodeProto] = []
        self._bounds: list[NodeProto] = []
        self._gates: list[NodeProto] = []

    def groups(self) -> list[ChannelGroup]:
        graph = self._graph
        self._hold(*graph.inputs, *graph.outputs)
        for node in graph.nodes:
            self._visit(node)
        held = {self._sets.find(name) for name in self._held}
        found: dict[str, ChannelGroup] = {}
        for name, _ in graph.values():
            channels = self._channels(name)
            root = self._sets.find(name)
            if root not in held and channels is not None:
                found.setdefault(root, ChannelGroup(channels=channels)).values.append(name)
        for node in self._layers:
            for root, kind in (
                (self._sets.find(node.output[0]), "makers"),
                (self._sets.find(node.input[0]), "readers"),
            ):
                if root in found:
                    getattr(found[root], kind).append(node)
        for nodes, kind in ((self._bounds, "bounds"), (self._gates, "gates")):
            for node in nodes:
                if (root := self._sets.find(node.input[0])) in found:
                    getattr(found[root], kind).append(node)
        return [group for group in found.values() if group.makers and group.readers and group.channels > 1]

    def _visit(self, node: NodeProto) -> None:
        if node.op_type in {"Conv", "Gemm", "MatMul"} and self._scalable_layer(node):
            self._layers.append(node)
        elif node.op_type in _COMMUTE and len([name for name in node.output if name]) == 1:
            self._join(node.input[0], node.output[0])
        elif node.op_type in {"Clip", "Min"} and self._bounded(node):
            self._bounds.append(node)
            self._join(node.input[0], node.output[0])
        elif node.op_type in {"Pad", "Flatten", "Reshape", "Squeeze", "ReduceMean"} and keeps_channels(
            node, self._graph, self._shapes
        ):
            self._join(node.input[0], node.output[0])
        elif node.op_type == "Add" and self._same_shapes(node):
            self._join(node.input[0], node.input[1])
            self._join(node.input[0], node.output[0])
        elif node.op_type == "Mul":
            self._product(node)
        elif node.op_type == "Sigmoid" and self._through_gates and self._is_silu(node):
            self._gates.append(node)
            self._hold(node.output[0])
        else:
            self._hold(*node.input, *node.output)

    # Patterns.

    def _scalable_layer(self, node: NodeProto) -> bool:
        constants = self._graph.constants
        if any(
            name not in constants or len(self._graph.read_by[name]) != 1 for name in node.input[1:] if name
        ):
            return False
        if node.op_type == "Conv":
            return True
        shape = self._shapes.get(node.input[0])
        plain = (
            not attribute(node, "transA", 0)
            and attribute(node, "alpha", 1.0) == 1.0
            and attribute(node, "beta", 1.0) == 1.0
        )
        plain = plain and (node.op_type != "Gemm" or self._graph.adds_row(node))
        return plain and shape is not None and len(shape) == 2 and len(constants[node.input[1]].dims) == 2

    def _bounded(self, node: NodeProto) -> bool:
        shape = self._shapes.get(node.input[0])
        if shape is None or len(shape) != 4:
            return False
        if node.op_type == "Clip":
            bounds = self._graph.clip_bounds(node)
            return bounds is not None and bounds[0] == 0.0 < bounds[1] < float("inf")
        bound = upper_bound(node, self._graph, self._channels(node.input[0]) or 0)
        return bound is not None and bool((bound > 0).all())

    def _same_shapes(self, node: NodeProto) -> bool:
        left, right = (self._shapes.get(name) for name in node.input)
        constant = any(name in self._graph.constants for name in node.input)
        return not constant and left is not None and left == right and len(left) >= 2

    def _product(self, node: NodeProto) -> None:
        for value, other in (node.input, reversed(node.input)):
            maker = self._untiled(other)
            if maker is None or value in self._graph.constants:
                continue
            if maker.op_type == "Sigmoid" and maker.input[0] == value:
                # SiLU: the sigmoid holds x unless it is told of the scale.
                self._join(value, node.output[0])
                return
            if self._shapes.get(value) != self._shapes.get(node.output[0]):
                continue
            if maker.op_type in {"Sigmoid", "HardSigmoid"} or self._clips_to_share(maker):
                # A gate: whatever its own values are, they must stay, and x may be scaled.
                self._hold(other, *maker.input[:1], *maker.output)
                self._join(value, node.output[0])
                return
        self._hold(*node.input, *node.output)

    def _untiled(self, name: str) -> NodeProto | None:
        """What makes a value, seen through the Tile by which a gate is repeated over the map (``tile_gates``)."""
        maker = self._graph.made_by.get(name)
        if maker is not None and maker.op_type == "Tile":
            return self._graph.made_by.get(maker.input[0])
        return maker

    def _clips_to_share(self, node: NodeProto) -> bool:
        """Whether a gate is the Clip to [0, 1] that a HardSigmoid became (``clip_by_range``)."""
        return node.op_type == "Clip" and self._graph.clip_bounds(node) == (0.0, 1.0)

    def _is_silu(self, node: NodeProto) -> bool:
        readers = self._graph.read_by.get(node.output[0], [])
        return (
            node.output[0] not in self._graph.outputs
            and bool(readers)
            and all(reader.op_type == "Mul" and node.input[0] in reader.input for reader in readers)
        )

    # Sets of values.

    def _channels(self, name: str) -> int | None:
        shape = self._shapes.get(name)
        return shape[1] if shape is not None and len(shape) >= 2 else None

    def _join(self, first: str, second: str) -> None:
        if self._channels(first) is None or self._channels(first) != self._channels(second):
            self._hold(first, second)
            return
        self._sets.join(first, second)

    def _hold(self, *names: str) -> None:
        self._held.update(name for name in names if name)


def keeps_channels(
    node: NodeProto, graph: Structure, shapes: Mapping[str, tuple[int | None, ...] | None]
) -> bool:
    """Whether padding, flattening, reshaping or a mean leaves each channel what it is, if of fewer or more pixels."""
    source, target = shapes.get(node.input[0]), shapes.get(node.output[0])
    if source is None or target is None or len(source) < 2 or len(target) < 2 or source[1] != target[1]:
        return False
    if node.op_type == "Pad":
        # Zeros beside the channels stay zeros; more channels would be another shape.
        pads = graph.constants.get(node.input[1]) if len(node.input) > 1 else None
        if pads is None or not graph.moves(node) or attribute(node, "mode", b"constant") != b"constant":
            return False
        amounts = numpy_helper.to_array(pads).reshape(2, -1)
        return amounts.shape[1] == len(source) and not amounts[:, 1].any()
    if node.op_type == "ReduceMean":
        axes = attribute(node, "axes")
        if len(node.input) > 1 and node.input[1] in graph.constants:
            axes = numpy_helper.to_array(graph.constants[node.input[1]]).tolist()
        return len(source) == 4 and {axis % 4 for axis in cast("list[int]", axes or [0])} <= {2, 3}
    return source[2:] == (1,) * (len(source) - 2) and target[2:] == (1,) * (len(target) - 2)


def upper_bound(node: NodeProto, graph: Structure, channels: int) -> npt.NDArray[np.float64] | None:
    """The bound of a ``Clip`` or of a ``Min`` with one constant, for each channel; ``None`` for others."""
    if node.op_type == "Clip":
        bounds = graph.clip_bounds(node)
        return None if bounds is None else np.full(channels, bounds[1])
    if len(node.input) != 2 or node.input[1] not in graph.constants or node.input[0] in graph.constants:
        return None
    bound = numpy_helper.to_array(graph.constants[node.input[1]]).astype(np.float64)
    if bound.size == 1:
        return np.full(channels, bound.item())
    if bound.ndim < 3 or bound.shape[-3] != channels or bound.size != channels:
        return None
    return bound.reshape(-1)


def rows(node: NodeProto, weight: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A layer's weights as (outputs, inputs of one output, kernel positions): a view."""
    if node.op_type == "Conv":
        return weight.reshape(*weight.shape[:2], -1)
    transposed = node.op_type == "Gemm" and attribute(node, "transB", 0)
    return (weight if transposed else weight.T)[:, :, None]


def spread_inputs(
    node: NodeProto, outputs: int, per_input: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """A number for each input channel as (outputs, inputs of one output): each group has inputs of its own."""
    groups = cast("int", attribute(node, "group", 1)) if node.op_type == "Conv" else 1
    return np.repeat(per_input.reshape(groups, -1), outputs // groups, axis=0)


def gather_inputs(
    node: NodeProto, table: npt.NDArray[np.float64], how: np.ufunc = np.add
) -> npt.NDArray[np.float64]:
    """The reverse: reduce (outputs, inputs of one output) over the outputs that read each input channel."""
    groups = cast("int", attribute(node, "group", 1)) if node.op_type == "Conv" else 1
    reduced: npt.NDArray[np.float64] = how.reduce(table.reshape(groups, -1, table.shape[1]), axis=1)
    return reduced.reshape(-1)


def is_depthwise(node: NodeProto, weight_shape: Iterable[int]) -> bool:
    """Whether each output channel reads one input channel."""
    return (
        node.op_type == "Conv" and list(weight_shape)[1] == 1 and cast("int", attribute(node, "group", 1)) > 1
    )
