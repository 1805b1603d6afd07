"""Lint rules about where Q/DQ stand: a file against our own placement of the float graph inside it."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from deploycnn.quantization.packs import RulePack
from deploycnn.quantization.placement import place
from deploycnn.quantization.reading import Reading, Rounding
from deploycnn.quantization.structure import COMPUTE, POOLS, Structure
from deploycnn.quantization.types import Plan

#: Rule, node, what is wrong.
Found = tuple[str, str, str]

#: Stands for a graph output among the readers of a value.
_OUTPUT = ""

_UNWEIGHTED = "its weights are not constant"

#: Operators of activations and gates, between which and their layer compilers want no Q/DQ.
_GATING = frozenset({"Sigmoid", "HardSigmoid", "HardSwish", "Mul", "Gelu", "Erf", "Tanh", "Softplus", "Mish"})


def edge_findings(reading: Reading, pack: RulePack) -> list[Found]:
    """Findings, each kind together."""
    return list(_Edges(reading, pack).findings())


class _Edges:
    def __init__(self, reading: Reading, pack: RulePack) -> None:
        self._reading = reading
        self._pack = pack
        self._graph = Structure(reading.model)
        self._nodes = {node.name: node for node in self._graph.nodes}
        self._layers = [node for node in self._graph.nodes if node.op_type in COMPUTE]
        #: Value -> names of the nodes that read it through Q/DQ.
        self._found: dict[str, set[str]] = {}
        #: Value -> one of its roundings.
        self._pairs: dict[str, Rounding] = {}
        for (name, position), pair in reading.activations.items():
            if name in self._nodes and position < len(self._nodes[name].input):
                value = self._nodes[name].input[position]
                self._found.setdefault(value, set()).add(name)
                self._pairs.setdefault(value, pair)
        for value, pair in reading.outputs.items():
            self._found.setdefault(value, set()).add(_OUTPUT)
            self._pairs.setdefault(value, pair)
        self._ideal = place(reading.model, pack)
        #: Layers that the rules would keep float.
        self._unwanted = {
            node.name
            for node in self._layers
            if self._ideal.kept_float.get(node.name, _UNWEIGHTED) != _UNWEIGHTED
            and self._sides(node) == (True, True)
        }
        self._plan = place(reading.model, pack, self._float_nodes())

    def _sides(self, node: NodeProto) -> tuple[bool, bool]:
        """Whether a layer's input and weights are quantized."""
        weights = (node.name, 1) in self._reading.constants
        return self._pack.style == "weights" or (node.name, 0) in self._reading.activations, weights

    def _float_nodes(self) -> set[str]:
        """Nodes that the file leaves in float altogether: taken as meant so."""
        kept = {node.name for node in self._layers if self._is_float(node)}
        wanted = set().union(*self._expected(self._ideal).values())
        for node in self._graph.nodes:
            if (
                node.name in wanted
                and node.op_type not in COMPUTE | self._pack.clips
                and not any(
                    (node.name, position) in self._reading.activations for position in range(len(node.input))
                )
            ):
                kept.add(node.name)
        return kept

    def _is_float(self, node: NodeProto) -> bool:
        data, weights = self._sides(node)
        # In "units" it may read what was rounded for others, or by another layer's kernel.
        return not weights and (not data or self._pack.style != "inputs")

    def findings(self) -> Iterator[Found]:
        """All kinds."""
        yield from self._of_layers()
        if self._pack.style != "weights":
            yield from self._of_edges(self._plan)
            yield from self._of_scales(self._plan)
        yield from self._of_repetition()

    def _of_layers(self) -> Iterator[Found]:
        for node in self._layers:
            data, weights = self._sides(node)
            why = self._ideal.kept_float.get(node.name, "")
            if why == _UNWEIGHTED:
                continue
            if node.name in self._unwanted:
                yield "QDQ103", node.name, why
            elif data != weights and not self._is_float(node):
                whole, half = ("input", "weights") if data else ("weights", "input")
                yield (
                    "QDQ101",
                    node.name,
                    f"its {whole} is quantized and its {half} is not".replace("weights is", "weights are"),
                )
            elif not weights and not why:
                yield "QDQ102", node.name, f"{node.op_type} in float"

    def _expected(self, plan: Plan) -> dict[str, set[str]]:
        expected = {}
        for item in plan.activations:
            if item.value in self._graph.constants:
                continue
            readers = {node.name for node in self._graph.read_by.get(item.value, ())}
            if item.value in self._graph.outputs:
                readers.add(_OUTPUT)
            expected[item.value] = readers if item.readers is None else set(item.readers)
        return expected

    def _of_edges(self, plan: Plan) -> Iterator[Found]:
        expected = self._expected(plan)
        integer = set(plan.quantized_nodes)
        for value, maker in self._graph.values():
            wanted, found = expected.get(value, set()), self._found.get(value, set())
            missing = {name for name in wanted - found if not self._explained(name)}
            if missing and maker is not None and maker.name in integer and self._pack.style == "units":
                who = ", ".join(sorted(name or "the graph's output" for name in missing)[:3])
                yield "QDQ104", maker.name, f'its result "{value}" goes in float to {who}'
            else:
                for name in sorted(missing):
                    yield from self._missing(value, self._nodes.get(name))
            rounded = bool(wanted) and self._pack.style == "units"
            for name in sorted(found - wanted):
                if not rounded and name not in self._unwanted:
                    yield from self._unneeded(value, maker, self._nodes.get(name))

    def _explained(self, name: str) -> bool:
        """Whether a layer that reads in float is reported as such already."""
        node = self._nodes.get(name)
        return node is not None and node.op_type in COMPUTE

    def _missing(self, value: str, reader: NodeProto | None) -> Iterator[Found]:
        if reader is None or self._graph.moves(reader):
            return
        if reader.op_type == "Add":
            yield "QDQ107", reader.name, f'its shortcut "{value}" is not rounded'
        elif reader.op_type in POOLS:
            yield "QDQ110", reader.name, f'what it makes is rounded, its input "{value}" is not'
        else:
            yield "QDQ104", reader.name, f'reads "{value}" in float'

    def _unneeded(self, value: str, maker: NodeProto | None, reader: NodeProto | None) -> Iterator[Found]:
        name = reader.name if reader is not None else maker.name if maker is not None else value
        if reader is None:
            yield "QDQ111", name, f'rounds the output "{value}" of the graph'
        elif reader.op_type in self._pack.clips:
            if maker is not None and maker.op_type == reader.op_type == "Relu":
                return  # it changes nothing, and is left out with the pair in front of it
            layer = maker is not None and not self._graph.moves(maker)
            yield "QDQ105" if layer else "QDQ111", name, f'reads "{value}" rounded'
        elif reader.op_type == "Concat" and self._pack.style == "inputs":
            pairs = [self._pairs.get(part) for part in reader.input]
            first = pairs[0]
            if first is None or any(pair is None or not pair.same_numbers(first) for pair in pairs):
                yield "QDQ108", name, f'reads "{value}" rounded, and not all its inputs have that scale'
        elif reader.op_type == "Add" and self._pack.residual == "shortcut":
            yield "QDQ107", name, f'its input "{value}" is rounded and is no shortcut'
        elif reader.op_type in POOLS:
            if reader.output[0] not in self._pairs:
                yield "QDQ110", name, f'its input "{value}" is rounded, what it makes is not'
        elif (reader.op_type in _GATING and maker is not None and self._pack.style == "inputs") or (
            reader.op_type in _GATING
            and maker is not None
            and maker.op_type in COMPUTE
            and self._pack.epilogues
        ):
            yield "QDQ106", name, f'reads "{value}" rounded'
        elif self._graph.moves(reader) and self._pack.style == "inputs":
            return  # it commutes with Q/DQ
        elif self._on_integers(reader):
            yield "QDQ111", name, f'reads "{value}" rounded; better left in float with what is around it'
        else:
            yield "QDQ111", name, f'reads "{value}" rounded, and computes in float'

    def _on_integers(self, node: NodeProto) -> bool:
        """Whether all that a node reads and makes is rounded, so that it may have an integer kernel nevertheless."""
        read = [name for name in node.input if name and name not in self._graph.constants]
        return self._pack.style == "units" and all(name in self._pairs for name in (*read, *node.output))

    def _of_scales(self, plan: Plan) -> Iterator[Found]:
        group = {item.value: item.tied for item in plan.activations if item.tied is not None}
        for node in self._graph.nodes:
            if node.op_type != "Concat" and not self._graph.moves(node):
                continue
            for part in node.input if node.op_type == "Concat" else node.input[:1]:
                for made in node.output:
                    before, behind = self._pairs.get(part), self._pairs.get(made)
                    if (
                        before is not None
                        and behind is not None
                        and group.get(part) is not None
                        and group.get(part) == group.get(made)
                        and not before.same_numbers(behind)
                    ):
                        identifier = "QDQ108" if node.op_type == "Concat" else "QDQ109"
                        yield identifier, node.name, f'"{part}" and "{made}" have different scales'

    def _of_repetition(self) -> Iterator[Found]:
        numbers = {
            pair.quantizer: pair
            for pair in (*self._reading.activations.values(), *self._reading.outputs.values())
        }
        for value, names in self._reading.quantizers.items():
            pairs = [numbers[name] for name in names if name in numbers]
            # Compilers make one of equal pairs.
            alike = all(pair.same_numbers(pairs[0]) for pair in pairs)
            if len(names) > 1 and not (alike and self._pack.style == "inputs"):
                yield "QDQ112", names[1], f'"{value}" is rounded {len(names)} times'
        for name in self._reading.again:
            yield "QDQ112", name, "rounds what is rounded already"
