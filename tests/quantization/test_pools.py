"""Average pools as depthwise convolutions compute the same means on integers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from deploycnn.graph.model import attribute, infer_shapes, initializers, save_onnx
from deploycnn.quantization import packs
from deploycnn.quantization.calibration import calibrate, choose_ranges, values_of
from deploycnn.quantization.fusion import count_fused
from deploycnn.quantization.insertion import build
from deploycnn.quantization.isa import Isa
from deploycnn.quantization.lint import lint_graph
from deploycnn.quantization.packed import measure
from deploycnn.quantization.placement import place

PACK = packs.with_formats(packs.get("onnxruntime-cpu"), activations=None, reduced=True, per_channel=True)
IMAGES = np.random.default_rng(0).standard_normal((4, 3, 12, 12)).astype(np.float32)


def outputs(model: ModelProto, images: np.ndarray = IMAGES) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def pooled(*, last: bool = False, joined: bool = False, opset: int = 19, **options: object) -> ModelProto:
    """A pool between two convolutions, or behind the last; beside ReLUs that a Concat joins with it."""
    rng = np.random.default_rng(1)
    nodes = [
        helper.make_node("Conv", ["images", "one"], ["a"], name="one"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("AveragePool", ["b"], ["y" if last else "c"], name="pool", **options),
    ]
    if joined:
        nodes.append(helper.make_node("Concat", ["b", "c"], ["d"], name="concat", axis=1))
    if not last:
        nodes.append(helper.make_node("Conv", ["d" if joined else "c", "two"], ["y"], name="two"))
    shapes = {"one": (16, 3, 1, 1), "two": (8, 32 if joined else 16, 1, 1)}
    weights = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    ends = [
        helper.make_tensor_value_info("images", TensorProto.FLOAT, [None, 3, 12, 12]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4),
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights[: 1 if last else 2])
    return infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    )


def quantized(model: ModelProto, *, convolved: bool = True) -> ModelProto:
    plan = place(model, replace(PACK, convolves_pools=convolved), [])
    ranges = choose_ranges(plan, calibrate(model, [IMAGES], values=values_of(plan)))
    return build(model, plan, ranges)


def operators(model: ModelProto) -> dict[str, str]:
    return {node.name: node.op_type for node in model.graph.node}


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_shape": [2, 2], "strides": [2, 2]},
        {"kernel_shape": [3, 2], "strides": [1, 3]},
        {"kernel_shape": [3, 3], "pads": [1, 0, 1, 2], "count_include_pad": 1},
        {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1},
        {"kernel_shape": [12, 12]},
    ],
)
def test_the_same_means(options: dict[str, object], tmp_path: Path) -> None:
    """Up to a step: of ties, the pool's float mean rounds some the other way."""
    model = pooled(**options)
    found = quantized(model)
    node = next(held for held in found.graph.node if held.name == "pool")
    assert (node.op_type, attribute(node, "group")) == ("Conv", 16)
    before = quantized(model, convolved=False)
    assert operators(before)["pool"] == "AveragePool"
    step = max(
        float(numpy_helper.to_array(tensor))
        for name, tensor in initializers(found.graph).items()
        if name.endswith("_scale") and not tensor.dims
    )
    # A step of what is pooled is up to this much of the result.
    weights = float(np.abs(numpy_helper.to_array(initializers(model.graph)["two"])).sum(axis=1).max())
    error = np.abs(outputs(found) - outputs(before))
    assert error.max() <= step * (1 + weights)
    assert np.median(error) <= step
    save_onnx(found, path := tmp_path / "int8.onnx")
    fused = count_fused(path)
    assert (fused.by_operator["QLinearConv"], fused.float_compute) == (3, 0)
    assert measure(found) == measure(before)


def test_the_means_are_exact() -> None:
    """Against float64: what is pooled is the integers, and the result their mean, rounded once."""
    model = pooled(kernel_shape=[3, 3])
    found = quantized(model)
    names = {node.name: node for node in found.graph.node}
    weight = initializers(found.graph)
    rounded = next(node for node in found.graph.node if node.output[0] == names["pool"].input[1])
    integers, scale = (numpy_helper.to_array(weight[name]) for name in rounded.input[:2])
    np.testing.assert_allclose(integers.astype(np.float64) * scale.reshape(-1, 1, 1, 1), 1 / 9, rtol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},  # fewer pixels at borders
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},  # and behind them
        {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER"},
        {"kernel_shape": [2, 2], "last": True},  # float behind it
        {"kernel_shape": [3, 3], "dilations": [2, 2]},  # stays float
    ],
)
def test_others_stay_pools(options: dict[str, object]) -> None:
    found = quantized(pooled(**options))
    assert operators(found)["pool"] == "AveragePool"
    assert np.isfinite(outputs(found)).all()


def test_what_is_joined_with_it_keeps_one_scale() -> None:
    model = pooled(joined=True, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)
    found = quantized(model)
    assert operators(found)["pool"] == "Conv"
    scales = {
        float(numpy_helper.to_array(initializers(found.graph)[node.input[1]]))
        for node in found.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] in {"a", "b", "c", "d"}
    }
    assert len(scales) == 1
    assert lint_graph(found, PACK) == ()


def test_only_where_the_kernel_is() -> None:
    assert packs.get("onnxruntime-cpu", Isa(name="avx512_vnni", saturates=False)).convolves_pools
    assert not packs.get("onnxruntime-cpu", Isa(name="aarch64", saturates=False)).convolves_pools
    assert not packs.get("openvino", Isa(name="avx512_vnni", saturates=False)).convolves_pools
