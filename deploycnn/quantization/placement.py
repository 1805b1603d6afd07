"""Which nodes stand between Q and DQ, so that onnxruntime's CPU provider (and OpenVINO) fuse the graph.

Compute nodes with constant weights are quantized. The nodes between them (additions, concatenations, pools,
reshapes) are quantized where all their inputs are and where a quantized compute node follows: then the values
stay 8-bit in between. Behind the last compute node everything stays float.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import cast

from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from deploycnn.graph.model import attribute, consumers, initializers, producers

COMPUTE = frozenset({"Conv", "Gemm", "MatMul"})

#: Operators left in float because onnxruntime has no integer kernel for them.
FLOAT_ONLY_COMPUTE = frozenset({"ConvTranspose"})

ACTIVATIONS = frozenset({"Relu", "Clip"})

#: Operators with an 8-bit kernel, or that only move data. ``HardSigmoid`` has none, but 8 bits on both sides
#: of it let the gate's ``Mul`` run on integers; ``Pad`` likewise for the addition behind it.
FOLLOWERS = frozenset(
    {
        "Add", "Mul", "Sigmoid", "HardSigmoid", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool",
        "Pad", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Split", "Slice",
    }
)  # fmt: skip

#: Followers all of whose inputs are activations; the others' further inputs are shapes, axes and bounds.
_MANY_INPUTS = frozenset({"Add", "Mul", "Concat"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Names of the nodes to quantize, in graph order, and of compute nodes left in float -> why."""

    quantized: tuple[str, ...]
    float_compute: Mapping[str, str]


def place(model: ModelProto, exclude: Collection[str] = ()) -> Placement:
    """Choose the nodes to quantize in a simplified model whose nodes are named."""
    graph = model.graph
    weights = initializers(graph)
    made_by = producers(graph)
    read_by = consumers(graph)
    chosen: set[str] = set()
    kept: dict[str, str] = {}
    for node in graph.node:
        if node.op_type in COMPUTE | FLOAT_ONLY_COMPUTE:
            why = "as asked" if node.name in exclude else _why_float(node, weights)
            if why:
                kept[node.name] = why
            else:
                chosen.add(node.name)
        elif node.name not in exclude and _may_follow(node, weights):
            inputs = [name for name in _data_inputs(node) if name not in weights]
            if inputs and all(name in made_by and made_by[name].name in chosen for name in inputs):
                chosen.add(node.name)
    needed: set[str] = set()
    for node in reversed(graph.node):
        if node.name not in chosen:
            continue
        readers = [reader for name in node.output for reader in read_by.get(name, ())]
        # An activation is folded into the range of what it follows, at no cost wherever it stands.
        if (
            node.op_type in COMPUTE
            or any(reader.name in needed for reader in readers)
            or (node.op_type in ACTIVATIONS and made_by[node.input[0]].op_type in COMPUTE)
        ):
            needed.add(node.name)
    return Placement(
        quantized=tuple(node.name for node in graph.node if node.name in needed), float_compute=kept
    )


def _why_float(node: NodeProto, weights: Mapping[str, TensorProto]) -> str:
    if node.op_type in FLOAT_ONLY_COMPUTE:
        return "no integer kernel"
    if any(name not in weights for name in node.input[1:] if name):
        return "its weights are not constant"
    if node.op_type == "Gemm" and (attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0):
        return "transposed or scaled Gemm"
    return ""


def _may_follow(node: NodeProto, weights: Mapping[str, TensorProto]) -> bool:
    if node.op_type == "Clip":
        # It becomes the quantization range, which must hold zero.
        low = _constant(node, 1, float("-inf"), weights)
        high = _constant(node, 2, float("inf"), weights)
        return low is not None and high is not None and low <= 0.0 <= high
    if node.op_type == "Pad":
        # Zero is in every range, so padding with it needs no range of its own.
        return attribute(node, "mode", b"constant") == b"constant" and _constant(node, 2, 0.0, weights) == 0.0
    if node.op_type == "MaxPool":
        return len(node.output) == 1 and set(cast("list[int]", attribute(node, "dilations", [1]))) == {1}
    return node.op_type in FOLLOWERS or node.op_type in ACTIVATIONS


def _data_inputs(node: NodeProto) -> list[str]:
    return list(node.input) if node.op_type in _MANY_INPUTS else list(node.input[:1])


def _constant(
    node: NodeProto, position: int, absent: float, weights: Mapping[str, TensorProto]
) -> float | None:
    """A scalar input: ``absent`` where it is left out, ``None`` where it is computed."""
    if position >= len(node.input) or not node.input[position]:
        return absent
    name = node.input[position]
    return float(numpy_helper.to_array(weights[name]).item()) if name in weights else None
