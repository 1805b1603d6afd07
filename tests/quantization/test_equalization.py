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
from deploycnn.quantization.bias_absorption import absorb_high_biases
from deploycnn.quantization.calibration import calibrate, choose_ranges, values_of
from deploycnn.quantization.channels import channel_groups
from deploycnn.quantization.equalization import channel_peaks, equalize, rescale
from deploycnn.quantization.insertion import build
from deploycnn.quantization.judge import decibels
from deploycnn.quantization.placement import place
from deploycnn.quantization.preparation import prepare
from tests.graph.nets import graph, operators
from tests.quantization.small_graphs import Builder, images, random_graph

KINDS = ["Relu", "relu6", "silu", "gate", "none"]


def stressed(model: ModelProto, seed: int, *, through_gates: bool = False) -> ModelProto:
    """The same function with channels of very different size."""
    rng = np.random.default_rng(seed)
    changed = ModelProto.FromString(model.SerializeToString())
    groups = channel_groups(model, through_gates=through_gates)
    rescale(changed, [(group, np.exp(rng.uniform(-2.8, 2.8, group.channels))) for group in groups])
    return infer_shapes(changed)


def assert_same(first: ModelProto, second: ModelProto, inputs: np.ndarray) -> None:
    (expected,), (found,) = evaluator(first)(inputs), evaluator(second)(inputs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


def sqnr(reference: ModelProto, model: ModelProto, target: str) -> float:
    pack = packs.get(target)
    plan = place(model, pack)
    seen = calibrate(model, [images(64)], values=values_of(plan), histograms=False)
    quantized = build(model, plan, choose_ranges(plan, seen))
    test = images(64, seed=2)
    (expected,), (found,) = evaluator(reference)(test), evaluator(quantized, integers=False)(test)
    return decibels(float(np.square(expected).sum()), float(np.square(expected - found).sum()))


@given(st.integers(0, 2**16), st.lists(st.sampled_from(KINDS), min_size=1, max_size=3), st.booleans())
@settings(max_examples=25, deadline=None)
def test_rescaling_changes_no_function(seed: int, kinds: list[str], through_gates: bool) -> None:
    model = random_graph(seed, kinds)
    assert channel_groups(model, through_gates=through_gates)
    assert_same(model, stressed(model, seed, through_gates=through_gates), images(8))


@given(st.integers(0, 2**16), st.lists(st.sampled_from(KINDS), min_size=1, max_size=3), st.booleans())
@settings(max_examples=25, deadline=None)
def test_equalization_changes_no_function(seed: int, kinds: list[str], through_gates: bool) -> None:
    model = stressed(random_graph(seed, kinds), seed)
    before = model.SerializeToString()
    assert_same(model, equalize(model, [images(32)], through_gates=through_gates), images(32))
    assert model.SerializeToString() == before


@pytest.mark.parametrize("kind", ["Relu", "relu6", "none"])
@pytest.mark.parametrize("target", ["onnxruntime-cpu", "tensorrt"])
def test_equalization_undoes_any_rescaling(kind: str, target: str) -> None:
    model = random_graph(3, [kind, kind])
    stress = stressed(model, 4)
    plain, harmed = sqnr(model, model, target), sqnr(model, stress, target)
    repaired = sqnr(model, equalize(stress, [images(64)]), target)
    assert harmed < plain - 6
    assert repaired > plain - 3
    # Canonical: it does not matter what was done before.
    assert repaired == pytest.approx(sqnr(model, equalize(model, [images(64)]), target), abs=2.0)


def test_relu6_is_a_clip_again_after_equalization() -> None:
    model = random_graph(5, ["relu6", "relu6"])
    stress = stressed(model, 6)
    assert {"Relu", "Min"} <= {node.op_type for node in stress.graph.node}
    found = [node.op_type for node in equalize(stress, [images(32)]).graph.node]
    assert found.count("Clip") == sum(node.op_type == "Clip" for node in model.graph.node)
    assert not {"Relu", "Min"} & set(found)


def test_channels_that_a_depthwise_layer_reads_get_one_peak() -> None:
    builder = Builder(0)
    builder.conv(6)
    read = builder.activation("Relu")
    builder.conv(6, 3, depthwise=True)
    model = stressed(builder.finish(), 1)
    equal = equalize(model, [images(64)])
    before, after = (channel_peaks(graph, [read], [images(64)])[read] for graph in (model, equal))
    assert before.max() > 5 * before.min()
    np.testing.assert_allclose(after, after.mean(), rtol=1e-5)


def test_scales_are_the_square_root_of_peak_over_strength() -> None:
    builder = Builder(2)
    builder.conv(6)
    read = builder.activation("Relu")
    builder.conv(4)
    model = builder.finish()
    first, second = (
        numpy_helper.to_array(tensor).astype(np.float64)
        for tensor in model.graph.initializer
        if len(tensor.dims) == 4
    )
    (hidden,) = evaluator(infer_shapes(exposing_relu(model, read)))(images(64))[-1:]
    peak = hidden.max(axis=(0, 2, 3)).astype(np.float64)
    matrix = second[:, :, 0, 0]
    sizes = np.sqrt(((matrix * peak) ** 2).sum(axis=1))
    strength = np.sqrt(((matrix / sizes[:, None]) ** 2).sum(axis=0))
    wanted = np.sqrt(peak / strength)
    wanted /= np.exp(np.log(wanted).mean())
    equal = [
        numpy_helper.to_array(t) for t in equalize(model, [images(64)]).graph.initializer if len(t.dims) == 4
    ]
    np.testing.assert_allclose(equal[0], first / wanted[:, None, None, None], rtol=1e-4)
    # The second layer's rows are equalized too, each by one number.
    ratios = (equal[1] / second / wanted[None, :, None, None]).reshape(4, 6)
    np.testing.assert_allclose(ratios, np.repeat(ratios[:, :1], 6, axis=1), rtol=1e-4)


def exposing_relu(model: ModelProto, value: str) -> ModelProto:
    exposed = ModelProto.FromString(model.SerializeToString())
    exposed.graph.output.append(helper.make_tensor_value_info(value, 1, None))
    return exposed


def test_what_reads_a_sigmoid_or_leaves_the_graph_is_held() -> None:
    builder = Builder(0)
    builder.conv(6)
    builder.activation("silu")
    builder.conv(6)
    model = builder.finish()
    # The last convolution feeds the classifier; the first feeds SiLU.
    (group,) = channel_groups(model)
    assert [node.name for node in group.makers] == ["Conv_3"]
    assert {node.op_type for node in group.readers} == {"Gemm"}
    through = channel_groups(model, through_gates=True)
    assert len(through) == 2
    assert [node.op_type for node in through[0].gates] == ["Sigmoid"]


def test_shared_weights_are_held() -> None:
    builder = Builder(0)
    builder.conv(3)
    builder.activation("Relu")
    builder.conv(3)
    builder.activation("Relu")
    builder.conv(4)
    model = builder.finish()
    assert len(channel_groups(model)) == 3
    first, second = [node for node in model.graph.node if node.op_type == "Conv"][:2]
    second.input[1] = first.input[1]
    assert all(first.name not in [n.name for n in group.makers] for group in channel_groups(model))


def test_padded_channels_are_held() -> None:
    """The option-A shortcut of CIFAR ResNets makes channels that no layer could scale."""
    builder = Builder(0)
    builder.conv(4)
    builder.node("Pad", builder.value, "pads")
    builder.channels = 8
    builder.conv(5)
    model = builder.finish()
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 2, 0, 0, 0, 2, 0, 0]), "pads"))
    model = infer_shapes(model)
    assert [[n.name for n in group.makers] for group in channel_groups(model)] == [["Conv_2"]]


