"""Placement for CPU runtimes: every integer operator stands between DQ and Q."""

from __future__ import annotations

from collections.abc import Collection

from onnx import NodeProto, numpy_helper

from deploycnn.quantization.packs import MOVERS, RulePack
from deploycnn.quantization.structure import COMPUTE, MANY_INPUTS, Structure, has_kernel
from deploycnn.quantization.ties import Ties, plan_activation
from deploycnn.quantization.types import ActivationPlan


class Units:
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
        """Names of the nodes on integers, and the values that are rounded."""
        integer = self._needed(self._reachable())
        values = self._values(integer)
        values |= self._constants(integer)
        groups = self._ties(integer, values).groups(values)
        return integer, tuple(
            plan_activation(value, readers, self._graph, groups[value]) for value, readers in values.items()
        )

    def _ties(self, integer: set[str], values: Collection[str]) -> Ties:
        """What only moves data keeps its scale, or the runtime cannot leave Q/DQ out.

        With equal scales a Concat is a copy too (7 times as fast in onnxruntime as one that rescales).
        """
        graph = self._graph
        limits = {}
        for node in graph.nodes:
            bounds = graph.clip_bounds(node) if node.name in integer else None
            if bounds is not None and node.input[0] not in values:
                limits[node.output[0]] = bounds
        ties = Ties(graph.possible(), limits)
        within = [node for node in graph.nodes if node.name in integer]
        for node in within:
            if graph.moves(node):
                for name in node.output:
                    ties.tie(node.input[0], name)
        if self._pack.tie_concat:
            for node in within:
                if node.op_type == "Concat":
                    ties.join(node.output[0], [name for name in node.input if name not in graph.constants])
        return ties

    def _reachable(self) -> set[str]:
        """Convolutions, and operators that can follow them with all inputs on integers."""
        graph, found = self._graph, set(self._chosen)
        for node in graph.nodes:
            if node.op_type in COMPUTE or node.name in self._keep_float or not self._may_follow(node):
                continue
            inputs = [name for name in graph.data_inputs(node) if name not in graph.constants]
            if inputs and all(
                self._integer_anyway(name, found) or self._image(name, node) for name in inputs
            ):
                found.add(node.name)
        return found

    def _image(self, value: str, node: NodeProto) -> bool:
        """Whether an input of the graph may as well be rounded before ``node`` as behind it."""
        graph = self._graph
        return value in graph.inputs and node.op_type in self._pack.on_integers and graph.pads_zeros(node)

    def _integer_anyway(self, value: str, found: set[str]) -> bool:
        """Whether integers of a value are there: an integer operator makes it, or a convolution reads it so."""
        maker = self._graph.made_by.get(value)
        if maker is not None and maker.name in found:
            return True
        readers = self._graph.read_by.get(value, [])
        return any(node.name in self._chosen and node.input[0] == value for node in readers)

    def _may_follow(self, node: NodeProto) -> bool:
        graph = self._graph
        if node.op_type in self._pack.clips:
            # It becomes the quantization range, which must hold zero.
            bounds = graph.clip_bounds(node)
            return bounds is not None and bounds[0] <= 0.0 <= bounds[1]
        if node.op_type not in self._pack.followers or not has_kernel(node):
            return False
        if not all(self._takes(name) for name in graph.data_inputs(node) if name in graph.constants):
            return False
        return graph.moves(node) or node.op_type not in MOVERS

    def _takes(self, constant: str) -> bool:
        """Whether a constant may stand beside integers: a single number is exact, an array is rounded."""
        array = numpy_helper.to_array(self._graph.constants[constant])
        return self._pack.constant_operands == "any" or (
            self._pack.constant_operands == "scalar" and array.size == 1
        )

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
            elif (within or maker.op_type not in self._pack.float_results) and not (
                self._folded(value, integer) or self._inside_epilogue(value, integer)
            ):
                # Whatever a kernel returns as integers, all readers get: a float copy would break the fusion.
                found[value] = None
        return found

    def _constants(self, integer: set[str]) -> dict[str, list[str] | None]:
        """Constant operands of integer additions and products -> the nodes that read them."""
        graph, found = self._graph, dict[str, list[str]]()
        for node in graph.nodes:
            if node.name in integer and node.op_type in MANY_INPUTS:
                for name in node.input:
                    if name in graph.constants:
                        found.setdefault(name, []).append(node.name)
        return {**found}

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

    def _inside_epilogue(self, value: str, integer: set[str]) -> bool:
        """Whether a runtime computes ``value`` and the activation behind it within one integer convolution."""
        graph = self._graph
        maker, readers = graph.made_by[value], graph.read_by.get(value, [])
        if value in graph.outputs or any(node.name not in integer for node in readers):
            return False
        if maker.op_type == "Conv" and len(readers) == 1:
            return readers[0].op_type in self._pack.epilogues
        if "SiLU" not in self._pack.epilogues:
            return False
        if maker.op_type == "Sigmoid":
            source = graph.made_by.get(maker.input[0])
            return (
                source is not None and source.op_type == "Conv" and graph.silu(source.output[0]) is not None
            )
        return maker.op_type == "Conv" and graph.silu(value) is not None
