from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from deploycnn.graph.export import export_onnx
from deploycnn.graph.fp16 import convert_fp16
from deploycnn.graph.half_range import overflows, vanishes
from deploycnn.graph.parity import evaluator
from tests.graph.nets import Residual, Weights, graph, images, operators, randomized
from tests.graph.test_cleanup import random_graphs

RNG = np.random.default_rng(2)


def close(full: ModelProto, half: ModelProto, *, shape: tuple[int, int, int] = (3, 8, 8)) -> bool:
    x = images(2, shape)
    for a, b in zip(evaluator(full)(x), evaluator(half)(x), strict=True):
        assert b.dtype == a.dtype
        if not np.abs(a - b).max() <= 1e-2 * max(1.0, float(np.abs(a).max())):
            return False
    return True


def conv(source: str, target: str, weight: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node("Conv", [source, weight], [target], name=target, pads=[1, 1, 1, 1], **attributes)


def weight(scale: float = 0.2, channels: int = 3) -> np.ndarray:
    return (RNG.standard_normal((channels, channels, 3, 3)) * scale).astype(np.float32)


def test_an_exported_model_is_half_inside_and_float_outside() -> None:
    model = export_onnx(randomized(Residual()), (3, 12, 12), opset=18)
    half, record = convert_fp16(model)
    assert not record.kept
    assert record.casts == 2
    assert record.converted == len(model.graph.node)
    assert {tensor.data_type for tensor in half.graph.initializer} == {TensorProto.FLOAT16, TensorProto.INT64}
    assert half.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert half.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert half.ByteSize() < 0.75 * model.ByteSize()
    assert close(model, half, shape=(3, 12, 12))


def test_weights_beyond_fp16_keep_their_node_and_are_named() -> None:
    nodes = [
        conv("x", "a", "w1"),
        helper.make_node("Mul", ["a", "big"], ["b"], name="b"),
        conv("b", "y", "w2"),
    ]
    weights: Weights = {"w1": weight(1e-4), "big": np.float32(1e5), "w2": weight(1e-2)}
    model = graph(nodes, weights)
    half, record = convert_fp16(model)
    assert list(record.kept) == ["b"]
    assert 'constant "big" overflows FP16 (largest magnitude 1e+05)' in record.kept["b"]
    assert record.converted == 2
    assert close(model, half)


def test_weights_below_fp16_keep_their_node_and_are_named() -> None:
    nodes = [conv("x", "a", "tiny"), helper.make_node("Mul", ["a", "k"], ["y"], name="y")]
    model = graph(nodes, {"tiny": weight(1e-8), "k": np.float32(100)})
    half, record = convert_fp16(model)
    assert list(record.kept) == ["a", "y"]
    assert '"tiny" is too small' in record.kept["a"]
    assert record.kept["y"] == 'computed in one kernel with "a", which stays FP32'
    assert close(model, half)


def test_a_dead_channel_does_not_keep_a_whole_layer() -> None:
    values = weight()
    values[0] = 1e-20
    assert not vanishes(values)
    assert not vanishes(np.zeros(3, np.float32))
    assert vanishes(np.float32([1e-5]))
    assert vanishes(np.float32([1.0, 1e-6]), elementwise=True)
    assert not overflows(np.float32([np.inf, 65504]))
    assert overflows(np.float32([-65505]))


def test_activations_beyond_fp16_keep_producer_and_consumers() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="a"),
        helper.make_node("Mul", ["a", "k"], ["b"], name="b"),
        helper.make_node("Mul", ["b", "k"], ["c"], name="c"),
        helper.make_node("Mul", ["c", "small"], ["y"], name="y"),
    ]
    model = graph(nodes, {"k": np.float32(1000), "small": np.float32(1e-3)})
    peaks = {"x": 3.0, "a": 3.0, "b": 3e3, "c": 3e6, "y": 3e3}
    half, record = convert_fp16(model, peaks=peaks)
    assert set(record.kept) == {"c", "y"}
    assert 'value "c" overflows' in record.kept["c"]
    assert close(model, half)
    # onnxruntime's CPU provider computes all this in float32 and would hide the fault.
    broken, _ = convert_fp16(model)
    with np.errstate(over="ignore"):
        (found,) = ReferenceEvaluator(broken).run(None, {"x": images(2, (3, 8, 8))})
    assert not np.isfinite(found).all()
    (found,) = ReferenceEvaluator(half).run(None, {"x": images(2, (3, 8, 8))})
    assert np.isfinite(found).all()


def test_operators_are_kept_by_type_or_name_with_casts_between() -> None:
    nodes = [conv("x", "a", "w1"), helper.make_node("Relu", ["a"], ["b"], name="r"), conv("b", "y", "w2")]
    model = graph(nodes, {"w1": weight(), "w2": weight()})
    half, record = convert_fp16(model, keep_ops=("Relu",))
    assert record.kept == {"r": "as asked"}
    assert operators(half) == ["Cast", "Conv", "Cast", "Relu", "Cast", "Conv", "Cast"]
    by_name, record = convert_fp16(model, keep_ops=("a",))
    assert record.kept == {"a": "as asked", "r": 'computed in one kernel with "a", which stays FP32'}
    assert operators(by_name)[:3] == ["Conv", "Relu", "Cast"]
    assert close(model, half)
    assert close(model, by_name)


