"""FP32 ONNX to FP16 ONNX."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from deploycnn.core import MAIN_FILE, Artifact, Context, Draft, Format, Pass
from deploycnn.errors import PassRequirementError, nearest

if TYPE_CHECKING:
    from pathlib import Path

    from onnx import ModelProto

    from deploycnn.graph.parity import Parity

#: Behind INT8 the tolerance is so many times wider: a value on the edge of two integers may round to the other one.
_FLIPS = 5.0

#: BF16 has 8 bits of precision, FP16 11.
_BF16_STEPS = 8.0

_PACKED_WEIGHTS = (
    "fp16: int8 left the weights packed (weights: int4, or weights_only), and FP16 would store them wide; "
    "leave fp16 out, or quantize to 8 bits with activations"
)


@dataclass(frozen=True, kw_only=True)
class Fp16(Pass):
    """Cast weights and activations to FP16, keeping graph inputs and outputs FP32; behind int8, what is left float.

    Parity is measured by onnxruntime's CPU provider, which stores halves but computes some of them in FP32;
    so overflow is not left to it but looked for in the FP32 activations of training images. It has no BF16 kernels;
    there parity is that of a float32 graph that rounds to BF16 behind each operator.
    """

    consumes: ClassVar[Format | None] = "onnx"
    produces: ClassVar[Format] = "onnx"
    version: ClassVar[int] = 6

    dtype: Annotated[
        Literal["fp16", "bf16"],
        "bf16: FP32's range with 8 bits of precision; for TensorRT, and not behind int8.",
    ] = "fp16"
    keep_fp32_ops: Annotated[tuple[str, ...], "Operator types, or names of nodes, to leave in FP32."] = ()
    calibration_images: Annotated[
        int,
        Ge(0),
        "Training images on which activations are checked for FP16's range; 0 checks weights only.",
    ] = 32
    relative_tolerance: Annotated[
        float,
        Gt(0),
        "Largest error of an output as a share of the image's largest output; five times it behind int8, 8 with bf16.",
    ] = 0.02
    parity_images: Annotated[int, Ge(1), "Images on which the graph is compared with its FP32 version."] = 16

    def check_precision(self, precision: str) -> None:
        """Refuse what is neither FP32 nor INT8 among FP32."""
        if precision in {"w8", "w4", "w4a8"}:
            raise PassRequirementError(_PACKED_WEIGHTS)
        if precision not in ("fp32", "int8"):
            raise PassRequirementError(
                f"fp16: the model is already {precision}; put fp16 directly behind export or int8"
            )
        if self.dtype == "bf16" and precision == "int8":
            raise PassRequirementError(
                "fp16: dtype bf16 behind int8 would round the scales of the integers to 8 bits; use dtype fp16"
            )

    def precision_after(self, before: str | None) -> str | None:
        """Both, behind int8."""
        return None if before is None else "int8_fp16" if before == "int8" else self.dtype

    def run(self, source: Artifact, ctx: Context) -> Draft:
        """Write ``model.onnx``.

        Raises:
            PassRequirementError: the model is not float32 and of images, or nothing in it can be converted.
            ParityError: outputs differ from the FP32 graph's by more than the tolerance.
            ArtifactError: the source's file cannot be read.
        """
        from deploycnn.graph.fp16 import convert_fp16
        from deploycnn.graph.model import runtime_inputs, save_onnx, tensor_specs

        if ctx.data is not None:
            ctx.data.preprocessing.check_same(source.facts.preprocessing, "fp16")
        full, quantized = _load(source.path)
        _check_kept(full, self.keep_fp32_ops)
        ctx.progress(0, 2, "looking for values beyond FP16's range")
        peaks = self._peaks(full, ctx)
        converted, record = convert_fp16(full, keep_ops=self.keep_fp32_ops, peaks=peaks, half=self.dtype)
        if not record.converted:
            first = next(iter(record.kept.items()), ("it", "no float32 operator"))
            raise PassRequirementError(
                f"fp16: nothing can be converted ({first[0]}: {first[1]}); leave fp16 out"
            )
        path = ctx.output / MAIN_FILE["onnx"]
        size = save_onnx(converted, path)
        ctx.progress(1, 2, "comparing with FP32")
        parity = self._parity(source.path, converted, quantized, ctx)
        parity.check(f"fp16: the {self.dtype.upper()} graph")
        ctx.progress(2, 2, "converted")
        return Draft(
            format="onnx",
            inputs=tensor_specs(runtime_inputs(converted)),
            outputs=tensor_specs(converted.graph.output),
            facts=replace(
                source.facts,
                size_bytes=size,
                precision="int8_fp16" if quantized else self.dtype,
                record={
                    "parity": parity.to_json(),
                    "fp16": {**record.to_json(), "activations_checked": bool(peaks)},
                },
            ),
        )

    def _parity(self, full: Path, converted: ModelProto, quantized: bool, ctx: Context) -> Parity:
        """How far the converted graph's outputs are from those of the file that it was made from.

        Raises:
            PassRequirementError: the graph does not say its image size, and no data does.
        """
        from deploycnn.graph.bfloat16 import float32_twin
        from deploycnn.graph.observe import image_input
        from deploycnn.graph.parity import Tolerance, evaluator, measure_parity
        from deploycnn.graph.probe import parity_images

        _, (batch, *shape) = image_input(converted)
        if ctx.data is None and None in shape:
            raise PassRequirementError(
                f"fp16: the image size is not known (input {shape}); name data in the recipe"
            )
        channels, height, width = (int(dim or 0) for dim in shape)
        images, source = parity_images(ctx.data, (channels, height, width), self.parity_images, ctx.seed)
        runnable = float32_twin(converted) if self.dtype == "bf16" else ctx.output / MAIN_FILE["onnx"]
        return measure_parity(
            evaluator(full, threads=ctx.threads, integers=False),
            evaluator(runnable, threads=ctx.threads, integers=False),
            images,
            batch_sizes=(1, 5) if batch is None else (batch,),
            tolerance=Tolerance(absolute=1e-3, relative=self.relative_tolerance * self._wider(quantized)),
            source=source,
            against="int8 onnx" if quantized else "fp32 onnx",
        )

    def _wider(self, quantized: bool) -> float:
        """How many times the tolerance is allowed: BF16 rounds eight times as coarsely as FP16."""
        return _BF16_STEPS if self.dtype == "bf16" else _FLIPS if quantized else 1.0

    def _peaks(self, model: ModelProto, ctx: Context) -> dict[str, float]:
        """Largest magnitude of each value on training images; empty without data."""
        from deploycnn.graph.observe import float_values, observe
        from deploycnn.graph.probe import calibration_batches

        peaks: dict[str, float] = {}
        if ctx.data is None or not self.calibration_images:
            return peaks
        observe(
            model,
            float_values(model),
            calibration_batches(ctx.data, self.calibration_images, ctx.seed),
            lambda name, content: peaks.update(
                {
                    name: max(
                        peaks.get(name, 0.0), float(content.max(initial=0)), -float(content.min(initial=0))
                    )
                }
            ),
            threads=ctx.threads,
        )
        return peaks


def _check_kept(model: ModelProto, kept: Iterable[str]) -> None:
    """Refuse what names neither an operator type nor a node of the model.

    Raises:
        PassRequirementError: names it, and the nearest that there is.
    """
    known = {name for node in model.graph.node for name in (node.op_type, node.name)}
    for name in kept:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=5, cutoff=0.0)
            raise PassRequirementError(
                f'fp16: keep_fp32_ops: the model has no operator or node "{name}"; {nearest(name, close)}'
            )


def _load(path: Path) -> tuple[ModelProto, bool]:
    """The graph as it is converted, simplified and its nodes named, and whether it is quantized.

    Of a quantized graph, operator set 19 is the first in which scales may be FP16.

    Raises:
        PassRequirementError: its weights are packed.
    """
    from deploycnn.graph.cleanup import simplify
    from deploycnn.graph.model import copy_of, is_quantized, load_onnx
    from deploycnn.graph.names import name_nodes
    from deploycnn.graph.opset import raise_opset
    from deploycnn.quantization.packed import unpack

    original = load_onnx(path)
    if unpack(copy_of(original)):
        raise PassRequirementError(_PACKED_WEIGHTS)
    quantized = is_quantized(original)
    full = simplify(raise_opset(original, 19) if quantized else original)
    name_nodes(full)
    return full, quantized
