"""What a quantization did, as the report wants to know it: figures, tables and distributions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from deploycnn.core import Histogram, Json, Table
from deploycnn.graph.model import is_quantized
from deploycnn.quantization.fusion import FusedCounts
from deploycnn.quantization.harm import Unharmed
from deploycnn.quantization.isa import detect_isa
from deploycnn.quantization.layers import Layer
from deploycnn.quantization.packed import Weights
from deploycnn.quantization.packs import RulePack
from deploycnn.quantization.quantize import Options, Quantized, ladder_table
from deploycnn.quantization.statistics import Statistics
from deploycnn.quantization.types import precision_name

#: Layers whose distribution is drawn.
WORST_LAYERS = 6
_DRAWN_BINS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a job did.

    Attributes:
        images: Calibration images that were run.
        compared_on: Which images decided what stays only where it is better: "val" or "calibration".
        integers: Whether this CPU's integer kernels compute what the graph means.
        harm: What timing decided; ``None`` where nothing was timed.
        weights: What the weights take.
    """

    pack: RulePack
    options: Options
    images: int
    compared_on: str
    quantized: Quantized
    ranges: Mapping[str, tuple[float, float]]
    layers: tuple[Layer, ...]
    histograms: tuple[Histogram, ...]
    quantized_nodes: tuple[str, ...]
    kept_float: Mapping[str, str]
    opset: int
    fused: FusedCounts | None
    percentile: float
    integers: bool
    harm: Unharmed | None
    weights: Weights

    @property
    def precision(self) -> str:
        """What the graph is: see ``precision_name``; "fp32" where no integer graph was faster or within the budget."""
        if not is_quantized(self.quantized.model):
            return "fp32"
        return precision_name(self.pack.weight.bits, weights_only=self.pack.style == "weights")

    @property
    def scheme(self) -> str:
        """The scheme in words."""
        activation, weight, sensitive = self.pack.activation, self.pack.weight, self.pack.sensitive_weight
        bits = f"{weight.bits}-bit"
        if sensitive is not None:
            bits = f"{bits} (first, last and depthwise layers {sensitive.bits}-bit)"
        granularity = "per channel" if self.pack.per_channel else "per tensor"
        if self.pack.style == "weights":
            return f"weights only, symmetric {bits} {granularity}, computed in float"
        form = "symmetric" if activation.symmetric else "asymmetric"
        signed = f" (signed ones symmetric {self.pack.signed.dtype})" if self.pack.signed is not None else ""
        return f"QDQ, activations {form} {activation.dtype} per tensor{signed}, weights symmetric {bits} {granularity}"

    def to_json(self) -> Json:
        """The record kept with the artifact: ranges are summed up, the five widest named."""
        calibrator = self.quantized.candidate.calibrator
        detail = f" {self.percentile:g}" if calibrator == "percentile" else ""
        widest = sorted(self.ranges.items(), key=lambda item: item[1][0] - item[1][1])[:5]
        found = {
            "target": self.pack.target,
            "scheme": self.scheme,
            "rewrites": list(self.pack.rewrites),
            "weights": asdict(self.weights),
            "calibrator": f"{calibrator}{detail}",
            "images": self.images,
            "ranges": {"values": len(self.ranges), "widest": {name: list(bounds) for name, bounds in widest}},
            "quantized_nodes": len(self.quantized_nodes),
            "float_compute_nodes": dict(self.kept_float),
            "opset": self.opset,
            "fused": None if self.fused is None else _without_layers(self.fused),
            "isa": asdict(detect_isa()),
            "max_top1_drop": self.options.max_top1_drop,
            **self.quantized.to_json(),
            "do_no_harm": "not timed" if self.harm is None else self.harm.words,
        }
        if not self.integers and self.pack.style == "units":
            found["note"] = "made for CPUs with VNNI; on this one 8-bit products saturate"
        return found

    def tables(self) -> list[Json]:
        """The ladder, the layers and their sensitivities, for the report."""
        found = []
        columns = ("rung", "kept", "top-1, points", "agreement, %", "SQNR, dB", "seconds", "why undone")
        for title, tried in (
            (f"Compared on a few {self.compared_on} images", self.quantized.compared),
            ("Repair ladder, judged on val", self.quantized.tried),
        ):
            if tried:
                found.append(Table(title=title, columns=columns, rows=tuple(ladder_table(tried))))
        if self.harm is not None:
            found.append(_race_rows(self.harm))
        found.append(_weight_rows(self.weights))
        found.append(_layer_rows(self.layers))
        if self.quantized.sensitivities:
            found.append(
                Table(
                    title="Sensitivity: each layer as the only one on integers",
                    columns=("layer", "SQNR, dB", "top-1, points", "gain, ms", "MACs"),
                    rows=tuple(
                        (
                            layer.node,
                            layer.sqnr_db,
                            None if layer.top1_drop is None else -100 * layer.top1_drop,
                            layer.gain_ms,
                            layer.macs,
                        )
                        for layer in sorted(self.quantized.sensitivities, key=lambda item: item.sqnr_db)
                    ),
                )
            )
        return [table.to_json() for table in found]


