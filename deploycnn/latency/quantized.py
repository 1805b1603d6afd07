"""A quantized graph for timing: real placement, ranges from noise."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto

from deploycnn.quantization import packs
from deploycnn.quantization.engine import Candidate, Engine
from deploycnn.quantization.isa import detect_isa
from deploycnn.quantization.preparation import prepare


def quantized(graph: ModelProto, shape: tuple[int, int, int], target: str, threads: int) -> ModelProto:
    """``graph`` as the pass `int8` would place integers for ``target``; calibrated on two images of noise.

    Speed does not depend on the ranges.
    """
    images = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    pack = packs.get(target, detect_isa())
    model = prepare(graph, pack)
    engine = Engine(pack, lambda: [images], threads=threads)
    return engine.build(Candidate(model=model, calibrator="minmax"))
