"""Channel shuffles fall away, and the function stays the same."""

from __future__ import annotations

import collections

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import ModelProto
from torch import nn

from deploycnn.graph.export import export_onnx
from deploycnn.quantization.preparation import prepare
from deploycnn.quantization.shuffle import remove_shuffles


def shuffle(x: torch.Tensor, groups: int = 2) -> torch.Tensor:
    _, channels, height, width = x.shape
    x = x.view(-1, groups, channels // groups, height, width)
    return x.transpose(1, 2).reshape(-1, channels, height, width)


class Branch(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 1),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, stride, 1, groups=outputs, bias=False),
            nn.Conv2d(outputs, outputs, 1),
            nn.ReLU(),
        )


class Shuffled(nn.Module):
    """Two stages of ShuffleNetV2: a block that halves the image, then blocks that pass half of the channels on."""

    def __init__(self, width: int = 12, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        half = width // 2
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.Conv2d(8, half, 1), nn.ReLU())
        self.right = Branch(8, half, 2)
        self.blocks = nn.ModuleList(Branch(half, half) for _ in range(blocks))
        self.left2 = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1, groups=width), nn.Conv2d(width, width, 1))
        self.right2 = Branch(width, width, 2)
        self.last = nn.Conv2d(2 * width, 16, 1)
        self.fc = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(images))
        x = shuffle(torch.cat((self.left(x), self.right(x)), 1))
        for block in self.blocks:
            kept, changed = x.chunk(2, 1)
            x = shuffle(torch.cat((kept, block(changed)), 1))
        x = shuffle(torch.cat((self.left2(x), self.right2(x)), 1))
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))


def outputs(model: ModelProto, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def images(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 16, 16)).astype(np.float32)


def made(module: nn.Module) -> ModelProto:
    return prepare(export_onnx(module, (3, 16, 16), opset=18))


@pytest.mark.parametrize(("width", "blocks"), [(12, 1), (12, 3), (20, 4)])
def test_shuffles_fall_away_and_the_function_stays(width: int, blocks: int) -> None:
    torch.manual_seed(blocks)
    module = Shuffled(width, blocks)
    model = made(module)
    assert remove_shuffles(model) == blocks + 2
    counts = collections.Counter(node.op_type for node in model.graph.node)
    assert counts["Transpose"] == 0
    with torch.no_grad():
        expected = module.double()(torch.from_numpy(images()).double()).numpy()
    np.testing.assert_allclose(outputs(model, images()), expected, atol=1e-5)


def test_a_second_time_there_is_nothing_to_do() -> None:
    model = made(Shuffled())
    remove_shuffles(model)
    assert remove_shuffles(model) == 0


class Watched(Shuffled):
    """A shuffled value is read by something that minds the order of channels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(images))
        x = shuffle(torch.cat((self.left(x), self.right(x)), 1))
        return self.fc(nn.functional.pad(x.mean((2, 3)), (0, 4)))


class Grouped(Shuffled):
    """A grouped convolution reads what was shuffled, as in the first ShuffleNet: its groups mind the order."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(12, 16, 1, groups=2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(images))
        x = shuffle(torch.cat((self.left(x), self.right(x)), 1))
        return self.fc(self.grouped(x).mean((2, 3)))


class ReadTwice(Shuffled):
    """What enters the shuffle is read by another node too."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(images))
        left = self.left(x)
        x = shuffle(torch.cat((left, self.right(x)), 1))
        x = torch.relu(self.last(torch.cat((self.left2(x), self.right2(x)), 1)))
        return self.fc(x.mean((2, 3))) + left.mean((1, 2, 3))[:, None]


@pytest.mark.parametrize("module", [Watched, Grouped, ReadTwice])
def test_where_order_matters_nothing_changes(module: type[Shuffled]) -> None:
    model = made(module())
    before = model.SerializeToString(deterministic=True)
    assert remove_shuffles(model) == 0
    assert model.SerializeToString(deterministic=True) == before
