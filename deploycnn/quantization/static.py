"""INT8 by post-training static quantization: calibration and placement are ours, insertion is onnxruntime's.

The seam is ``quantize_static``: a file, images and settings in, a file and a record out.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from deploycnn.errors import PassRequirementError, nearest
from deploycnn.graph.batchnorm import batchnorm_to_depthwise
from deploycnn.graph.cleanup import remove_unused, simplify
from deploycnn.graph.metadata import get_metadata, set_metadata
from deploycnn.graph.model import (
    check_onnx,
    consumers,
    infer_shapes,
    is_quantized,
    load_onnx,
    opset_of,
    producers,
    save_onnx,
    sort_nodes,
)
from deploycnn.graph.names import name_nodes
from deploycnn.graph.observe import float_values, image_input, observe
from deploycnn.graph.opset import raise_opset
from deploycnn.optional import require
from deploycnn.quantization.fusion import count_fused
from deploycnn.quantization.placement import COMPUTE, Placement, place
from deploycnn.quantization.ranges import Statistics, choose_range
from deploycnn.quantization.settings import Int8Settings, QuantizationRecord

#: The first operator set with per-channel DequantizeLinear.
MIN_OPSET = 13

Ranges = Mapping[str, tuple[float, float]]


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
    prepared = prepare(original)
    _check_exclude(original, prepared, settings.exclude)
    placement = place(prepared, settings.exclude)
    if not placement.quantized:
        raise PassRequirementError(
            f"{model_path}: no convolution or matrix product to quantize; leave int8 out"
        )
    ranges, images = calibrate(prepared, placement, calibration, settings, progress)
    quantized = insert_qdq(prepared, placement, ranges, settings)
    set_metadata(quantized, get_metadata(original))
    check_onnx(quantized, f"{model_path}: its quantized graph")
    save_onnx(quantized, output_path)
    detail = f" {settings.percentile:g}" if settings.calibrator == "percentile" else ""
    return QuantizationRecord(
        scheme=settings.scheme,
        calibrator=f"{settings.calibrator}{detail}",
        images=images,
        ranges=ranges,
        quantized_nodes=placement.quantized,
        float_compute_nodes=placement.float_compute,
        opset=opset_of(quantized),
        fused=count_fused(output_path),
    )


def prepare(original: ModelProto) -> ModelProto:
    """The float graph that gets quantized: opset 13 or newer, simplified, named, with inferred shapes.

    Batch norms that no convolution precedes become depthwise convolutions, so that they run on integers too.

    Raises:
        PassRequirementError: opset 13 cannot be reached, or the input is not one batch of float32 images.
    """
    # Simplified first: the converter has fewer operators to know, and old models' weights are no inputs any
    # more.
    model = raise_opset(simplify(original), MIN_OPSET)
    image_input(model)
    name_nodes(model)
    batchnorm_to_depthwise(model)
    return infer_shapes(simplify(model))


def _check_exclude(original: ModelProto, prepared: ModelProto, exclude: Iterable[str]) -> None:
    """Names may come from the file as it is (a node that clean-up removes is float anyway) or as prepared."""
    known = {node.name for graph in (original.graph, prepared.graph) for node in graph.node if node.name}
    for name in exclude:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=5, cutoff=0.0)
            raise PassRequirementError(f'exclude: the model has no node "{name}"; {nearest(name, close)}')


def calibrate(
    model: ModelProto,
    placement: Placement,
    calibration: Iterable[npt.NDArray[np.float32]],
    settings: Int8Settings,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[Ranges, int]:
    """Ranges of all values at quantized nodes, by name, and the number of images that were seen.

    Raises:
        PassRequirementError: no images, or NaN or infinity in them or in a value (named).
    """
    quantized = set(placement.quantized)
    touched = {
        name for node in model.graph.node if node.name in quantized for name in (*node.input, *node.output)
    }
    values = [name for name in float_values(model) if name in touched]
    statistics = {name: Statistics(histogram=settings.calibrator != "minmax") for name in values}
    images = observe(
        model,
        values,
        calibration,
        lambda name, content: statistics[name].update(content),
        threads=settings.threads,
        progress=progress,
    )
    if not images:
        raise PassRequirementError("no calibration images; give data with a non-empty training split")
    return {
        name: choose_range(summary, settings.calibrator, settings.percentile)
        for name, summary in statistics.items()
    }, images


def insert_qdq(model: ModelProto, placement: Placement, ranges: Ranges, settings: Int8Settings) -> ModelProto:
    """``model`` with weights in INT8 and Q/DQ around the placed nodes, by onnxruntime's quantizer."""
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    chosen = set(placement.quantized)
    symmetric = settings.activation_type == "int8"
    with _root_logger_silenced():
        quantizer = QDQQuantizer(
            model,
            per_channel=settings.per_channel,
            reduce_range=settings.reduce_range,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            tensors_range=TensorsData(
                CalibrationMethod.MinMax,
                {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()},
            ),
            nodes_to_quantize=list(placement.quantized),
            nodes_to_exclude=[],
            op_types_to_quantize=sorted({node.op_type for node in model.graph.node if node.name in chosen}),
            extra_options={"ActivationSymmetric": symmetric, "WeightSymmetric": True},
        )
        quantized: ModelProto = quantizer.quantize_model()
    # The quantizer appends its nodes at the end.
    sort_nodes(quantized)
    float_outputs_of_products(quantized, chosen)
    quantized.producer_name, quantized.producer_version = "deploycnn", ""
    return infer_shapes(quantized)


def float_outputs_of_products(model: ModelProto, quantized: set[str]) -> int:
    """Drop the Q/DQ behind matrix products that only float nodes or graph outputs read; return how many.

    Integer matrix products can return float32: rounding logits to 8 bits would buy nothing. (Integer
    convolutions cannot.)
    """
    graph = model.graph
    made_by = producers(graph)
    read_by = consumers(graph)
    outputs = {value.name for value in graph.output}
    dropped = 0
    for dequantize in [node for node in graph.node if node.op_type == "DequantizeLinear"]:
        quantize = made_by.get(dequantize.input[0])
        product = made_by.get(quantize.input[0]) if quantize is not None else None
        target = dequantize.output[0]
        if (
            quantize is None
            or product is None
            or product.op_type not in COMPUTE - {"Conv"}
            or len(read_by[quantize.input[0]]) != 1
            or len(read_by[quantize.output[0]]) != 1
            or any(reader.name in quantized for reader in read_by.get(target, ()))
            or quantize.input[0] in outputs
        ):
            continue
        product.output[0] = target
        graph.node.remove(quantize)
        graph.node.remove(dequantize)
        dropped += 1
    remove_unused(model)
    return dropped


@contextlib.contextmanager
def _root_logger_silenced() -> Iterator[None]:
    """Keep the quantizer's notes, which go through the root logger, off the terminal."""
    root = logging.getLogger()
    handler = logging.NullHandler()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
