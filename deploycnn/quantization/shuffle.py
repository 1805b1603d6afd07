"""Channel shuffles without moving channels: convolutions on both sides take another order of channels instead.

ShuffleNetV2 (Ma et al. 2018) interleaves the channels of two branches behind every block. The interleaving is a
reshape, a transpose and a reshape, for which onnxruntime leaves the channels-last layout of its integer kernels, twice
a block; and half of the channels are copied on from block to block. Only the order of channels matters to nobody: the
convolutions that make them can make them in another order, and those that read them can have their weights ordered to
fit. What remains is to take the right channels: a split of what a convolution made, a concatenation before the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from deploycnn.graph.cleanup import remove_unused
from deploycnn.graph.constants import replace_constant
from deploycnn.graph.model import (
    attribute,
    consumers,
    infer_shapes,
    initializers,
    lasting_names,
    producers,
    shape_of,
    sort_nodes,
    value_types,
)
from deploycnn.graph.names import unique

#: A channel of a value that a convolution made: (value, index).
Channel = tuple[str, int]

_ELEMENTWISE = frozenset({"Relu", "Clip"})


class _Graph:
    """Indexes over a model, and the channels that every moved value consists of."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.weights = initializers(model.graph)
        self.made_by = producers(model.graph)
        self.read_by = consumers(model.graph)
        self.outputs = lasting_names(model.graph)
        types = value_types(model)
        self.shapes = {name: shape_of(value) for name, value in types.items()}
        #: Moved value -> its channels.
        self.channels: dict[str, list[Channel]] = {}
        self.moving: set[str] = set()
        self.shuffles = 0
        for node in model.graph.node:
            self._follow(node)

    def count(self, value: str) -> int | None:
        """Channels of a 4-D value."""
        shape = self.shapes.get(value)
        return shape[1] if shape is not None and len(shape) == 4 else None

    def of(self, value: str) -> list[Channel] | None:
        """The channels of a value; its own where it was not moved."""
        count = self.count(value)
        if value in self.channels or count is None:
            return self.channels.get(value)
        return [(value, index) for index in range(count)]

    def _follow(self, node: NodeProto) -> None:
        if node.op_type == "Concat" and attribute(node, "axis") in {1, -3}:
            parts = [self.of(name) for name in node.input]
            if all(part is not None for part in parts):
                self._moved(node, [[channel for part in parts if part for channel in part]])
        elif node.op_type == "Split" and attribute(node, "axis", 0) in {1, -3}:
            source = self.of(node.input[0])
            sizes = [self.count(name) for name in node.output]
            if source is not None and None not in sizes:
                ends = np.cumsum(cast("list[int]", sizes))
                self._moved(
                    node,
                    [
                        source[end - size : end]
                        for end, size in zip(ends, cast("list[int]", sizes), strict=True)
                    ],
                )
        elif node.op_type == "Reshape":
            self._follow_shuffle(node)

    def _follow_shuffle(self, last: NodeProto) -> None:
        """A reshape to (N, g, C / g, H, W), a transpose of the middle axes, and a reshape back."""
        transpose = self.made_by.get(last.input[0])
        first = self.made_by.get(transpose.input[0]) if transpose is not None else None
        if (
            transpose is None
            or first is None
            or transpose.op_type != "Transpose"
            or first.op_type != "Reshape"
            or attribute(transpose, "perm") != [0, 2, 1, 3, 4]
            or any(len(self.read_by[node.output[0]]) != 1 for node in (first, transpose))
        ):
            return
        source, middle = self.of(first.input[0]), self.shapes.get(first.output[0])
        before, after = self.shapes.get(first.input[0]), self.shapes.get(last.output[0])
        if source is None or middle is None or before is None or before != after or len(middle) != 5:
            return
        groups, width = middle[1:3]
        if groups is None or width is None or groups * width != len(source) or middle[3:] != before[2:]:
            return
        self.shuffles += 1
        order = np.arange(groups * width).reshape(groups, width).T.reshape(-1)
        self.moving |= {first.name, transpose.name}
        self._moved(last, [[source[index] for index in order]])

    def _moved(self, node: NodeProto, parts: Sequence[list[Channel]]) -> None:
        self.moving.add(node.name)
        self.channels |= dict(zip(node.output, parts, strict=True))


def remove_shuffles(model: ModelProto) -> int:
    """Order the weights around channel shuffles so that these fall away, in place; return how many did. Exact.

    Nothing is changed unless every value that enters the splits, concatenations and shuffles comes from an ordinary
    convolution that nobody else reads, and every value that leaves them goes into convolutions only.

    Args:
        model: A simplified model whose nodes are named and whose shapes are inferred.
    """
    graph = _Graph(model)
    if not graph.shuffles:
        return 0
    ends = [
        name
        for name in graph.channels
        if any(node.name not in graph.moving for node in graph.read_by.get(name, ()))
    ]
    sources = list(dict.fromkeys(source for name in ends for source, _ in graph.channels[name]))
    makers = {source: _maker(graph, source) for source in sources}
    if (
        any(maker is None for maker in makers.values())
        or any(name in graph.outputs for name in graph.channels)
        or not all(_orderable(graph, node, name) for name in ends for node in _readers(graph, name))
    ):
        return 0
    orders, pieces = _split_by_reader(graph, sources, ends)
    for source, order in orders.items():
        _order_outputs(graph, cast("NodeProto", makers[source]), order)
    for name in ends:
        _feed(graph, name, pieces)
    _splits(graph, orders, pieces)
    doomed = [node for node in model.graph.node if node.name in graph.moving]
    for node in doomed:
        model.graph.node.remove(node)
    sort_nodes(model)
    remove_unused(model)
    model.CopyFrom(infer_shapes(model))
    return graph.shuffles


