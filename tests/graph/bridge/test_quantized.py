"""Fake quantization against onnxruntime's integers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, helper, numpy_helper
from torch import nn

from deploycnn.errors import TrainingError
from deploycnn.graph.bridge import FakeQuantize, to_torch
from deploycnn.graph.bridge.fake_quant import BiasQuantize, QuantizedConv2d, QuantizedLinear
from tests.graph.bridge.support import by_torch, convnet, model_of, noise, quantized, run


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> ModelProto:
    return quantized(convnet(), tmp_path_factory.mktemp("int8"))


def output_step(model: ModelProto) -> float:
    """Scale of the graph's last quantizer."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    last = [node for node in model.graph.node if node.op_type == "DequantizeLinear"][-1]
    return float(tensors[last.input[1]])


def within_one_step(model: ModelProto, found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean(np.abs(found - expected) <= 1.001 * output_step(model)))


def test_layers_are_ordinary_leaves_with_quantizers(int8: ModelProto) -> None:
    bridge = to_torch(int8)
    layers = {name: bridge.module.get_submodule(path) for name, path in bridge.module_of.items()}
    assert isinstance(layers["stem"], nn.Conv2d)
    assert isinstance(layers["stem"], QuantizedConv2d)
    assert isinstance(layers["head"], nn.Linear)
    assert isinstance(layers["head"], QuantizedLinear)
    assert layers["stem"].weight_fake_quant.qmax <= 64  # 7 bits, as the file has them
    assert isinstance(layers["stem"].bias_fake_quant, BiasQuantize)
    assert len(layers["stem"].bias_fake_quant.tied) == 2


def test_logits_equal_the_executed_integers_within_one_step(int8: ModelProto) -> None:
    x = noise(512, 3, 12, 12, seed=9)
    (expected,) = run(int8, x)
    (found,) = by_torch(to_torch(int8), x)
    assert within_one_step(int8, found, expected) >= 0.999


def test_a_wrong_axis_is_noticed(int8: ModelProto) -> None:
    """The agreement above is no accident: scales on the wrong channels break it."""
    bridge = to_torch(int8)
    pointwise = bridge.module.get_submodule(bridge.module_of["pw"])
    assert isinstance(pointwise, QuantizedConv2d)
    pointwise.weight_fake_quant.axis = 1
    x = noise(64, 3, 12, 12, seed=9)
    assert within_one_step(int8, by_torch(bridge, x)[0], run(int8, x)[0]) < 0.9


def test_untrained_it_writes_back_the_same_bytes(int8: ModelProto) -> None:
    written = to_torch(int8).write_back()
    assert written.SerializeToString(deterministic=True) == int8.SerializeToString(deterministic=True)


@pytest.mark.parametrize("learn", [False, True])
def test_what_was_trained_is_what_onnxruntime_runs(int8: ModelProto, learn: bool) -> None:
    bridge = to_torch(int8)
    if learn:
        bridge.learn_scales()
    module = bridge.module.train()
    images, labels = torch.from_numpy(noise(64, 3, 12, 12)), torch.arange(64) % 5
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(images), labels)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < losses[0]
    module.eval()
    written = bridge.write_back()
    onnx.checker.check_model(written, full_check=True)
    before = {tensor.name: tensor for tensor in int8.graph.initializer}
    after = {tensor.name: tensor for tensor in written.graph.initializer}
    assert before.keys() == after.keys()
    assert all(before[name].data_type == after[name].data_type for name in before)
    changed = {name for name in before if before[name] != after[name]}
    assert {"stem.w_quantized", "head.w_quantized"} <= changed
    assert any(name.endswith("_scale") for name in changed) == learn
    x = noise(256, 3, 12, 12, seed=9)
    (expected,), (found,) = run(written, x), by_torch(bridge, x)
    assert within_one_step(written, found, expected) >= 0.999
    assert within_one_step(written, found, run(int8, x)[0]) < 0.9
    # The written file is the trained module: imported again, it computes the same.
    np.testing.assert_allclose(by_torch(to_torch(written), x)[0], found, atol=output_step(written) * 0.01)


def test_no_step_takes_a_learned_scale_to_zero() -> None:
    """A step of any size, from any scale: positive, finite, and the scale's own step where that is small."""
    quantizer = FakeQuantize(torch.tensor([1e-3, 1e-2, 0.1, 10.0]), torch.zeros(4), qmin=-7, qmax=7, axis=0)
    before = quantizer.scale.clone()
    quantizer.learn_scale()
    assert torch.equal(quantizer.scale, before)  # to the bit
    (way,) = quantizer.parameters()
    quantizer.scale.sum().backward()
    assert way.grad is not None
    assert torch.equal(way.grad, torch.ones(4))  # LSQ's gradient reaches the scale as it is
    with torch.no_grad():
        way.copy_(-1e-4 * before)
    torch.testing.assert_close(quantizer.scale, before * (1 - 1e-4))
    with torch.no_grad():
        way.copy_(-10 * before)
    assert bool((quantizer.scale > 0).all())
    assert bool((quantizer.scale < 1e-4 * before).all())
    with torch.no_grad():
        way.fill_(-1e3)
    assert bool((quantizer.scale > 0).all())
    with torch.no_grad():
        way.fill_(1e3)  # far beyond what exp can hold for the small ones
    way.grad = None
    quantizer.scale.sum().backward()
    torch.testing.assert_close(quantizer.scale, before + 1e3)
    assert torch.equal(way.grad, torch.ones(4))


