"""FP32 ONNX to INT8 ONNX with Q/DQ nodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from deploycnn.core import MAIN_FILE, Artifact, Context, Draft, Format, Json, Pass
from deploycnn.errors import PassRequirementError
from deploycnn.quantization.int8_settings import QAT, Int8Settings

if TYPE_CHECKING:
    from pathlib import Path

    from onnx import ModelProto

    from deploycnn.graph.parity import Parity
    from deploycnn.quantization.engine import Candidate, Engine
    from deploycnn.quantization.remedies import Remedy

#: Images on which the quantized graph is compared with the float one, for the record.
_PARITY_IMAGES = 64


@dataclass(frozen=True, kw_only=True)
class Int8(Int8Settings, Pass):
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
    version: ClassVar[int] = 16
    needs_data: ClassVar[bool] = True
    uses_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "timing_decides", self.do_no_harm)

    def extra_identity(self) -> Json:
        """Whether weights are 7-bit depends on the machine unless the recipe says it."""
        from deploycnn.quantization.isa import detect_isa

        return None if self.reduce_range is not None else {"saturates": detect_isa().saturates}

    def check_target(self, target: str) -> None:
        """Refuse number formats that the rules of a GPU have no place for."""
        self.check_formats(target if self.rules == "target" else self.rules)

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
            pack=self.pack(ctx.target if self.rules == "target" else self.rules),
            options=self.options(),
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

        return {QAT: train}

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
