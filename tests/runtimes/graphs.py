"""Small ONNX graphs, sound and broken, and what the sound ones compute in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from deploycnn.core import Artifact, Facts, Format, TensorSpec

CHANNELS, CLASSES, SIZE = 16, 10, 16


def weights(layers: int = 2) -> dict[str, npt.NDArray[np.float32]]:
    generator = np.random.default_rng(0)
    found = {}
    for index in range(layers):
        inputs = 3 if index == 0 else CHANNELS
        found[f"w{index}"] = generator.normal(0, (2 / (9 * inputs)) ** 0.5, (CHANNELS, inputs, 3, 3))
    found["head"] = generator.normal(0, 0.3, (CHANNELS, CLASSES))
    return {name: value.astype(np.float32) for name, value in found.items()}


def write(
    path: Path,
    *,
    layers: int = 2,
    opset: int = 17,
    batch: int | str = "N",
    extra: tuple[str, str] | None = None,
    initializers_as_inputs: bool = False,
    images: int = 1,
    dtype: int = TensorProto.FLOAT,
) -> Path:
    """Conv-Relu layers and a classifier. ``extra`` is (operator, domain) of one more node."""
    nodes, current = [], "images"
    for index in range(layers):
        nodes.append(helper.make_node("Conv", [current, f"w{index}"], [f"c{index}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"]))
        current = f"r{index}"
    if extra is not None:
        nodes.append(helper.make_node(extra[0], [current], ["odd"], domain=extra[1], name="odd_one"))
        current = "odd"
    nodes += [
        helper.make_node("GlobalAveragePool", [current], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("MatMul", ["features", "head"], ["logits"]),
    ]
    values = weights(layers)
    inputs = [helper.make_tensor_value_info("images", dtype, [batch, 3, SIZE, SIZE])]
    if images == 2:
        inputs.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [batch, CLASSES]))
        nodes.append(helper.make_node("Add", ["logits", "more"], ["sum"]))
    if dtype != TensorProto.FLOAT:
        nodes.insert(0, helper.make_node("Cast", ["images"], ["cast"], to=TensorProto.FLOAT))
        nodes[1].input[0] = "cast"
    if initializers_as_inputs:
        inputs += [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, w.shape) for name, w in values.items()
        ]
    output = helper.make_tensor_value_info(
        "sum" if images == 2 else "logits", TensorProto.FLOAT, [batch, CLASSES]
    )
    graph = helper.make_graph(
        nodes, "small", inputs, [output], [numpy_helper.from_array(w, name) for name, w in values.items()]
    )
    imports = [helper.make_opsetid("", opset)] + (
        [helper.make_opsetid(extra[1], 1)] if extra and extra[1] else []
    )
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


def write_qdq(path: Path, layers: int = 2) -> Path:
    """The same with U8 activations and S8 per-channel weights in Q/DQ, as ONNX Runtime fuses them."""
    values = weights(layers)
    nodes, tensors, current = [], [], "images"

    def pair(name: str, scale: float, zero_point: int) -> str:
        tensors.append(numpy_helper.from_array(np.float32(scale), f"{name}_scale"))
        tensors.append(numpy_helper.from_array(np.uint8(zero_point), f"{name}_zero"))
        parameters = [f"{name}_scale", f"{name}_zero"]
        nodes.append(helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", *parameters], [f"{name}_dq"]))
        return f"{name}_dq"

    current = pair("images", 6 / 255, 128)
    for index in range(layers):
        weight = values[f"w{index}"]
        scale = np.abs(weight).max(axis=(1, 2, 3)) / 127
        quantized = np.clip(np.round(weight / scale[:, None, None, None]), -127, 127).astype(np.int8)
        tensors += [
            numpy_helper.from_array(quantized, f"w{index}_q"),
            numpy_helper.from_array(scale.astype(np.float32), f"w{index}_scale"),
            numpy_helper.from_array(np.zeros(CHANNELS, np.int8), f"w{index}_zero"),
        ]
        stored = [f"w{index}_q", f"w{index}_scale", f"w{index}_zero"]
        nodes.append(helper.make_node("DequantizeLinear", stored, [f"w{index}_dq"], axis=0))
        nodes.append(helper.make_node("Conv", [current, f"w{index}_dq"], [f"c{index}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"]))
        current = pair(f"r{index}", 8 / 255, 0)
    tensors.append(numpy_helper.from_array(values["head"], "head"))
    nodes += [
        helper.make_node("GlobalAveragePool", [current], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("MatMul", ["features", "head"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "quantized",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])],
        tensors,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def reference(images: npt.NDArray[np.float32], layers: int = 2) -> npt.NDArray[np.float64]:
    """What the graph of ``write`` computes, in float64 by PyTorch."""
    values = {name: torch.from_numpy(value).double() for name, value in weights(layers).items()}
    current = torch.from_numpy(images).double()
    for index in range(layers):
        current = torch.relu(torch.nn.functional.conv2d(current, values[f"w{index}"], padding=1))
    result: npt.NDArray[np.float64] = (current.mean((2, 3)) @ values["head"]).numpy()
    return result


def images(count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, 3, SIZE, SIZE), dtype=np.float32)


def artifact(
    path: Path, format_: Format = "onnx", shape: tuple[int | None, ...] = (None, 3, SIZE, SIZE)
) -> Artifact:
    spec = TensorSpec(name="images", dtype="float32", shape=shape)
    return Artifact(key="k", format=format_, path=path, inputs=(spec,), outputs=(), parents=(), facts=Facts())
