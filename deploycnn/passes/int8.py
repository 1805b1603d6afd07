"""FP32 ONNX to INT8 ONNX with Q/DQ nodes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Interval

from deploycnn.core import MAIN_FILE, Artifact, Context, Draft, Format, Json, Pass
from deploycnn.errors import PassRequirementError

if TYPE_CHECKING:
    from pathlib import Path

    from deploycnn.graph.parity import Parity
    from deploycnn.quantization.settings import Int8Settings

#: Images on which the quantized graph is compared with the float one, for the record.
_PARITY_IMAGES = 64


@dataclass(frozen=True, kw_only=True)
class Int8(Pass):
    """Quantize weights and activations to 8 bits, calibrated on training images; the rest stays FP32."""

    consumes: ClassVar[Format | None] = "onnx"
    produces: ClassVar[Format] = "onnx"
    needs_data: ClassVar[bool] = True
    uses_target: ClassVar[bool] = True

    calibrator: Annotated[
        Literal["minmax", "moving_average", "percentile", "entropy", "mse"],
        "Range of activations: all values seen, each image's ends averaged, all but the outermost values, least "
        "KL divergence, or least squared error.",
    ] = "minmax"
    percentile: Annotated[
        float,
        Interval(gt=50, le=100),
        "For `percentile`: percent of the values that each end of the range covers.",
    ] = 99.999
    calibration_images: Annotated[int, Ge(1), "Training images to calibrate on, evenly over the classes."] = (
        512
    )
    per_channel: Annotated[bool, "One weight scale per output channel instead of one per layer."] = True
    activations: Annotated[
        Literal["auto", "uint8", "int8"],
        "Type of activations; auto: uint8 on CPUs, symmetric int8 elsewhere.",
    ] = "auto"
    reduce_range: Annotated[
        bool | None,
        "7-bit weights; by default only where this x86 CPU's 8-bit arithmetic saturates (no VNNI).",
    ] = None
    exclude: Annotated[tuple[str, ...], "Names of nodes to leave in float."] = ()

    def extra_identity(self) -> Json:
        """Whether weights are 7-bit depends on the machine unless the recipe says it."""
        from deploycnn.quantization.isa import detect_isa

        return None if self.reduce_range is not None else {"saturates": detect_isa().saturates}

    def requires(self, source: Artifact) -> None:
        """Refuse what is not FP32."""
        if source.facts.precision != "fp32":
            raise PassRequirementError(
                f"int8: the model is already {source.facts.precision}; put int8 directly behind export"
            )

    def run(self, source: Artifact, ctx: Context) -> Draft:
        """Write ``model.onnx``.

        Raises:
            PassRequirementError: see ``deploycnn.quantization.static.quantize_static``.
            PreprocessingError: the model was made for images prepared otherwise.
            RuntimeUnavailable: onnxruntime is not installed.
        """
        from deploycnn.graph.model import load_onnx, runtime_inputs, tensor_specs
        from deploycnn.graph.probe import calibration_batches
        from deploycnn.quantization.isa import detect_isa
        from deploycnn.quantization.static import quantize_static

        if ctx.data is None:
            raise PassRequirementError("int8: calibration needs images; name `data` in the recipe")
        ctx.data.preprocessing.check_same(source.facts.preprocessing, "int8")
        path = ctx.output / MAIN_FILE["onnx"]
        total = min(self.calibration_images, len(ctx.data.dataset.train))
        record = quantize_static(
            source.path,
            path,
            calibration_batches(ctx.data, self.calibration_images, ctx.seed),
            self._settings(ctx),
            progress=lambda done: ctx.progress(done, total, "calibrating"),
        )
        fused = record.fused
        ctx.log.info("%d operators fused, %d stray Q/DQ", fused.quantized, fused.stray)
        quantized = load_onnx(path)
        parity = self._parity(source.path, path, ctx)
        return Draft(
            format="onnx",
            inputs=tensor_specs(runtime_inputs(quantized)),
            outputs=tensor_specs(quantized.graph.output),
            facts=replace(
                source.facts,
                size_bytes=path.stat().st_size,
                precision="int8",
                record={
                    "parity": parity.to_json(),
                    "int8": {**record.to_json(), "isa": asdict(detect_isa())},
                },
            ),
        )

    def _settings(self, ctx: Context) -> Int8Settings:
        from deploycnn import targets
        from deploycnn.quantization.isa import detect_isa
        from deploycnn.quantization.settings import Int8Settings

        activation_type: Literal["uint8", "int8"]
        if self.activations == "auto":
            activation_type = "uint8" if targets.get(ctx.target).device == "cpu" else "int8"
        else:
            activation_type = self.activations
        reduce_range = self.reduce_range
        if reduce_range is None:
            reduce_range = detect_isa().saturates and targets.get(ctx.target).device == "cpu"
        return Int8Settings(
            calibrator=self.calibrator,
            percentile=self.percentile,
            per_channel=self.per_channel,
            reduce_range=reduce_range,
            activation_type=activation_type,
            exclude=self.exclude,
            target=ctx.target,
            threads=ctx.threads,
        )

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
            images if batch is None else images[: len(images) // batch * batch],
            batch_sizes=(16,) if batch is None else (batch,),
            tolerance=None,
            source=source,
            against="fp32 onnx",
        )
