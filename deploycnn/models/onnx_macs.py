"""Parameters, multiply-accumulates (MACs) and tensor specifications of ONNX models.

Float, FP16, Q/DQ and integer-operator graphs are all understood; the same network counts the same in each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, TensorProto
from onnx.inliner import inline_local_functions

from deploycnn.core import TensorSpec
from deploycnn.graph import model as graphs

Shape = tuple[int, ...]

#: Operator -> inputs that are trained parameters when they are constant.
_PARAMETERS: Mapping[str, frozenset[int]] = {
    **dict.fromkeys(("Conv", "ConvTranspose", "FusedConv"), frozenset({1, 2})),
    **dict.fromkeys(("Gemm", "FusedGemm", "MatMul", "FusedMatMul"), frozenset({0, 1, 2})),
    **dict.fromkeys(
        ("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization"),
        frozenset({1, 2}),
    ),
    **dict.fromkeys(("PRelu", "ConvInteger", "MatMulInteger"), frozenset({1})),
    "QLinearConv": frozenset({3, 8}),
    "QLinearMatMul": frozenset({0, 3}),
    "Gather": frozenset({0}),
}

#: Arithmetic whose stored operand is a bias or a scale, unless it is a mere number. Operands written into the
#: graph as ``Constant`` nodes come from the model's code (anchors, image statistics) and are not trained.
_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div"})

#: Operators that hand a constant on as it is, in another type or shape.
_HANDS_ON = frozenset(
    {
        "Cast",
        "DequantizeLinear",
        "Flatten",
        "Identity",
        "QuantizeLinear",
        "Reshape",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)

#: Operators with MACs that are not counted here; a graph with them has unknown MACs rather than too few.
_UNCOUNTED = frozenset(
    {
        "Attention",
        "MultiHeadAttention",
        "QAttention",
        "LSTM",
        "GRU",
        "RNN",
        "DeformConv",
        "Loop",
        "If",
        "Scan",
    }
)

#: Larger constants only matter by their shape; shape inference is spared their bytes.
_SMALL = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxCounts:
    """What a graph holds and costs.

    Attributes:
        params: Trained parameters; scales, zero points and batch-norm statistics do not count.
        macs: For one image; ``None`` where a shape or an operator's cost is unknown.
    """

    params: int
    macs: int | None


def onnx_specs(path: Path | str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of an ONNX file; initializers that old files list among the inputs are left out.

    Raises:
        ArtifactError: the file is missing, truncated or not ONNX.
    """
    model = graphs.load_onnx(Path(path))
    return specs_of(model)


