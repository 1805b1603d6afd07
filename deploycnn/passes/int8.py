"""FP32 ONNX to INT8 ONNX with Q/DQ nodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Interval

from deploycnn import targets
from deploycnn.core import MAIN_FILE, Artifact, Context, Draft, Format, Json, Pass
from deploycnn.errors import PassRequirementError

if TYPE_CHECKING:
    from pathlib import Path

    from onnx import ModelProto

    from deploycnn.graph.parity import Parity
    from deploycnn.quantization.engine import Candidate, Engine
    from deploycnn.quantization.packs import RulePack
    from deploycnn.quantization.quantize import Options
    from deploycnn.quantization.remedies import Remedy

#: Images on which the quantized graph is compared with the float one, for the record.
_PARITY_IMAGES = 64

_QAT = "qat"

_QAT_EPOCHS = 2

#: Outputs with less than 1% noise are good enough to spare the passes over the images that equalizing takes.
_GOOD_DB = 20.0

#: The budget of ``auto`` where the recipe gives none.
_AUTO_BUDGET = 0.002


@dataclass(frozen=True, kw_only=True)
class Int8(Pass):
    """Quantize weights and activations to 8 bits, calibrated on training images; the rest stays FP32.

    Of ranges and corrected biases, those are kept that leave the outputs of validation images the least noise.

    ``int8: auto`` climbs the repair ladder until the drop of top-1 on the validation split is within the
    budget: other ranges, equalized weights, corrected biases, learned rounding, a few layers in float, training, and
    at last as many layers in float as it takes. With ``max_top1_drop`` alone, the settings stay as given and the
    cheapest layers are left in float.

    ``weights: int4`` stores weights in 4 bits (first, last and depthwise layers in 8); activations keep 8. With
    ``weights_only`` only the file gets smaller: everything is computed in float.
    """

    consumes: ClassVar[Format | None] = "onnx"
    produces: ClassVar[Format] = "onnx"
    main: ClassVar[str | None] = "mode"
    version: ClassVar[int] = 14
    needs_data: ClassVar[bool] = True
    uses_target: ClassVar[bool] = True

    mode: Annotated[
        Literal["fixed", "auto"], "fixed: as the options say; auto: repair until the budget is met."
    ] = "fixed"
    max_top1_drop: Annotated[
        float | None,
        Interval(ge=0, lt=1),
        "Budget on the validation split, a fraction of 1; layers stay float as needed. null: auto 0.002, else "
        "none.",
    ] = None
    calibrator: Annotated[
        Literal["auto", "minmax", "moving_average", "percentile", "entropy", "mse"],
        "Range of activations: all values seen, each image's ends averaged, all but the outermost values, least "
        "KL divergence, or least squared error. auto: minmax, percentile or mse, whichever leaves the outputs of "
        "validation images the least noise (mode auto begins with percentile).",
    ] = "auto"
    percentile: Annotated[
        float,
        Interval(gt=50, le=100),
        "For `percentile`: percent of the values that each end of the range covers.",
    ] = 99.999
    calibration_images: Annotated[int, Ge(1), "Training images to calibrate on, evenly over the classes."] = (
        512
    )
    judge_images: Annotated[
        int | None, Ge(1), "Validation images that a budget is judged on, evenly over the classes; null: all."
    ] = None
    per_channel: Annotated[bool, "One weight scale per output channel instead of one per layer."] = True
    activations: Annotated[
        Literal["auto", "uint8", "int8"],
        "Type of activations; auto: uint8 on x86, asymmetric int8 on other CPUs, symmetric int8 on GPUs.",
    ] = "auto"
    reduce_range: Annotated[
        bool | None,
        "7-bit weights; by default only where this x86 CPU's 8-bit arithmetic saturates (no VNNI).",
    ] = None
    weights: Annotated[
        Literal["int8", "int4"],
        "Type of weights; int4: scales of least squared error, two to a byte, for size. For CPU targets.",
    ] = "int8"
    weights_only: Annotated[
        bool, "Leave activations in float: a smaller file, no gain in speed. For CPU targets."
    ] = False
    equalize: Annotated[
        bool | None,
        "Spread the ranges of channels evenly over neighbouring layers (Nagel et al. 2019). null: where outputs have "
        "more than 1% noise, and get less noisy by it. With mode auto it is a rung that may be needed, unless false.",
    ] = None
    absorb_bias: Annotated[
        bool, "Move biases that always pass a ReLU into the next layer (Nagel et al. 2019)."
    ] = False
    correct_bias: Annotated[
        bool | None,
        "Take the mean error that rounding the weights makes out of the biases (Nagel et al. 2019). null: where "
        "outputs get less noisy by it. With mode auto it is a rung that may be needed, unless false.",
    ] = None
    adaround: Annotated[
        bool | None,
        "Learn for each weight whether to round up or down (Nagel et al. 2020); minutes. null: with 4-bit weights. "
        "With auto it is a rung that may be needed, unless false.",
    ] = None
    qat_epochs: Annotated[
        int,
        Ge(0),
        "For auto: epochs of quantization-aware training, tried before more than a few layers stay float; "
        "0: no training and no such limit.",
    ] = _QAT_EPOCHS
    do_no_harm: Annotated[
        bool,
        "Leave in float what is measured slower on integers on the target; where no integer graph is faster, "
        "return float. What is timed decides, so equal runs may differ where it is close.",
    ] = True
    exclude: Annotated[tuple[str, ...], "Names of nodes to leave in float."] = ()
    rules: Annotated[
        Literal["target", "onnxruntime-cpu", "openvino", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"],
        "Whose placement rules; target: those of the recipe's target.",
    ] = "target"

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if self.weights_only and self.mode == "auto":
            raise ValueError(
                "weights_only does not go with auto, which repairs activations; set max_top1_drop instead"
            )
        given = {name for name in ("equalize", "absorb_bias", "correct_bias") if getattr(self, name)}
        given |= {"calibrator"} if self.calibrator != "auto" else set()
        if self.mode == "auto" and given:
            raise ValueError(
                f"auto chooses ranges and remedies itself; leave out {', '.join(sorted(given))}, or mode"
            )
        if self.mode == "fixed" and self.qat_epochs != _QAT_EPOCHS:
            raise ValueError("qat_epochs is for auto; put the pass qat behind int8 instead")
        if self.judge_images is not None and self.mode == "fixed" and self.max_top1_drop is None:
            raise ValueError("judge_images judge a budget, and there is none; give max_top1_drop too")
        if self.weights_only and self.activations != "auto":
            raise ValueError("weights_only leaves activations in float; leave `activations` out")
        object.__setattr__(self, "timing_decides", self.do_no_harm)

    def extra_identity(self) -> Json:
        """Whether weights are 7-bit depends on the machine unless the recipe says it."""
        from deploycnn.quantization.isa import detect_isa

        return None if self.reduce_range is not None else {"saturates": detect_isa().saturates}

    def check_target(self, target: str) -> None:
        """Refuse number formats that the rules of a GPU have no place for."""
        self._check_formats(target if self.rules == "target" else self.rules)

    def check_precision(self, precision: str) -> None:
        """Refuse what is not FP32."""
        if precision != "fp32":
            raise PassRequirementError(
                f"int8: the model is already {precision}; put int8 directly behind export"
            )

    def precision_after(self, before: str | None) -> str | None:  # noqa: ARG002 - it takes FP32 only
        """Of weights and activations."""
        from deploycnn.quantization.types import precision_name

        return precision_name(4 if self.weights == "int4" else 8, weights_only=self.weights_only)

    def run(self, source: Artifact, ctx: Context) -> Draft:
        """Write ``model.onnx``.

        Raises:
            PassRequirementError: see ``deploycnn.quantization.job.Job.run``.
            PreprocessingError: the model was made for images prepared otherwise.
            RuntimeUnavailable: onnxruntime is not installed.
        """
        from deploycnn.graph.model import load_onnx, runtime_inputs, tensor_specs
        from deploycnn.graph.probe import calibration_batches
        from deploycnn.quantization.job import Job
        from deploycnn.quantization.judge import val_batches

        if ctx.data is None:
            raise PassRequirementError("int8: calibration needs images; name `data` in the recipe")
        ctx.data.preprocessing.check_same(source.facts.preprocessing, "int8")
        path = ctx.output / MAIN_FILE["onnx"]
        record = Job(
            source=source.path,
            output=path,
            pack=self._pack(ctx.target if self.rules == "target" else self.rules),
            options=self._options(),
            images=partial(calibration_batches, ctx.data, self.calibration_images, ctx.seed),
            total=min(self.calibration_images, len(ctx.data.dataset.train)),
            judging=partial(val_batches, ctx.data, seed=ctx.seed) if len(ctx.data.dataset.val) else None,
            judge_images=self.judge_images,
            percentile=self.percentile,
            further_remedies=partial(self._training, ctx),
            stopwatch=ctx.stopwatch if self.do_no_harm and self._same_kernels(ctx.target) else None,
            scratch=ctx.scratch,
            seed=ctx.seed,
            threads=ctx.threads,
            progress=ctx.progress,
            warn=ctx.log.warning,
        ).run()
        if record.fused is not None:
            ctx.log.info("%d operators fused, %d stray Q/DQ", record.fused.quantized, record.fused.stray)
        quantized = load_onnx(path)
        parity = self._parity(source.path, path, ctx)
        if not math.isfinite(parity.max_abs_error):
            ctx.log.warning(
                "outputs are NaN or infinite, or of other shapes, on some of %d %s: how far INT8 moves them is unknown",
                parity.images,
                parity.source,
            )
        return Draft(
            format="onnx",
            inputs=tensor_specs(runtime_inputs(quantized)),
            outputs=tensor_specs(quantized.graph.output),
            facts=replace(
                source.facts,
                size_bytes=path.stat().st_size,
                precision=record.precision,
                record={
                    "parity": parity.to_json(),
                    "int8": record.to_json(),
                    "tables": record.tables(),
                    "histograms": [histogram.to_json() for histogram in record.histograms],
                },
            ),
        )

    def _same_kernels(self, target: str) -> bool:
        """Whether the graph is made for what is timed: rules of another target make one for other kernels."""
        alike = {"cpu", "onnxruntime-cpu"}
        return self.rules in {"target", target} or {self.rules, target} <= alike

    def _training(self, ctx: Context, engine: Engine, model: ModelProto) -> Mapping[str, Remedy]:
        """Quantization-aware training with the float graph as teacher; the pass ``qat`` has all its options."""
        from deploycnn.quantization.qat import fine_tune
        from deploycnn.quantization.qat_settings import QatSettings
        from deploycnn.training.artifact import needed_data
        from deploycnn.training.losses import Distillation
        from deploycnn.training.teacher import graph_teacher

        settings = QatSettings(epochs=self.qat_epochs)

        def train(best: Candidate) -> Candidate:
            teacher = graph_teacher(model, ctx)
            tuned = fine_tune(
                engine.build(best),
                best.model,
                needed_data(ctx, "int8"),
                settings,
                loss=Distillation(teacher=teacher, method=settings.method, **settings.weights),
                ctx=ctx,
                learn_scales=settings.learn_scales,
                parity_count=_PARITY_IMAGES,
            )
            return replace(best, graph=tuned.model)

        return {_QAT: train}

    def _options(self) -> Options:
        from deploycnn.quantization.quantize import COMPARED, FEW_FLOAT_LAYERS, FLOAT_LAYERS, Options

        if self.mode == "auto":
            return Options(
                calibrator="percentile",
                exclude=self.exclude,
                ladder=(
                    "mse",
                    *(
                        name
                        for name in ("equalize", "correct_bias", "adaround")
                        if getattr(self, name) is not False
                    ),
                    *((FEW_FLOAT_LAYERS, _QAT) if self.qat_epochs else ()),
                    FLOAT_LAYERS,
                ),
                max_top1_drop=_AUTO_BUDGET if self.max_top1_drop is None else self.max_top1_drop,
            )
        # Nothing has a range where activations stay float.
        compared = None if self.calibrator == "auto" and not self.weights_only else False
        wanted: tuple[tuple[str, bool | None], ...] = (
            # Asked for: ranges are chosen for the graph that comes of it.
            ("equalize", bool(self.equalize)),
            ("absorb_bias", self.absorb_bias),
            *((name, compared) for name in COMPARED),
            # Not asked for: whether it is needed is known with the best ranges.
            ("equalize", None if self.equalize is None else False),
            ("adaround", self._learns_rounding),
            # Last: biases make up for the rounding that was decided.
            ("correct_bias", self.correct_bias),
        )
        return Options(
            calibrator="minmax" if self.calibrator == "auto" else self.calibrator,
            exclude=self.exclude,
            remedies=tuple(name for name, asked in wanted if asked is not False),
            if_better={
                name: _GOOD_DB if name == "equalize" else math.inf for name, asked in wanted if asked is None
            },
            ladder=(FLOAT_LAYERS,),
            max_top1_drop=self.max_top1_drop,
        )

    @property
    def _learns_rounding(self) -> bool:
        return self.weights == "int4" if self.adaround is None else self.adaround

    def _check_formats(self, target: str) -> None:
        if targets.get(target).device == "cpu":
            return
        if self.activations == "uint8":
            raise PassRequirementError(
                f"int8: activations: uint8 is for CPU targets, not {target}, which wants them symmetric; leave it out"
            )
        if self.weights_only or self.weights == "int4":
            raise PassRequirementError(
                f"int8: {'weights_only' if self.weights_only else 'weights: int4'} is for CPU targets, not {target}: "
                "its kernels for convolutions take 8-bit weights beside 8-bit activations"
            )

    def _pack(self, target: str) -> RulePack:
        """The target's rules, with what the recipe says of number formats."""
        self._check_formats(target)
        from deploycnn.quantization import packs
        from deploycnn.quantization.isa import detect_isa

        pack = packs.with_formats(
            packs.get(target, detect_isa()),
            activations=None if self.activations == "auto" else self.activations,
            reduced=self.reduce_range,
            per_channel=self.per_channel,
        )
        if self.weights_only:
            return packs.weights_only(pack, self.weights)
        return packs.four_bits(pack) if self.weights == "int4" else pack

    def _parity(self, full: Path, quantized: Path, ctx: Context) -> Parity:
        """How far rounding to 8 bits moves the outputs: for the record, held to no tolerance."""
        from deploycnn.graph.model import load_onnx
        from deploycnn.graph.observe import image_input
        from deploycnn.graph.parity import evaluator, measure_parity
        from deploycnn.graph.probe import parity_images

        _, (batch, *_) = image_input(load_onnx(quantized))
        images, source = parity_images(ctx.data, (0, 0, 0), _PARITY_IMAGES, ctx.seed)
        return measure_parity(
            evaluator(full, threads=ctx.threads),
            evaluator(quantized, threads=ctx.threads),
            images,
            batch_sizes=(batch or 16,),
            tolerance=None,
            source=source,
            against="fp32 onnx",
        )