def test_a_graph_with_nothing_to_equalize_is_refused() -> None:
    builder = Builder(0)
    builder.conv(4)
    builder.node("Softmax", builder.value, axis=1)
    with pytest.raises(PassRequirementError, match="no layer's output channels can be rescaled"):
        equalize(builder.finish(), [images(2)])
    with pytest.raises(PassRequirementError, match="no calibration images"):
        equalize(random_graph(0, ["Relu"]), [])


def high_biases(pad: bool = False) -> ModelProto:
    builder = Builder(0)
    builder.conv(6)
    builder.activation("Relu")
    builder.conv(4, 3 if pad else 1)
    model = builder.finish()
    bias = next(t for t in model.graph.initializer if list(t.dims) == [6])
    raised = numpy_helper.to_array(bias) + np.array([40, 0, 40, 0, 0, 0], np.float32)
    bias.CopyFrom(numpy_helper.from_array(raised, bias.name))
    return model


def test_absorbed_biases_change_no_function_and_shrink_the_range() -> None:
    model = high_biases()
    absorbed = absorb_high_biases(model, [images(64)])
    assert_same(model, absorbed, images(64))
    relu = next(node.output[0] for node in model.graph.node if node.op_type == "Relu")
    before, after = (channel_peaks(graph, [relu], [images(64)])[relu] for graph in (model, absorbed))
    assert before[0] > 40 > 20 > after[0]
    np.testing.assert_allclose(after[1:2], before[1:2])


