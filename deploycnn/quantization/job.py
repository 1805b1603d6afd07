"""A quantization from file to file, with all that the report wants to know of it: what the passes share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from deploycnn.core import Histogram, Json, Table
from deploycnn.errors import PassRequirementError
from deploycnn.graph.metadata import get_metadata, set_metadata
from deploycnn.graph.model import check_onnx, is_quantized, load_onnx, opset_of, save_onnx
from deploycnn.graph.probe import calibration_batches
from deploycnn.models.onnx_macs import known_shapes, node_macs, with_shapes
from deploycnn.quantization.engine import Engine
from deploycnn.quantization.fusion import census
from deploycnn.quantization.isa import detect_isa
from deploycnn.quantization.judge import Judge, val_batches
from deploycnn.quantization.layers import Layer, layer_table, value_sqnr
from deploycnn.quantization.packs import RulePack
from deploycnn.quantization.placement import place
from deploycnn.quantization.quantize import Options, Quantized, Quantizer, Remedy, choose, ladder_table
from deploycnn.quantization.settings import FusedCounts
from deploycnn.quantization.static import check_exclude, prepare
from deploycnn.quantization.statistics import Statistics

if TYPE_CHECKING:
    from onnx import ModelProto

    from deploycnn.data.base import Data

#: Validation images on which layers are judged one by one: enough for a ratio of powers, not for top-1.
QUICK_IMAGES = 128
#: Images on which each layer's noise is measured for the table.
TABLE_IMAGES = 16
#: Layers whose distribution is drawn.
WORST_LAYERS = 6
_DRAWN_BINS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A float model to quantize.

    Attributes:
        source: The float file.
        output: Where the quantized file goes.
        pack: The target's rules.
        options: What is asked.
        data: Images: training ones calibrate, validation ones judge.
        calibration_images: How many calibrate.
        judge_images: How many judge; all where ``None``.
        percentile: For the calibrator of that name.
        remedies: By name.
        seed: Of the choice of images.
        threads: CPU threads.
        progress: Told of the share done, and what is being done.
    """

    source: Path
    output: Path
    pack: RulePack
    options: Options
    data: Data
    calibration_images: int = 512
    judge_images: int | None = None
    percentile: float = 99.999
    remedies: Callable[[Engine], Mapping[str, Remedy]] = lambda _: {}
    seed: int = 0
    threads: int = 1
    progress: Callable[[float, float, str], None] = lambda _done, _total, _message: None

    def run(self) -> Record:
        """Write the quantized model.

        Raises:
            PassRequirementError: the model is already quantized or not float32, or holds nothing to quantize;
                an excluded node does not exist; no images; NaN or infinity in an image or a value (named).
            ArtifactError: the file cannot be read.
            RuntimeUnavailable: onnxruntime is not installed.
        """
        original = load_onnx(self.source)
        if is_quantized(original):
            raise PassRequirementError(f"{self.source}: already quantized; give the float32 model")
        model = prepare(original, self.pack)
        check_exclude(original, model, self.options.exclude)
        plan = place(model, self.pack, self.options.exclude)
        if not plan.quantized_nodes and not plan.weights:
            raise PassRequirementError(
                f"{self.source}: no convolution or matrix product to quantize; leave the pass out"
            )
        total = min(self.calibration_images, len(self.data.dataset.train))
        engine = Engine(
            self.pack,
            self._calibration,
            percentile=self.percentile,
            threads=self.threads,
            progress=lambda done: self.progress(done, total, "calibrating"),
        )
        macs = layer_macs(model)
        judge = self._judge(model, self.judge_images) if self.options.max_top1_drop is not None else None
        quick = self._judge(model, QUICK_IMAGES) if judge and self.options.ladder else None
        found = Quantizer(
            model,
            engine,
            judge=judge,
            quick_judge=quick,
            remedies={"percentile": choose("percentile"), "mse": choose("mse"), **self.remedies(engine)},
            macs=macs,
            tell=lambda message: self.progress(0, 1, message),
        ).run(self.options)
        set_metadata(found.model, get_metadata(original))
        check_onnx(found.model, f"{self.source}: its quantized graph")
        save_onnx(found.model, self.output)
        return self._record(model, engine, found, macs)

    def _calibration(self) -> Iterable[npt.NDArray[np.float32]]:
        return calibration_batches(self.data, self.calibration_images, self.seed)

    @property
    def integers(self) -> bool:
        """Whether this CPU's integer kernels compute what the graph means."""
        return self.pack.style == "units" and (self.pack.weight.reduced or not detect_isa().saturates)

    def _judge(self, model: ModelProto, images: int | None) -> Judge:
        return Judge(
            model, val_batches(self.data, images, self.seed), threads=self.threads, integers=self.integers
        )

    def _record(self, model: ModelProto, engine: Engine, found: Quantized, macs: Mapping[str, int]) -> Record:
        candidate = found.candidate
        plan = engine.plan(candidate)
        seen = engine.calibration(candidate.model, plan)
        ranges = engine.ranges(candidate)
        values = [name for name in ranges if name in seen.values]
        self.progress(0, 1, "measuring the noise of each layer")
        batches = val_batches(self.data, TABLE_IMAGES, self.seed)
        noise = value_sqnr(
            model, found.model, values, (images for images, _ in batches()), threads=self.threads
        )
        fused = census(self.output, self.pack.target)
        layers = layer_table(
            candidate.model,
            kept_float=plan.kept_float,
            ranges=ranges,
            sqnr_db=noise,
            fused=fused.layers if fused is not None else {},
            macs=macs,
            int8_ms={},
            float_ms={},
        )
        return Record(
            pack=self.pack,
            options=self.options,
            images=seen.images,
            quantized=found,
            ranges=ranges,
            layers=layers,
            histograms=_histograms(ranges, seen.values, noise),
            quantized_nodes=len(plan.quantized_nodes),
            kept_float=plan.kept_float,
            opset=opset_of(found.model),
            fused=fused,
            percentile=self.percentile,
            integers=self.integers,
        )