def test_a_learned_scale_becomes_a_buffer_again() -> None:
    quantizer = FakeQuantize(torch.tensor(0.5), torch.tensor(0), qmin=-7, qmax=7)
    quantizer.learn_scale()
    with torch.no_grad():
        next(quantizer.parameters()).fill_(-0.25)
    found = quantizer.scale.detach().clone()
    assert found == pytest.approx(0.5 * np.exp(-0.5))
    for learn in (True, False):
        quantizer.learn_scale(learn)
        assert torch.equal(quantizer.scale, found)
    assert not list(quantizer.parameters())
    assert set(quantizer.state_dict()) == {"scale", "zero_point"}


@pytest.mark.parametrize(
    ("shape", "axis", "zero", "batched", "features", "largest"),
    [
        ((6, 3, 5, 5), None, 0, False, 6 * 3 * 5 * 5, 7),  # weights, one scale for the layer
        ((6, 3, 5, 5), 0, 0, False, 3 * 5 * 5, 7),  # one for each channel
        ((6, 3, 5, 5), None, -8, True, 3 * 5 * 5, 15),  # activations: an image's features, unsigned
        ((2, 3, 5, 5), None, -8, True, 3 * 5 * 5, 15),  # however many images there are
    ],
)
def test_lsq_scales_the_gradient_of_a_scale(
    shape: tuple[int, ...], axis: int | None, zero: int, batched: bool, features: int, largest: int
) -> None:
    """Section 2.2 of the paper: 1 / sqrt(N Qp), N being weights or features that share the scale."""
    count = 1 if axis is None else shape[axis]
    scale, zeros = torch.full((count,), 0.25), torch.full((count,), zero)
    quantizer = FakeQuantize(
        scale.reshape(-1 if axis is not None else ()),
        zeros.reshape(-1 if axis is not None else ()),
        qmin=-8 if zero else -7, qmax=7, axis=axis, batched=batched,
    )  # fmt: skip
    quantizer.learn_scale()
    x = torch.from_numpy(noise(*shape))
    (quantizer(x).sum()).backward()
    ratio = x.double() / 0.25
    low, high = (0, 15) if zero else (-7, 7)
    slope = torch.where(
        (ratio.round() >= low) & (ratio.round() <= high), ratio.round() - ratio, ratio.clamp(low, high)
    )
    expected = slope.flatten(1).sum(dim=1) if axis == 0 else slope.sum()
    (way,) = quantizer.parameters()
    assert way.grad is not None
    torch.testing.assert_close(
        way.grad.double(), expected / (features * largest) ** 0.5, rtol=1e-4, atol=1e-5
    )


def test_a_scale_that_is_no_scale_is_not_written(int8: ModelProto) -> None:
    bridge = to_torch(int8)
    with torch.no_grad():
        next(iter(bridge.quantizers().values())).scale.neg_()
    with pytest.raises(TrainingError, match=r"scale was trained to -.*, and scales are positive"):
        bridge.write_back()


def test_the_gradient_reaches_every_weight(int8: ModelProto) -> None:
    bridge = to_torch(int8)
    bridge.learn_scales()
    bridge.module(torch.from_numpy(noise(4, 3, 12, 12))).square().sum().backward()
    for name, parameter in bridge.module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_given_float_weights_are_rounded(int8: ModelProto) -> None:
    floats = {tensor.name: numpy_helper.to_array(tensor) for tensor in convnet().graph.initializer}
    given = {name: floats[name] for name in ("stem.w", "dw.w", "pw.w", "head.w", "stem.b")}
    bridge = to_torch(int8, float_weights=given)
    layer = bridge.module.get_submodule(bridge.module_of["stem"])
    np.testing.assert_array_equal(layer.weight.detach().numpy(), floats["stem.w"])
    # onnxruntime rounded the same floats, so the file stays what it was.
    assert bridge.write_back() == int8
    with pytest.raises(Exception, match=r"no tensor as integers that is called nothing"):
        to_torch(int8, float_weights={"nothing": np.zeros(3, np.float32)})
    with pytest.raises(Exception, match=r"has shape \(3,\), the model stores \(8, 3, 3, 3\)"):
        to_torch(int8, float_weights={"stem.w": np.zeros(3, np.float32)})


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_rounding_is_onnxs_own(dtype: type, axis: int | None) -> None:
    """Ties to even, saturation and division in float32, against onnxruntime's operators."""
    rng = np.random.default_rng(0)
    channels = 1 if axis is None else 6
    scale = rng.uniform(0.001, 0.1, channels).astype(np.float32)
    zero = rng.integers(0, 100, channels).astype(dtype)
    if axis is None:
        scale, zero = scale[0], zero[0]
    spread = scale if axis is None else scale.reshape([-1 if i == axis % 3 else 1 for i in range(3)])
    x = (rng.integers(-400, 400, (6, 6, 6)) * spread / 2).astype(np.float32)  # half of them ties
    options = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "q", **options),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], "dq", **options),
    ]
    weights = {"s": np.asarray(scale), "z": np.asarray(zero)}
    model = model_of(nodes, weights, inputs={"x": [6, 6, 6]})
    (expected,) = run(model, x, optimize=False)
    bridge = to_torch(model)
    np.testing.assert_array_equal(by_torch(bridge, x)[0], expected)
    quantizer = bridge.module.get_submodule(bridge.module_of["q"])
    assert isinstance(quantizer, FakeQuantize)
    gradient = torch.from_numpy(x).requires_grad_()
    quantizer(gradient).sum().backward()
    raw = np.rint(x / spread) + (zero if axis is None else zero.reshape(spread.shape)).astype(int)
    info = np.iinfo(dtype)
    assert gradient.grad is not None
    np.testing.assert_array_equal(gradient.grad.numpy(), ((raw >= info.min) & (raw <= info.max)) * 1.0)
