"""Exact Q/DQ positions, rule by rule, on small graphs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, helper

from deploycnn.errors import RecipeError
from deploycnn.quantization import packs
from deploycnn.quantization.isa import Isa
from deploycnn.quantization.placement import place
from deploycnn.quantization.preparation import prepare
from deploycnn.quantization.types import NumberFormat, Plan
from tests.graph.nets import Weights, graph

CPU = packs.get("onnxruntime-cpu")
OPENVINO = packs.get("openvino")
TENSORRT = packs.get("tensorrt")
RNG = np.random.default_rng(2)


def normal(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) * 0.3).astype(np.float32)


def node(op: str, inputs: str, output: str, **attributes: object) -> NodeProto:
    """A node named as its output; inputs are separated by spaces."""
    return helper.make_node(
        op, inputs.split(), output.split(), name=output.split(maxsplit=1)[0], **attributes
    )


def conv(
    source: str, output: str, weights: Weights, shape: tuple[int, ...], **attributes: object
) -> NodeProto:
    weights[f"{output}.w"] = normal(*shape)
    kernel = shape[-1]
    return node("Conv", f"{source} {output}.w", output, pads=[kernel // 2] * 4, **attributes)


def model(nodes: list[NodeProto], weights: Weights, **options: object) -> ModelProto:
    return prepare(graph(nodes, weights, **options))  # type: ignore[arg-type]


def positions(plan: Plan) -> dict[str, list[str] | None]:
    """Value -> who reads it rounded (``None``: everybody)."""
    return {item.value: None if item.readers is None else sorted(item.readers) for item in plan.activations}


def residual(*, downsample: bool = False) -> ModelProto:
    weights: Weights = {}
    nodes = [
        conv("x", "stem", weights, (16, 3, 3, 3)),
        node("Relu", "stem", "r"),
        conv("r", "a", weights, (16, 16, 3, 3)),
        node("Relu", "a", "ar"),
        conv("ar", "b", weights, (16, 16, 3, 3)),
        *([conv("r", "down", weights, (16, 16, 1, 1))] if downsample else []),
        node("Add", "down b" if downsample else "b r", "sum"),
        node("Relu", "sum", "y1"),
        conv("y1", "y", weights, (16, 16, 1, 1)),
    ]
    return model(nodes, weights)


def test_cpu_rounds_what_every_kernel_takes_and_gives() -> None:
    plan = place(residual(), CPU)
    assert positions(plan) == dict.fromkeys(["x", "r", "ar", "b", "y1", "y"])
    assert plan.quantized_nodes == ("stem", "r", "a", "ar", "b", "sum", "y1", "y")
    assert [(item.initializer, item.axis) for item in plan.weights][:2] == [("stem.w", 0), ("a.w", 0)]
    assert plan.integer_bias
    assert not any(item.tied for item in plan.activations)


def test_tensorrt_rounds_inputs_and_the_shortcut_only() -> None:
    plan = place(residual(), TENSORRT)
    # r goes through one pair to the convolution and the addition; b is added within its convolution.
    assert positions(plan) == dict.fromkeys(["x", "r", "ar", "y1"])
    assert plan.quantized_nodes == ("stem", "a", "b", "y")
    assert not plan.integer_bias
    assert plan.activation == NumberFormat(dtype="int8", symmetric=True)


def test_tensorrt_takes_the_shorter_branch_for_the_shortcut() -> None:
    assert positions(place(residual(downsample=True), TENSORRT)) == dict.fromkeys(
        ["x", "r", "ar", "down", "y1"]
    )


def test_both_inputs_of_an_addition_where_the_pack_says_so() -> None:
    found = positions(place(residual(), replace(TENSORRT, residual="both")))
    assert found == {"x": None, "r": ["a"], "ar": None, "y1": None}


def silu() -> ModelProto:
    weights: Weights = {}
    nodes = [
        conv("x", "c", weights, (16, 3, 3, 3)),
        node("Sigmoid", "c", "s"),
        node("Mul", "c s", "m"),
        conv("m", "y", weights, (16, 16, 1, 1)),
    ]
    return model(nodes, weights)


def test_silu_per_target() -> None:
    assert positions(place(silu(), TENSORRT)) == {"x": None, "m": None}
    assert positions(place(silu(), OPENVINO)) == {"x": None, "m": None, "y": None}
    plan = place(silu(), CPU)
    assert positions(plan) == dict.fromkeys(["x", "c", "s", "m", "y"])
    assert {item.value: item.fixed for item in plan.activations}["s"] == (0.0, 1.0)


def test_hardswish_is_an_epilogue_of_openvino() -> None:
    weights: Weights = {}
    nodes = [
        conv("x", "c", weights, (16, 3, 3, 3)),
        node("HardSwish", "c", "h"),
        conv("h", "y", weights, (16, 16, 1, 1)),
    ]
    made = model(nodes, weights)
    assert positions(place(made, OPENVINO)) == {"x": None, "h": None, "y": None}
    assert positions(place(made, CPU)) == {"x": None, "c": None, "h": None, "y": None}


def squeeze() -> ModelProto:
    weights: Weights = {}
    nodes = [
        conv("x", "c", weights, (32, 3, 3, 3)),
        node("Relu", "c", "r"),
        node("GlobalAveragePool", "r", "g"),
        conv("g", "f1", weights, (16, 32, 1, 1)),
        node("Relu", "f1", "fr"),
        conv("fr", "f2", weights, (32, 16, 1, 1)),
        node("Sigmoid", "f2", "gate"),
        node("Mul", "r gate", "m"),
        conv("m", "y", weights, (16, 32, 1, 1)),
    ]
    return model(nodes, weights)


def test_gates_stay_float_for_tensorrt_and_integer_on_cpus() -> None:
    plan = place(squeeze(), TENSORRT)
    assert positions(plan) == {"x": None, "m": None}
    assert plan.kept_float == dict.fromkeys(["f1", "f2"], "part of a squeeze-and-excitation gate")
    assert positions(place(squeeze(), CPU)) == dict.fromkeys(["x", "r", "g", "fr", "f2", "gate", "m", "y"])
    assert place(squeeze(), replace(CPU, float_gates=True)).kept_float.keys() == {"f1", "f2"}


def inception() -> ModelProto:
    weights: Weights = {}
    nodes = [
        conv("x", "c", weights, (16, 3, 3, 3)),
        node("Relu", "c", "r"),
        node("MaxPool", "r", "p", kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1]),
        conv("p", "q", weights, (16, 16, 1, 1)),
        node("Relu", "q", "qr"),
        conv("r", "a", weights, (16, 16, 1, 1)),
        node("Relu", "a", "ar"),
        node("Concat", "ar qr", "j", axis=1),
        conv("j", "z", weights, (16, 32, 1, 1)),
        node("GlobalAveragePool", "z", "g"),
        node("Flatten", "g", "f"),
        node("Gemm", "f fc", "y"),
    ]
    weights["fc"] = normal(16, 20)
    return model(nodes, weights)


def test_pools_and_concatenations_on_cpus() -> None:
    plan = place(inception(), CPU)
    assert positions(plan) == dict.fromkeys(["x", "r", "p", "qr", "ar", "j", "z", "g", "f"])  # y is float
    tied = {item.value: item.tied for item in plan.activations}
    assert tied["r"] == tied["p"] is not None
    assert tied["ar"] == tied["qr"] == tied["j"] is not None
    assert tied["g"] == tied["f"] is not None
    assert tied["x"] is tied["z"] is None


def test_pools_and_concatenations_for_tensorrt() -> None:
    plan = place(inception(), TENSORRT)
    # The pool shares the pair in front of it; the mean is rounded in and out; the Concat has no Q/DQ of its own.
    assert positions(plan) == {"x": None, "r": None, "p": None, "j": None, "z": None, "f": None}
    tied = {item.value: item.tied for item in plan.activations}
    assert tied["r"] == tied["p"] is not None
    assert tied["j"] is None


def test_values_that_join_others_share_their_scale_for_tensorrt() -> None:
    weights: Weights = {}
    nodes = [
        conv("x", "c", weights, (16, 3, 3, 3)),
        node("Relu", "c", "r"),
        conv("r", "d", weights, (16, 16, 3, 3)),
        node("Relu", "d", "dr"),
        node("Concat", "r dr", "j", axis=1),
        conv("j", "y", weights, (16, 32, 1, 1)),
    ]
    plan = place(model(nodes, weights), TENSORRT)
    assert positions(plan) == {"x": None, "r": ["d"], "j": None}
    tied = {item.value: item.tied for item in plan.activations}
    assert tied["r"] == tied["j"] is not None


def test_a_relu_is_not_tied_to_what_may_be_negative() -> None:
    weights: Weights = {}
    nodes = [
        conv("x", "c", weights, (16, 3, 3, 3)),
        node("Relu", "c", "r"),
        conv("r", "n1", weights, (16, 16, 1, 1)),
        conv("r", "n2", weights, (16, 16, 1, 1)),
        node("Concat", "r n1 n2", "j", axis=1),
        conv("j", "y", weights, (16, 48, 1, 1)),
    ]
    tied = {item.value: item.tied for item in place(model(nodes, weights), CPU).activations}
    assert tied["n1"] == tied["n2"] == tied["j"] is not None
    assert tied["r"] is None  # its zero point must stay at the end, or the ReLU could not be folded


@pytest.mark.parametrize(
    ("shape", "group", "why"),
    [
        ((16, 1, 3, 3), 16, ""),
        ((16, 1, 1, 1), 16, "grouped, with a kernel under 3"),
        ((12, 1, 3, 3), 12, "grouped, with 12 output channels (no multiple of 8)"),
        ((16, 4, 3, 3), 4, ""),
    ],
)
def test_grouped_convolutions_for_tensorrt(shape: tuple[int, ...], group: int, why: str) -> None:
    weights: Weights = {}
    channels = shape[1] * group
    nodes = [
        conv("x", "c", weights, (channels, 8, 3, 3)),
        conv("c", "d", weights, shape, group=group),
        conv("d", "y", weights, (16, shape[0], 1, 1)),
    ]
    made = model(nodes, weights, shape=("N", 8, 8, 8))
    assert place(made, TENSORRT).kept_float.get("d", "") == why
    assert not place(made, CPU).kept_float


@pytest.mark.parametrize(("channels", "filters", "quantized"), [(3, 16, True), (8, 12, True), (3, 12, False)])
def test_the_first_layer_for_tensorrt(channels: int, filters: int, quantized: bool) -> None:
    weights: Weights = {}
    nodes = [conv("x", "c", weights, (filters, channels, 3, 3)), conv("c", "y", weights, (16, filters, 1, 1))]
    plan = place(model(nodes, weights, shape=("N", channels, 8, 8)), TENSORRT)
    assert ("c" not in plan.kept_float) is quantized


def test_tiny_products_stay_float_for_tensorrt() -> None:
    nodes = [node("Flatten", "x", "f"), node("Gemm", "f w", "h"), node("Gemm", "h v", "y")]
    made = model(nodes, {"w": normal(192, 16), "v": normal(16, 10)})
    plan = place(made, TENSORRT)
    assert list(plan.kept_float) == ["y"]
    assert [item.node for item in plan.weights] == ["h"]
    assert [item.axis for item in place(made, CPU).weights] == [1, 1]


def test_rtx_leaves_convolutions_float() -> None:
    plan = place(inception(), packs.get("tensorrt-rtx"))
    assert [item.node for item in plan.weights] == ["y"]
    assert "does not accelerate" in plan.kept_float["c"]


def test_single_numbers_are_exact_beside_integers_and_arrays_are_not() -> None:
    weights: Weights = {"three": np.float32(3), "each": normal(16, 1, 1)}
    nodes = [
        conv("x", "c", weights, (16, 3, 3, 3)),
        node("Add", "c three", "s"),
        conv("s", "d", weights, (16, 16, 1, 1)),
        node("Mul", "d each", "m"),
        conv("m", "y", weights, (16, 16, 1, 1)),
    ]
    made = model(nodes, weights)
    plan = place(made, CPU)
    assert "three" in positions(plan)
    assert {item.value: item.fixed for item in plan.activations}["three"] == (0.0, 3.0)
    assert "m" not in plan.quantized_nodes
    assert "each" in positions(place(made, replace(CPU, constant_operands="any")))
    assert "three" not in positions(place(made, replace(CPU, constant_operands="none")))


def test_float_readers_of_float_values_keep_them_unrounded() -> None:
    weights: Weights = {}
    nodes = [
        conv("x", "c", weights, (16, 3, 3, 3)),
        node("Tanh", "c", "t"),
        conv("t", "d", weights, (16, 16, 1, 1)),
        node("Exp", "t", "e"),
        node("Mul", "d e", "y"),
    ]
    plan = place(model(nodes, weights), CPU)
    assert positions(plan) == {"x": None, "c": None, "t": ["d"], "d": None}


def test_kept_nodes_stay_float_everywhere() -> None:
    for target in packs.PACKS:
        plan = place(residual(), packs.get(target), keep_float=("a", "sum"))
        assert plan.kept_float["a"] == "as asked" or target == "tensorrt-rtx"
        assert "a" not in {item.node for item in plan.weights}
        assert "sum" not in plan.quantized_nodes


def test_weights_only_rounds_no_activation() -> None:
    plan = place(squeeze(), packs.weights_only(CPU, "int4"))
    assert plan.activations == ()
    assert len(plan.weights) == 4
    assert plan.weights[1].number == NumberFormat(dtype="int4", symmetric=True)
    assert not plan.integer_bias


def test_first_last_and_depthwise_weights_keep_eight_bits() -> None:
    weights: Weights = {}
    nodes = [
        conv("x", "stem", weights, (16, 3, 3, 3)),
        conv("x", "side", weights, (16, 3, 3, 3)),
        node("Add", "stem side", "sum"),
        conv("sum", "wide", weights, (16, 16, 1, 1)),
        conv("wide", "depthwise", weights, (16, 1, 3, 3), group=16),
        conv("depthwise", "grouped", weights, (16, 8, 3, 3), group=2),
        node("Relu", "grouped", "r"),
        conv("r", "left", weights, (16, 16, 1, 1)),
        conv("r", "right", weights, (16, 16, 1, 1)),
        node("Concat", "left right", "y", axis=1),
    ]
    reduced = packs.get("cpu", Isa(name="x86", saturates=True))
    plan = place(model(nodes, weights), packs.four_bits(reduced))
    bits = {item.node: item.number.bits for item in plan.weights}
    assert bits == {
        "stem": 7, "side": 7, "wide": 4, "depthwise": 7, "grouped": 4, "left": 7, "right": 7,
    }  # fmt: skip


def test_number_formats_follow_the_cpu() -> None:
    vnni = packs.get("cpu", Isa(name="avx512_vnni", saturates=False))
    old = packs.get("cpu", Isa(name="x86 without VNNI", saturates=True))
    arm = packs.get("openvino", Isa(name="aarch64", saturates=False))
    assert (vnni.activation.dtype, vnni.weight.qmax) == ("uint8", 127)
    assert (old.activation.dtype, old.weight.qmax) == ("uint8", 63)
    assert (arm.activation.dtype, arm.activation.symmetric, arm.weight.qmax) == ("int8", False, 127)
    assert packs.get("tensorrt", Isa(name="x86 without VNNI", saturates=True)).weight.qmax == 127


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(RecipeError, match='no placement rules for "tensort"; did you mean "tensorrt"'):
        packs.get("tensort")


@pytest.mark.parametrize(
    ("bias", "integer"),
    [((), True), ((1,), True), ((8,), True), ((1, 8), True), ((2, 8), False), ((2, 1), False)],
)
@pytest.mark.parametrize("target", ["onnxruntime-cpu", "tensorrt"])
def test_a_gemm_that_adds_more_than_a_row_stays_float(
    bias: tuple[int, ...], integer: bool, target: str
) -> None:
    weights: Weights = {"w": normal(8, 8), "b": normal(*bias)}
    nodes = [
        conv("x", "c", weights, (8, 3, 3, 3)),
        node("GlobalAveragePool", "c", "p"),
        node("Flatten", "p", "f"),
        node("Gemm", "f w b", "y"),
    ]
    pack = replace(packs.get(target), min_product=1, float_operators={})
    plan = place(model(nodes, weights, shape=(2, 3, 8, 8)), pack)
    assert ("y" in plan.quantized_nodes) is integer
    assert (plan.kept_float.get("y") == "Gemm that adds a whole matrix") is not integer
