"""INT8 by post-training static quantization, from a file to a file: prepare, place, calibrate, build."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from deploycnn.errors import PassRequirementError, nearest
from deploycnn.graph.batchnorm import batchnorm_to_depthwise
from deploycnn.graph.cleanup import simplify
from deploycnn.graph.metadata import get_metadata, set_metadata
from deploycnn.graph.model import (
    check_onnx,
    infer_shapes,
    is_quantized,
    load_onnx,
    opset_of,
    save_onnx,
)
from deploycnn.graph.names import name_nodes
from deploycnn.graph.observe import image_input
from deploycnn.graph.opset import raise_opset
from deploycnn.optional import require
from deploycnn.quantization import calibration as calibrating
from deploycnn.quantization import packs
from deploycnn.quantization.fusion import count_fused
from deploycnn.quantization.insertion import MIN_OPSET, build
from deploycnn.quantization.packs import RulePack
from deploycnn.quantization.placement import place
from deploycnn.quantization.rewrites import apply_rewrites
from deploycnn.quantization.settings import Int8Settings, QuantizationRecord
from deploycnn.quantization.types import NumberFormat, Plan, Ranges


def quantize_static(
    model_path: Path,
    output_path: Path,
    calibration: Iterable[npt.NDArray[np.float32]],
    settings: Int8Settings,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> QuantizationRecord:
    """Write an INT8 Q/DQ version of a float32 ONNX model.

    Graph inputs and outputs keep their names, types and dynamic axes; metadata is kept.

    Args:
        model_path: Any float32 ONNX model with one image input, opset 9 upward.
        output_path: Where to write.
        calibration: Batches of preprocessed images (N, C, H, W); streamed once, never held together.
        settings: See ``Int8Settings``.
        progress: Called with the number of images calibrated.

    Raises:
        PassRequirementError: the model is already quantized or not float32, cannot be brought to opset 13 or
        holds
            nothing to quantize; an excluded node does not exist; no calibration images; an image or an
            activation is NaN or infinite.
        ArtifactError: ``model_path`` cannot be read.
        RuntimeUnavailable: onnxruntime is not installed.
    """
    require("onnxruntime")
    original = load_onnx(model_path)
    if is_quantized(original):
        raise PassRequirementError(f"{model_path}: already quantized; give the float32 model")
    pack = rule_pack(settings)
    prepared = prepare(original, pack)
    check_exclude(original, prepared, settings.exclude)
    plan = place(prepared, pack, settings.exclude)
    if not plan.quantized_nodes:
        raise PassRequirementError(
            f"{model_path}: no convolution or matrix product to quantize; leave int8 out"
        )
    ranges, images = calibrate(prepared, plan, calibration, settings, progress)
    quantized = build(prepared, plan, ranges)
    set_metadata(quantized, get_metadata(original))
    check_onnx(quantized, f"{model_path}: its quantized graph")
    save_onnx(quantized, output_path)
    detail = f" {settings.percentile:g}" if settings.calibrator == "percentile" else ""
    return QuantizationRecord(
        scheme=settings.scheme,
        calibrator=f"{settings.calibrator}{detail}",
        images=images,
        ranges=ranges,
        quantized_nodes=plan.quantized_nodes,
        float_compute_nodes=plan.kept_float,
        opset=opset_of(quantized),
        fused=count_fused(output_path),
    )


def rule_pack(settings: Int8Settings) -> RulePack:
    """The rules that settings ask for."""
    symmetric = settings.activation_type == "int8"
    pack = packs.get(settings.target)
    return replace(
        pack,
        activation=NumberFormat(dtype=settings.activation_type, symmetric=symmetric),
        weight=replace(pack.weight, reduced=settings.reduce_range),
        per_channel=settings.per_channel,
    )


def prepare(original: ModelProto, pack: RulePack | None = None) -> ModelProto:
    """The float graph that gets quantized: opset 13 or newer, simplified, named, with inferred shapes.

    Batch norms that no convolution precedes become depthwise convolutions, so that they run on integers too. The
    rewrites that ``pack`` names follow; they change values inside, so ranges are calibrated on the result.

    Raises:
        PassRequirementError: opset 13 cannot be reached, or the input is not one batch of float32 images.
    """
    # Simplified first: the converter has fewer operators to know, and old models' weights are no inputs any
    # more.
    model = raise_opset(simplify(original), MIN_OPSET)
    image_input(model)
    name_nodes(model)
    batchnorm_to_depthwise(model)
    model = infer_shapes(simplify(model))
    if pack is not None:
        apply_rewrites(model, pack.rewrites)
    return model


def check_exclude(original: ModelProto, prepared: ModelProto, exclude: Iterable[str]) -> None:
    """Names may come from the file as it is (a node that clean-up removes is float anyway) or as prepared."""
    known = {node.name for graph in (original.graph, prepared.graph) for node in graph.node if node.name}
    for name in exclude:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=5, cutoff=0.0)
            raise PassRequirementError(f'exclude: the model has no node "{name}"; {nearest(name, close)}')


def calibrate(
    model: ModelProto,
    plan: Plan,
    calibration: Iterable[npt.NDArray[np.float32]],
    settings: Int8Settings,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[Ranges, int]:
    """Ranges of the values that a plan rounds, by name, and the number of images that were seen.

    Raises:
        PassRequirementError: no images, or NaN or infinity in them or in a value (named).
    """
    seen = calibrating.calibrate(
        model,
        calibration,
        values=calibrating.values_of(plan),
        histograms=settings.calibrator not in {"minmax", "moving_average"},
        threads=settings.threads,
        progress=progress,
    )
    return calibrating.choose_ranges(plan, seen, settings.calibrator, settings.percentile), seen.images
