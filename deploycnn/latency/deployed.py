"""A model's graph in the precision that it will be deployed in, for timing."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto

from deploycnn.graph.fp16 import convert_fp16
from deploycnn.quantization import packs
from deploycnn.quantization.calibration import Calibration, choose_ranges, values_of
from deploycnn.quantization.insertion import build
from deploycnn.quantization.isa import detect_isa
from deploycnn.quantization.placement import place
from deploycnn.quantization.preparation import prepare
from deploycnn.quantization.statistics import Statistics, extremes
from deploycnn.quantization.structure import Structure


def deployed(graph: ModelProto, precision: str, target: str) -> ModelProto:
    """A float graph in a precision, as the passes `int8` and `fp16` make it, but for what images decide.

    Ranges are made up, and no value is taken to overflow FP16: single nodes may stay FP32 in what ships.

    Args:
        graph: Of ``export_onnx``.
        precision: A ``targets.Precision``.
        target: Name of the target, for the rules of INT8.
    """
    if precision.startswith("int8"):
        graph = _quantized(graph, target)
    return convert_fp16(graph)[0] if precision.endswith("fp16") else graph


def _quantized(graph: ModelProto, target: str) -> ModelProto:
    """Every value takes what it can between -1 and 1: speed does not depend on the ranges."""
    pack = packs.get(target, detect_isa())
    model = prepare(graph, pack)
    plan = place(model, pack, ())
    possible = Structure(model).possible()
    seen = {name: Statistics(histogram=False) for name in values_of(plan)}
    for name, statistics in seen.items():
        ends = np.clip(np.array([possible[name]], np.float32), -1.0, 1.0)
        statistics.update(ends, extremes(ends))
    return build(model, plan, choose_ranges(plan, Calibration(images=1, values=seen)))
