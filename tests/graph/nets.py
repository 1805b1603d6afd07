"""Small networks that tests export, and small ONNX graphs written by hand."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

Weights = dict[str, npt.NDArray[np.generic]]


class Residual(nn.Module):
    """Convolutions with batch norms, a shortcut, a pool and a linear layer."""

    def __init__(self, channels: int = 8, classes: int = 5, image_channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(image_channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(2)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.norm2(self.conv(x)))
        x = self.gap(self.pool(x))
        return self.head(self.drop(torch.flatten(x, 1)))


class Shuffle(nn.Module):
    """A batch-dependent view, a concatenation, a split, and a mean that drops H and W."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.conv(x).chunk(2, dim=1)
        x = torch.cat((left, self.depthwise(right)), dim=1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(x.mean([2, 3]))


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms statistics and weights that do something; the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))

    with torch.no_grad():
        for parameter in model.parameters():
            uniform(parameter, -0.4, 0.4)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                uniform(module.running_mean, -0.5, 0.5)
                uniform(module.running_var, 0.3, 2.0)
                uniform(module.weight, 0.5, 1.5)
                uniform(module.bias, -0.3, 0.3)
    return model.eval()


def images(count: int, shape: tuple[int, int, int] = (3, 12, 12), seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, *shape), dtype=np.float32)


def graph(
    nodes: list[NodeProto],
    weights: Weights,
    *,
    shape: tuple[int | str, ...] = ("N", 3, 8, 8),
    outputs: tuple[str, ...] = ("y",),
    opset: int = 18,
    ir_version: int = 8,
    weights_as_inputs: bool = False,
    output_shape: tuple[int | str, ...] | None = None,
) -> ModelProto:
    """A model of one image input ``x`` with float outputs, of inferred shape by default."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    if weights_as_inputs:
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors]
    made = helper.make_graph(
        nodes,
        "main",
        inputs,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, output_shape) for name in outputs],
        tensors,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    model = onnx.shape_inference.infer_shapes(model)
    onnx.checker.check_model(model)
    return model


def operators(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]
