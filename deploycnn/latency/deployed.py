"""A model's graph in the precision that it will be deployed in, for timing."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto

from deploycnn.graph.fp16 import convert_fp16
from deploycnn.quantization import packs
from deploycnn.quantization.engine import Candidate, Engine
from deploycnn.quantization.isa import detect_isa
from deploycnn.quantization.preparation import prepare


def deployed(
    graph: ModelProto, precision: str, shape: tuple[int, int, int], target: str, threads: int
) -> ModelProto:
    """A float graph in a precision, as the passes `int8` and `fp16` make it, but for what images decide.

    Ranges are of noise, and no value is taken to overflow FP16: single nodes may stay FP32 in what ships.

    Args:
        graph: Of ``export_onnx``.
        precision: A ``targets.Precision``.
        shape: (C, H, W) of an image.
        target: Name of the target, for the rules of INT8.
        threads: To calibrate with.
    """
    if precision.startswith("int8"):
        graph = _quantized(graph, shape, target, threads)
    return convert_fp16(graph)[0] if precision.endswith("fp16") else graph


def _quantized(graph: ModelProto, shape: tuple[int, int, int], target: str, threads: int) -> ModelProto:
    """Calibrated on two images of noise: speed does not depend on the ranges."""
    images = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    pack = packs.get(target, detect_isa())
    model = prepare(graph, pack)
    engine = Engine(pack, lambda: [images], threads=threads)
    return engine.build(Candidate(model=model, calibrator="minmax"))
