"""Which values and weights of a float graph become integers, by a target's rules.

``place`` decides, ``calibrate`` finds the ranges, ``insertion.build`` makes the Q/DQ graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from deploycnn.graph.model import attribute
from deploycnn.quantization.packs import MOVERS, RulePack
from deploycnn.quantization.structure import COMPUTE, FLOAT_ONLY_COMPUTE, MANY_INPUTS, POOLS, Structure
from deploycnn.quantization.types import ActivationPlan, Plan, Range, WeightPlan

#: Ranges that follow from the operator.
_FIXED: dict[str, Range] = {"Sigmoid": (0.0, 1.0), "HardSigmoid": (0.0, 1.0), "Softmax": (0.0, 1.0)}


def place(model: ModelProto, pack: RulePack, keep_float: Collection[str] = ()) -> Plan:
    """Decide what is quantized.

    Args:
        model: A simplified float graph whose nodes are named and whose shapes are inferred
            (``static.prepare``).
        pack: The target's rules.
        keep_float: Names of nodes to leave in float, also against the rules.

    Returns:
        The plan. It has no activations where the pack quantizes weights only, and nothing at all where the
        graph holds no convolution or matrix product that may be quantized.
    """
    graph = Structure(model)
    kept = _kept_float(graph, pack, keep_float)
    chosen = {node.name for node in graph.nodes if node.op_type in COMPUTE and node.name not in kept}
    if pack.style == "units":
        integer, activations = _Units(graph, pack, chosen, keep_float).place()
    elif pack.style == "inputs":
        integer, activations = _Inputs(graph, pack, chosen, keep_float).place()
    else:
        integer, activations = chosen, ()
    return Plan(
        target=pack.target,
        activation=pack.activation,
        activations=activations,
        weights=tuple(
            WeightPlan(
                initializer=node.input[1],
                node=node.name,
                axis=output_axis(node) if pack.per_channel else None,
                number=pack.weight,
            )
            for node in graph.nodes
            if node.name in chosen
        ),
        integer_bias=pack.integer_bias,
        quantized_nodes=tuple(node.name for node in graph.nodes if node.name in integer),
        kept_float=kept,
    )


def output_axis(node: NodeProto) -> int:
    """The axis of a node's weights that counts its output channels."""
    if node.op_type == "Conv":
        return 0
    return 0 if node.op_type == "Gemm" and attribute(node, "transB", 0) else 1


def _kept_float(graph: Structure, pack: RulePack, keep_float: Collection[str]) -> dict[str, str]:
    """Convolutions and matrix products that stay float -> why."""
    gates = graph.squeezed() if pack.float_gates and pack.style != "weights" else set()
    kept = {}
    for node in graph.nodes:
        if node.op_type not in COMPUTE | FLOAT_ONLY_COMPUTE:
            continue
        why = "as asked" if node.name in keep_float else why_float(node, graph, pack)
        if not why and node.name in gates:
            why = "part of a squeeze-and-excitation gate"
        if why:
            kept[node.name] = why
    return kept


def why_float(node: NodeProto, graph: Structure, pack: RulePack) -> str:
    """Why a convolution or matrix product cannot or should not be quantized; empty where it should."""
    if any(name not in graph.constants for name in node.input[1:] if name):
        return "its weights are not constant"
    if node.op_type == "MatMul" and (node.input[0] in graph.constants or len(graph.weight_shape(node)) != 2):
        return "its weights are no matrix on the right"
    if node.op_type == "Gemm" and (attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0):
        return "transposed or scaled Gemm"
    if pack.style == "weights":
        return "no integer kernel" if node.op_type in FLOAT_ONLY_COMPUTE else ""
    if node.op_type in pack.float_operators:
        return pack.float_operators[node.op_type]
    shape = graph.weight_shape(node)
    if node.op_type == "Conv":
        return _why_float_convolution(node, shape, graph, pack)
    if min(shape) < pack.min_product:
        return f"a matrix product of {min(shape)} rows or columns; under {pack.min_product} gains nothing"
    return ""


def _why_float_convolution(node: NodeProto, shape: tuple[int, ...], graph: Structure, pack: RulePack) -> str:
    group = attribute(node, "group", 1)
    if group != 1 and shape[0] % pack.grouped_multiple:
        return f"grouped, with {shape[0]} output channels (no multiple of {pack.grouped_multiple})"
    if group != 1 and min(shape[2:], default=1) < pack.grouped_kernel:
        return f"grouped, with a kernel under {pack.grouped_kernel}"
    if node.input[0] in graph.inputs and shape[1] % pack.first_multiple and shape[0] % pack.first_multiple:
        return f"first layer, and neither input nor output channels are a multiple of {pack.first_multiple}"
    return ""


