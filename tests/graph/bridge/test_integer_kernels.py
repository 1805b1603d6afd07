"""The module in integers, bit by bit what onnxruntime's fused kernels compute."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional

from deploycnn.graph.bridge import to_torch
from deploycnn.graph.bridge.fake_quant import FakeQuantize, QuantizedLinear
from deploycnn.graph.bridge.integer_kernels import IntegerKernels, _multiply, _Product, _Sum
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


on_x86 = pytest.mark.skipif(not detect_isa().x86, reason="the kernels of x86 are modelled")


class Subsampled(nn.Module):
    """A shortcut of every second pixel and of channels of zeros, as in the CIFAR ResNets, and what is behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.last = nn.Conv2d(16, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.conv(x) + functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.last(x).mean((2, 3))


@on_x86
@pytest.mark.parametrize(("net", "bits"), [(Residual, 7), (Residual, 4), (Subsampled, 7)])
def test_bits_are_those_of_onnxruntime(
    net: type[nn.Module], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    additions = []
    rounded = _Sum.rounded
    monkeypatch.setattr(
        _Sum, "rounded", lambda self, target: additions.append(target) or rounded(self, target)
    )
    full = prepare(export_onnx(randomized(net()), (3, 12, 12), opset=18, classes=None))
    pack = packs.get("onnxruntime-cpu", SATURATING)
    plan = place(full, pack if bits == 7 else packs.four_bits(pack))
    ranges = choose_ranges(plan, calibrate(full, [images(16, (3, 12, 12))], values=values_of(plan)))
    model = build(full, plan, ranges)
    bridge = to_torch(model)
    batch = images(200, (3, 12, 12), seed=5)
    expected = evaluator(packed(model))(batch)[0]
    kernels = IntegerKernels(bridge.module.eval())
    found = kernels(torch.from_numpy(batch)).numpy()
    # In a net this small float32 hardly differs: it must be seen that the addition is done in integers.
    assert len(additions) == 1
    assert not kernels._pending, "nothing is kept beyond its last reader"
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)
    with torch.no_grad():
        plain = bridge.module(torch.from_numpy(batch)).numpy()
    # The same numbers but for a rounding now and then: the module means what the kernels compute.
    assert np.linalg.norm(plain - expected) < 0.02 * np.linalg.norm(expected)


@on_x86
@pytest.mark.parametrize(
    ("operator", "modelled", "wide"), [("QLinearAdd", _Sum, 1.0), ("QLinearMul", _Product, 60.0)]
)
def test_pairs_are_rounded_as_by_the_kernel(
    operator: str, modelled: type[_Sum | _Product], wide: float
) -> None:
    """All pairs of 8-bit integers: near the middle of two steps the last bit of float32 decides."""
    scalars = [(name, TensorProto.FLOAT) for name in ("sa", "sb", "sc")]
    scalars += [(name, TensorProto.UINT8) for name in ("za", "zb", "zc")]
    vectors = [helper.make_tensor_value_info(name, TensorProto.UINT8, [None]) for name in "abc"]
    node = helper.make_node(
        operator, ["a", "sa", "za", "b", "sb", "zb", "sc", "zc"], ["c"], domain="com.microsoft"
    )
    inputs = [*vectors[:2], *(helper.make_tensor_value_info(name, kind, []) for name, kind in scalars)]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "pair", inputs, vectors[2:]), opset_imports=opsets, ir_version=8
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pairs = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    a, b = (side.ravel() for side in pairs)
    rng = np.random.default_rng(0)
    for _ in range(1000):
        scales = (np.exp(rng.normal(-3, 0.5, 3)) * (1, 1, wide)).astype(np.float32)
        zeros = rng.integers(0, 160, 3).astype(np.uint8)
        feeds = dict(
            zip(("sa", "sb", "sc", "za", "zb", "zc"), map(np.asarray, (*scales, *zeros)), strict=True)
        )
        one, other, target = (
            FakeQuantize(torch.tensor(scale), torch.tensor(int(zero)), qmin=0, qmax=255)
            for scale, zero in zip(scales, zeros, strict=True)
        )
        values = [
            (torch.from_numpy(side).float() - grid.zero_point) * grid.scale
            for side, grid in ((a, one), (b, other))
        ]
        with torch.no_grad():
            steps = modelled((values[0], values[1]), (one, other)).rounded(target) + target.zero_point
        expected = session.run(None, {"a": a, "b": b, **feeds})[0]
        np.testing.assert_array_equal(steps.clamp(0, 255).numpy(), expected)


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
