"""The module in integers, bit by bit what onnxruntime's fused kernels compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deploycnn.graph.bridge import to_torch
from deploycnn.graph.bridge.fake_quant import FakeQuantize, QuantizedLinear
from deploycnn.graph.bridge.integer_kernels import IntegerKernels, _multiply
from deploycnn.graph.export import export_onnx
from deploycnn.graph.parity import evaluator
from deploycnn.quantization import packs
from deploycnn.quantization.calibration import calibrate, choose_ranges, values_of
from deploycnn.quantization.insertion import build
from deploycnn.quantization.isa import Isa, detect_isa
from deploycnn.quantization.packed import packed
from deploycnn.quantization.placement import place
from deploycnn.quantization.preparation import prepare
from tests.graph.nets import Residual, images, randomized

SATURATING = Isa(name="x86 without VNNI", saturates=True)


@pytest.mark.skipif(not detect_isa().x86, reason="the kernels of x86 are modelled")
@pytest.mark.parametrize("bits", [7, 4])
def test_bits_are_those_of_onnxruntime(bits: int) -> None:
    full = prepare(export_onnx(randomized(Residual()), (3, 12, 12), opset=18, classes=None))
    pack = packs.get("onnxruntime-cpu", SATURATING)
    plan = place(full, pack if bits == 7 else packs.four_bits(pack))
    ranges = choose_ranges(plan, calibrate(full, [images(16, (3, 12, 12))], values=values_of(plan)))
    model = build(full, plan, ranges)
    bridge = to_torch(model)
    batch = images(200, (3, 12, 12), seed=5)
    expected = evaluator(packed(model))(batch)[0]
    found = IntegerKernels(bridge.module.eval())(torch.from_numpy(batch)).numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)
    with torch.no_grad():
        plain = bridge.module(torch.from_numpy(batch)).numpy()
    # The same numbers but for a rounding now and then: the module means what the kernels compute.
    assert np.linalg.norm(plain - expected) < 0.02 * np.linalg.norm(expected)


def test_a_sum_beyond_float32_is_exact() -> None:
    layer = QuantizedLinear(4096, 1)
    layer.bias_fake_quant = None
    layer.weight_fake_quant = FakeQuantize(torch.tensor(1.0), torch.tensor(0), qmin=-127, qmax=127)
    grid = FakeQuantize(torch.tensor(1.0), torch.tensor(0), qmin=0, qmax=255)
    rng = np.random.default_rng(0)
    weight, value = rng.integers(100, 127, 4096), rng.integers(200, 255, 4096)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight[None]).float())
        layer.bias.zero_()
        found = _multiply(layer, torch.from_numpy(value[None]).float(), grid)
    assert float(found.sums) == float(np.float32(int((weight * value).sum())))
