"""First layers in the shape of onnxruntime's fast kernel compute what they computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from deploycnn.graph.export import export_onnx
from deploycnn.graph.model import initializers, save_onnx
from deploycnn.quantization import packs
from deploycnn.quantization.calibration import calibrate, choose_ranges, values_of
from deploycnn.quantization.first_layers import align_first_layers, release_float_layers
from deploycnn.quantization.fusion import count_fused
from deploycnn.quantization.insertion import build
from deploycnn.quantization.isa import Isa
from deploycnn.quantization.lifting import lift_pads
from deploycnn.quantization.placement import place
from deploycnn.quantization.preparation import prepare


def outputs(model: ModelProto, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def operators(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def images(model: ModelProto, count: int = 2) -> np.ndarray:
    shape = [axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim]
    return np.random.default_rng(0).standard_normal((count, *shape[1:])).astype(np.float32)


def convolution(
    size: tuple[int, int] = (16, 16), channels: int = 3, outputs: int = 16, **options: object
) -> ModelProto:
    torch.manual_seed(0)
    module = nn.Conv2d(channels, outputs, **{"kernel_size": 3, **options})  # type: ignore[arg-type]
    return prepare(export_onnx(module, (channels, *size), opset=18))


def whole_numbers(
    weight: np.ndarray, size: tuple[int, int], stride: int, pads: tuple[int, int, int, int]
) -> ModelProto:
    node = helper.make_node("Conv", ["images", "w"], ["y"], name="stem", strides=[stride, stride], pads=pads)
    ends = [
        helper.make_tensor_value_info("images", TensorProto.FLOAT, [None, weight.shape[1], *size]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4),
    ]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@given(
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.integers(1, 4),
    pads=st.tuples(*[st.integers(0, 3)] * 4),
    size=st.tuples(st.integers(8, 16), st.integers(8, 16)),
    channels=st.sampled_from([1, 2, 3, 6]),
)
def test_it_computes_the_same_sums(
    kernel: tuple[int, int],
    stride: int,
    pads: tuple[int, int, int, int],
    size: tuple[int, int],
    channels: int,
) -> None:
    weight = np.random.default_rng(1).integers(-9, 9, (8, channels, *kernel)).astype(np.float32)
    model = whole_numbers(weight, size, stride, pads)
    given_images = np.random.default_rng(0).integers(-9, 9, (2, channels, *size)).astype(np.float32)
    expected = outputs(model, given_images)
    assert align_first_layers(model) == 1
    # Whole numbers, so that no order of adding them matters.
    np.testing.assert_array_equal(outputs(model, given_images), expected)


@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({"kernel_size": 7, "stride": 2, "padding": 3}, (16, 4, 7, 7)),  # ResNet
        ({"kernel_size": 3, "stride": 2, "padding": 1}, (16, 4, 3, 3)),  # MobileNet
        ({"kernel_size": 4, "stride": 4}, (16, 4, 4, 4)),  # ConvNeXt
        ({"padding": 1, "channels": 6}, (16, 8, 3, 3)),
        ({"kernel_size": 3, "stride": 2, "dilation": 2}, (16, 4, 3, 3)),
    ],
)
def test_images_and_kernels_get_channels_of_zeros(
    options: dict[str, object], weight: tuple[int, ...]
) -> None:
    model = convolution(**options)  # type: ignore[arg-type]
    before = outputs(model, images(model))
    assert align_first_layers(model) == 1
    assert operators(model) == ["Pad", "Conv"]
    assert tuple(initializers(model.graph)[model.graph.node[1].input[1]].dims) == weight
    np.testing.assert_allclose(outputs(model, images(model)), before, rtol=1e-4, atol=1e-5)
    assert align_first_layers(model) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"channels": 4},
        {"outputs": 12},  # no multiple of 8
        {"channels": 6, "outputs": 18, "groups": 2},
    ],
)
def test_what_is_left_alone(options: dict[str, object]) -> None:
    model = convolution(**options)  # type: ignore[arg-type]
    before = model.SerializeToString()
    assert align_first_layers(model) == 0
    assert model.SerializeToString() == before


def test_weights_that_others_read_stay() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.stem(images) + self.stem(torch.relu(images))

    model = prepare(export_onnx(Twice(), (3, 8, 8), opset=18))
    before = outputs(model, images(model))
    assert align_first_layers(model) == 1
    np.testing.assert_allclose(outputs(model, images(model)), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["cpu", "onnxruntime-cpu"])
def test_channels_are_added_to_the_rounded_image(tmp_path: Path, target: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3))
    pack = packs.get(target, Isa(name="avx512_vnni", saturates=False))
    model = prepare(export_onnx(net, (3, 16, 16), opset=18), pack)
    plan = place(model, pack, [])
    # Images above zero, whose zero point is no 0 where zeros were not counted among them.
    above = images(model) + 5
    ranges = choose_ranges(plan, calibrate(model, [above], values=values_of(plan)))
    path = tmp_path / "int8.onnx"
    quantized = build(model, plan, ranges)
    save_onnx(quantized, path)
    by_input = {node.input[0]: node for node in quantized.graph.node}
    rounding = by_input[quantized.graph.input[0].name]
    assert rounding.op_type == "QuantizeLinear"
    assert by_input[rounding.output[0]].op_type == "Pad"
    assert count_fused(path).by_operator["QLinearConv"] == 2
    assert count_fused(path).by_operator["QuantizeLinear"] == 1
    # Read as Pad between DQ and Q, it says the same, and what it says is nearly what the float graph computes.
    lifted = ModelProto.FromString(quantized.SerializeToString())
    assert len(lift_pads(lifted)) == 2
    np.testing.assert_array_equal(outputs(lifted, above), outputs(quantized, above))
    exact = outputs(model, above)
    assert np.abs(outputs(quantized, above) - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(("mode", "first"), [("constant", "QuantizeLinear"), ("reflect", "Pad")])
def test_padding_that_no_integer_kernel_does_stays_in_front_of_the_rounding(mode: str, first: str) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(4, 8, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.stem(nn.functional.pad(images, (1, 1, 1, 1), mode=mode))

    pack = packs.get("cpu", Isa(name="avx512_vnni", saturates=False))
    model = prepare(export_onnx(Padded(), (4, 8, 8), opset=18), pack)
    plan = place(model, pack, [])
    quantized = build(
        model, plan, choose_ranges(plan, calibrate(model, [images(model)], values=values_of(plan)))
    )
    by_input = {node.input[0]: node for node in quantized.graph.node}
    assert by_input[quantized.graph.input[0].name].op_type == first
    assert operators(quantized).count("QuantizeLinear") == 2  # the image's and the output's


def test_a_first_layer_that_stays_float_gives_its_channel_back() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3))
    pack = packs.get("cpu", Isa(name="avx512_vnni", saturates=False))
    model = prepare(export_onnx(net, (3, 16, 16), opset=18), pack)
    stem = next(node for node in model.graph.node if node.op_type == "Conv")
    plan = place(model, pack, [stem.name])
    quantized = build(
        model, plan, choose_ranges(plan, calibrate(model, [images(model)], values=values_of(plan)))
    )
    first = next(node for node in quantized.graph.node if node.name == stem.name)
    assert first.input[0] == quantized.graph.input[0].name
    assert tuple(initializers(quantized.graph)[first.input[1]].dims) == (16, 3, 3, 3)
    assert "Pad" not in operators(quantized)
    assert tuple(initializers(model.graph)[stem.input[1]].dims) == (16, 4, 3, 3), (
        "the float graph is as it was"
    )
    exact = net(torch.from_numpy(images(model))).detach().numpy()
    assert np.abs(outputs(quantized, images(model)) - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("amounts", "touched", "groups", "released"),
    [
        ([0, 0, 0, 0, 0, 1, 0, 0], False, 1, 1),
        ([0, 0, 0, 0, 0, 1, 0, 0], True, 1, 0),  # its weights for that channel are not 0
        ([0, 1, 0, 0, 0, 0, 0, 0], False, 1, 0),  # in front of the others
        ([0, 0, 1, 1, 0, 1, 1, 1], False, 1, 0),  # pixels too
        ([0, 0, 0, 0, 0, 1, 0, 0], False, 2, 0),
    ],
)
def test_only_channels_that_count_for_nothing_are_given_back(
    amounts: list[int], touched: bool, groups: int, released: int
) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 4 // groups, 3, 3)).astype(np.float32)
    weight[:, -1] = float(touched)
    nodes = [
        helper.make_node("Pad", ["images", "amounts"], ["padded"], name="pad"),
        helper.make_node("Conv", ["padded", "w"], ["y"], name="stem", group=groups),
        helper.make_node("Conv", ["padded", "w"], ["z"], name="again", group=groups),
    ]
    held = [
        numpy_helper.from_array(np.array(amounts, np.int64), "amounts"),
        numpy_helper.from_array(weight, "w"),
    ]
    shapes = {"images": [2, 3, 8, 8], "y": None, "z": None}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    before = outputs(model, images(model))
    assert release_float_layers(model) == 2 * released
    assert ("Pad" in operators(model)) is not bool(released)
    np.testing.assert_allclose(outputs(model, images(model)), before, rtol=1e-4, atol=1e-5)


def test_other_machines_kernels_take_images_as_they_are() -> None:
    assert (
        "align_first_layers"
        in packs.get("onnxruntime-cpu", Isa(name="x86 without VNNI", saturates=True)).rewrites
    )
    assert (
        "align_first_layers"
        not in packs.get("onnxruntime-cpu", Isa(name="aarch64", saturates=False)).rewrites
    )
