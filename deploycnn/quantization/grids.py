"""The integers that each value of a plan becomes, from ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from onnx import ModelProto

from deploycnn.errors import PassRequirementError
from deploycnn.quantization.structure import ANY, Structure
from deploycnn.quantization.types import ActivationPlan, NumberFormat, Plan, Range, Ranges


class Grid(NamedTuple):
    """The integers of a value: ``real = (integer - zero_point) * scale``."""

    scale: np.float32
    zero_point: int
    number: NumberFormat


def activation_parameters(model: ModelProto, plan: Plan, ranges: Ranges) -> dict[str, Grid]:
    """Scale, zero point and number format of each planned value.

    No range goes beyond what a value can be (behind a ReLU, a clip, a sigmoid); tied values share the hull of theirs.

    Raises:
        PassRequirementError: a range is missing or not finite.
    """
    possible = Structure(model).possible()
    hulls: dict[str, Range] = {}
    for item in plan.activations:
        low, high = _bounds(item, ranges)
        least, most = possible.get(item.value, ANY)
        low, high = max(low, least), min(high, most)
        group = item.tied or item.value
        held = hulls.get(group, (0.0, 0.0))
        hulls[group] = min(held[0], low), max(held[1], high)
    grids = {}
    for group, hull in hulls.items():
        number = plan.number(hull)
        grids[group] = Grid(*number.scale_and_zero_point(hull), number)
    return {item.value: grids[item.tied or item.value] for item in plan.activations}


def _bounds(item: ActivationPlan, ranges: Ranges) -> Range:
    bounds = item.fixed if item.fixed is not None else ranges.get(item.value)
    if bounds is None:
        raise PassRequirementError(f'value "{item.value}" is to be quantized and has no range; calibrate it')
    if not np.isfinite(bounds).all():
        raise PassRequirementError(f'value "{item.value}" has the range {bounds}, which is not finite')
    return bounds


def fold_clips(model: ModelProto, plan: Plan, parameters: Mapping[str, Grid]) -> None:
    """Take out each ReLU and clip whose rounding does the same: its bounds are the ends of the integers."""
    graph = Structure(model)
    integer = set(plan.quantized_nodes)
    for node in graph.nodes:
        bounds = graph.clip_bounds(node) if node.name in integer else None
        source, target = (node.input[0], node.output[0]) if bounds is not None else ("", "")
        maker = graph.made_by.get(source)
        if (
            bounds is None
            or target not in parameters
            or source in parameters
            or source in graph.outputs
            or maker is None
            or maker.name not in integer
            or len(graph.read_by[source]) != 1
            or not _clips_alike(bounds, parameters[target])
        ):
            continue
        maker.output[list(maker.output).index(source)] = target
        model.graph.node.remove(node)
        graph.made_by[target] = maker


def _clips_alike(bounds: Range, grid: Grid) -> bool:
    """Whether rounding to a grid cuts as a clip to ``bounds`` does."""
    scale, zero_point, number = grid
    low, high = (np.rint(np.float32(bound) / scale) + zero_point for bound in bounds)
    # QuantizeLinear knows no symmetric range: it saturates at the type's own ends.
    least = number.qmin - (number.symmetric and number.qmin < 0)
    return bool(low <= least and high >= number.qmax)
