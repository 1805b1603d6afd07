"""Placement for compilers that find the rest: only what convolutions, products and additions read is rounded."""

from __future__ import annotations

from collections.abc import Collection

from onnx import NodeProto

from deploycnn.quantization.packs import RulePack
from deploycnn.quantization.structure import POOLS, Structure, has_kernel
from deploycnn.quantization.ties import Ties, plan_activation
from deploycnn.quantization.types import ActivationPlan


class Inputs:
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
        self._ties = Ties(graph.possible(), {})

    def place(self) -> tuple[set[str], tuple[ActivationPlan, ...]]:
        """Names of the nodes that read integers, and the values that are rounded."""
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
        groups = self._ties.groups(values)
        return integer, tuple(
            plan_activation(value, self._readers[value], graph, groups[value]) for value in values
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
            return has_kernel(node) and self._only_integer(node.output[0])
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
