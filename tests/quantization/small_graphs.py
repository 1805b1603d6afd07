"""Small convolutional ONNX graphs with everything that equalization has to know, drawn at random."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from deploycnn.graph.model import infer_shapes

SIZE = 8


class Builder:
    """Appends nodes to a graph of images (n, 3, 8, 8)."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []
        self.value, self.channels = "images", 3

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        output = f"v{len(self.nodes)}"
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        self.value = output
        return output

    def constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
        return name

    def conv(
        self, channels: int, kernel: int = 1, *, depthwise: bool = False, source: str | None = None
    ) -> str:
        shape = (channels, 1 if depthwise else self.channels, kernel, kernel)
        weight = self.rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        bias = self.rng.standard_normal(channels) * 0.3
        inputs = (source or self.value, self.constant(weight), self.constant(bias))
        self.channels = channels
        group = channels if depthwise else 1
        return self.node("Conv", *inputs, group=group, pads=[kernel // 2] * 4)

    def activation(self, kind: str) -> str:
        if kind == "relu6":
            return self.node("Clip", self.value, self.constant(np.array(0.0)), self.constant(np.array(1.0)))
        if kind == "silu":
            source = self.value
            return self.node("Mul", source, self.node("Sigmoid", source))
        if kind == "gate":
            source = self.value
            self.node("GlobalAveragePool", source)
            self.conv(self.channels)
            return self.node("Mul", source, self.node("Sigmoid", self.value))
        return self.value if kind == "none" else self.node(kind, self.value)

    def residual(self, kind: str) -> str:
        """A bottleneck around the value: expand, filter, project, add."""
        source, channels = self.value, self.channels
        self.conv(2 * channels)
        self.activation(kind)
        self.conv(2 * channels, 3, depthwise=True)
        self.activation(kind)
        self.conv(channels)
        return self.node("Add", source, self.value)

    def finish(self, classes: int = 5) -> ModelProto:
        self.node("GlobalAveragePool", self.value)
        self.node("Flatten", self.value)
        weight = self.rng.standard_normal((classes, self.channels))
        bias = self.constant(self.rng.standard_normal(classes))
        self.node("Gemm", self.value, self.constant(weight), bias, transB=1)
        graph = helper.make_graph(
            self.nodes,
            "small",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, SIZE, SIZE])],
            [helper.make_tensor_value_info(self.value, TensorProto.FLOAT, ["n", classes])],
            self.weights,
        )
        return infer_shapes(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        )


def random_graph(seed: int, kinds: list[str]) -> ModelProto:
    builder = Builder(seed)
    builder.conv(8, 3)
    for kind in kinds:
        builder.activation("Relu" if kind == "gate" else kind)
        builder.residual("Relu" if kind == "gate" else kind)
        if kind == "gate":
            builder.activation(kind)
        builder.conv(int(builder.rng.integers(4, 10)))
    return builder.finish()


def images(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, SIZE, SIZE)).astype(np.float32)
