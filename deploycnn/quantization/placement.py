"""Which values and weights of a float graph become integers, by a target's rules.

``place`` decides, ``calibrate`` finds the ranges, ``insertion.build`` makes the Q/DQ graph.
"""

from __future__ import annotations

from collections.abc import Collection

from onnx import ModelProto, NodeProto

from deploycnn.graph.model import attribute
from deploycnn.quantization.inputs import Inputs
from deploycnn.quantization.packs import RulePack
from deploycnn.quantization.structure import COMPUTE, FLOAT_ONLY_COMPUTE, Structure
from deploycnn.quantization.types import Plan, WeightPlan
from deploycnn.quantization.units import Units


def place(model: ModelProto, pack: RulePack, keep_float: Collection[str] = ()) -> Plan:
    """Decide what is quantized.

    Args:
        model: A simplified float graph whose nodes are named and whose shapes are inferred
            (``static.prepare``).
        pack: The target's rules.
        keep_float: Names of nodes to leave in float, also against the rules.

    Returns:
        The plan. It has no activations where the pack quantizes weights only, and nothing at all where the
        graph holds no convolution or matrix product that may be quantized.
    """
    graph = Structure(model)
    kept = _kept_float(graph, pack, keep_float)
    chosen = {node.name for node in graph.nodes if node.op_type in COMPUTE and node.name not in kept}
    if pack.style == "units":
        integer, activations = Units(graph, pack, chosen, keep_float).place()
    elif pack.style == "inputs":
        integer, activations = Inputs(graph, pack, chosen, keep_float).place()
    else:
        integer, activations = chosen, ()
    sensitive = sensitive_layers(graph) if pack.sensitive_weight is not None else set()
    return Plan(
        target=pack.target,
        activation=pack.activation,
        signed=pack.signed,
        activations=activations,
        weights=tuple(
            WeightPlan(
                initializer=node.input[1],
                node=node.name,
                axis=output_axis(node) if pack.per_channel else None,
                number=(pack.sensitive_weight if node.name in sensitive else None) or pack.weight,
            )
            for node in graph.nodes
            if node.name in chosen
        ),
        integer_bias=pack.integer_bias,
        quantized_nodes=tuple(node.name for node in graph.nodes if node.name in integer),
        on_integers=pack.on_integers,
        convolves_selections=pack.convolves_selections,
        convolves_pools=pack.convolves_pools,
        guards_float=pack.guards_float,
        kept_float=kept,
    )


def sensitive_layers(graph: Structure) -> set[str]:
    """Layers that few bits hurt most: the first and the last ones of every path, and depthwise convolutions.

    The first see the image as it is, the last make the logits, and a depthwise kernel has too few weights for their
    errors to cancel out. All of them together are a small share of a CNN's weights.
    """
    found = set[str]()
    behind, ahead = set[str](), set(graph.outputs)
    for node in graph.nodes:
        follows = any(name in behind for name in node.input)
        if node.op_type in COMPUTE:
            if not follows:
                found.add(node.name)
            grouped = node.op_type == "Conv" and attribute(node, "group", 1) != 1
            if grouped and node.input[1] in graph.constants and graph.weight_shape(node)[1] == 1:
                found.add(node.name)
        if follows or node.op_type in COMPUTE:
            behind.update(node.output)
    for node in reversed(graph.nodes):
        if not any(name in ahead for name in node.output):
            continue
        if node.op_type in COMPUTE:
            found.add(node.name)
        else:
            ahead.update(node.input)
    return found


def output_axis(node: NodeProto) -> int:
    """The axis of a node's weights that counts its output channels."""
    if node.op_type == "Conv":
        return 0
    return 0 if node.op_type == "Gemm" and attribute(node, "transB", 0) else 1


def _kept_float(graph: Structure, pack: RulePack, keep_float: Collection[str]) -> dict[str, str]:
    """Convolutions and matrix products that stay float -> why."""
    gates = graph.squeezed() if pack.float_gates and pack.style != "weights" else set()
    kept = {}
    for node in graph.nodes:
        if node.op_type not in COMPUTE | FLOAT_ONLY_COMPUTE:
            continue
        why = "as asked" if node.name in keep_float else why_float(node, graph, pack)
        if not why and node.name in gates:
            why = "part of a squeeze-and-excitation gate"
        if why:
            kept[node.name] = why
    return kept


def why_float(node: NodeProto, graph: Structure, pack: RulePack) -> str:
    """Why a convolution or matrix product cannot or should not be quantized; empty where it should."""
    if any(name not in graph.constants for name in node.input[1:] if name):
        return "its weights are not constant"
    if node.op_type == "MatMul" and (node.input[0] in graph.constants or len(graph.weight_shape(node)) != 2):
        return "its weights are no matrix on the right"
    if node.op_type == "Gemm" and (attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0):
        return "transposed or scaled Gemm"
    if node.op_type == "Gemm" and not graph.adds_row(node):
        return "Gemm that adds a whole matrix"
    if pack.style == "weights":
        return "no integer kernel" if node.op_type in FLOAT_ONLY_COMPUTE else ""
    if node.op_type in pack.float_operators:
        return pack.float_operators[node.op_type]
    shape = graph.weight_shape(node)
    if node.op_type == "Conv":
        return _why_float_convolution(node, shape, graph, pack)
    if min(shape) < pack.min_product:
        return f"a matrix product of {min(shape)} rows or columns; under {pack.min_product} gains nothing"
    return ""


def _why_float_convolution(node: NodeProto, shape: tuple[int, ...], graph: Structure, pack: RulePack) -> str:
    group = attribute(node, "group", 1)
    if group != 1 and shape[0] % pack.grouped_multiple:
        return f"grouped, with {shape[0]} output channels (no multiple of {pack.grouped_multiple})"
    if group != 1 and min(shape[2:], default=1) < pack.grouped_kernel:
        return f"grouped, with a kernel under {pack.grouped_kernel}"
    if node.input[0] in graph.inputs and shape[1] % pack.first_multiple and shape[0] % pack.first_multiple:
        return f"first layer, and neither input nor output channels are a multiple of {pack.first_multiple}"
    return ""
