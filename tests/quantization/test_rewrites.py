"""The rewrites preserve the function, and onnxruntime makes integer kernels of what they leave."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from deploycnn.graph.export import export_onnx
from deploycnn.graph.model import attribute, save_onnx
from deploycnn.quantization import packs
from deploycnn.quantization.calibration import calibrate, choose_ranges, values_of
from deploycnn.quantization.fusion import count_fused
from deploycnn.quantization.insertion import build
from deploycnn.quantization.isa import Isa
from deploycnn.quantization.placement import place
from deploycnn.quantization.preparation import prepare
from deploycnn.quantization.rewrites import REWRITES, apply_rewrites


class Gated(nn.Module):
    """A block of MobileNetV3: HardSwish, squeeze-and-excitation with HardSigmoid, grouped convolutions of width 8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.swish = nn.Hardswish()
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4, bias=False)
        self.squeeze = nn.Conv2d(32, 8, 1)
        self.excite = nn.Conv2d(8, 32, 1, bias=False)
        self.project = nn.Conv2d(32, 16, 1)
        self.last = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.grouped(self.swish(self.stem(images))))
        gate = nn.functional.hardsigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.last(self.swish(self.project(x * gate)).mean((2, 3)))


def exported(size: int = 16) -> ModelProto:
    torch.manual_seed(0)
    return prepare(export_onnx(Gated(), (3, size, size), opset=18))


def outputs(model: ModelProto, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def images(count: int, size: int = 16) -> np.ndarray:
    # Wide enough that both ends of the activations are reached.
    return (6 * np.random.default_rng(0).standard_normal((count, 3, size, size))).astype(np.float32)


def operators(model: ModelProto) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph.node)


#: Rewrites that ``Gated`` has something for.
APPLIED = ("clip_by_range", "tile_gates", "merge_groups", "align_first_layers")


@pytest.mark.parametrize("name", [*APPLIED, "all"])
def test_the_function_stays_the_same(name: str) -> None:
    model = exported()
    expected = outputs(model, images(5))
    applied = apply_rewrites(model, REWRITES if name == "all" else [name])
    assert all(applied[name] for name in APPLIED if name in applied)
    error = np.abs(outputs(model, images(5)) - expected).max()
    assert error < 2e-6 * np.abs(expected).max()


def test_float64_pytorch_agrees() -> None:
    torch.manual_seed(0)
    module = Gated().double()
    model = exported()
    apply_rewrites(model, REWRITES)
    with torch.no_grad():
        expected = module(torch.from_numpy(images(3).astype(np.float64))).numpy()
    np.testing.assert_allclose(outputs(model, images(3)), expected, atol=3e-6 * np.abs(expected).max())


def test_what_each_rewrite_leaves() -> None:
    model = exported()
    before = operators(model)
    assert before["HardSwish"] == 2
    assert before["HardSigmoid"] == 1
    assert apply_rewrites(model, REWRITES) == {
        "remove_shuffles": 0,
        "clip_by_range": 3,
        "tile_gates": 1,
        "merge_groups": 1,
        "align_channels": 0,
        "align_first_layers": 1,
    }
    after = operators(model)
    assert after["HardSwish"] == after["HardSigmoid"] == 0
    assert after["Clip"] == 3
    assert after["Tile"] == 1
    grouped = next(node for node in model.graph.node if node.name.startswith("grouped"))
    assert next(held.i for held in grouped.attribute if held.name == "group") == 1


