"""BF16: bit patterns against PyTorch's, and the float32 twin against PyTorch computing in BF16."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from deploycnn.graph import bfloat16
from deploycnn.graph.fp16 import convert_fp16
from deploycnn.graph.parity import evaluator
from tests.graph.nets import Weights, graph, images

RNG = np.random.default_rng(5)


@given(st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=8))
def test_rounding_is_that_of_pytorch(values: list[float]) -> None:
    content = np.array(values, np.float32)
    expected = torch.from_numpy(content).to(torch.bfloat16).to(torch.float32).numpy()
    np.testing.assert_array_equal(bfloat16.floats_of(bfloat16.bits_of(content)), expected)


def net() -> tuple[object, Weights]:
    weights: Weights = {
        "w1": (RNG.standard_normal((4, 3, 3, 3)) * 0.3).astype(np.float32),
        "big": np.float32(1e6),  # beyond FP16
        "w2": (RNG.standard_normal((3, 4, 3, 3)) * 1e-6).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="a", pads=[1, 1, 1, 1]),
        helper.make_node("Mul", ["a", "big"], ["b"], name="b"),
        helper.make_node("Conv", ["b", "w2"], ["y"], name="y", pads=[1, 1, 1, 1]),
    ]
    return graph(nodes, weights), weights


def test_nothing_overflows_and_constants_are_stored_once() -> None:
    model, weights = net()
    half, record = convert_fp16(model, half="bf16", peaks={"b": 1e9})  # type: ignore[arg-type]
    assert not record.kept
    assert half.opset_import[0].version >= 22
    assert {tensor.data_type for tensor in half.graph.initializer} == {TensorProto.BFLOAT16}
    assert len(half.graph.initializer) == len(weights)
    assert half.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert half.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


def test_the_twin_rounds_where_bf16_does() -> None:
    model, weights = net()
    half, _ = convert_fp16(model, half="bf16")  # type: ignore[arg-type]
    twin = bfloat16.float32_twin(half)
    assert not any(tensor.data_type == TensorProto.BFLOAT16 for tensor in twin.graph.initializer)
    x = images(2, (3, 8, 8))

    def short(value: torch.Tensor) -> torch.Tensor:
        return value.to(torch.bfloat16).to(torch.float64)

    def conv(value: torch.Tensor, name: str) -> torch.Tensor:
        weight = short(torch.from_numpy(np.asarray(weights[name])))
        return short(torch.nn.functional.conv2d(value, weight, padding=1))

    expected = conv(short(conv(short(torch.from_numpy(x)), "w1") * short(torch.tensor(1e6))), "w2").numpy()
    found = evaluator(twin)(x)[0]
    # Sums in float32 instead of float64 may fall on the other side of a rounding edge: one step of 2^-8.
    assert np.abs(found - expected).max() <= 2.0**-7 * np.abs(expected).max()
    assert np.mean(found == expected) > 0.9
    exact = evaluator(model)(x)[0]  # type: ignore[arg-type]
    assert 1e-4 < np.abs(found - exact).max() / np.abs(exact).max() < 0.03
    assert numpy_helper.to_array(twin.graph.initializer[0]).dtype == np.float32
