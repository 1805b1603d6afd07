from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper, numpy_helper

from deploycnn.errors import PassRequirementError
from deploycnn.graph.model import infer_shapes
from deploycnn.graph.parity import evaluator
from deploycnn.quantization import packs
from deploycnn.quantization.bias_correction import bias_shifts, correct_biases, inputs_of
from deploycnn.quantization.calibration import calibrate
from deploycnn.quantization.placement import place
from deploycnn.quantization.types import NumberFormat, Plan
from deploycnn.quantization.weights import dequantize, quantize_weight
from tests.quantization.small_graphs import Builder, images, random_graph

FOUR_BITS = packs.weights_only(packs.get("onnxruntime-cpu"), "int4")


def with_rounded_weights(model: ModelProto, plan, only: str | None = None) -> ModelProto:
    rounded = ModelProto.FromString(model.SerializeToString())
    plans = {item.initializer: item for item in plan.weights}
    for tensor in rounded.graph.initializer:
        if tensor.name in plans and only in {None, plans[tensor.name].node}:
            real = dequantize(quantize_weight(numpy_helper.to_array(tensor), plans[tensor.name]))
            tensor.CopyFrom(numpy_helper.from_array(real.astype(np.float32), tensor.name))
    return rounded


def shifts(model: ModelProto, plan: Plan, batches, **weights) -> dict[str, np.ndarray]:
    means = calibrate(model, batches, values=[], means=inputs_of(model, plan)).means
    return bias_shifts(model, plan, means, **weights)


def value(model: ModelProto, name: str, batch: np.ndarray) -> np.ndarray:
    exposed = ModelProto.FromString(model.SerializeToString())
    if name not in {output.name for output in exposed.graph.output}:
        exposed.graph.output.append(helper.make_tensor_value_info(name, 1, None))
    (found,) = evaluator(exposed, outputs=[name])(batch)
    return found.astype(np.float64)


@given(st.integers(0, 2**16), st.sampled_from(["Relu", "relu6", "silu", "gate"]))
@settings(max_examples=10, deadline=None)
def test_each_layers_own_mean_error_vanishes(seed: int, kind: str) -> None:
    model = random_graph(seed, [kind])
    plan = place(model, FOUR_BITS)
    batch = images(40)
    corrected = correct_biases(model, shifts(model, plan, np.array_split(batch, 3)))
    biases = {t.name: t for t in corrected.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type in {"Conv", "Gemm"}]:
        # This layer alone is rounded, so its input is the float one.
        alone = with_rounded_weights(model, plan, only=node.name)
        axes = (0, 2, 3) if node.op_type == "Conv" else (0,)
        right = value(model, node.output[0], batch)
        before = (value(alone, node.output[0], batch) - right).mean(axis=axes)
        bias = next(t for t in alone.graph.initializer if t.name == node.input[2])
        bias.CopyFrom(biases[node.input[2]])
        after = (value(alone, node.output[0], batch) - right).mean(axis=axes)
        assert np.abs(after).max() <= 1e-5 * max(1.0, np.abs(right).max()) + 1e-3 * np.abs(before).max()


def test_the_mean_error_of_the_outputs_shrinks() -> None:
    model = random_graph(7, ["Relu", "Relu"])
    plan = place(model, FOUR_BITS)
    corrected = correct_biases(model, shifts(model, plan, [images(200)]))
    output = model.graph.output[0].name
    fresh = images(200, seed=9)
    right = value(model, output, fresh)
    errors = [
        np.abs((value(with_rounded_weights(graph, plan), output, fresh) - right).mean(axis=0)).mean()
        for graph in (model, corrected)
    ]
    assert errors[1] < 0.7 * errors[0]


def test_layers_without_a_bias_get_one() -> None:
    model = random_graph(1, ["Relu"])
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    del first.input[2:]
    plan = place(model, packs.get("onnxruntime-cpu"))
    corrected = correct_biases(model, shifts(model, plan, [images(10)]))
    node = next(node for node in corrected.graph.node if node.name == first.name)
    assert len(node.input) == 3
    assert evaluator(corrected)(images(3))[0].shape == (3, 5)
    assert len(first.input) == 2


def test_given_integers_are_corrected_for_instead_of_nearest_ones() -> None:
    model = random_graph(2, ["Relu"])
    plan = place(model, FOUR_BITS)
    item = next(item for item in plan.weights if item.number.dtype == "int4")
    real = next(t for t in model.graph.initializer if t.name == item.initializer)
    nearest = quantize_weight(numpy_helper.to_array(real), item)
    other = correct_biases(model, shifts(model, plan, [images(10)], weights={item.initializer: nearest}))
    default = correct_biases(model, shifts(model, plan, [images(10)]))
    assert other.SerializeToString(deterministic=True) == default.SerializeToString(deterministic=True)
    exact = quantize_weight(numpy_helper.to_array(real), place_8_bits(model, item.initializer))
    finer = correct_biases(model, shifts(model, plan, [images(10)], weights={item.initializer: exact}))
    assert finer.SerializeToString(deterministic=True) != default.SerializeToString(deterministic=True)


def place_8_bits(model: ModelProto, initializer: str):
    plan = place(model, packs.weights_only(packs.get("onnxruntime-cpu")))
    assert NumberFormat(dtype="int8", symmetric=True) == plan.weights[0].number
    return next(item for item in plan.weights if item.initializer == initializer)


def test_mean_maps_are_means() -> None:
    builder = Builder(0)
    read = builder.conv(4)
    model = builder.finish()
    batch = images(30)
    found = calibrate(model, np.array_split(batch, 4), values=[], means=["images", read], threads=2).means
    np.testing.assert_allclose(found["images"], batch.mean(axis=0, dtype=np.float64), atol=1e-6)
    np.testing.assert_allclose(found[read], value(model, read, batch).mean(axis=0), atol=1e-5)


def test_positions_in_the_first_axis_are_no_images() -> None:
    """A Gemm that reads positions as rows is corrected by their mean, not by their sum."""
    builder = Builder(0)
    read = builder.conv(4)
    rng = np.random.default_rng(0)
    rows, weight = numpy_helper.from_array(np.array([-1, 4]), "rows"), rng.standard_normal((4, 5))
    model = builder.finish()
    model.graph.initializer.extend([rows, numpy_helper.from_array(weight.astype(np.float32), "matrix")])
    model.graph.node.extend(
        [
            helper.make_node("Transpose", [read], ["last"], perm=[0, 2, 3, 1], name="transpose"),
            helper.make_node("Reshape", ["last", "rows"], ["folded"], name="fold"),
            helper.make_node("Gemm", ["folded", "matrix"], ["scores"], name="scores"),
        ]
    )
    model.graph.output.append(helper.make_tensor_value_info("scores", 1, [None, 5]))
    model = infer_shapes(model)
    batch = images(30)
    mean = calibrate(model, np.array_split(batch, 4), values=[], means=["folded"]).means["folded"]
    expected = value(model, read, batch).mean(axis=(0, 2, 3))
    np.testing.assert_allclose(mean, expected, atol=1e-5)


def test_nothing_to_correct_and_no_images_are_refused() -> None:
    model = random_graph(0, ["Relu"])
    plan = place(model, packs.get("onnxruntime-cpu"), [node.name for node in model.graph.node])
    with pytest.raises(PassRequirementError, match="bias correction"):
        correct_biases(model, shifts(model, plan, [images(2)]))
    with pytest.raises(PassRequirementError, match="no calibration images"):
        correct_biases(model, shifts(model, place(model, packs.get("onnxruntime-cpu")), []))