def _activation(
    value: str, readers: Iterable[str] | None, graph: Structure, tied: str | None
) -> ActivationPlan:
    """``readers`` becomes ``None`` where it is all of them, graph outputs included."""
    names = frozenset(readers) if readers is not None else None
    if names is not None and value not in graph.outputs:
        names = names if {node.name for node in graph.read_by.get(value, ())} - names else None
    maker = graph.made_by.get(value)
    fixed = _FIXED.get(maker.op_type) if maker is not None else None
    if value in graph.constants:
        array = numpy_helper.to_array(graph.constants[value])
        fixed = float(min(np.min(array), 0.0)), float(max(np.max(array), 0.0))
    return ActivationPlan(
        value=value,
        readers=names,
        tied=tied,
        fixed=fixed,
    )


class _Ties:
    """Values that share a scale: a union-find whose groups are called after their first member in the graph."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def find(self, value: str) -> str:
        while value in self._parent:
            value = self._parent[value]
        return value

    def tie(self, first: str, second: str) -> None:
        left, right = self.find(first), self.find(second)
        if left != right:
            self._parent[right] = left

    def group(self, value: str, members: Collection[str]) -> str | None:
        root = self.find(value)
        alone = sum(self.find(member) == root for member in members) < 2
        return None if alone else root


class _Units:
    """Every integer operator between DQ and Q, as onnxruntime's CPU provider and OpenVINO fuse it.

    Operators between convolutions are quantized where all their inputs are and where a quantized convolution
    follows: values then stay 8-bit in between. Behind the last convolution everything stays float.
    """

    def __init__(
        self, graph: Structure, pack: RulePack, chosen: set[str], keep_float: Collection[str]
    ) -> None:
        self._graph = graph
        self._pack = pack
        self._chosen = chosen
        self._keep_float = keep_float

    def place(self) -> tuple[set[str], tuple[ActivationPlan, ...]]:
        integer = self._needed(self._reachable())
        values = self._values(integer)
        if self._pack.constant_operands:
            values |= self._constants(integer)
        ties = _Ties()
        for node in self._graph.nodes:
            if node.name in integer and self._graph.moves(node):
                for name in node.output:
                    ties.tie(node.input[0], name)
        return integer, tuple(
            _activation(value, readers, self._graph, ties.group(value, values))
            for value, readers in values.items()
        )

    def _reachable(self) -> set[str]:
        """Convolutions, and operators that can follow them with all inputs on integers."""
        graph, found = self._graph, set(self._chosen)
        for node in graph.nodes:
            if node.op_type in COMPUTE or node.name in self._keep_float or not self._may_follow(node):
                continue
            inputs = [name for name in graph.data_inputs(node) if name not in graph.constants]
            if inputs and all(name in graph.made_by and graph.made_by[name].name in found for name in inputs):
                found.add(node.name)
        return found

    def _may_follow(self, node: NodeProto) -> bool:
        graph = self._graph
        if node.op_type in self._pack.clips:
            # It becomes the quantization range, which must hold zero.
            bounds = graph.clip_bounds(node)
            return bounds is not None and bounds[0] <= 0.0 <= bounds[1]
        if node.op_type not in self._pack.followers:
            return False
        constant = any(name in graph.constants for name in graph.data_inputs(node))
        if constant and not self._pack.constant_operands:
            return False
        return graph.moves(node) or node.op_type not in MOVERS

    def _needed(self, found: set[str]) -> set[str]:
        """Those from which a convolution follows on integers."""
        graph, needed = self._graph, set[str]()
        for node in reversed(graph.nodes):
            if node.name not in found:
                continue
            readers = [reader for name in node.output for reader in graph.read_by.get(name, ())]
            # A ReLU is folded into the range of what a convolution returns, at no cost wherever it stands.
            maker = graph.made_by.get(node.input[0])
            folded = (
                node.op_type in self._pack.clips
                and maker is not None
                and maker.op_type in COMPUTE - self._pack.float_results
            )
            if node.op_type in COMPUTE or folded or any(reader.name in needed for reader in readers):
                needed.add(node.name)
        return needed

    def _values(self, integer: set[str]) -> dict[str, list[str] | None]:
        """Value -> the nodes that read it as integers (``None``: whoever reads it), in graph order."""
        graph, found = self._graph, dict[str, list[str] | None]()
        for value, maker in graph.values():
            readers = graph.read_by.get(value, [])
            within = [
                node.name for node in readers if node.name in integer and value in graph.data_inputs(node)
            ]
            if maker is None or maker.name not in integer:
                if within:
                    found[value] = within
            elif (within or maker.op_type not in self._pack.float_results) and not self._folded(
                value, integer
            ):
                # Whatever a kernel returns as integers, all readers get: a float copy would break the fusion.
                found[value] = None
        return found

    def _constants(self, integer: set[str]) -> dict[str, list[str]]:
        """Constant operands of integer additions and products -> the nodes that read them."""
        graph, found = self._graph, dict[str, list[str]]()
        for node in graph.nodes:
            if node.name in integer and node.op_type in MANY_INPUTS:
                for name in node.input:
                    if name in graph.constants:
                        found.setdefault(name, []).append(node.name)
        return found

    def _folded(self, value: str, integer: set[str]) -> bool:
        """Whether ``value`` never exists: a ReLU or clip behind it becomes the range of what it makes itself.

        That needs a single reader, a maker with a scale of its own, and a zero point at the end of the range.
        """
        graph, readers = self._graph, self._graph.read_by.get(value, [])
        return (
            len(readers) == 1
            and readers[0].op_type in self._pack.clips
            and readers[0].name in integer
            and value not in graph.outputs
            and not graph.moves(graph.made_by[value])
            and not self._pack.activation.symmetric
        )


class _Inputs:
    """Only what convolutions, matrix products and residual additions read, as TensorRT wants it."""

    def __init__(
        self, graph: Structure, pack: RulePack, chosen: set[str], keep_float: Collection[str]
    ) -> None:
        self._graph = graph
        self._pack = pack
        self._chosen = chosen
        self._keep_float = keep_float
        #: Value -> names of the nodes that read it as integers.
        self._readers: dict[str, list[str]] = {}
        self._ties = _Ties()

    def place(self) -> tuple[set[str], tuple[ActivationPlan, ...]]:
        graph, integer = self._graph, set(self._chosen)
        for node in graph.nodes:
            if node.name in self._chosen:
                self._read(node.input[0], node)
        if self._pack.residual == "shortcut":
            for node in graph.nodes:
                shortcut = graph.shortcut(node, self._chosen)
                if shortcut is not None and node.name not in self._keep_float:
                    self._read(shortcut, node)
        for node in reversed(graph.nodes):
            if node.name not in self._keep_float and self._passes_integers(node):
                integer.add(node.name)
                self._read(node.input[0], node)
        if self._pack.tie_concat:
            for node in graph.nodes:
                if node.op_type == "Concat" and (joined := self._integer_behind(node.output[0])) is not None:
                    for name in node.input:
                        if (source := self._integer_before(name)) is not None:
                            self._ties.tie(joined, source)
        values = [value for value, _ in graph.values() if value in self._readers]
        return integer, tuple(
            _activation(value, self._readers[value], graph, self._ties.group(value, values))
            for value in values
        )

    def _read(self, value: str, node: NodeProto) -> None:
        if value not in self._graph.constants:
            self._readers.setdefault(value, []).append(node.name)

    def _passes_integers(self, node: NodeProto) -> bool:
        """Whether a pool or a mover reads integers too.

        A mean does where what it makes is read as integers: in and out, or neither. A mover commutes with
        Q/DQ, so it does only where its input has a Q/DQ already, which it then shares.
        """
        graph = self._graph
        if node.op_type in POOLS:
            return self._only_integer(node.output[0])
        if not graph.moves(node) or node.input[0] not in self._readers:
            return False
        rounded = [name for name in node.output if name in self._readers]
        for name in rounded:
            self._ties.tie(node.input[0], name)
        return bool(rounded)

    def _only_integer(self, value: str) -> bool:
        """Whether all readers of a value take it as integers, seen through movers."""
        graph = self._graph
        readers = graph.read_by.get(value, [])
        if value in graph.outputs or not readers:
            return False
        return all(
            node.name in self._readers.get(value, ())
            or (graph.moves(node) and all(self._only_integer(name) for name in node.output))
            for node in readers
        )

    def _integer_behind(self, value: str) -> str | None:
        """``value`` if it is rounded, or the first rounded one that movers make of it."""
        if value in self._readers:
            return value
        for node in self._graph.read_by.get(value, []):
            if self._graph.moves(node):
                for name in node.output:
                    if (found := self._integer_behind(name)) is not None:
                        return found
        return None

    def _integer_before(self, value: str) -> str | None:
        """``value`` if it is rounded for some reader, or the nearest rounded one that movers made it of."""
        while value not in self._readers:
            maker = self._graph.made_by.get(value)
            if maker is None or not self._graph.moves(maker):
                return None
            value = maker.input[0]
        return value
