"""The per-layer table: what became of every convolution and matrix product, and how much each one hurts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from deploycnn.core import Json
from deploycnn.graph.model import consumers, producers
from deploycnn.graph.observe import exposing
from deploycnn.graph.parity import evaluator
from deploycnn.quantization.judge import decibels
from deploycnn.quantization.structure import COMPUTE
from deploycnn.quantization.types import Ranges

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

#: So many layers are named in a warning.
_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One convolution or matrix product.

    Attributes:
        node: Its name.
        op: Its operator.
        precision: "int8", "w4a8" (4-bit weights), "w8" or "w4" (weights only) or "float".
        why: Why it is float; empty where it is not.
        range: Calibrated range of the value that leaves it for other layers (behind its activation).
        sqnr_db: Signal-to-quantization-noise ratio of that value, everything before it quantized too.
        fused: Whether the runtime made one integer kernel of it; ``None`` where that is not known.
        macs: Multiply-accumulates for one image.
        int8_ms: Time in the quantized graph, on the target; ``None`` where it was not measured.
        float_ms: Time in the float graph.
    """

    node: str
    op: str
    precision: str
    why: str
    range: tuple[float, float] | None
    sqnr_db: float | None
    fused: bool | None
    macs: int
    int8_ms: float | None
    float_ms: float | None

    def to_json(self) -> Json:
        """A row of the record."""
        return asdict(self)


def layer_table(
    model: ModelProto,
    *,
    kept_float: Mapping[str, str],
    precisions: Mapping[str, str],
    ranges: Ranges,
    sqnr_db: Mapping[str, float],
    fused: Mapping[str, bool],
    macs: Mapping[str, int],
    int8_ms: Mapping[str, float],
    float_ms: Mapping[str, float],
) -> tuple[Layer, ...]:
    """Rows in graph order.

    Args:
        model: The float graph, nodes named.
        kept_float: Layers that stayed float -> why.
        precisions: Of the others; "int8" where it is not said.
        ranges: By value.
        sqnr_db: By value, see ``value_sqnr``.
        fused: By layer.
        macs: By layer.
        int8_ms: By layer, in the quantized graph.
        float_ms: By layer, in the float graph.
    """
    rows = []
    read_by = consumers(model.graph)
    for node in model.graph.node:
        if node.op_type not in COMPUTE:
            continue
        values = leaving(node, read_by)[::-1]
        value = next((name for name in values if name in ranges), None)
        rows.append(
            Layer(
                node=node.name,
                op=node.op_type,
                precision="float" if node.name in kept_float else precisions.get(node.name, "int8"),
                why=kept_float.get(node.name, ""),
                range=ranges[value] if value is not None else None,
                sqnr_db=next((sqnr_db[name] for name in values if name in sqnr_db), None),
                fused=fused.get(node.name),
                macs=macs.get(node.name, 0),
                int8_ms=int8_ms.get(node.name),
                float_ms=float_ms.get(node.name),
            )
        )
    return tuple(rows)


def unfused_layers(layers: Iterable[Layer], runtime: str) -> str:
    """What should be known where the runtime computes layers in float that are integers in the file; empty if none."""
    integer = [row for row in layers if row.precision in {"int8", "w4a8"}]
    names = [row.node for row in integer if row.fused is False]
    if not names:
        return ""
    shown = ", ".join(f'"{name}"' for name in names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    return (
        f"{len(names)} of {len(integer)} integer layers are computed in float by {runtime}: {shown}; "
        "`activations: auto` takes formats that it fuses, and `deploycnn lint` tells what is in the way"
    )


def leaving(node: NodeProto, read_by: Mapping[str, Sequence[NodeProto]]) -> list[str]:
    """The values by which a layer's result leaves it: its output, and that of an activation that follows alone.

    Args:
        node: The layer.
        read_by: ``graph.model.consumers`` of its graph.
    """
    found = [node.output[0]]
    while True:
        readers = read_by.get(found[-1], [])
        if len(readers) != 1 or readers[0].op_type not in {"Relu", "Clip"}:
            return found
        found.append(readers[0].output[0])


def value_sqnr(
    model: ModelProto,
    quantized: ModelProto,
    values: Collection[str],
    images: Iterable[npt.NDArray[np.float32]],
    *,
    threads: int = 1,
) -> dict[str, float]:
    """Signal-to-quantization-noise ratio of values of the float graph, in decibels.

    A value is taken behind its own rounding where the quantized graph rounds it. Values that the quantized
    graph no longer has are left out.

    Args:
        model: The float graph.
        quantized: The Q/DQ graph made from it.
        values: Names of float values.
        images: A few batches; both graphs see them.
        threads: CPU threads.
    """
    held = _rounded(quantized, values)
    if not held:
        return {}
    names, others = list(held), [held[name] for name in held]
    reference = evaluator(exposing(model, names), threads=threads, outputs=names)
    candidate = evaluator(exposing(quantized, others), threads=threads, outputs=others)
    powers = np.zeros((len(names), 2))
    for batch in images:
        # One by one: all values of both graphs are held at once.
        for image in np.split(batch, len(batch)):
            for row, (right, found) in enumerate(zip(reference(image), candidate(image), strict=True)):
                signal = right.ravel().astype(np.float64)
                noise = signal - found.ravel()
                powers[row] += signal @ signal, noise @ noise
    return {name: decibels(float(row[0]), float(row[1])) for name, row in zip(names, powers, strict=True)}


def _rounded(quantized: ModelProto, values: Collection[str]) -> dict[str, str]:
    """Where the quantized graph holds each of ``values``: behind the DequantizeLinear of its own Q/DQ, or as it is.

    Values that it no longer has are left out.
    """
    present = {item.name for item in quantized.graph.input} | producers(quantized.graph).keys()
    read_by = consumers(quantized.graph)
    return {
        value: next(
            (
                str(second.output[0])
                for reader in read_by.get(value, [])
                if reader.op_type == "QuantizeLinear"
                for second in read_by.get(reader.output[0], [])
                if second.op_type == "DequantizeLinear"
            ),
            value,
        )
        for value in values
        if value in present
    }
