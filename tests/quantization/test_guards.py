"""Float layers between integers stay float in onnxruntime, whose optimizer would make integers of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from deploycnn.graph.export import export_onnx
from deploycnn.graph.parity import evaluator
from deploycnn.quantization import packs
from deploycnn.quantization.calibration import calibrate, choose_ranges, values_of
from deploycnn.quantization.guards import guard_float_layers, requantized_layers
from deploycnn.quantization.insertion import build
from deploycnn.quantization.isa import Isa
from deploycnn.quantization.placement import place
from deploycnn.quantization.preparation import prepare
from tests.graph.nets import images

VNNI = Isa(name="avx512_vnni", saturates=False)
SHAPE = (3, 12, 12)


class Uneven(nn.Module):
    """A depthwise convolution whose channels differ by a factor of 300: one scale for all of them is no use."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.last, self.activation = nn.Conv2d(16, 16, 1), activation
        size = torch.logspace(-2.5, 0, 16)
        with torch.no_grad():
            self.deep.weight.mul_(size.reshape(-1, 1, 1, 1))
            self.deep.bias.mul_(size)  # type: ignore[union-attr]
            self.last.weight.div_(size.reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.deep(torch.relu(self.stem(x))))
        return functional.adaptive_avg_pool2d(torch.relu(self.last(x)), 1).flatten(1)


def quantized(full: ModelProto, target: str, keep_float: tuple[str, ...]) -> ModelProto:
    plan = place(full, packs.get(target, VNNI), keep_float)
    return build(
        full, plan, choose_ranges(plan, calibrate(full, [images(32, SHAPE)], values=values_of(plan)))
    )


def deep_layer(model: ModelProto) -> str:
    return next(
        node.name
        for node in model.graph.node
        if node.op_type == "Conv" and any(item.name == "group" and item.i == 16 for item in node.attribute)
    )


