"""BF16 without a runtime for it: constants, and a float32 graph that rounds where a BF16 graph does.

onnxruntime has no BF16 kernels on CPUs, but it rounds to BF16 and back. So what a BF16 graph computes is imitated:
each of its operators in float32, its inputs and outputs rounded. GPUs sum the products of BF16 numbers in float32
too (NVIDIA, "TensorRT Developer Guide", reduced precision), so the imitation is what they compute, but for the order of
the sums.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper

from deploycnn.graph.model import infer_shapes, value_types


def bits_of(content: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Float32 as BF16 bit patterns, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(content, dtype=np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    not_a_number = ((bits >> 16) | 0x40).astype(np.uint16)
    return np.where(np.isnan(content), not_a_number, rounded)


def floats_of(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """BF16 bit patterns as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def constant(name: str, content: npt.NDArray[np.float32]) -> TensorProto:
    """A BF16 initializer."""
    raw = bits_of(content).astype("<u2").tobytes()
    return TensorProto(name=name, data_type=TensorProto.BFLOAT16, dims=content.shape, raw_data=raw)


def float32_twin(model: ModelProto) -> ModelProto:
    """A float32 graph that computes what a BF16 graph of ``convert_fp16(half="bf16")`` does."""
    twin = ModelProto()
    twin.CopyFrom(model)
    types = {name: value.type.tensor_type.elem_type for name, value in value_types(model).items()}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        nodes.append(copy)
        for position, name in enumerate(node.output):
            if types.get(name) != TensorProto.BFLOAT16:
                continue
            if node.op_type == "Cast":
                next(item for item in copy.attribute if item.name == "to").i = TensorProto.FLOAT
            copy.output[position] = f"{name}/exact"
            nodes.append(
                helper.make_node("Cast", [f"{name}/exact"], [f"{name}/short"], to=TensorProto.BFLOAT16)
            )
            nodes.append(helper.make_node("Cast", [f"{name}/short"], [name], to=TensorProto.FLOAT))
    del twin.graph.node[:], twin.graph.value_info[:]
    twin.graph.node.extend(nodes)
    for tensor in twin.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            bits = np.frombuffer(tensor.raw_data, "<u2").astype(np.uint16)
            tensor.raw_data = floats_of(bits).astype("<f4").tobytes()
            tensor.data_type = TensorProto.FLOAT
    return infer_shapes(twin)
