"""Average pools as depthwise convolutions compute the same means, in float and on integers."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from deploycnn.graph.export import export_onnx
from deploycnn.graph.model import attribute, infer_shapes, initializers
from deploycnn.quantization import packs
from deploycnn.quantization.calibration import calibrate, choose_ranges, values_of
from deploycnn.quantization.insertion import build
from deploycnn.quantization.placement import place
from deploycnn.quantization.pools import convolve_pools
from deploycnn.quantization.preparation import prepare
from deploycnn.quantization.types import NumberFormat, WeightPlan
from deploycnn.quantization.weights import dequantize, quantize_weight


def outputs(model: ModelProto, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def pool(size: int = 12, opset: int = 19, **options: object) -> ModelProto:
    node = helper.make_node("AveragePool", ["images"], ["y"], name="pool", **options)
    ends = [
        helper.make_tensor_value_info("images", TensorProto.FLOAT, [None, 16, size, size]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4),
    ]
    made = helper.make_graph([node], "g", ends[:1], ends[1:])
    return infer_shapes(helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=9))


IMAGES = np.random.default_rng(0).standard_normal((2, 16, 12, 12)).astype(np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_shape": [2, 2], "strides": [2, 2]},
        {"kernel_shape": [3, 2], "strides": [1, 3]},
        {"kernel_shape": [3, 3], "pads": [1, 0, 1, 2], "count_include_pad": 1},
        {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1},
        {"kernel_shape": [3, 3], "dilations": [2, 2]},
        {"kernel_shape": [12, 12]},
    ],
)
def test_the_same_means(options: dict[str, object]) -> None:
    model = pool(**options)
    expected = outputs(model, IMAGES)
    assert convolve_pools(model) == 1
    (node,) = model.graph.node
    assert (node.op_type, node.name, attribute(node, "group")) == ("Conv", "pool", 16)
    np.testing.assert_allclose(outputs(model, IMAGES), expected, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},  # fewer pixels at borders
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},  # and behind them
        {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER"},
    ],
)
def test_windows_of_different_sizes_stay_pools(options: dict[str, object]) -> None:
    model = pool(**options)
    assert convolve_pools(model) == 0
    assert [node.op_type for node in model.graph.node] == ["AveragePool"]


@pytest.mark.parametrize("kernel", [(2, 2), (3, 3), (7, 5)])
def test_equal_weights_are_exact_in_eight_bits(kernel: tuple[int, int]) -> None:
    weight = np.full((16, 1, *kernel), 1 / np.prod(kernel), np.float32)
    plan = WeightPlan(node="pool", initializer="w", axis=0, number=NumberFormat(dtype="int8", symmetric=True))
    found = quantize_weight(weight, plan)
    assert (found.integers == 127).all()
    np.testing.assert_allclose(dequantize(found), weight, rtol=1e-7)


def test_integers_are_those_of_the_pool() -> None:
    """But for ties, of which the float mean rounds some the other way."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.two(nn.functional.avg_pool2d(self.one(images).relu(), 2)).mean((2, 3))

    torch.manual_seed(0)
    images = np.random.default_rng(0).standard_normal((8, 3, 18, 18)).astype(np.float32)
    pack = packs.with_formats(packs.get("onnxruntime-cpu"), activations=None, reduced=True, per_channel=True)
    model = prepare(export_onnx(Pooled().eval(), (3, 18, 18), opset=18))
    results = []
    for convolved in (False, True):
        if convolved:
            assert convolve_pools(model) == 1
        plan = place(model, pack, [])
        quantized = build(
            model, plan, choose_ranges(plan, calibrate(model, [images], values=values_of(plan)))
        )
        results.append(outputs(quantized, images))
        scales = initializers(quantized.graph)
        step = max(
            float(numpy_helper.to_array(tensor))
            for name, tensor in scales.items()
            if name.endswith("_scale") and not tensor.dims
        )
    assert np.abs(results[0] - results[1]).max() <= step
