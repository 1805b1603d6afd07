"""Small ONNX graphs, made by hand, and engines of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, save_model

from deploycnn.engines import building, flavour
from deploycnn.engines.building import Built
from deploycnn.engines.settings import BuildSettings


def model(
    nodes: list[NodeProto],
    constants: dict[str, Any],
    *,
    shape: tuple[Any, ...] = ("N", 8, 12, 12),
    opset: int = 19,
) -> ModelProto:
    """A graph from ``images`` to ``logits``."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("foreign", 1)], ir_version=9
    )


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def net(*, dtype: str = "float32", shape: tuple[Any, ...] = ("N", 8, 12, 12)) -> ModelProto:
    """conv1 -> relu1 -> conv2 -> Add -> pool -> fc, in float32 or float16 inside."""
    half = dtype == "float16"
    weights = {
        "w1": rng().normal(0, 0.2, (16, 8, 3, 3)),
        "w2": rng().normal(0, 0.2, (16, 16, 3, 3)),
        "w3": rng().normal(0, 0.2, (16, 5)),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="relu1"),
        helper.make_node("Conv", ["b", "w2"], ["c"], name="conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "b"], ["d"], name="add"),
        helper.make_node("GlobalAveragePool", ["d"], ["e"], name="pool"),
        helper.make_node("Flatten", ["e"], ["f"], name="flat"),
        helper.make_node("MatMul", ["f", "w3"], ["y"], name="fc"),
    ]
    if half:
        nodes.insert(0, helper.make_node("Cast", ["images"], ["x"], name="to_half", to=TensorProto.FLOAT16))
        nodes.append(helper.make_node("Cast", ["y"], ["logits"], name="to_float", to=TensorProto.FLOAT))
    else:
        nodes[0].input[0], nodes[-1].output[0] = "images", "logits"
    return model(nodes, {name: value.astype(dtype) for name, value in weights.items()}, shape=shape)


def quantized(*, zero: np.generic | None = None, bias: bool = False) -> ModelProto:
    """Q/DQ around one convolution; ``bias`` adds an int32 bias behind a DequantizeLinear, as CPUs want it."""
    constants: dict[str, Any] = {
        "w": rng().integers(-127, 128, (16, 8, 3, 3)).astype(np.int8),
        "ws": np.full(16, 0.01, np.float32),
        "wz": np.zeros(16, np.int8),
        "s": np.float32(0.05),
        "z": np.int8(0) if zero is None else zero,
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "s", "z"], ["q"], name="images_Q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["x"], name="images_DQ"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wf"], name="w_DQ", axis=0),
        helper.make_node("Conv", ["x", "wf", "b"] if bias else ["x", "wf"], ["c"], name="conv1"),
        helper.make_node("Relu", ["c"], ["logits"], name="relu1"),
    ]
    if bias:
        constants |= {
            "bi": np.zeros(16, np.int32),
            "bs": np.full(16, 0.0005, np.float32),
            "bz": np.zeros(16, np.int32),
        }
        nodes.insert(
            3, helper.make_node("DequantizeLinear", ["bi", "bs", "bz"], ["b"], name="bias_DQ", axis=0)
        )
    return model(nodes, constants)


def saved(proto: ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_model(proto, folder / name)
    return folder / name


def build(proto: ModelProto, folder: Path, **settings: Any) -> Built:
    return building.build(
        saved(proto, folder), flavour.find("tensorrt-rtx"), BuildSettings(**settings), gpu=None
    )