@pytest.mark.parametrize(
    ("groups", "width", "left"), [(13, 8, 1), (26, 8, 13), (55, 8, 11), (32, 4, 4), (32, 8, 8), (32, 32, 32)]
)
def test_groups_are_joined_until_products_cost_more(groups: int, width: int, left: int) -> None:
    """RegNetY-400MF's last three stages, and ResNeXt's first and last."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, groups * width, 1), nn.Conv2d(groups * width, groups * width, 3, groups=groups)
    )
    model = prepare(export_onnx(module.eval(), (3, 8, 8), opset=18))
    expected = outputs(model, images(2, 8))
    assert apply_rewrites(model, ["merge_groups"]) == {"merge_groups": int(left < groups)}
    assert attribute(model.graph.node[1], "group", 1) == left
    np.testing.assert_allclose(outputs(model, images(2, 8)), expected, atol=1e-5 * np.abs(expected).max())


def test_files_of_integer_weights_alone_keep_their_graph() -> None:
    pack = packs.weights_only(packs.get("cpu", Isa(name="avx512_vnni", saturates=False)))
    torch.manual_seed(0)
    assert operators(prepare(export_onnx(Gated(), (3, 16, 16), opset=18), pack)) == operators(exported())


def test_small_images_are_not_tiled() -> None:
    model = exported(size=8)
    assert apply_rewrites(model, ["tile_gates"]) == {"tile_gates": 0}


def test_values_that_others_read_are_left_alone() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = self.conv(images)
            return (x + nn.functional.hardswish(x) + nn.functional.hardsigmoid(x)).mean((2, 3))

    model = prepare(export_onnx(Shared(), (3, 8, 8), opset=18))
    before = model.SerializeToString(deterministic=True)
    assert apply_rewrites(model, ["clip_by_range"]) == {"clip_by_range": 0}
    assert model.SerializeToString(deterministic=True) == before


def test_shared_weights_keep_their_other_reader() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.conv(nn.functional.hardswish(self.conv(images))).mean((2, 3))

    torch.manual_seed(0)
    model = prepare(export_onnx(Twice(), (3, 8, 8), opset=18))
    expected = outputs(model, images(4, 8))
    assert apply_rewrites(model, ["clip_by_range"]) == {"clip_by_range": 1}
    np.testing.assert_allclose(outputs(model, images(4, 8)), expected, atol=1e-5)


def shared_without_bias(*, output: bool = False) -> ModelProto:
    """Two convolutions share weights and have no bias; a HardSigmoid follows the second."""
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["a"], name="one", pads=[1] * 4),
        helper.make_node("Conv", ["a" if not output else "images", "w"], ["b"], name="two", pads=[1] * 4),
        helper.make_node("HardSigmoid", ["b"], ["y"], name="gate"),
    ]
    shapes = {"images": [None, 3, 8, 8], "y": [None, 3, 8, 8], "w": [3, 3, 3, 3]}
    ends = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()
    }
    weight = np.random.default_rng(0).standard_normal((3, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        nodes[int(output) :],
        "g",
        [ends["images"]],
        [ends["y"], *([ends["w"]] if output else [])],
        [numpy_helper.from_array(weight, "w")],
    )
    return prepare(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))


@pytest.mark.parametrize("output", [False, True])
def test_weights_that_others_see_stay_theirs(output: bool) -> None:
    model = shared_without_bias(output=output)

    def run() -> list[np.ndarray]:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, {"images": images(2, 8)})

    expected = run()
    assert apply_rewrites(model, ["clip_by_range"]) == {"clip_by_range": 1}
    for actual, wanted in zip(run(), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-5)


def test_the_result_fuses_without_strays(tmp_path: Path) -> None:
    pack = packs.get("onnxruntime-cpu")
    model = exported()
    apply_rewrites(model, pack.rewrites)
    plan = place(model, pack, [])
    ranges = choose_ranges(plan, calibrate(model, [images(8)], values=values_of(plan)))
    path = tmp_path / "int8.onnx"
    save_onnx(build(model, plan, ranges), path)
    fused = count_fused(path)
    counts = collections.Counter(fused.by_operator)
    assert fused.float_compute == 0
    assert (counts["QLinearConv"], counts["QGemm"]) == (5, 1)
    assert (counts["QLinearAdd"], counts["QLinearMul"]) == (2, 3)
    # Only the images are rounded; the last product returns float32.
    assert (counts["QuantizeLinear"], counts["DequantizeLinear"]) == (1, 0)
