"""Values that must have the same channels, and what makes and reads them.

Activations, depthwise convolutions, sums and pools hand channels on; a dense convolution makes new ones. What a
``Concat`` joins or a ``Split`` takes apart has the channels of its parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import cast

from onnx import ModelProto, NodeProto, numpy_helper

from deploycnn.graph.model import attribute, shape_of, value_types
from deploycnn.quantization.channels import is_depthwise, keeps_channels
from deploycnn.quantization.disjoint import DisjointSets
from deploycnn.quantization.structure import Structure

#: Pixels of images of unknown size.
_PIXELS = 28 * 28

#: Nanoseconds of one element of a value that no convolution makes (as in ``widths.py``): it is looked up or multiplied
#: one by one, or moved with many others.
COMPUTED, MOVED = 0.5, 0.4

#: Operators on one value that keep finite numbers finite, channel by channel; and what an element costs.
_UNARY = {
    **dict.fromkeys(("Relu", "Clip", "Identity", "Dropout"), 0.0),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), MOVED),
    **dict.fromkeys(
        (
            "Sigmoid", "HardSigmoid", "HardSwish", "LeakyRelu", "Elu", "Selu", "Celu", "Tanh", "Softplus", "Softsign",
            "Gelu", "Erf", "Mish", "Abs", "Neg", "ThresholdedRelu",
        ),
        COMPUTED,
    ),
}  # fmt: skip

#: Those that make something else of zeros.
_NOT_OF_ZEROS = frozenset({"Sigmoid", "HardSigmoid", "Softplus"})

#: And on several of one shape, or some of which are single pixels or numbers.
_MANY = frozenset({"Add", "Sub", "Mul", "Min", "Max"})


@dataclass(slots=True)
class ChannelSet:
    """Values with the same channels, and what makes and reads them.

    Attributes:
        channels: How many.
        makers: Convolutions that make them, not depthwise.
        readers: Convolutions and matrix products that read them, not depthwise.
        depthwise: Convolutions that do both.
        per_channel: Nanoseconds that one channel more costs, convolutions aside.
    """

    channels: int
    makers: list[NodeProto] = field(default_factory=list)
    readers: list[NodeProto] = field(default_factory=list)
    depthwise: list[NodeProto] = field(default_factory=list)
    per_channel: float = 0.0


class ChannelSets:
    """The sets of a graph, called after a member.

    Attributes:
        graph: Indexes over it.
        sets: By what they are called.
        parts: The sets that each set consists of, where it has parts.
        held: Sets whose channels must stay: they meet the graph's inputs or outputs, or an operator that is not known.
        paddings: ``Pad`` nodes that add channels of zeros.
    """

    def __init__(self, model: ModelProto) -> None:
        self.graph = Structure(model)
        self.shapes = {name: shape_of(value) for name, value in value_types(model).items()}
        self.paddings: list[NodeProto] = []
        self._values = DisjointSets()
        self.held: set[str] = set()
        self._held_values: set[str] = set()
        #: Values that are no zeros where what they are made of is.
        self._not_zeros: list[str] = []
        self._layers: list[NodeProto] = []
        self._depthwise: list[NodeProto] = []
        self._costs: list[tuple[str, float]] = []
        #: (whole, parts) of every ``Concat`` and ``Split``.
        self._joints: list[tuple[str, tuple[str, ...]]] = []
        self._hold(*self.graph.inputs, *self.graph.outputs)
        for node in self.graph.nodes:
            self._visit(node)
        self.parts = self._find_parts()
        self.sets = self._find_sets()
        self.hold(*(self.root(name) for name in self._held_values))

    def root(self, value: str) -> str:
        """What the set of a value is called."""
        return self._values.find(value)

    def hold(self, *roots: str) -> None:
        """Let these sets and what they consist of stay as they are."""
        stack = list(roots)
        while stack:
            root = stack.pop()
            if root not in self.held:
                self.held.add(root)
                stack.extend(self.parts.get(root, ()))

    def channels(self, name: str) -> int:
        """Of a value; 0 where they are not known."""
        shape = self.shapes.get(name)
        return shape[1] or 0 if shape is not None and len(shape) >= 2 else 0

    # What goes together.

    def _visit(self, node: NodeProto) -> None:
        graph, ends = self.graph, (node.input[0] if node.input else "", node.output[0])
        single = len([name for name in node.output if name]) == 1
        if node.op_type == "Conv" and self._constant(node, rank=4):
            shape = graph.constants[node.input[1]].dims
            if is_depthwise(node, shape) and shape[0] == self.channels(node.input[0]):
                self._depthwise.append(node)
                self._join(*ends)
            elif attribute(node, "group", 1) == 1:
                self._layers.append(node)
            else:
                self._hold(*ends)
        elif node.op_type in {"Gemm", "MatMul"} and self._reads_rows(node):
            self._layers.append(node)
            self._hold(node.output[0])
        elif node.op_type in _UNARY and single and self._by_numbers(node):
            self._join(*ends, _UNARY[node.op_type])
            if node.op_type in _NOT_OF_ZEROS or not self._clips_around_zero(node):
                self._not_zeros.append(node.output[0])
        elif node.op_type in _MANY and self._by_channels(node):
            for name in self._activations(node):
                self._join(name, node.output[0])
            self._costs.append((node.output[0], COMPUTED))
            if node.op_type != "Mul" and len(self._activations(node)) < len(node.input):
                self._not_zeros.append(node.output[0])
        elif node.op_type == "Pad" and graph.zero_channels(node) is not None:
            self.paddings.append(node)
        elif (node.op_type in {"Concat", "Split"}) and attribute(node, "axis", 0) in {1, -3}:
            whole, parts = (
                (node.output[0], node.input) if node.op_type == "Concat" else (node.input[0], node.output)
            )
            if all(self._images(name) for name in (whole, *parts)):
                self._joints.append((whole, tuple(parts)))
                self._costs.append((whole, MOVED))
            else:
                self._hold(*node.input, *node.output)
        elif self._moves(node):
            self._join(*ends, MOVED)
        else:
            self._hold(*node.input, *node.output)

    def _constant(self, node: NodeProto, rank: int) -> bool:
        constants = self.graph.constants
        given = [name for name in node.input[1:] if name]
        return all(name in constants for name in given) and len(constants[given[0]].dims) == rank

    def _reads_rows(self, node: NodeProto) -> bool:
        shape = self.shapes.get(node.input[0])
        plain = shape is not None and len(shape) == 2
        plain = plain and all(name in self.graph.constants for name in node.input[1:] if name)
        return (
            plain and len(self.graph.constants[node.input[1]].dims) == 2 and not attribute(node, "transA", 0)
        )

    def _by_numbers(self, node: NodeProto) -> bool:
        constants = self.graph.constants
        return all(name in constants and prod(constants[name].dims) == 1 for name in node.input[1:] if name)

    def _clips_around_zero(self, node: NodeProto) -> bool:
        bounds = self.graph.clip_bounds(node) if node.op_type == "Clip" else (0.0, 0.0)
        return bounds is not None and bounds[0] <= 0.0 <= bounds[1]

    def _activations(self, node: NodeProto) -> list[str]:
        return [name for name in node.input if name not in self.graph.constants]

    def _by_channels(self, node: NodeProto) -> bool:
        """Whether it computes each channel from the same channel of its inputs, and from single numbers."""
        constants = self.graph.constants
        if any(prod(constants[name].dims) != 1 for name in node.input if name in constants):
            return False
        channels = self.channels(node.output[0])
        return channels > 0 and all(
            self._images(name) and self.channels(name) == channels for name in self._activations(node)
        )

    def _images(self, name: str) -> bool:
        shape = self.shapes.get(name)
        return shape is not None and len(shape) == 4 and shape[1] is not None

    def _moves(self, node: NodeProto) -> bool:
        """Whether it moves or sums up pixels within channels, however many there are."""
        constants = self.graph.constants
        if node.op_type in {"Pad", "Flatten", "ReduceMean"}:
            # A Flatten elsewhere would count the channels among the images.
            first = node.op_type != "Flatten" or attribute(node, "axis", 1) in {1, -3}
            return first and keeps_channels(node, self.graph, self.shapes)
        if node.op_type == "Slice":
            axes = self.graph.integers(node, 3)
            return self._images(node.input[0]) and axes is not None and {axis % 4 for axis in axes} <= {2, 3}
        if node.op_type == "Tile":
            repeats = self.graph.integers(node, 1)
            return self._images(node.input[0]) and repeats is not None and repeats[1] == 1
        if node.op_type == "Resize":
            # Sizes would name the number of channels.
            given = len(node.input) > 2 and node.input[2] in constants and not any(node.input[3:])
            if not given or not self._images(node.input[0]) or attribute(node, "axes") is not None:
                return False
            return bool(numpy_helper.to_array(constants[node.input[2]])[1] == 1.0)
        return False

    def _join(self, first: str, second: str, cost: float = 0.0) -> None:
        if not self.channels(first) or self.channels(first) != self.channels(second):
            self._hold(first, second)
            return
        self._values.join(first, second)
        self._costs.append((second, cost))

    def _hold(self, *names: str) -> None:
        self._held_values.update(name for name in names if name)

    # Sets and families.

    def _find_parts(self) -> dict[str, tuple[str, ...]]:
        """The sets that each set consists of, where it has parts; those that have them in several ways are held."""
        found: dict[str, tuple[str, ...]] = {}
        for whole, values in self._joints:
            root, parts = self.root(whole), tuple(self.root(name) for name in values)
            if found.setdefault(root, parts) != parts or root in parts:
                self._hold(root, *parts)
        not_zeros = {self.root(name) for name in self._not_zeros}
        for node in self.paddings:
            # The zeros of a Pad are behind the channels, not between those of parts. New channels take their places, so
            # they must be zeros themselves.
            self._hold(*(name for name in (node.input[0], node.output[0]) if self.root(name) in found))
            if self.root(node.input[0]) in not_zeros:
                self._hold(node.input[0])
        return found

    def _find_sets(self) -> dict[str, ChannelSet]:
        found: dict[str, ChannelSet] = {}
        for name, _ in self.graph.values():
            if channels := self.channels(name):
                found.setdefault(self.root(name), ChannelSet(channels))
        for node in self._layers:
            if (root := self.root(node.output[0])) in found:
                found[root].makers.append(node)
            if (root := self.root(node.input[0])) in found:
                found[root].readers.append(node)
        for node in self._depthwise:
            found[self.root(node.input[0])].depthwise.append(node)
        for value, cost in self._costs:
            if (root := self.root(value)) in found:
                found[root].per_channel += cost * self.pixels(value)
        return found

    def families(self) -> Iterator[list[str]]:
        """Sets of which one has to do with the channels of another; a whole behind its parts."""
        joined = DisjointSets()
        for whole, parts in self.parts.items():
            for part in parts:
                joined.join(whole, part)
        families: dict[str, list[str]] = {}
        for root in self.sets:
            families.setdefault(joined.find(root), []).append(root)
        for members in families.values():
            placed: list[str] = []
            while len(placed) < len(members):
                ready = [
                    root
                    for root in members
                    if root not in placed and all(part in placed for part in self.parts.get(root, ()))
                ]
                if not ready:  # parts of themselves
                    break
                placed.extend(ready)
            else:
                yield placed

    def taps(self, node: NodeProto) -> int:
        """Pixels of the kernel of a convolution."""
        return prod(self.graph.constants[node.input[1]].dims[2:])

    def pixels(self, name: str) -> int:
        """Of a value, if it is of images."""
        shape = self.shapes.get(name)
        if shape is None or len(shape) <= 2:
            return 1
        return prod(cast("tuple[int, ...]", shape[2:])) if None not in shape[2:] else _PIXELS