def loaded(model: ModelProto, folder: Path) -> tuple[onnxruntime.InferenceSession, ModelProto]:
    """A session as users make it, and the graph that it runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "loaded.onnx")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session, onnx.load(folder / "loaded.onnx")


@pytest.mark.parametrize("target", ["cpu", "onnxruntime-cpu", "openvino"])
@pytest.mark.parametrize(
    "activation",
    [nn.Identity(), nn.ReLU(), nn.ReLU6(), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))],
    ids=["none", "relu", "relu6", "pooled"],
)
def test_a_layer_left_in_float_is_float(activation: nn.Module, target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    full = prepare(export_onnx(Uneven(activation).eval(), SHAPE, opset=18, classes=None))
    name = deep_layer(full)
    model = quantized(full, target, (name,))
    session, graph = loaded(model, tmp_path)
    integer = [item.name for item in graph.graph.initializer if item.data_type == TensorProto.INT8]
    assert not [held for held in integer if held.startswith("deep.weight")]
    assert name not in {node.name for node in graph.graph.node if node.op_type == "QLinearConv"}
    batch = images(32, SHAPE, seed=3)
    found = session.run(None, {session.get_inputs()[0].name: batch})[0]
    meant = evaluator(model, integers=False)(batch)[0]
    assert np.linalg.norm(found - meant) < 0.01 * np.linalg.norm(meant)
    # What the guard keeps away: the same file without it.
    bare = ModelProto()
    bare.CopyFrom(model)
    for node in bare.graph.node:
        slopes = [item.f for item in node.attribute if item.name == "alpha"]
        if node.op_type == "LeakyRelu":
            node.op_type = "Relu" if slopes == [0.0] else "Identity"
            del node.attribute[:]
    session, _ = loaded(bare, tmp_path)
    spoiled = session.run(None, {session.get_inputs()[0].name: batch})[0]
    assert np.linalg.norm(spoiled - meant) > 0.02 * np.linalg.norm(meant)


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime-cuda"])
def test_other_targets_need_no_guard(target: str) -> None:
    """For GPUs float layers read what was not rounded."""
    torch.manual_seed(0)
    full = prepare(export_onnx(Uneven(nn.ReLU()).eval(), SHAPE, opset=18, classes=None))
    model = quantized(full, target, (deep_layer(full),))
    assert not [node for node in model.graph.node if node.op_type == "LeakyRelu"]
    assert requantized_layers(model) == []


def test_a_graph_of_integers_throughout_has_no_guard() -> None:
    full = prepare(export_onnx(Uneven(nn.ReLU()).eval(), SHAPE, opset=18, classes=None))
    model = quantized(full, "cpu", ())
    assert not [node for node in model.graph.node if node.op_type == "LeakyRelu"]
    assert requantized_layers(model) == []


#: Case -> what stands behind the layer, in order.
BEHIND = {
    "nothing": ["Q"],
    "relu": ["Relu", "Q"],
    "clip": ["Clip", "Q"],
    "relu, clip": ["Relu", "Clip", "Q"],
    "transpose": ["Transpose", "Q"],
    "sigmoid": ["Sigmoid", "Q"],
    "no rounding": [],
    "leaky": ["LeakyRelu", "Q"],
}


def chain(layer: str, behind: list[str], *, again: bool = False) -> ModelProto:
    """DQ, a layer with float weights, and what is behind it. Rounding leaves negative values, so that ReLU counts."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 8) if layer == "Gemm" else (8, 8, 3, 3)).astype(np.float32)
    held = {
        "scale": np.float32(0.05), "zero": np.uint8(100), "weight": weight, "low": np.float32(0),
        "high": np.float32(6), "bias": rng.standard_normal(8).astype(np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        helper.make_node(layer, ["xd", "weight", "bias"], ["y0"], name="layer"),
    ]
    value = "y0"
    for position, operator in enumerate(behind, 1):
        made, extra = f"y{position}", {"Clip": ["low", "high"], "Q": ["scale", "zero"]}.get(operator, [])
        kind = "QuantizeLinear" if operator == "Q" else operator
        nodes.append(helper.make_node(kind, [value, *extra], [made], name=f"n{position}"))
        value = made
    if behind:
        nodes.append(helper.make_node("DequantizeLinear", [value, "scale", "zero"], ["y"]))
        value = "y"
    size = [1, 8] if layer == "Gemm" else [1, 8, 6, 6]
    outputs = [value, "y0"] if again else [value]
    graph = helper.make_graph(
        nodes, "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, size)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in held.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def requantizes(model: ModelProto, folder: Path) -> bool:
    """Whether onnxruntime made integers of the weights."""
    _, graph = loaded(model, folder)
    return any(
        item.data_type in {TensorProto.INT8, TensorProto.UINT8} and len(item.dims) > 1
        for item in graph.graph.initializer
    )


@pytest.mark.parametrize("layer", ["Conv", "ConvTranspose", "Gemm"])
@pytest.mark.parametrize("case", BEHIND)
def test_it_is_known_which_layers_onnxruntime_makes_integers_of(
    layer: str, case: str, tmp_path: Path
) -> None:
    model = chain(layer, BEHIND[case])
    known = requantized_layers(model)
    if case != "transpose":  # more are guarded than need be, where onnxruntime may move Q/DQ
        assert bool(known) == requantizes(model, tmp_path)
    before = evaluator(model, integers=False)(images(1, (8, 6, 6)) if layer != "Gemm" else ROW)[0]
    assert guard_float_layers(model) == len(known)
    assert not requantized_layers(model)
    assert not requantizes(model, tmp_path)
    after = evaluator(model, integers=False)(images(1, (8, 6, 6)) if layer != "Gemm" else ROW)[0]
    np.testing.assert_array_equal(before, after)


ROW = np.random.default_rng(1).standard_normal((1, 8)).astype(np.float32)


def test_a_result_that_the_graph_returns_too_is_guarded(tmp_path: Path) -> None:
    model = chain("Conv", BEHIND["nothing"], again=True)
    assert requantizes(model, tmp_path)
    batch = images(1, (8, 6, 6))
    before = evaluator(model, integers=False)(batch)
    assert guard_float_layers(model) == 1
    assert not requantizes(model, tmp_path)
    for one, other in zip(before, evaluator(model, integers=False)(batch), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_layer_that_others_read_in_float_is_let_be(tmp_path: Path) -> None:
    model = chain("Conv", BEHIND["nothing"])
    model.graph.node.append(helper.make_node("Exp", ["y0"], ["exp"]))
    model.graph.output.append(helper.make_tensor_value_info("exp", TensorProto.FLOAT, None))
    assert requantized_layers(model) == []
    assert not requantizes(model, tmp_path)


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-7])
@pytest.mark.parametrize("target", ["onnxruntime-cuda", "tensorrt", "cpu"])
def test_biases_of_channels_next_to_zero_do_not_overflow(target: str, size: float, tmp_path: Path) -> None:
    """Float biases too: onnxruntime rounds them to int32 at input scale x weight scale."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)
    )
    dead, last = layers[2], layers[4]
    assert isinstance(dead, nn.Conv2d)
    assert isinstance(last, nn.Conv2d)
    with torch.no_grad():
        dead.weight[3] *= size
        dead.bias[3] = 0.7  # type: ignore[index]
        last.weight[:, 3] = 1.0
    pack = packs.get(target, VNNI)
    full = prepare(export_onnx(layers.eval(), (8, 12, 12), opset=18, classes=None), pack)
    plan = place(full, pack)
    batch = images(8, (8, 12, 12))
    model = build(full, plan, choose_ranges(plan, calibrate(full, [batch], values=values_of(plan))))
    session, _ = loaded(model, tmp_path)
    found = session.run(None, {session.get_inputs()[0].name: batch})[0]
    exact = evaluator(full)(batch)[0]
    assert np.abs(found - exact).max() < 0.03 * np.abs(exact).max()
