"""What the builder made of a graph: fused nodes, precision got against precision asked for, reformats, time.

The graph asks for a precision by its types (strong typing). Whether it is got is another matter: a convolution
between Q/DQ nodes may have no INT8 kernel for its shape, or a value that is not rounded on one side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from deploycnn.core import Json
from deploycnn.engines.layers import Layer, computes
from deploycnn.errors import RecipeError, nearest

if TYPE_CHECKING:
    from onnx import ModelProto

_COMPARE = re.compile(r"\s*([a-z0-9_]+)\s*(<=|>=|==|!=|<|>)\s*([-+.\deE]+)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A convolution or matrix product of the ONNX graph.

    Attributes:
        node: Its name.
        operator: "Conv", "Gemm", ...
        precision: What the graph's types ask for.
        macs: For one image; ``None`` where unknown.
    """

    node: str
    operator: str
    precision: str
    macs: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A layer as the audit tells it."""

    name: str
    kind: str
    onnx_nodes: tuple[str, ...]
    asked: str
    executed: str
    macs: int
    tactic: str
    reformat: bool
    time_ms: float | None

    @property
    def differs(self) -> bool:
        """Whether it runs in another precision than the graph asked for."""
        return bool(self.asked and self.executed and self.asked != self.executed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """An engine's layers, and the sums over them.

    Attributes:
        rows: In the order in which they run.
        unmatched: ONNX nodes with MACs that no layer says it computes, and whose place does not tell it either.
        shares: Precision -> share of the MACs that ran in it.
        as_asked: Share of the MACs that ran in the precision that the graph asked for.
    """

    rows: tuple[Row, ...]
    unmatched: tuple[str, ...] = ()
    shares: Mapping[str, float] = field(default_factory=dict)
    as_asked: float = 1.0

    @property
    def reformats(self) -> tuple[Row, ...]:
        """Layers that only move values."""
        return tuple(row for row in self.rows if row.reformat)

    @property
    def total_ms(self) -> float | None:
        """Time of all layers, where it was measured."""
        times = [row.time_ms for row in self.rows if row.time_ms is not None]
        return sum(times) if times else None

    @property
    def reformat_ms(self) -> float | None:
        """Time of the reformats, where it was measured."""
        if self.total_ms is None:
            return None
        return sum(row.time_ms or 0.0 for row in self.reformats)

    def metrics(self) -> dict[str, float]:
        """What thresholds are written against."""
        found = {f"{precision}_macs": share for precision, share in self.shares.items()}
        for precision in ("int8", "fp16", "bf16", "fp32", "tf32", "fp8"):
            found.setdefault(f"{precision}_macs", 0.0)
        found |= {
            "as_asked": self.as_asked,
            "reformats": float(len(self.reformats)),
            "layers": float(len(self.rows)),
            "unmatched": float(len(self.unmatched)),
        }
        if self.total_ms is not None and self.reformat_ms is not None:
            found |= {"time_ms": self.total_ms, "reformat_ms": self.reformat_ms}
        return found

    def census(self) -> str:
        """One sentence: "92% of MACs ran INT8, 8% FP16; 3 reformats cost 0.04 ms"."""
        shares = sorted(self.shares.items(), key=lambda item: -item[1])
        parts = [f"{_percent(share)} {precision.upper()}" for precision, share in shares if share > 0]
        macs = f"{parts[0].replace(' ', ' of MACs ran ', 1)}" if parts else "no MACs found"
        macs = ", ".join([macs, *parts[1:]])
        count = len(self.reformats)
        cost = "" if self.reformat_ms is None else f" cost {self.reformat_ms:.2f} ms"
        differing = sum(row.differs for row in self.rows)
        asked = (
            "all in the precision that the graph asked for"
            if self.as_asked > 1 - 1e-9
            else f"{differing} layer{'s' * (differing != 1)} not in the precision that the graph asked for"
        )
        return f"{macs}; {asked}; {count} reformat{'s' * (count != 1)}{cost}"

    def to_json(self) -> Json:
        """As plain values."""
        return {
            "census": self.census(),
            "metrics": self.metrics(),
            "unmatched": list(self.unmatched),
            "layers": [asdict(row) | {"differs": row.differs} for row in self.rows],
        }


def _percent(share: float) -> str:
    rounded = round(100 * share)
    if 0 < share < 1 and rounded in (0, 100):
        return f"{100 * share:.1f}%"
    return f"{rounded}%"


def asked_of(model: ModelProto) -> list[Asked]:
    """Precision that the types of an ONNX graph ask for, for each convolution and matrix product."""
    from onnx import TensorProto

    from deploycnn.graph.model import initializers, producers, value_types
    from deploycnn.models.onnx_macs import batch_of, known_shapes, node_macs, with_shapes

    typed = with_shapes(model)
    shapes = known_shapes(typed)
    made, constants = producers(model.graph), initializers(model.graph)
    types = {name: value.type.tensor_type.elem_type for name, value in value_types(typed).items()}
    types |= {name: tensor.data_type for name, tensor in constants.items()}
    names: dict[int, str] = {
        TensorProto.FLOAT: "fp32",
        TensorProto.FLOAT16: "fp16",
        TensorProto.BFLOAT16: "bf16",
    }

    def rounded(value: str) -> bool:
        """Whether a value comes out of integers, through nodes that only move it."""
        while value in made and made[value].op_type in (
            "Reshape",
            "Transpose",
            "Flatten",
            "Squeeze",
            "Unsqueeze",
            "Cast",
        ):
            value = made[value].input[0]
        return value in made and made[value].op_type == "DequantizeLinear"

    batch = batch_of(typed, shapes)
    found = []
    for node in typed.graph.node:
        macs = node_macs(node, shapes)
        if macs == 0:
            continue
        integers = len(node.input) > 1 and rounded(node.input[0]) and rounded(node.input[1])
        precision = "int8" if integers else names.get(types.get(node.input[0], 0), "")
        found.append(
            Asked(
                node=node.name,
                operator=node.op_type,
                precision=precision,
                macs=None if macs is None else macs // batch,
            )
        )
    return found


def audit(layers: Sequence[Layer], asked: Sequence[Asked], times: Mapping[str, float] | None = None) -> Audit:
    """Match layers with the graph that they were made from.

    Args:
        layers: From ``layers.parse``.
        asked: From :func:`asked_of`.
        times: Layer name -> milliseconds, where the engine was profiled.
    """
    products = products_of(layers, asked)
    matched = {item.node for items in products.values() for item in items}
    unmatched = [item.node for item in asked if item.node not in matched]
    rows = tuple(_row(layer, products.get(layer.name, ()), times or {}) for layer in layers)
    total = sum(row.macs for row in rows)
    macs: dict[str, int] = {}
    for row in rows:
        if row.macs:
            macs[row.executed] = macs.get(row.executed, 0) + row.macs
    kept = sum(row.macs for row in rows if not row.differs)
    return Audit(
        rows=rows,
        unmatched=tuple(unmatched),
        shares={precision: count / total for precision, count in macs.items()},
        as_asked=kept / total if total else 1.0,
    )


def products_of(layers: Sequence[Layer], asked: Sequence[Asked]) -> dict[str, list[Asked]]:
    """Layer name -> the convolutions and matrix products that it computes, where it or its place tells them."""
    found: dict[str, list[Asked]] = {}
    for item, owner in zip(asked, _by_place(layers, [_owner(layers, item) for item in asked]), strict=True):
        if owner is not None:
            found.setdefault(owner.name, []).append(item)
    return found


def _owner(layers: Sequence[Layer], item: Asked) -> Layer | None:
    """The layer that multiplies: a node's name also stands on kernels that only prepare or finish its values."""
    candidates = [layer for layer in layers if item.node in layer.onnx_nodes and not layer.is_reformat]
    for chosen in (
        [layer for layer in candidates if computes(layer) and not layer.pieces],
        [layer for layer in candidates if computes(layer)],
        [layer for layer in candidates if layer.constants],
        candidates,
    ):
        if chosen:
            named = [layer for layer in chosen if layer.name.startswith(item.node)]
            return (named or chosen)[0]
    return None