#: Piece of a source: (source, the values that leave the moves and hold it) -> (name, channels in their new order).
Pieces = dict[tuple[str, tuple[int, ...]], tuple[str, list[int]]]


def _readers(graph: _Graph, value: str) -> list[NodeProto]:
    return [node for node in graph.read_by.get(value, ()) if node.name not in graph.moving]


def _maker(graph: _Graph, source: str) -> NodeProto | None:
    """The convolution whose output channels may be ordered, through activations; ``None`` where there is none."""
    value = source
    if not all(node.name in graph.moving for node in graph.read_by.get(source, ())):
        return None
    while True:
        node = graph.made_by.get(value)
        if node is None or value in graph.outputs:
            return None
        if node.op_type not in _ELEMENTWISE:
            break
        value = node.input[0]
        if len(graph.read_by[value]) != 1:
            return None
    return node if _constant_conv(graph, node) and attribute(node, "group", 1) == 1 else None


def _constant_conv(graph: _Graph, node: NodeProto) -> bool:
    return node.op_type == "Conv" and all(name in graph.weights for name in node.input[1:] if name)


def _orderable(graph: _Graph, node: NodeProto, value: str) -> bool:
    """Whether the input channels of a reader may come in any order."""
    if not _constant_conv(graph, node) or node.input[0] != value:
        return False
    if attribute(node, "group", 1) == 1:
        return True
    channels = graph.count(value)
    if attribute(node, "group", 1) != channels or graph.weights[node.input[1]].dims[0] != channels:
        return False
    # A depthwise convolution hands the order on to what reads it.
    return node.output[0] not in graph.outputs and all(
        attribute(reader, "group", 1) == 1 and _orderable(graph, reader, node.output[0])
        for reader in graph.read_by.get(node.output[0], ())
    )


def _split_by_reader(
    graph: _Graph, sources: Sequence[str], ends: Sequence[str]
) -> tuple[dict[str, list[int]], Pieces]:
    """The new order of each source's channels, those that go the same ways side by side; and the pieces."""
    ways: dict[Channel, list[int]] = {}
    for index, name in enumerate(ends):
        for channel in graph.channels[name]:
            ways.setdefault(channel, []).append(index)
    taken = set(graph.made_by) | set(graph.weights)
    orders, pieces = {}, Pieces()
    for source in sources:
        groups: dict[tuple[int, ...], list[int]] = {}
        for index in range(cast("int", graph.count(source))):
            groups.setdefault(tuple(ways.get((source, index), ())), []).append(index)
        orders[source] = [index for key in sorted(groups) for index in groups[key]]
        for number, key in enumerate(sorted(groups)):
            name = source if len(groups) == 1 else unique(f"{source}.part{number}", taken)
            taken.add(name)
            pieces[source, key] = name, groups[key]
    return orders, pieces


def _feed(graph: _Graph, value: str, pieces: Pieces) -> None:
    """Join the pieces that make up ``value``, and order the weights of its readers to fit."""
    old = {channel: index for index, channel in enumerate(graph.channels[value])}
    joined = [
        (name, [old[source, index] for index in held])
        for (source, _), (name, held) in pieces.items()
        if (source, held[0]) in old
    ]
    order = [index for _, held in joined for index in held]
    readers = _readers(graph, value)
    fed = joined[0][0]
    if len(joined) > 1:
        fed = unique(f"{value}.joined", set(graph.made_by) | set(graph.weights))
        node = helper.make_node("Concat", [name for name, _ in joined], [fed], name=fed, axis=1)
        graph.model.graph.node.append(node)
    for node in readers:
        node.input[0] = fed
        if attribute(node, "group", 1) == 1:
            _order(graph, node, 1, order, axis=1)
        else:
            _order_outputs(graph, node, order)
            for reader in graph.read_by[node.output[0]]:
                _order(graph, reader, 1, order, axis=1)


def _splits(graph: _Graph, orders: dict[str, list[int]], pieces: Pieces) -> None:
    for source in orders:
        parts = [piece for (origin, _), piece in pieces.items() if origin == source]
        if len(parts) > 1:
            sizes = np.array([len(held) for _, held in parts], dtype=np.int64)
            name = unique(f"{source}.sizes", set(graph.made_by) | set(graph.weights))
            graph.model.graph.initializer.append(numpy_helper.from_array(sizes, name))
            outputs = [part for part, _ in parts]
            graph.model.graph.node.append(
                helper.make_node("Split", [source, name], outputs, name=f"{source}.split", axis=1)
            )


def _order_outputs(graph: _Graph, node: NodeProto, order: Sequence[int]) -> None:
    _order(graph, node, 1, order, axis=0)
    if len(node.input) > 2 and node.input[2]:
        _order(graph, node, 2, order, axis=0)


def _order(graph: _Graph, node: NodeProto, position: int, order: Sequence[int], axis: int) -> None:
    """Order one axis of a constant; under another name where other nodes read it too."""
    values = np.take(numpy_helper.to_array(graph.weights[node.input[position]]), order, axis=axis)
    taken = set(graph.made_by) | set(graph.weights)
    replace_constant(graph.model.graph, node, position, values, taken)
    graph.weights = initializers(graph.model.graph)
