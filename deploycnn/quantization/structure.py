"""What placement and lint ask of a float graph: who reads what, and the patterns that rules speak of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

from onnx import ModelProto, NodeProto, numpy_helper

from deploycnn.graph.model import attribute, consumers, initializers, lasting_names, producers, runtime_inputs
from deploycnn.quantization.packs import MOVERS
from deploycnn.quantization.types import Range

#: Operators with weights.
COMPUTE = frozenset({"Conv", "Gemm", "MatMul"})

#: Operators with weights that no target here computes on integers.
FLOAT_ONLY_COMPUTE = frozenset({"ConvTranspose"})

ANY: Range = (float("-inf"), float("inf"))

POOLS = frozenset({"AveragePool", "GlobalAveragePool"})

#: Followers all of whose inputs are activations; the others' further inputs are shapes, axes and bounds.
MANY_INPUTS = frozenset({"Add", "Mul", "Concat"})

#: Ranges that follow from the operator.
FIXED_RANGES: dict[str, Range] = {"Sigmoid": (0.0, 1.0), "HardSigmoid": (0.0, 1.0), "Softmax": (0.0, 1.0)}

#: What may stand between the mean and the gate of a squeeze-and-excitation block.
_GATE_PATH = (
    COMPUTE
    | MOVERS
    | {"Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Mul", "Add", "Gelu", "LeakyRelu", "PRelu"}
)

_GATES = frozenset({"Sigmoid", "HardSigmoid"})


def has_kernel(node: NodeProto) -> bool:
    """Whether onnxruntime's integer kernels know all that a pool's or Resize's attributes say.

    On integers, dilated averages do not load, and a ``Resize`` of some axes does not run.
    """
    if node.op_type == "AveragePool":
        return set(cast("list[int]", attribute(node, "dilations", [1]))) == {1}
    return bool(node.op_type != "Resize" or attribute(node, "axes") is None)


class Structure:
    """Indexes over a graph. The graph must not change while they are in use.

    Attributes:
        nodes: In graph order.
        constants: Initializers by name.
        made_by: Value -> the node that makes it.
        read_by: Value -> nodes that read it.
        inputs: Names of the graph's inputs.
        outputs: Values that must keep their names: the graph's outputs, and what branches read.
    """

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self.nodes: list[NodeProto] = list(graph.node)
        self.constants = initializers(graph)
        self.made_by = producers(graph)
        self.read_by = consumers(graph)
        self.inputs = [value.name for value in runtime_inputs(model)]
        self.outputs = lasting_names(graph)

    def values(self) -> Iterator[tuple[str, NodeProto | None]]:
        """Every activation with the node that makes it, in graph order; the graph's inputs first."""
        yield from ((name, None) for name in self.inputs)
        yield from ((name, node) for node in self.nodes for name in node.output if name)

    def data_inputs(self, node: NodeProto) -> list[str]:
        """The inputs of a node that are activations or constant operands in their place."""
        return list(node.input) if node.op_type in MANY_INPUTS else list(node.input[:1])

    def scalar(self, node: NodeProto, position: int, absent: float) -> float | None:
        """A scalar input: ``absent`` where it is left out, ``None`` where it is computed or no single number."""
        if position >= len(node.input) or not node.input[position]:
            return absent
        name = node.input[position]
        held = numpy_helper.to_array(self.constants[name]) if name in self.constants else None
        return float(held.item()) if held is not None and held.size == 1 else None

    def clip_bounds(self, node: NodeProto) -> tuple[float, float] | None:
        """What a ``Relu`` or ``Clip`` cuts its input to; ``None`` for others, or computed bounds."""
        if node.op_type == "Relu":
            return 0.0, float("inf")
        if node.op_type != "Clip":
            return None
        low, high = self.scalar(node, 1, float("-inf")), self.scalar(node, 2, float("inf"))
        return (low, high) if low is not None and high is not None else None

    def possible(self) -> dict[str, Range]:
        """What each value can be at most, zero included, as far as the operators tell."""
        found: dict[str, Range] = dict.fromkeys(self.inputs, ANY)
        for node in self.nodes:
            parts = [found.get(name, ANY) for name in self.data_inputs(node)]
            bounds = self.clip_bounds(node)
            result = ANY
            if node.op_type in FIXED_RANGES:
                result = FIXED_RANGES[node.op_type]
            elif bounds is not None:
                result = min(max(parts[0][0], bounds[0]), 0.0), max(min(parts[0][1], bounds[1]), 0.0)
            elif node.op_type == "Concat" or node.op_type in POOLS or self.moves(node):
                result = min(low for low, _ in parts), max(high for _, high in parts)
            found.update((name, result) for name in node.output if name)
        return found

    def moves(self, node: NodeProto) -> bool:
        """Whether integers pass through a node unchanged (zero padding included: zero is in every range)."""
        if node.op_type == "Pad":
            return attribute(node, "mode", b"constant") != b"constant" or self.pads_zeros(node)
        if node.op_type == "MaxPool":
            return len(node.output) == 1 and set(cast("list[int]", attribute(node, "dilations", [1]))) == {1}
        if node.op_type == "Resize":
            return attribute(node, "mode", b"nearest") == b"nearest" and has_kernel(node)
        return node.op_type in MOVERS

    def adds_row(self, node: NodeProto) -> bool:
        """Whether a ``Gemm`` adds one constant for all, or one to each column: what integer kernels can."""
        if len(node.input) < 3 or not node.input[2]:
            return True
        if node.input[2] not in self.constants:
            return False
        shape: tuple[int, ...] = tuple(self.constants[node.input[2]].dims)
        columns = self.weight_shape(node)[0 if attribute(node, "transB", 0) else 1]
        return math.prod(shape) == 1 or (math.prod(shape) == columns and shape[-1] == columns)

    def pads_zeros(self, node: NodeProto) -> bool:
        """Whether a ``Pad`` adds zeros."""
        return attribute(node, "mode", b"constant") == b"constant" and self.scalar(node, 2, 0.0) == 0.0

    def integers(self, node: NodeProto, position: int) -> list[int] | None:
        """A list of integers that a node takes; ``None`` where it is left out or computed."""
        if position >= len(node.input) or node.input[position] not in self.constants:
            return None
        return cast("list[int]", numpy_helper.to_array(self.constants[node.input[position]]).tolist())

    def zero_channels(self, node: NodeProto) -> tuple[int, int] | None:
        """How many channels of zeros a ``Pad`` adds before and behind those of images; ``None`` where it does more."""
        amounts = self.integers(node, 1)
        if amounts is None or len(amounts) != 8 or len(node.input) > 3 or not self.pads_zeros(node):
            return None
        before, behind = amounts[1], amounts[5]
        alone = amounts == [0, before, 0, 0, 0, behind, 0, 0]
        return (before, behind) if alone and min(before, behind) >= 0 else None

    def silu(self, value: str) -> NodeProto | None:
        """The product of ``x * sigmoid(x)``, where nothing else reads x or the sigmoid."""
        readers = self.read_by.get(value, [])
        sigmoid = next((node for node in readers if node.op_type == "Sigmoid"), None)
        product = next((node for node in readers if node.op_type == "Mul"), None)
        if sigmoid is None or product is None or len(readers) != 2:
            return None
        (gate,) = sigmoid.output
        alone = self.read_by.get(gate) == [product] and gate not in self.outputs
        return product if alone and sorted(product.input) == sorted([value, gate]) else None

    def weight_shape(self, node: NodeProto) -> tuple[int, ...]:
        """Shape of the weights of a node that has constant ones."""
        return tuple(self.constants[node.input[1]].dims)

    def squeezed(self) -> set[str]:
        """Names of the convolutions and products inside squeeze-and-excitation gates."""
        found: set[str] = set()
        for node in self.nodes:
            if node.op_type != "Mul":
                continue
            for name in node.input:
                gate = self.made_by.get(name)
                if gate is not None and gate.op_type in _GATES:
                    found |= self._squeezed_behind(gate)
        return found

    def _squeezed_behind(self, gate: NodeProto) -> set[str]:
        """The convolutions between a gate and the spatial mean that it comes from; none without such a mean."""
        path: set[str] = set()
        stack, seen, mean = [gate], set(), False
        while stack:
            node = stack.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if node.op_type in COMPUTE:
                path.add(node.name)
            for name in self.data_inputs(node):
                maker = self.made_by.get(name)
                if name in self.constants:
                    continue
                if maker is not None and maker.op_type in {"GlobalAveragePool", "ReduceMean"}:
                    mean = True
                elif maker is not None and maker.op_type in _GATE_PATH:
                    stack.append(maker)
                else:
                    return set()
        return path if mean else set()

    def ancestors(self, value: str) -> dict[str, int]:
        """Value -> the least number of nodes with weights between it and ``value``, itself included."""
        depth = {value: 0}
        frontier = [value]
        while frontier:
            name = frontier.pop(0)
            node = self.made_by.get(name)
            if node is None:
                continue
            cost = depth[name] + (node.op_type in COMPUTE | FLOAT_ONLY_COMPUTE)
            for source in self._sources(node):
                if cost < depth.get(source, cost + 1):
                    depth[source] = cost
                    frontier.append(source)
        return depth

    def _sources(self, node: NodeProto) -> Iterator[str]:
        return (name for name in node.input if name and name not in self.constants)

    def shortcut(self, node: NodeProto, integer: set[str]) -> str | None:
        """The input of a residual addition that did not come through the block's convolutions.

        The other one is made by a convolution of ``integer`` (names) and read by the addition alone, so that a
        compiler can fuse the addition into it. Where both are, the shortcut is the branch with fewer
        convolutions up to the nearest value from which both come; ``None`` where there is no such addition.
        """
        if node.op_type != "Add" or any(name in self.constants for name in node.input):
            return None
        left, right = node.input
        main = [name for name in (left, right) if left != right and self._fusible(name, integer)]
        if not main:
            return None
        if len(main) == 1:
            return str(right if main[0] == left else left)
        first, second = self.ancestors(left), self.ancestors(right)
        common = [name for name in first if name in second]
        if not common:
            return str(right)
        near = min(common, key=lambda name: first[name] + second[name])
        return str(left if first[near] < second[near] else right)

    def _fusible(self, value: str, integer: set[str]) -> bool:
        maker = self.made_by.get(value)
        return (
            maker is not None
            and maker.op_type == "Conv"
            and maker.name in integer
            and len(self.read_by[value]) == 1
            and value not in self.outputs
        )
