"""Channels of zeros change no result, and are added where integer kernels gain by them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from deploycnn.graph.export import export_onnx
from deploycnn.graph.model import attribute, copy_of, infer_shapes, initializers, shape_of, value_types
from deploycnn.models.cifar_resnet import CifarResNet
from deploycnn.quantization import packs
from deploycnn.quantization.calibration import calibrate, choose_ranges, values_of
from deploycnn.quantization.insertion import build
from deploycnn.quantization.placement import place
from deploycnn.quantization.preparation import prepare
from deploycnn.quantization.rewrites import apply_rewrites
from deploycnn.quantization.widths import align_channels


def outputs(model: ModelProto, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def widths(model: ModelProto) -> dict[str, int]:
    """Output channels of every convolution, by name."""
    weights = initializers(model.graph)
    return {node.name: weights[node.input[1]].dims[0] for node in model.graph.node if node.op_type == "Conv"}


def exported(module: nn.Module, size: int = 32) -> ModelProto:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    return prepare(export_onnx(module.eval(), (3, size, size), opset=18))


class Inverted(nn.Module):
    """A block of MobileNetV3 with a squeeze-and-excitation gate, between two ordinary convolutions."""

    def __init__(self, width: int, act: type[nn.Module] = nn.Hardswish, kernel: int = 3) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 16, 3, padding=1), act()
        self.expand = nn.Conv2d(16, width, 1)
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.squeeze, self.excite = nn.Conv2d(width, 8, 1), nn.Conv2d(8, width, 1)
        self.project, self.last = nn.Conv2d(width, 16, 1), nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.act(self.stem(images))
        y = self.act(self.depthwise(self.act(self.expand(x))))
        y = y * torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.last((x + self.project(y)).mean((2, 3)))


@pytest.mark.parametrize(
    ("width", "expected"), [(72, 80), (120, 128), (58, 64), (80, 80), (9, 16), (24, 32), (17, 32)]
)
def test_depthwise_convolutions_get_multiples_of_16(width: int, expected: int) -> None:
    model = exported(Inverted(width, nn.ReLU))
    before = outputs(model, noise(2, 3, 32, 32))
    named = widths(model)
    align_channels(model)
    changed = widths(model)
    for layer in ("expand", "depthwise", "excite"):
        assert changed[f"{layer}/Conv"] == expected, layer
    for layer in ("stem", "squeeze", "project"):
        assert changed[f"{layer}/Conv"] == named[f"{layer}/Conv"], layer
    assert (
        attribute(next(node for node in model.graph.node if node.name == "depthwise/Conv"), "group")
        == expected
    )
    after = outputs(model, noise(2, 3, 32, 32))
    np.testing.assert_allclose(after, before, atol=2e-6 * np.abs(before).max())


def test_what_costs_more_than_it_gains_is_left_alone() -> None:
    class Once(Inverted):
        """Two SiLUs for every product of the depthwise convolution."""

        def __init__(self) -> None:
            super().__init__(17, nn.SiLU, kernel=1)

    model = exported(Once())
    align_channels(model)
    assert widths(model)["depthwise/Conv"] in {17, 20}


def test_a_second_time_changes_nothing() -> None:
    model = exported(Inverted(72))
    assert align_channels(model)
    once = model.SerializeToString(deterministic=True)
    assert align_channels(model) == 0
    assert model.SerializeToString(deterministic=True) == once


def test_integers_stay_the_same_bit_by_bit() -> None:
    """Ranges and scales of all that was there do not change, so neither does what the runtime computes."""
    found = []
    for aligned in (False, True):
        pack = packs.with_formats(
            packs.get("onnxruntime-cpu"), activations=None, reduced=True, per_channel=True
        )
        model = exported(Inverted(58))
        apply_rewrites(model, ["clip_by_range", "tile_gates", *(["align_channels"] if aligned else [])])
        plan = place(model, pack, [])
        ranges = choose_ranges(plan, calibrate(model, [noise(8, 3, 32, 32)], values=values_of(plan)))
        found.append(build(model, plan, ranges))
    assert widths_of_integers(found[1]) > widths_of_integers(found[0])
    np.testing.assert_array_equal(*(outputs(model, noise(4, 3, 32, 32)) for model in found))


def widths_of_integers(model: ModelProto) -> int:
    return sum(tensor.dims[0] for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT8)


class OddResNet(nn.Module):
    """Pruned to odd widths, with a shortcut that adds channels of zeros."""

    def __init__(self, first: int, inner: int, second: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, first, 3, padding=1)
        self.one, self.two = nn.Conv2d(first, inner, 3, padding=1), nn.Conv2d(inner, first, 3, padding=1)
        self.down = nn.Conv2d(first, second, 3, stride=2, padding=1)
        self.last = nn.Linear(second, 7)
        self.before = (second - first) // 2
        self.behind = second - first - self.before

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(images))
        x = torch.relu(x + self.two(torch.relu(self.one(x))))
        shortcut = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.behind))
        return self.last(torch.relu(self.down(x) + shortcut).mean((2, 3)))


@settings(max_examples=15, deadline=None)
@given(first=st.integers(5, 37), inner=st.integers(3, 37), extra=st.integers(1, 21))
def test_residual_networks_of_any_width(first: int, inner: int, extra: int) -> None:
    model = exported(OddResNet(first, inner, first + extra), size=16)
    before = outputs(model, noise(2, 3, 16, 16))
    align_channels(model)
    after = outputs(model, noise(2, 3, 16, 16))
    np.testing.assert_allclose(after, before, atol=2e-6 * np.abs(before).max())
    if inner > 4:  # else what reads them pays more than what makes them gains
        assert widths(model)["one/Conv"] == max(16, inner + -inner % 4)


def test_shortcuts_with_channels_of_zeros_take_channels_from_them() -> None:
    model = exported(OddResNet(18, 18, 38))
    align_channels(model)
    assert {widths(model)[f"{name}/Conv"] for name in ("stem", "two")} == {20}
    assert widths(model)["down/Conv"] == 40
    pad = next(node for node in model.graph.node if node.op_type == "Pad")
    amounts = numpy_helper.to_array(initializers(model.graph)[pad.input[1]]).tolist()
    assert amounts == [0, 10, 0, 0, 0, 10, 0, 0]


@pytest.mark.parametrize(
    "shifted",
    [
        torch.sigmoid,
        nn.functional.softplus,
        lambda x: x + 1.0,
        lambda x: x.clamp(0.5, 2.0),
        lambda x: nn.functional.pad(x, (1, 1), value=1.0)[..., 1:-1],
    ],
)
def test_what_a_shortcut_pads_is_zeros(shifted: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Channels that are no zeros must not take the places of those that the padding adds."""

    class Shifted(OddResNet):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = shifted(self.stem(images))
            shortcut = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.behind))
            return self.last(torch.relu(self.down(x) + shortcut).mean((2, 3)))

    model = exported(Shifted(18, 18, 38))
    before = outputs(model, noise(2, 3, 32, 32))
    align_channels(model)
    np.testing.assert_allclose(outputs(model, noise(2, 3, 32, 32)), before, atol=2e-6 * np.abs(before).max())