def test_a_constant_shared_by_half_and_float_nodes_exists_in_both_types() -> None:
    nodes = [conv("x", "a", "w"), conv("a", "b", "w"), helper.make_node("Add", ["a", "b"], ["y"], name="y")]
    model = graph(nodes, {"w": weight()})
    half, record = convert_fp16(model, keep_ops=("b",))
    assert {tensor.data_type for tensor in half.graph.initializer} == {TensorProto.FLOAT, TensorProto.FLOAT16}
    assert list(record.kept) == ["b"]
    assert close(model, half)


def spec_cases() -> dict[str, ModelProto]:
    resize = helper.make_node("Resize", ["x", "", "scales"], ["y"], name="y", mode="nearest")
    upsample = helper.make_node("Upsample", ["x", "scales"], ["y"], name="y", mode="nearest")
    to_int = helper.make_node("Cast", ["x"], ["i"], name="i", to=TensorProto.INT32)
    to_float = helper.make_node("Cast", ["i"], ["y"], name="y", to=TensorProto.FLOAT)
    filled = helper.make_node(
        "ConstantOfShape", ["s"], ["f"], name="f", value=helper.make_tensor("v", 1, [1], [2.0])
    )
    shape = helper.make_node("Shape", ["x"], ["s"], name="s")
    add = helper.make_node("Add", ["x", "f"], ["y"], name="y")
    clip = helper.make_node("Clip", ["x", "low", "high"], ["y"], name="y")
    old_clip = helper.make_node("Clip", ["x"], ["y"], name="y", min=0.0, max=3e38)
    pad = helper.make_node("Pad", ["x", "pads", "value"], ["y"], name="y")
    scales = {"scales": np.float32([1, 1, 2, 2])}
    hard = helper.make_node("HardSwish", ["x"], ["y"], name="y")
    return {
        "resize": graph([resize], scales),
        "upsample": graph([upsample], scales, opset=9, ir_version=4),
        "cast": graph([to_int, to_float], {}),
        "constant of shape": graph([shape, filled, add], {}),
        "clip": graph([clip], {"low": np.float32(0), "high": np.float32(3e38)}, opset=13),
        "old clip": graph([old_clip], {}, opset=9),
        "pad": graph([pad], {"pads": np.int64([0, 0, 1, 1, 0, 0, 1, 1]), "value": np.float32(-np.inf)}),
        "hard swish": graph([hard], {}),
    }


@pytest.mark.parametrize("name", list(spec_cases()))
def test_what_the_specification_wants_in_float_stays_float(name: str) -> None:
    model = spec_cases()[name]
    half, _ = convert_fp16(model)
    onnx.checker.check_model(half, full_check=True)
    x = images(2, (3, 8, 8))
    (a,), (b,) = evaluator(model)(x), evaluator(half)(x)
    assert np.allclose(a, b, atol=1e-2, rtol=1e-2)


def test_control_flow_stays_float_and_reads_float() -> None:
    then = helper.make_graph(
        [helper.make_node("Add", ["a", "one"], ["t"])],
        "then",
        [],
        [helper.make_tensor_value_info("t", 1, ["N", 3, 8, 8])],
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["a"], ["e"])],
        "else",
        [],
        [helper.make_tensor_value_info("e", 1, ["N", 3, 8, 8])],
    )
    nodes = [
        conv("x", "a", "w"),
        helper.make_node("If", ["yes"], ["b"], name="if", then_branch=then, else_branch=other),
        helper.make_node("Mul", ["b", "one"], ["y"], name="y"),
    ]
    model = graph(nodes, {"w": weight(), "yes": np.bool_(True), "one": np.float32(1)})
    half, record = convert_fp16(model)
    assert record.kept == {"if": "control flow"}
    assert close(model, half)


@given(random_graphs(), st.sets(st.sampled_from(["Conv", "Relu", "Add", "Mul", "BatchNormalization"])))
@settings(max_examples=30, deadline=None)
def test_any_mix_of_half_and_float_nodes_computes_the_same(model: ModelProto, keep: set[str]) -> None:
    half, record = convert_fp16(model, keep_ops=keep)
    assert [value.name for value in half.graph.output] == [value.name for value in model.graph.output]
    assert record.casts == operators(half).count("Cast")
    assert close(model, half, shape=(4, 6, 6))


def quantized_conv(scale: float, value: np.ndarray) -> ModelProto:
    """x -> Q/DQ -> Conv with int8 weights of ``scale`` per channel -> Relu -> y."""
    channels = value.shape[0]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="dq"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wf"], name="w_dq", axis=0),
        conv("d", "c", "wf"),
        helper.make_node("Relu", ["c"], ["y"], name="relu"),
    ]
    weights: Weights = {
        "s": np.float32(0.02),
        "z": np.int8(0),
        "w": value,
        "ws": np.full(channels, scale, np.float32),
        "wz": np.zeros(channels, np.int8),
    }
    return graph(nodes, weights)