def _by_place(layers: Sequence[Layer], owners: Sequence[Layer | None]) -> list[Layer | None]:
    """Owners of the nodes that no layer names, where the order leaves no choice.

    A convolution of a single pixel becomes a generated matrix product, which loses its metadata. Between the owners of
    the nodes before and after, there must be as many nameless layers that compute as there are nodes without an owner.
    """
    found = list(owners)
    places = {layer.name: place for place, layer in enumerate(layers)}
    known = [-1, *(index for index, owner in enumerate(owners) if owner is not None), len(owners)]
    for before, after in pairwise(known):
        start, end = (owners[index] if 0 <= index < len(owners) else None for index in (before, after))
        first = places[start.name] if start else -1
        last = places[end.name] if end else len(layers)
        nameless = [layer for layer in layers[first + 1 : last] if computes(layer) and not layer.onnx_nodes]
        if len(nameless) == after - before - 1:
            found[before + 1 : after] = nameless
    return found


def _row(layer: Layer, asked: Sequence[Asked], times: Mapping[str, float]) -> Row:
    executed = layer.precision
    wanted = {item.precision for item in asked}
    # TF32 is what the setting `tf32` lets float32 become.
    if executed == "tf32":
        wanted = {"tf32" if precision == "fp32" else precision for precision in wanted}
    return Row(
        name=layer.name,
        kind=layer.kind,
        onnx_nodes=layer.onnx_nodes,
        asked="+".join(sorted(wanted)),
        executed=executed,
        macs=sum(item.macs or 0 for item in asked),
        tactic=layer.tactic,
        reformat=layer.is_reformat,
        time_ms=times.get(layer.name),
    )


@dataclass(frozen=True, slots=True)
class Threshold:
    """A condition under which the audit fails, such as ``int8_macs<0.9``."""

    metric: str
    comparison: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """Read ``metric<bound``.

        Raises:
            RecipeError: it is written otherwise.
        """
        found = _COMPARE.fullmatch(text)
        try:
            if found:
                return cls(found[1], found[2], float(found[3]))
        except ValueError:
            pass
        raise RecipeError(
            f'--fail-on "{text}": write a metric, a comparison and a number, such as int8_macs<0.9'
        )

    def holds(self, metrics: Mapping[str, float]) -> bool:
        """Whether the condition is met, that is, the audit fails.

        Raises:
            RecipeError: there is no such metric; names the nearest.
        """
        if self.metric not in metrics:
            timed = " (times need --times or --measure)" if self.metric.endswith("_ms") else ""
            raise RecipeError(
                f'--fail-on {self}: no metric "{self.metric}"{timed}; {nearest(self.metric, metrics)}'
            )
        value = metrics[self.metric]
        return {
            "<": value < self.bound,
            "<=": value <= self.bound,
            ">": value > self.bound,
            ">=": value >= self.bound,
            "==": value == self.bound,
            "!=": value != self.bound,
        }[self.comparison]

    def __str__(self) -> str:
        return f"{self.metric}{self.comparison}{self.bound:g}"
