"""Graphs that this project's own quantizer builds, for each target, through the bridge."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from onnx import ModelProto, numpy_helper
from torch import nn

from deploycnn.errors import PassRequirementError
from deploycnn.graph.bridge import FakeQuantize, to_torch
from deploycnn.graph.model import infer_shapes
from deploycnn.quantization import packs
from deploycnn.quantization.calibration import calibrate, choose_ranges, values_of
from deploycnn.quantization.insertion import build
from deploycnn.quantization.isa import Isa
from deploycnn.quantization.placement import place
from tests.graph.bridge.support import Array, by_torch, convnet, noise, run
from tests.quantization.test_insertion import padded_shortcut, quantized

SATURATING = Isa(name="x86 without VNNI", saturates=True)
VNNI = Isa(name="avx512_vnni", saturates=False)


@dataclass(frozen=True)
class Placed:
    """A placed graph, and whether onnxruntime may fuse it into integer kernels on any CPU."""

    pack: packs.RulePack
    executable: bool


PLACED = {
    "cpu, 7-bit weights": Placed(packs.get("cpu", SATURATING), executable=True),
    "cpu": Placed(packs.get("cpu", VNNI), executable=False),
    "onnxruntime-cuda": Placed(packs.get("onnxruntime-cuda"), executable=False),
    "tensorrt": Placed(packs.get("tensorrt"), executable=False),
    "int8 weights": Placed(packs.weights_only(packs.get("cpu", VNNI)), executable=False),
    "int4 weights": Placed(packs.weights_only(packs.get("cpu", VNNI), "int4"), executable=False),
}


def placed(pack: packs.RulePack) -> ModelProto:
    model = infer_shapes(convnet())
    plan = place(model, pack)
    ranges = {}
    if plan.activations:
        calibration = calibrate(model, [noise(32, 3, 12, 12)], values=values_of(plan))
        ranges = choose_ranges(plan, calibration)
    return build(model, plan, ranges)


def agreement(model: ModelProto, found: Array, expected: Array) -> float:
    """Share of logits within one step of the last quantizer (a thousandth of the largest where there is none)."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    steps = [
        float(tensors[node.input[1]])
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and tensors[node.input[1]].size == 1
    ]
    step = steps[-1] if steps else np.abs(expected).max() * 1e-3
    return float(np.mean(np.abs(found - expected) <= 1.001 * step))


@pytest.mark.parametrize("name", PLACED)
def test_placed_graphs_are_what_onnxruntime_computes(name: str) -> None:
    model = placed(PLACED[name].pack)
    x = noise(256, 3, 12, 12, seed=9)
    (found,) = by_torch(to_torch(model), x)
    assert agreement(model, found, run(model, x, optimize=False)[0]) >= 0.999
    if PLACED[name].executable:
        assert agreement(model, found, run(model, x)[0]) >= 0.999
    assert np.abs(found - run(convnet(), x)[0]).max() > 1e-4  # something is rounded


@pytest.mark.parametrize("name", PLACED)
def test_placed_graphs_are_trained_and_written_back(name: str) -> None:
    model = placed(PLACED[name].pack)
    bridge = to_torch(model)
    assert bridge.write_back() == model
    bridge.learn_scales()
    module = bridge.module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    images, labels = torch.from_numpy(noise(32, 3, 12, 12)), torch.arange(32) % 5
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(images), labels).backward()
        for parameter_name, parameter in module.named_parameters():
            assert parameter.grad is not None, parameter_name
        optimizer.step()
    module.eval()
    written = bridge.write_back()
    changed = {
        before.name
        for before, after in zip(model.graph.initializer, written.graph.initializer, strict=True)
        if before != after
    }
    assert changed
    x = noise(256, 3, 12, 12, seed=9)
    (found,) = by_torch(bridge, x)
    assert agreement(written, found, run(written, x, optimize=False)[0]) >= 0.999
    assert agreement(written, found, run(model, x, optimize=False)[0]) < 0.999


def test_weights_keep_their_bits_when_they_are_trained() -> None:
    bridge = to_torch(placed(PLACED["cpu, 7-bit weights"].pack))
    with torch.no_grad():
        for layer in bridge.module.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.mul_(4)
    for tensor in bridge.write_back().graph.initializer:
        if tensor.name.endswith(".w_quantized"):
            assert np.abs(numpy_helper.to_array(tensor).astype(int)).max() <= 64


def test_tied_scales_are_one_module() -> None:
    """Values that share scale and zero point share the quantizer, so that training cannot part them."""
    bridge = to_torch(placed(PLACED["tensorrt"].pack))
    quantizers = [m for m in bridge.module.modules() if isinstance(m, FakeQuantize)]
    assert len(quantizers) == len({id(m) for m in quantizers})
    origins = [slot.origin for slot in bridge.slots if slot.path.endswith(".scale")]
    assert len(origins) == len(set(origins))


def test_padding_on_integers_is_what_onnxruntime_computes() -> None:
    model = quantized(padded_shortcut(), packs.get("cpu", VNNI))
    assert (
        next(node for node in model.graph.node if node.op_type == "Pad")
        .input[0]
        .endswith("QuantizeLinear_Output")
    )
    x = noise(2, 3, 8, 8)
    np.testing.assert_allclose(
        by_torch(to_torch(model), x)[0], run(model, x, optimize=False)[0], rtol=1e-4, atol=1e-4
    )


def test_padding_integers_with_something_else_is_refused() -> None:
    model = quantized(padded_shortcut(), packs.get("cpu", VNNI))
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(7, dtype=np.uint8), "seven"))
    next(node for node in model.graph.node if node.op_type == "Pad").input[2] = "seven"
    with pytest.raises(PassRequirementError, match="pads integers with 7"):
        to_torch(model)
