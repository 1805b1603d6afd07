"""A quantization from file to file, with all that the report wants to know of it: what the passes share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from deploycnn.core import Stopwatch
from deploycnn.errors import PassRequirementError, TimingUnavailable
from deploycnn.graph.metadata import get_metadata, set_metadata
from deploycnn.graph.model import check_onnx, is_quantized, load_onnx, opset_of, save_onnx
from deploycnn.models.onnx_macs import known_shapes, node_macs, with_shapes
from deploycnn.quantization.engine import Engine, Images
from deploycnn.quantization.fusion import census
from deploycnn.quantization.harm import Unharmed, do_no_harm
from deploycnn.quantization.isa import detect_isa
from deploycnn.quantization.judge import Judge, Labelled, images_at_once
from deploycnn.quantization.layers import layer_table, unfused_layers, value_sqnr
from deploycnn.quantization.packed import measure, packed
from deploycnn.quantization.packs import RulePack
from deploycnn.quantization.placement import place
from deploycnn.quantization.preparation import check_constants, check_exclude, prepare
from deploycnn.quantization.quantize import Options, Quantized, Quantizer
from deploycnn.quantization.record import Record, worst_histograms
from deploycnn.quantization.remedies import Remedy, remedies
from deploycnn.quantization.structure import COMPUTE
from deploycnn.quantization.types import precision_name

if TYPE_CHECKING:
    from onnx import ModelProto

#: Images on which layers are judged one by one, and ranges compared: enough for a ratio of powers, not for top-1.
QUICK_IMAGES = 128
#: And no more than give outputs of this size.
QUICK_BYTES = 2**26
EIGHT_BITS = 8
#: Images on which each layer's noise is measured for the table.
TABLE_IMAGES = 16


@dataclass(slots=True, kw_only=True)
class Job:
    """A float model to quantize.

    Attributes:
        source: The float file.
        output: Where the quantized file goes.
        pack: The target's rules.
        options: What is asked.
        images: Calibration images.
        total: How many these are.
        judging: From a number of images (``None``: all) to labelled validation images that judge; ``None`` where there
            are none: no layer's noise is measured then, and what is compared for noise is on calibration images.
        judge_images: How many judge; all where ``None``.
        percentile: For the calibrator of that name.
        further_remedies: By name, for one engine and the float graph: what needs more than this room has.
        stopwatch: Times graphs on the target; ``None`` where it cannot run here, or shall not decide.
        scratch: Folder for candidates that are timed.
        seed: Of what remedies learn.
        threads: CPU threads.
        progress: Told of the share done, and what is being done.
        warn: Told what could not be timed (an engine that is not built here is no reason to leave integers out), and
            which integer layers the runtime computes in float.
    """

    source: Path
    output: Path
    pack: RulePack
    options: Options
    images: Images
    total: int
    judging: Callable[[int | None], Callable[[], Iterable[Labelled]]] | None = None
    judge_images: int | None = None
    percentile: float = 99.999
    further_remedies: Callable[[Engine, ModelProto], Mapping[str, Remedy]] = lambda _engine, _model: {}
    stopwatch: Stopwatch | None = None
    scratch: Path = Path()
    seed: int = 0
    threads: int = 1
    progress: Callable[[float, float, str], None] = lambda _done, _total, _message: None
    warn: Callable[[str], None] = lambda _message: None

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
        check_constants(model)
        check_exclude(original, model, self.options.exclude)
        plan = place(model, self.pack, self.options.exclude)
        if not plan.quantized_nodes and not plan.weights:
            raise PassRequirementError(
                f"{self.source}: no convolution or matrix product to quantize; leave the pass out"
            )
        engine = Engine(
            self.pack,
            self.images,
            percentile=self.percentile,
            mean_maps="correct_bias" in self.options.remedies,
            threads=self.threads,
            progress=lambda done: self.progress(done, self.total, "calibrating"),
        )
        macs = layer_macs(model)
        # First: it takes the most memory, and nothing is held beside it yet.
        engine.calibration(model, plan)
        judged = self.options.max_top1_drop is not None
        judge = self._judge(model, self.judge_images) if judged else None
        quick = None
        if self.options.if_better or (judge and self.options.ladder):
            quick = Judge(
                model,
                self._few_images,
                threads=self.threads,
                integers=self.integers,
                most_bytes=QUICK_BYTES,
            )
        found = Quantizer(
            model,
            engine,
            judge=judge,
            quick_judge=quick,
            remedies={
                **remedies(engine, seed=self.seed, tell=self.progress),
                **self.further_remedies(engine, model),
            },
            gains_ms=self._gains_ms,
            macs=macs,
            tell=lambda message: self.progress(0, 1, message),
        ).run(self.options)
        harm = None
        try:
            harm = self._do_no_harm(model, engine, found, judge)
        except TimingUnavailable as error:
            self._untimed(error)
        if harm is not None and harm.ship_float:
            found.model = original
            # The integer graph was judged; what ships is what it was compared with.
            found.judgement = found.met = None
        shipped = packed(found.model)
        set_metadata(shipped, get_metadata(original))
        check_onnx(shipped, f"{self.source}: its quantized graph")
        save_onnx(shipped, self.output)
        return self._record(engine, found, macs, harm)

    def _do_no_harm(
        self, model: ModelProto, engine: Engine, found: Quantized, judge: Judge | None
    ) -> Unharmed | None:
        """Leave in float what is measured slower on integers; nothing computes on them with integer weights only."""
        if self.stopwatch is None or self.pack.style == "weights":
            return None
        candidate = found.candidate

        def build(kept: Collection[str]) -> ModelProto:
            return packed(engine.build(replace(candidate, keep_float=candidate.keep_float | frozenset(kept))))

        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            harm = do_no_harm(
                self.source,
                model,
                build,
                self.stopwatch,
                Path(folder),
                keep_float=candidate.keep_float,
                # Trained weights and scales belong to one placement.
                whole=candidate.graph is not None,
                tell=lambda message: self.progress(0, 1, message),
            )
        if harm.keep_float and not harm.ship_float:
            found.candidate = replace(candidate, keep_float=candidate.keep_float | harm.keep_float)
            found.model = engine.build(found.candidate)
            if judge is not None and self.options.max_top1_drop is not None:
                found.judgement = judge(found.model)
                found.met = found.judgement.within(self.options.max_top1_drop)
        return harm

    def _gains_ms(self, quantized: ModelProto) -> Mapping[str, float] | None:
        """Float time minus integer time of each layer on the target."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            path = Path(folder) / "int8.onnx"
            save_onnx(packed(quantized), path)
            after, before = self._layer_ms(path), self._layer_ms(self.source)
        if self.stopwatch is None:
            return None
        return {name: before[name] - after[name] for name in after if name in before}

    def _layer_ms(self, path: Path) -> Mapping[str, float]:
        """Time of each node on the target; nothing where it cannot be told."""
        if self.stopwatch is None:
            return {}
        batch_size, threads = self.stopwatch.settings[0]
        try:
            return self.stopwatch.layer_ms(path, batch_size=batch_size, threads=threads)
        except TimingUnavailable as error:
            self._untimed(error)
            return {}

    def _untimed(self, error: TimingUnavailable) -> None:
        """Go on without timing: what failed once would fail again."""
        self.stopwatch = None
        self.warn(f"do_no_harm: nothing was timed, so integers may be slower than float: {error}")

    @property
    def integers(self) -> bool:
        """Whether this CPU's integer kernels compute what the graph means."""
        formats = {self.pack.weight, self.pack.sensitive_weight or self.pack.weight}
        exact = all(number.reduced or number.bits < EIGHT_BITS for number in formats)
        return self.pack.style == "units" and (exact or not detect_isa().saturates)

    def _judge(self, model: ModelProto, images: int | None) -> Judge:
        if self.judging is None:
            raise PassRequirementError(
                "an accuracy budget needs validation images; give data with a val split"
            )
        judge = Judge(model, self.judging(images), threads=self.threads, integers=self.integers)
        if judge.top1 is None:
            raise PassRequirementError(
                f"{self.source}: a budget is a drop of top-1, and this model's first output is no row of class scores; "
                "leave out max_top1_drop and auto"
            )
        return judge

    def _few_images(self) -> Iterator[Labelled]:
        """Images to compare candidates on by their noise, which needs no classes."""
        if self.judging is not None:
            yield from self.judging(QUICK_IMAGES)()
            return
        left = QUICK_IMAGES
        for batch in self.images():
            images = batch[:left]
            size = images_at_once(*images.shape[2:])
            for start in range(0, len(images), size):
                yield images[start : start + size], None
            left -= len(images)
            if not left:
                return

    def _record(
        self,
        engine: Engine,
        found: Quantized,
        macs: Mapping[str, int],
        harm: Unharmed | None,
    ) -> Record:
        candidate = found.candidate
        plan = engine.plan(candidate)
        seen = engine.calibration(candidate.model, plan)
        ranges = engine.ranges(candidate)
        values = [name for name in ranges if name in seen.values]
        noise: dict[str, float] = {}
        if self.judging is not None and is_quantized(found.model):
            self.progress(0, 1, "measuring the noise of each layer")
            batches = self.judging(TABLE_IMAGES)()
            # The graph that was rounded is the reference: equalized channels have other scales than the file's.
            noise = value_sqnr(
                candidate.model, found.model, values, (images for images, _ in batches), threads=self.threads
            )
        fused = census(self.output, self.pack.target)
        kept_float = _why_float(candidate.model, plan.kept_float, found, harm)
        layers = layer_table(
            candidate.model,
            kept_float=kept_float,
            precisions={
                item.node: precision_name(item.number.bits, weights_only=self.pack.style == "weights")
                for item in plan.weights
            },
            ranges=ranges,
            sqnr_db=noise,
            fused=fused.layers if fused is not None else {},
            macs=macs,
            int8_ms=self._layer_ms(self.output),
            float_ms=self._layer_ms(self.source),
        )
        if fused is not None and (words := unfused_layers(layers, fused.runtime)):
            self.warn(words)
        return Record(
            harm=harm,
            pack=self.pack,
            options=self.options,
            images=seen.images,
            compared_on="calibration" if self.judging is None else "val",
            quantized=found,
            ranges=ranges,
            layers=layers,
            histograms=worst_histograms(ranges, seen.values, noise),
            quantized_nodes=plan.quantized_nodes if is_quantized(found.model) else (),
            kept_float=kept_float,
            opset=opset_of(found.model),
            fused=fused,
            percentile=self.percentile,
            integers=self.integers,
            weights=measure(found.model),
        )


def layer_macs(model: ModelProto) -> dict[str, int]:
    """Multiply-accumulates of every node for one image, where there are any."""
    typed = with_shapes(model)
    shapes = known_shapes(typed)
    counts = {node.name: node_macs(node, shapes) for node in typed.graph.node}
    return {name: count for name, count in counts.items() if count}


def _why_float(
    model: ModelProto, placed: Mapping[str, str], found: Quantized, harm: Unharmed | None
) -> dict[str, str]:
    """Why each convolution or matrix product is float in what ships: placement only knows that it was asked to."""
    kept = dict(placed)
    if harm is not None and harm.ship_float:
        return {
            node.name: kept.get(node.name, "no integer graph was faster")
            for node in model.graph.node
            if node.op_type in COMPUTE
        }
    reasons = dict.fromkeys(found.accuracy_float, "too sensitive for the accuracy budget")
    if harm is not None:
        reasons |= dict.fromkeys(harm.keep_float, "its block was measured slower on integers")
    return {name: reasons.get(name, why) for name, why in kept.items()}