@pytest.mark.parametrize(("target", "gain_db"), [("onnxruntime-cpu", 0.5), ("tensorrt", 10)])
def test_absorbed_biases_leave_less_noise(target: str, gain_db: float) -> None:
    """Two channels near 40 set the range that four others of about 1 share.

    On the CPU most noise is of the output, which is rounded too and has the same range as before.
    """
    model = high_biases()
    before, after = sqnr(model, model, target), sqnr(model, absorb_high_biases(model, [images(64)]), target)
    assert after > before + gain_db


def test_padding_readers_absorb_nothing() -> None:
    with pytest.raises(PassRequirementError, match="bias absorption"):
        absorb_high_biases(high_biases(pad=True), [images(4)])


@pytest.mark.parametrize("gate", ["Sigmoid", "HardSigmoid"])
def test_gates_are_seen_through_what_the_cpu_rules_make_of_them(gate: str) -> None:
    """Repeated over the map (Tile), and HardSigmoid as a clip."""
    layer = helper.make_node
    nodes = [
        layer("Conv", ["x", "w0", "b0"], ["c"], "first", kernel_shape=[1, 1]),
        layer("Relu", ["c"], ["r"], "relu"),
        layer("GlobalAveragePool", ["r"], ["p"], "pool"),
        layer("Conv", ["p", "w1", "b1"], ["s"], "squeeze", kernel_shape=[1, 1]),
        layer(gate, ["s"], ["g"], "gate"),
        layer("Mul", ["r", "g"], ["m"], "scale"),
        layer("Conv", ["m", "w2"], ["y"], "last", kernel_shape=[1, 1]),
    ]
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in (
            ("w0", (8, 3, 1, 1)),
            ("b0", 8),
            ("w1", (8, 8, 1, 1)),
            ("b1", 8),
            ("w2", (4, 8, 1, 1)),
        )
    }
    pack = packs.get("onnxruntime-cpu")
    model = prepare(graph(nodes, weights, shape=("N", 3, 16, 16)), pack)
    assert "Tile" in operators(model)
    assert ("Clip" in operators(model)) == (gate == "HardSigmoid")
    (group,) = channel_groups(model)
    assert {node.name for node in group.makers} == {"first"}
    assert {node.name for node in group.readers} == {"squeeze", "last"}
    batch = rng.standard_normal((4, 3, 16, 16)).astype(np.float32)
    assert_same(model, stressed(model, 1), batch)
    assert_same(model, equalize(stressed(model, 1), [batch]), batch)