def test_a_quantized_graph_keeps_its_integers_and_raises_its_opset() -> None:
    value = RNG.integers(-127, 128, (3, 3, 3, 3)).astype(np.int8)
    model = quantized_conv(0.01, value)
    half, record = convert_fp16(model)
    assert not record.kept
    assert half.opset_import[0].version >= 19
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in half.graph.initializer}
    assert any(np.array_equal(value, tensor) for tensor in stored.values() if tensor.dtype == np.int8)
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype(np.int8), np.dtype(np.float16)}
    x = images(2, (3, 8, 8))
    expected, found = evaluator(model, integers=False)(x)[0], evaluator(half, integers=False)(x)[0]
    assert found.dtype == np.float32
    # Inputs on the edge of two integers may round to the other one: one step of 0.02 in some of 27 products.
    assert np.abs(found - expected).max() <= 0.02 * 0.01 * 127 * 2 + 0.01 * np.abs(expected).max()


def made_conv(model: ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == "Conv")


def test_scales_that_fp16_cannot_hold_stay_float32() -> None:
    """Below 6e-5 FP16 has few digits left: the integers would mean other numbers."""
    model = quantized_conv(1.03e-7, RNG.integers(-127, 128, (3, 3, 3, 3)).astype(np.int8))
    half, record = convert_fp16(model)
    assert record.kept["c"] == "integers that it reads have a float32 scale"
    assert set(record.kept) == {"w_dq", "c", "relu"}
    made = {name: node for node in half.graph.node for name in node.output}
    scales = {made[name].input[1] for name in made_conv(half).input[:2]}
    types = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    assert {types[name] for name in scales} == {TensorProto.FLOAT}
    assert "too small for FP16" in record.kept["w_dq"]
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in half.graph.initializer}
    assert np.array_equal(stored["ws"], np.full(3, 1.03e-7, np.float32))


def test_no_cast_parts_an_integer_convolution_from_its_shortcut_activation_and_rounding() -> None:
    """What a kernel computes in one piece has one type, even where only the weights' scales want FP32."""

    def pair(name: str) -> list[onnx.NodeProto]:
        scale = f"{name}s"
        return [
            helper.make_node("QuantizeLinear", [name, scale, "z"], [f"{name}q"], name=f"{name}q"),
            helper.make_node("DequantizeLinear", [f"{name}q", scale, "z"], [f"{name}d"], name=f"{name}d"),
        ]

    nodes = [
        *pair("x"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wf"], name="w_dq", axis=0),
        conv("xd", "c", "wf"),
        helper.make_node("Add", ["c", "xd"], ["sum"], name="add"),
        helper.make_node("Relu", ["sum"], ["r"], name="relu"),
        *pair("r"),
        conv("rd", "free", "w2"),
        helper.make_node("Add", ["free", "rd"], ["y"], name="free_add"),
    ]
    weights: Weights = {
        "xs": np.float32(0.02),
        "rs": np.float32(0.03),
        "z": np.int8(0),
        "w": RNG.integers(-127, 128, (3, 3, 3, 3)).astype(np.int8),
        "ws": np.full(3, 1.03e-7, np.float32),
        "wz": np.zeros(3, np.int8),
        "w2": weight(),
    }
    half, record = convert_fp16(graph(nodes, weights))
    assert set(record.kept) == {"w_dq", "c", "add", "relu", "rq"}
    made = {name: node for node in half.graph.node for name in node.output}
    quantizer = next(node for node in half.graph.node if node.name == "rq")
    chain = [quantizer]
    while chain[-1].op_type != "DequantizeLinear":
        chain.append(made[chain[-1].input[0]])
    assert [node.op_type for node in chain] == ["QuantizeLinear", "Relu", "Add", "Conv", "DequantizeLinear"]


def test_what_stays_float32_reads_its_integers_directly() -> None:
    """A cast between DequantizeLinear and a convolution would keep the convolution from running on integers."""
    value = RNG.integers(-127, 128, (3, 3, 3, 3)).astype(np.int8)
    model = quantized_conv(0.01, value)
    half, record = convert_fp16(model, peaks={"c": 1e6})
    assert set(record.kept) == {"c", "relu"}
    made = {name: node for node in half.graph.node for name in node.output}
    kept = next(node for node in half.graph.node if node.op_type == "Conv")
    assert [made[name].op_type for name in kept.input[:2]] == ["DequantizeLinear", "DequantizeLinear"]
    x = images(2, (3, 8, 8))
    expected, found = evaluator(model, integers=False)(x)[0], evaluator(half, integers=False)(x)[0]
    assert np.abs(found - expected).max() <= 0.02 * 0.01 * 127 * 2 + 0.01 * np.abs(expected).max()