def layer_macs(model: ModelProto) -> dict[str, int]:
    """Multiply-accumulates of every node for one image, where there are any."""
    typed = with_shapes(model)
    shapes = known_shapes(typed)
    counts = {node.name: node_macs(node, shapes) for node in typed.graph.node}
    return {name: count for name, count in counts.items() if count}


def _histograms(
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a job did.

    Attributes:
        images: Calibration images that were run.
        integers: Whether this CPU's integer kernels compute what the graph means.
    """

    pack: RulePack
    options: Options
    images: int
    quantized: Quantized
    ranges: Mapping[str, tuple[float, float]]
    layers: tuple[Layer, ...]
    histograms: tuple[Histogram, ...]
    quantized_nodes: int
    kept_float: Mapping[str, str]
    opset: int
    fused: FusedCounts | None
    percentile: float
    integers: bool

    @property
    def scheme(self) -> str:
        """The scheme in words."""
        activation, weight = self.pack.activation, self.pack.weight
        form = "symmetric" if activation.symmetric else "asymmetric"
        granularity = "per channel" if self.pack.per_channel else "per tensor"
        return (
            f"QDQ, activations {form} {activation.dtype} per tensor, "
            f"weights symmetric {weight.bits}-bit {granularity}"
        )

    def to_json(self) -> Json:
        """The record kept with the artifact: ranges are summed up, the five widest named."""
        calibrator = self.quantized.candidate.calibrator
        detail = f" {self.percentile:g}" if calibrator == "percentile" else ""
        widest = sorted(self.ranges.items(), key=lambda item: item[1][0] - item[1][1])[:5]
        found = {
            "target": self.pack.target,
            "scheme": self.scheme,
            "calibrator": f"{calibrator}{detail}",
            "images": self.images,
            "ranges": {"values": len(self.ranges), "widest": {name: list(bounds) for name, bounds in widest}},
            "quantized_nodes": self.quantized_nodes,
            "float_compute_nodes": dict(self.kept_float),
            "opset": self.opset,
            "fused": None if self.fused is None else _without_layers(self.fused),
            "isa": asdict(detect_isa()),
            **self.quantized.to_json(),
        }
        if not self.integers and self.pack.style == "units":
            found["note"] = "made for CPUs with VNNI; on this one 8-bit products saturate"
        return found

    def tables(self) -> list[Json]:
        """The ladder, the layers and their sensitivities, for the report."""
        found = []
        if self.quantized.tried:
            columns = ("rung", "kept", "top-1, points", "agreement, %", "SQNR, dB", "seconds", "why undone")
            rows = tuple(ladder_table(self.quantized.tried))
            found.append(Table(title="Repair ladder, judged on val", columns=columns, rows=rows))
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
