"""Which nodes of a graph stay FP32 when it is converted to FP16 or BF16, and why."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from deploycnn.graph.half_range import HALF_MAX, HALF_TINY, overflows, vanishes
from deploycnn.graph.model import initializers, opset_of, subgraphs, value_types

#: Operator -> position of an input whose every element must survive.
_DIVISORS = {"BatchNormalization": 4, "QuantizeLinear": 1, "DequantizeLinear": 1}

_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

#: What runtimes compute in one kernel with the product in front.
_EPILOGUES = frozenset(
    {
        "Add", "Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Mul",
        "QuantizeLinear",
    }
)  # fmt: skip

Half = Literal["fp16", "bf16"]

#: -> (element type, its name in operators' schemas).
ELEMENTS: Mapping[Half, tuple[int, str]] = {
    "fp16": (TensorProto.FLOAT16, "tensor(float16)"),
    "bf16": (TensorProto.BFLOAT16, "tensor(bfloat16)"),
}


def nodes_to_keep(
    model: ModelProto, keep_ops: Collection[str], peaks: Mapping[str, float], half: Half
) -> dict[str, str]:
    """Nodes that touch float32 values and are not converted -> why.

    Args:
        model: Simplified, its nodes named and in order.
        keep_ops: Operator types, or names of nodes.
        peaks: Largest magnitude seen of each value, by name.
        half: What the others are converted to.
    """
    types = element_types(model)
    constants = initializers(model.graph)
    opset = opset_of(model)
    kept: dict[str, str] = {}
    for node in model.graph.node:
        touches = [name for name in (*node.input, *node.output) if types.get(name) == TensorProto.FLOAT]
        if not touches and not any(True for _ in subgraphs(node)):
            continue
        if node.op_type in keep_ops or node.name in keep_ops:
            kept[node.name] = "as asked"
            continue
        why = _schema_reason(node, types, opset, half)
        if half == "fp16":
            why = why or _constant_reason(node, constants) or _peak_reason(touches, peaks)
        if why:
            kept[node.name] = why
    _keep_partners(model, kept)
    return kept


def _keep_partners(model: ModelProto, kept: dict[str, str]) -> None:
    """Keep what belongs to kept nodes.

    Integers that are multiplied must have scales of one type, or no kernel takes them. And a cast within what runtimes
    compute in one kernel (a convolution, the addition of a shortcut, its activation, its rounding) would part it.
    """
    made_by = {name: node for node in model.graph.node for name in node.output}
    #: Convolutions and products that are kept, and what is computed in one kernel with them.
    whole: dict[str, str] = {}
    for node in model.graph.node:
        makers = [made_by[name] for name in node.input if name in made_by]
        scales = [maker for maker in makers if maker.op_type == "DequantizeLinear"]
        if len(scales) > 1 and node.name not in kept and any(maker.name in kept for maker in scales):
            kept[node.name] = "integers that it reads have a float32 scale"
        within = [whole[maker.name] for maker in makers if maker.name in whole]
        if node.op_type in _PRODUCTS and node.name in kept:
            whole[node.name] = node.name
        elif node.op_type in _EPILOGUES and within and len(within) + len(scales) == len(makers):
            kept.setdefault(node.name, f'computed in one kernel with "{within[0]}", which stays FP32')
            whole[node.name] = within[0]


def element_types(model: ModelProto) -> dict[str, int]:
    """ONNX element type of each value and initializer, by name; 0 where it is not known."""
    types = {name: value.type.tensor_type.elem_type for name, value in value_types(model).items()}
    types.update({tensor.name: tensor.data_type for tensor in model.graph.initializer})
    return types


def half_inputs(node: NodeProto, types: Mapping[str, int], opset: int, half: Half = "fp16") -> list[int]:
    """Positions of the node's float32 inputs that its schema also accepts as FP16 or BF16."""
    wanted = ELEMENTS[half][1]
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    allowed = {item.type_param_str: item.allowed_type_strs for item in schema.type_constraints}
    positions = []
    for position, name in enumerate(node.input):
        formal = schema.inputs[min(position, len(schema.inputs) - 1)]
        if types.get(name) == TensorProto.FLOAT and wanted in allowed.get(formal.type_str, ()):
            positions.append(position)
    return positions


def _schema_reason(node: NodeProto, types: Mapping[str, int], opset: int, half: Half) -> str:
    if any(True for _ in subgraphs(node)):
        return "control flow"
    if any(name and not types.get(name) for name in (*node.input, *node.output)):
        return "a type in it could not be inferred"
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return f'operator of the foreign domain "{node.domain}"'
    halves = half_inputs(node, types, opset, half)
    if not halves:
        return "its specification takes float32 only"
    bound = {schema.inputs[min(position, len(schema.inputs) - 1)].type_str for position in halves}
    for position, name in enumerate(node.output):
        formal = schema.outputs[min(position, len(schema.outputs) - 1)]
        if types.get(name) == TensorProto.FLOAT and formal.type_str not in bound:
            return "its specification makes float32"
    return ""


def _constant_reason(node: NodeProto, constants: Mapping[str, TensorProto]) -> str:
    for position, name in enumerate(node.input):
        if name not in constants or constants[name].data_type != TensorProto.FLOAT:
            continue
        content = numpy_helper.to_array(constants[name])
        # A bound beyond FP16 clips nothing there, so it may saturate.
        if node.op_type != "Clip" and overflows(content):
            return f'constant "{name}" overflows FP16 (largest magnitude {np.abs(content).max():.3g})'
        # A running variance and the scales of integers are divided by, so each element matters by itself.
        elementwise = position == _DIVISORS.get(node.op_type)
        if vanishes(content, elementwise=elementwise):
            return f'constant "{name}" is too small for FP16 (largest magnitude {np.abs(content).max():.3g})'
    return ""


def _peak_reason(names: list[str], peaks: Mapping[str, float]) -> str:
    for name in names:
        # 65520 and above rounds to infinity; anything past the largest finite number is already clipped.
        if peaks.get(name, 0.0) > HALF_MAX:
            return f'value "{name}" overflows FP16 (largest magnitude seen {peaks[name]:.3g})'
        if 0.0 < peaks.get(name, 0.0) < HALF_TINY:
            return f'value "{name}" vanishes in FP16 (largest magnitude seen {peaks[name]:.3g})'
    return ""