class Joined(nn.Module):
    """Concatenations and splits of odd widths, as in ShuffleNet."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        self.sizes = [left, right]
        self.stem = nn.Conv2d(3, left + right, 3, padding=1)
        self.one, self.two = nn.Conv2d(left, left, 1), nn.Conv2d(right, right, 1)
        self.depthwise = nn.Conv2d(left + right, left + right, 3, padding=1, groups=left + right)
        self.last = nn.Conv2d(left + right, 5, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        left, right = self.stem(images).split(self.sizes, dim=1)
        x = torch.cat([self.two(right).relu(), self.one(left).relu(), left], dim=1)[:, : sum(self.sizes)]
        y = torch.cat([self.one(left), self.two(right)], dim=1)
        return self.last(self.depthwise(y)).mean((2, 3)) + x.mean()


@settings(max_examples=15, deadline=None)
@given(left=st.integers(5, 40), right=st.integers(5, 40))
def test_what_is_split_and_joined(left: int, right: int) -> None:
    model = exported(Joined(left, right), size=16)
    before = outputs(model, noise(2, 3, 16, 16))
    align_channels(model)
    np.testing.assert_allclose(outputs(model, noise(2, 3, 16, 16)), before, atol=3e-6 * np.abs(before).max())


@pytest.mark.parametrize("name", ["shufflenet_v2_x1_0", "mobilenet_v3_small", "mnasnet0_5"])
def test_torchvision_networks_compute_the_same(name: str) -> None:
    model = prepare(
        export_onnx(torchvision.models.get_model(name, weights=None).eval(), (3, 64, 64), opset=18)
    )
    before = outputs(model, noise(1, 3, 64, 64))
    apply_rewrites(model, ["remove_shuffles", "clip_by_range", "align_channels"])
    slow = [
        node.name
        for node in model.graph.node
        if node.op_type == "Conv" and attribute(node, "group", 1) != 1 and attribute(node, "group", 1) % 16
    ]
    np.testing.assert_allclose(outputs(model, noise(1, 3, 64, 64)), before, atol=1e-5 * np.abs(before).max())
    # Those of ShuffleNet that read what others read too pay more than they gain, as do images of four pixels.
    assert [layer for layer in slow if ".branch1." not in layer and "stage4" not in layer] == []


def test_resnets_of_the_zoo_have_nothing_to_gain() -> None:
    model = prepare(export_onnx(CifarResNet(20).eval(), (3, 32, 32), opset=18))
    assert align_channels(model) == 0


def graph(nodes: list[object], weights: dict[str, np.ndarray], channels: int) -> ModelProto:
    ends = [
        helper.make_tensor_value_info("images", TensorProto.FLOAT, [None, 3, 16, 16]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4),
    ]
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    return infer_shapes(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))


@pytest.mark.parametrize(
    "between", ["Softmax", "InstanceNormalization", "Exp", "Reciprocal", "PRelu", "Transpose"]
)
def test_what_is_not_known_to_keep_channels_apart_holds_them(between: str) -> None:
    """Exp and Reciprocal would make infinity of zeros or of nothing; the others mix or count channels."""
    extra = {
        "InstanceNormalization": {"s": np.ones(18, np.float32), "z": np.zeros(18, np.float32)},
        "PRelu": {"s": np.full((18, 1, 1), 0.25, np.float32)},
    }.get(between, {})
    options = {"Softmax": {"axis": 1}, "Transpose": {"perm": [0, 1, 3, 2]}}.get(between, {})
    model = graph(
        [
            helper.make_node("Conv", ["images", "w"], ["a"], name="one"),
            helper.make_node(between, ["a", *extra], ["b"], name="between", **options),
            helper.make_node("Conv", ["b", "v"], ["y"], name="two"),
        ],
        {"w": noise(18, 3, 1, 1), "v": noise(8, 18, 1, 1), **extra},
        18,
    )
    before = model.SerializeToString(deterministic=True)
    assert align_channels(model) == 0
    assert model.SerializeToString(deterministic=True) == before


def test_outputs_keep_their_shape() -> None:
    model = exported(
        nn.Sequential(nn.Conv2d(3, 17, 3, padding=1), nn.ReLU(), nn.Conv2d(17, 17, 3, padding=1))
    )
    shapes = [shape_of(value) for value in model.graph.output]
    assert align_channels(model)
    assert [shape_of(value_types(model)[value.name]) for value in model.graph.output] == shapes
    assert list(widths(model).values()) == [20, 17]


def test_weights_that_two_layers_share_stay_those_of_the_other() -> None:
    weight = noise(18, 3, 1, 1)
    model = graph(
        [
            helper.make_node("Conv", ["images", "w"], ["a"], name="one"),
            helper.make_node("Conv", ["images", "w"], ["c"], name="held"),
            helper.make_node("Conv", ["a", "v"], ["b"], name="two"),
            helper.make_node("Softmax", ["c"], ["d"], name="softmax", axis=1),
            helper.make_node("Conv", ["d", "v"], ["e"], name="three"),
            helper.make_node("Add", ["b", "e"], ["y"], name="add"),
        ],
        {"w": weight, "v": noise(8, 18, 1, 1)},
        18,
    )
    aligned = copy_of(model)
    assert align_channels(aligned) == 1
    assert widths(aligned) == {"one": 20, "held": 18, "two": 8, "three": 8}
    images = noise(2, 3, 16, 16)
    np.testing.assert_allclose(outputs(aligned, images), outputs(model, images), atol=1e-5)