def specs_of(model: ModelProto) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a model, as :func:`onnx_specs`."""
    return graphs.tensor_specs(graphs.runtime_inputs(model)), graphs.tensor_specs(model.graph.output)


def count_onnx(model: ModelProto | Path | str, input_shape: Sequence[int] | None = None) -> OnnxCounts:
    """Count parameters and MACs.

    Args:
        model: The model or its file.
        input_shape: (C, H, W) of one image, needed where the graph leaves these open.

    Raises:
        ArtifactError: the file is missing, truncated or not ONNX.
    """
    if not isinstance(model, ModelProto):
        model = graphs.load_onnx(Path(model))
    typed = with_shapes(model, input_shape)
    shapes = known_shapes(typed)
    return OnnxCounts(params=sum(params_by_output(model).values()), macs=_count_macs(typed, shapes))


def with_shapes(model: ModelProto, input_shape: Sequence[int] | None = None) -> ModelProto:
    """A light copy of ``model`` with the shapes of all values for one image, as far as ONNX can tell.

    Large constants become graph inputs, local functions are inlined, and a dynamic batch axis is 1.
    """
    if model.functions:
        model = inline_local_functions(model)
    fed = {value.name for value in graphs.runtime_inputs(model)}
    light = ModelProto()
    light.ir_version = model.ir_version
    light.opset_import.extend(model.opset_import)
    light.graph.name = model.graph.name
    light.graph.node.extend(model.graph.node)
    light.graph.output.extend(model.graph.output)
    light.graph.input.extend(value for value in model.graph.input if value.name in fed)
    for value in light.graph.input:
        _fix_axes(value, input_shape)
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= _SMALL:
            light.graph.initializer.append(tensor)
        else:
            light.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    return graphs.infer_shapes(light)


def _fix_axes(value: onnx.ValueInfoProto, input_shape: Sequence[int] | None) -> None:
    if not value.type.tensor_type.HasField("shape"):
        return
    wanted = (1, *(input_shape or ()))
    for index, axis in enumerate(value.type.tensor_type.shape.dim):
        if not axis.HasField("dim_value") and index < len(wanted):
            axis.dim_value = wanted[index]


def known_shapes(model: ModelProto) -> dict[str, Shape]:
    """Value name -> shape, of all values whose shape is fully known. Axes of length 0 count as unknown."""
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for name, value in graphs.value_types(model).items():
        shape = graphs.shape_of(value) if value.type.HasField("tensor_type") else None
        if shape is not None and all(shape):
            shapes[name] = tuple(axis for axis in shape if axis is not None)
    return shapes


def batch_of(model: ModelProto, shapes: Mapping[str, Shape]) -> int:
    """Images per run of a graph whose batch axis is fixed; 1 otherwise."""
    first = next(iter(graphs.runtime_inputs(model)), None)
    shape = shapes.get(first.name, ()) if first is not None else ()
    return shape[0] if len(shape) == 4 else 1


def _count_macs(model: ModelProto, shapes: Mapping[str, Shape]) -> int | None:
    total = 0
    for node in model.graph.node:
        macs = node_macs(node, shapes)
        if macs is None:
            return None
        total += macs
    return total // batch_of(model, shapes)


def node_macs(node: NodeProto, shapes: Mapping[str, Shape]) -> int | None:
    """MACs of one node for the whole batch; 0 for operators without, ``None`` where they are unknown."""
    if node.op_type in _UNCOUNTED:
        return None
    try:
        return _node_macs(node, shapes)
    except KeyError:
        return None


def _node_macs(node: NodeProto, shapes: Mapping[str, Shape]) -> int:
    op, inputs = node.op_type, node.input
    if op in {"Conv", "FusedConv", "ConvInteger", "QLinearConv"}:
        weight = shapes[inputs[3 if op == "QLinearConv" else 1]]
        return math.prod(shapes[node.output[0]]) * math.prod(weight[1:])
    if op == "ConvTranspose":
        return math.prod(shapes[inputs[0]]) * math.prod(shapes[inputs[1]][1:])
    if op in {"Gemm", "FusedGemm", "QGemm"}:
        rows = shapes[inputs[0]]
        return math.prod(shapes[node.output[0]]) * rows[0 if graphs.attribute(node, "transA", 0) else 1]
    if op in {"MatMul", "MatMulInteger", "QLinearMatMul", "FusedMatMul"}:
        rows = shapes[inputs[0]]
        return math.prod(shapes[node.output[0]]) * rows[-2 if graphs.attribute(node, "transA", 0) else -1]
    if op == "Einsum":
        return _einsum_macs(node, shapes)
    return 0


def _einsum_macs(node: NodeProto, shapes: Mapping[str, Shape]) -> int:
    """The product of all index ranges."""
    equation = graphs.attribute(node, "equation", b"")
    terms = equation.decode() if isinstance(equation, bytes) else str(equation)
    operands = terms.replace(" ", "").partition("->")[0].split(",")
    if "..." in terms or len(operands) != len(node.input):
        raise KeyError(terms)
    ranges = {
        letter: size
        for operand, name in zip(operands, node.input, strict=True)
        for letter, size in zip(operand, shapes[name], strict=True)
    }
    return math.prod(ranges.values())


def params_by_output(model: ModelProto) -> dict[str, int]:
    """First output of a node -> trained parameters that the node uses first."""
    if model.functions:
        model = inline_local_functions(model)
    readers: dict[str, list[tuple[NodeProto, int]]] = {}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, index))
    constants = {
        node.output[0]: held
        for node in model.graph.node
        if node.op_type == "Constant" and isinstance(held := graphs.attribute(node, "value"), TensorProto)
    }
    stored = graphs.initializers(model.graph)
    found: dict[str, int] = {}
    for name, tensor in (constants | stored).items():
        owner = _owner(name, tensor, readers, stored=name in stored)
        if owner is not None:
            found[owner.output[0]] = found.get(owner.output[0], 0) + math.prod(tensor.dims)
    return found


def _owner(
    name: str, tensor: TensorProto, readers: Mapping[str, Sequence[tuple[NodeProto, int]]], *, stored: bool
) -> NodeProto | None:
    """The node that uses a constant as its weight, bias or scale; ``None`` where none does."""
    for node, index in readers.get(name, ()):
        if index in _PARAMETERS.get(node.op_type, ()):
            return node
        if node.op_type in _ARITHMETIC and stored and _is_float(tensor) and math.prod(tensor.dims) > 1:
            return node
        if node.op_type in _HANDS_ON and index == 0:
            owner = _owner(node.output[0], tensor, readers, stored=stored)
            if owner is not None:
                return owner
    return None


def _is_float(tensor: TensorProto) -> bool:
    floats = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}
    return tensor.data_type in floats
