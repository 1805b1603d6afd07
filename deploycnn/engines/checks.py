"""What TensorRT asks of an ONNX graph, checked before it is given to it: with our names and how to mend it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from deploycnn.errors import PassRequirementError
from deploycnn.graph.model import initializers, opset_of, producers

_QUANTIZED = ("QuantizeLinear", "DequantizeLinear")


def check_quantization(model: ModelProto, what: str) -> None:
    """Refuse Q/DQ that TensorRT has no kernels for: zero points, unsigned types, integer biases.

    Raises:
        PassRequirementError: names the nodes, and the setting of ``int8`` that mends it.
    """
    constants = initializers(model.graph)
    made = producers(model.graph)
    shifted, unsigned, biases = [], [], []
    for node in model.graph.node:
        if node.op_type not in _QUANTIZED:
            continue
        kind, zero = _zero_point(node, constants)
        if kind == TensorProto.INT32 or _input_type(node, constants) == TensorProto.INT32:
            biases.append(node.name or node.output[0])
        elif zero is not None and zero.any():
            shifted.append(node.name or node.output[0])
        elif TensorProto.UINT8 in (kind, _input_type(node, constants)) or _implied_unsigned(node, kind, made):
            unsigned.append(node.name or node.output[0])
    for names, problem in (
        (shifted, "has a zero point that is not 0 (asymmetric quantization)"),
        (unsigned, "has the type uint8"),
        (biases, "is an int32 bias"),
    ):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise PassRequirementError(
                f'build_engine: {what}: Q/DQ node "{names[0]}"{others} {problem}, which TensorRT does not take; '
                "quantize with `target: tensorrt`, whose rules are symmetric int8 with float biases"
            )


def _zero_point(
    node: NodeProto, constants: dict[str, TensorProto]
) -> tuple[int, npt.NDArray[np.generic] | None]:
    name = node.input[2] if len(node.input) > 2 else ""
    if name not in constants:
        return 0, None
    return constants[name].data_type, numpy_helper.to_array(constants[name])


def _input_type(node: NodeProto, constants: dict[str, TensorProto]) -> int:
    return constants[node.input[0]].data_type if node.input[0] in constants else 0


def _implied_unsigned(node: NodeProto, kind: int, made: dict[str, NodeProto]) -> bool:
    """Without a zero point and without ``output_dtype``, ONNX quantizes to uint8."""
    if kind:
        return False
    quantize = node if node.op_type == "QuantizeLinear" else made.get(node.input[0])
    if quantize is None or quantize.op_type != "QuantizeLinear" or len(quantize.input) > 2:
        return False
    return not any(item.name == "output_dtype" and item.i for item in quantize.attribute)


def sparse_weights(model: ModelProto) -> int:
    """How many convolutions and matrix products have 2:4 sparse weights: two zeros among each four along the input.

    The pattern is along the input channels (the innermost axis of the matrix that the kernel multiplies by), see
    Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv:2104.08378.
    """
    constants = initializers(model.graph)
    made = producers(model.graph)
    return sum(
        _is_sparse(weight, node)
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and len(node.input) > 1
        for weight in [_weight(node.input[1], constants, made)]
        if weight is not None
    )


def _weight(
    name: str, constants: dict[str, TensorProto], made: dict[str, NodeProto]
) -> npt.NDArray[np.generic] | None:
    while name not in constants:
        if name not in made or made[name].op_type not in (*_QUANTIZED, "Cast"):
            return None
        name = made[name].input[0]
    return numpy_helper.to_array(constants[name])


def _is_sparse(weight: npt.NDArray[np.generic], node: NodeProto) -> bool:
    if node.op_type == "Conv":
        axis = 1
    else:
        transposed = any(item.name == "transB" and item.i for item in node.attribute)
        axis = weight.ndim - 1 if transposed else weight.ndim - 2
    if axis < 0 or weight.shape[axis] % 4:
        return False
    rows = np.moveaxis(weight, axis, -1).reshape(-1, 4)
    return bool(((rows == 0).sum(axis=1) >= 2).all())


def check_opset(model: ModelProto, what: str) -> None:
    """Refuse models older than the parser reads.

    Raises:
        PassRequirementError: the opset is below 9.
    """
    if opset_of(model) < 9:
        raise PassRequirementError(
            f"build_engine: {what}: opset {opset_of(model)} is too old; export with 17 or newer"
        )