def _without_layers(fused: FusedCounts) -> Json:
    """The counts; the table of layers has the rest."""
    found = asdict(fused)
    del found["layers"]
    return found


def _race_rows(harm: Unharmed) -> Table:
    rows = [
        (race.batch_size, race.threads, name, it.median_ms, it.ratio, it.low, it.high, it.earlier or None)
        for race in harm.races
        for name, it in race.speeds.items()
    ]
    return Table(
        title=f"Integers against float in {harm.runtime}",
        columns=("batch", "threads", "graph", "median, ms", "ratio", "low", "high", "of an earlier run"),
        rows=tuple(rows),
    )


def _weight_rows(weights: Weights) -> Table:
    stored, real = weights.stored_bytes, weights.float_bytes
    return Table(
        title="Size of the quantized weights",
        columns=("stored, bytes", "float32, bytes", "ratio", "4-bit share"),
        rows=((stored, real, real / stored if stored else None, weights.four_bit_share),),
    )


def _layer_rows(layers: Iterable[Layer]) -> Table:
    return Table(
        title="Layers",
        columns=(
            "layer", "operator", "precision", "low", "high", "SQNR, dB", "fused", "MACs", "INT8, ms",
            "float, ms", "why float",
        ),
        rows=tuple(
            (
                layer.node, layer.op, layer.precision, *(layer.range or (None, None)), layer.sqnr_db, layer.fused,
                layer.macs, layer.int8_ms, layer.float_ms, layer.why,
            )
            for layer in layers
        ),
    )  # fmt: skip


def worst_histograms(
    ranges: Mapping[str, tuple[float, float]],
    seen: Mapping[str, Statistics],
    noise: Mapping[str, float],
) -> tuple[Histogram, ...]:
    """Distributions of the values with the least signal-to-noise ratio."""
    worst = sorted((name for name in noise if name in seen), key=lambda name: noise[name])[:WORST_LAYERS]
    found = []
    for name in worst:
        drawn = _drawn(name, seen[name], ranges[name])
        if drawn is not None:
            found.append(drawn)
    return tuple(found)


def _drawn(name: str, statistics: Statistics, bounds: tuple[float, float]) -> Histogram | None:
    """The occupied part of a summary's histogram, in few bins."""
    counts = statistics.counts
    if counts is None or not counts.any():
        return None
    middle = len(counts) // 2
    occupied = np.flatnonzero(counts)
    first, last = int(occupied[0]), int(occupied[-1]) + 1
    step = max(1, -(-(last - first) // _DRAWN_BINS))
    first -= first % step
    last += -last % step
    padded = np.zeros(last - first, dtype=np.int64)
    stop = min(last, len(counts))
    padded[: stop - first] = counts[first:stop]
    width = statistics.bin_width
    return Histogram(
        title=name,
        start=(first - middle) * width,
        stop=(last - middle) * width,
        counts=tuple(int(count) for count in padded.reshape(-1, step).sum(axis=1)),
        low=bounds[0],
        high=bounds[1],
    )
