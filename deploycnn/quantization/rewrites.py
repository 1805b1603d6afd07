"""Exact float rewrites that give integer kernels what they can compute.

Neither onnxruntime's CPU provider nor most integer runtimes have 8-bit kernels for ``HardSwish`` and ``HardSigmoid``:
a quantized graph leaves its integers for them and comes back, which costs more than the convolutions gain. Both are
piecewise polynomials, and what clips them is what a quantization range does for nothing::

    Conv(x; W, b) -> HardSigmoid(alpha, beta)   =   Conv(x; alpha W, alpha b + beta) -> Clip(0, 1)
    Conv(x; W, b) -> HardSwish                  =   u * Clip(u + beta / r, 0, 1 / r),
                                                    u = Conv(x; r W, r b), r = sqrt(alpha), alpha = 1/6, beta = 1/2

The factor of HardSwish is shared out evenly between its two arguments, so no multiplication by it remains. In integers
these are QLinearConv with the range [0, 1], and QLinearAdd (with a constant) followed by QLinearMul. In real numbers
nothing changes; in float32, only the last bits.

HardSwish: Howard et al. 2019, "Searching for MobileNetV3", section 5.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import cast

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from deploycnn.graph.cleanup import remove_unused
from deploycnn.graph.constants import replace_constant
from deploycnn.graph.model import (
    attribute,
    consumers,
    infer_shapes,
    initializers,
    lasting_names,
    producers,
    shape_of,
    value_types,
)
from deploycnn.graph.names import names_taken, unique
from deploycnn.quantization.first_layers import align_first_layers
from deploycnn.quantization.shuffle import remove_shuffles
from deploycnn.quantization.widths import align_channels

#: HardSwish(x) = x * max(0, min(1, x / 6 + 1 / 2)).
HARDSWISH_ALPHA, HARDSWISH_BETA = 1.0 / 6.0, 0.5


def clip_by_range(model: ModelProto) -> int:
    """Rewrite ``HardSigmoid`` and ``HardSwish`` behind convolutions and matrix products, in place; return how many.

    ``x * HardSigmoid(x)``, as older exporters write HardSwish, counts as one. An activation stays as it is where what
    it follows has other readers, is a graph output, or has weights that are not constant.

    Args:
        model: A simplified float32 model whose nodes are named.
    """
    changed = 0
    for name in [held.name for held in model.graph.node if held.op_type in {"HardSwish", "HardSigmoid"}]:
        # Looked up anew: a rewrite builds the list of nodes again.
        node = next(held for held in model.graph.node if held.name == name)
        if node.op_type == "HardSwish":
            changed += _rewrite_hardswish(model, node, node, HARDSWISH_ALPHA, HARDSWISH_BETA)
        elif node.op_type == "HardSigmoid":
            alpha = cast("float", attribute(node, "alpha", 0.2))
            beta = cast("float", attribute(node, "beta", 0.5))
            product = _self_gated(model.graph, node)
            if product is not None:
                changed += _rewrite_hardswish(model, node, product, alpha, beta)
            else:
                changed += _rewrite_hardsigmoid(model, node, alpha, beta)
    if changed:
        remove_unused(model)
        model.CopyFrom(infer_shapes(model))
    return changed


#: Smallest H * W for which copying the gate pays: below, the copies cost what the broadcast costs.
MIN_TILED_PIXELS = 14 * 14


def tile_gates(model: ModelProto) -> int:
    """Repeat the gates of squeeze-and-excitation over H and W before they are multiplied, in place; return how many.

    ``x (N, C, H, W) * g (N, C, 1, 1)`` runs in onnxruntime's integer kernel pixel by pixel, C values at a time, which
    for small C is up to four times slower than a product of equal shapes, copies included. Exact.

    Args:
        model: A simplified model with inferred shapes. Gates over unknown H and W stay as they are.
    """
    graph = model.graph
    types = value_types(model)
    taken = names_taken(graph)
    changed = 0
    for node in list(graph.node):
        if node.op_type != "Mul":
            continue
        shapes = [shape_of(types[name]) if name in types else None for name in node.input]
        for position in (0, 1):
            gate, image = shapes[position], shapes[1 - position]
            if gate is None or image is None or len(gate) != 4 or len(image) != 4:
                continue
            height, width = image[2:]
            if gate[2:] != (1, 1) or gate[:2] != image[:2] or height is None or width is None:
                continue
            if height * width < MIN_TILED_PIXELS or node.input[position] in initializers(graph):
                continue
            tiled, repeats = unique(f"{node.name}.tiled", taken), unique(f"{node.name}.repeats", taken)
            taken |= {tiled, repeats}
            counts = np.array([1, 1, height, width], dtype=np.int64)
            graph.initializer.append(numpy_helper.from_array(counts, repeats))
            tile = helper.make_node("Tile", [node.input[position], repeats], [tiled], name=tiled)
            node.input[position] = tiled
            graph.node.insert(list(graph.node).index(node), tile)
            changed += 1
            break
    if changed:
        model.CopyFrom(infer_shapes(model))
    return changed


def _self_gated(graph: GraphProto, gate: NodeProto) -> NodeProto | None:
    """The ``Mul`` of ``x * HardSigmoid(x)``, if that is all that reads the gate."""
    readers = consumers(graph).get(gate.output[0], [])
    if len(readers) == 1 and readers[0].op_type == "Mul" and gate.output[0] not in lasting_names(graph):
        return readers[0] if set(readers[0].input) == {gate.input[0], gate.output[0]} else None
    return None


def _rewrite_hardsigmoid(model: ModelProto, node: NodeProto, alpha: float, beta: float) -> bool:
    source = _scalable(model.graph, node.input[0], {node.name})
    if source is None:
        return False
    taken = names_taken(model.graph)
    _scale_and_shift(model.graph, source, alpha, beta, taken)
    bounds = _constants(model.graph, node.name, {"low": 0.0, "high": 1.0}, taken)
    node.CopyFrom(helper.make_node("Clip", [node.input[0], *bounds], [node.output[0]], name=node.name))
    return True


def _rewrite_hardswish(
    model: ModelProto, node: NodeProto, product: NodeProto, alpha: float, beta: float
) -> bool:
    """``node`` is the HardSwish, or the gate of ``product``; ``product`` makes the result."""
    source = _scalable(model.graph, node.input[0], {node.name, product.name})
    if source is None or alpha <= 0.0:
        return False
    graph = model.graph
    taken = names_taken(graph)
    root = math.sqrt(alpha)
    _scale_and_shift(graph, source, root, 0.0, taken)
    values = {"offset": beta / root, "low": 0.0, "high": 1.0 / root}
    offset, low, high = _constants(graph, node.name, values, taken)
    scaled, shifted, gate = node.input[0], f"{node.name}.shifted", f"{node.name}.gate"
    shifted, gate = unique(shifted, taken), unique(gate, taken | {shifted})
    made = [
        helper.make_node("Add", [scaled, offset], [shifted], name=shifted),
        helper.make_node("Clip", [shifted, low, high], [gate], name=gate),
        helper.make_node("Mul", [scaled, gate], [product.output[0]], name=product.name),
    ]
    position = next(index for index, held in enumerate(graph.node) if held.name == product.name)
    doomed = {node.name, product.name}
    nodes = list(graph.node)
    kept = [held for held in nodes[:position] if held.name not in doomed]
    rest = [held for held in nodes[position:] if held.name not in doomed]
    rebuilt = [*kept, *made, *rest]
    del graph.node[:]
    graph.node.extend(rebuilt)
    return True


def _scalable(graph: GraphProto, value: str, readers: set[str]) -> NodeProto | None:
    """What makes ``value``, if it is linear with constant weights and only ``readers`` see it."""
    source = producers(graph).get(value)
    weights = initializers(graph)
    if source is None or source.op_type not in {"Conv", "Gemm"} or value in lasting_names(graph):
        return None
    if {reader.name for reader in consumers(graph).get(value, [])} != readers:
        return None
    if any(name not in weights for name in source.input[1:] if name):
        return None
    if source.op_type == "Gemm" and attribute(source, "beta", 1.0) != 1.0:
        return None
    return source


def _scale_and_shift(graph: GraphProto, node: NodeProto, scale: float, shift: float, taken: set[str]) -> None:
    """Make ``node`` (Conv or Gemm) return ``scale * y + shift``, in float64, where it returned ``y``."""
    weights = initializers(graph)
    weight, outputs = numpy_helper.to_array(weights[node.input[1]]), _outputs_of(node, weights)
    replace_constant(graph, node, 1, weight.astype(np.float64) * scale, taken)
    if len(node.input) > 2 and node.input[2]:
        bias = numpy_helper.to_array(weights[node.input[2]]).astype(np.float64)
        replace_constant(graph, node, 2, bias * scale + shift, taken)
    elif shift:
        name = unique(f"{node.name}.bias", taken)
        taken.add(name)
        bias = np.full(outputs, shift, dtype=weight.dtype)
        graph.initializer.append(numpy_helper.from_array(bias, name))
        del node.input[2:]
        node.input.append(name)


def _outputs_of(node: NodeProto, weights: Mapping[str, TensorProto]) -> int:
    shape = weights[node.input[1]].dims
    transposed = node.op_type == "Conv" or attribute(node, "transB", 0)
    return int(shape[0] if transposed else shape[1])


def _constants(graph: GraphProto, stem: str, values: Mapping[str, float], taken: set[str]) -> Sequence[str]:
    names = []
    for suffix, value in values.items():
        name = unique(f"{stem}.{suffix}", taken)
        taken.add(name)
        graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype=np.float32), name))
        names.append(name)
    return names


# Nanoseconds for a pixel on one core with VNNI, of which only the ratios matter (ResNeXt's and RegNet's shapes).
#: A group costs this, and this for each tap, as its windows are copied into a matrix; one group is read in place.
_GROUP, _GROUP_TAP, _ONE_GROUP = 5.0, 3.8, 15.0
#: Of a product. A third more than a Sapphire Rapids takes, to be right for CPUs with narrower units as well.
_PRODUCT = 0.004
#: What joining must leave of the time, at most.
_MERGED_SHARE = 0.8


def merge_groups(model: ModelProto) -> int:
    """Join narrow groups of grouped convolutions into wider ones whose new weights are zero, in place; return how many.

    onnxruntime's integer convolution runs group by group, and for groups of 8 channels spends its time on everything
    but products: RegNet's 104 channels take 1.9 times as long in 13 groups as in one. Depthwise convolutions
    have kernels of their own and stay. Exact.
    """
    graph = model.graph
    weights = initializers(graph)
    taken = names_taken(graph)
    changed = 0
    for node in graph.node:
        groups = cast("int", attribute(node, "group", 1))
        if node.op_type != "Conv" or groups == 1 or node.input[1] not in weights:
            continue
        weight = numpy_helper.to_array(weights[node.input[1]])
        outputs, width, *kernel = weight.shape
        if width == 1:
            continue
        merged = _groups_to_merge(groups, width, outputs // groups, math.prod(kernel))
        if merged == 1:
            continue
        wide = np.zeros((outputs, merged * width, *kernel))
        for channel in range(outputs):
            place = channel // (outputs // groups) % merged * width
            wide[channel, place : place + width] = weight[channel]
        replace_constant(graph, node, 1, wide, taken)
        next(held for held in node.attribute if held.name == "group").i = groups // merged
        changed += 1
    return changed


def _groups_to_merge(groups: int, inputs: int, outputs: int, taps: int) -> int:
    """How many of ``groups`` should become one, which each have ``inputs`` and ``outputs`` channels."""

    def cost(merged: int) -> float:
        left = groups // merged
        overhead = _ONE_GROUP if left == 1 else _GROUP + _GROUP_TAP * taps
        return left * (overhead + _PRODUCT * taps * inputs * outputs * merged**2)

    best = min((merged for merged in range(1, groups + 1) if groups % merged == 0), key=cost)
    return best if cost(best) <= _MERGED_SHARE * cost(1) else 1


#: Rewrites by the name that rule packs call them by, in the order in which they are made.
REWRITES: Mapping[str, Callable[[ModelProto], int]] = {
    "remove_shuffles": remove_shuffles,
    "clip_by_range": clip_by_range,
    "tile_gates": tile_gates,
    "merge_groups": merge_groups,
    "align_channels": align_channels,
    "align_first_layers": align_first_layers,
}


def apply_rewrites(model: ModelProto, names: Collection[str]) -> dict[str, int]:
    """Make the named rewrites in place, in the order of ``REWRITES``; return how often each one applied."""
    return {name: rewrite(model) for name, rewrite in REWRITES.items() if name in names}
