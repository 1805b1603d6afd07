from __future__ import annotations

import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper

from deploycnn.graph.batchnorm import batchnorm_to_depthwise, fold_batchnorm
from deploycnn.graph.cleanup import remove_unused, simplify
from deploycnn.graph.model import infer_shapes
from deploycnn.graph.names import name_nodes
from deploycnn.graph.parity import evaluator
from tests.graph.nets import Weights, graph, images, operators

RNG = np.random.default_rng(1)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def batchnorm_weights(channels: int) -> Weights:
    return {
        "scale": RNG.uniform(0.5, 2, channels).astype(np.float32),
        "shift": normal(channels),
        "mean": normal(channels),
        "var": RNG.uniform(0.01, 3, channels).astype(np.float32),
    }


def same_outputs(before: ModelProto, after: ModelProto, *, shape: tuple[int, int, int] = (3, 8, 8)) -> bool:
    x = images(3, shape)
    pairs = zip(evaluator(before)(x), evaluator(after)(x), strict=True)
    return all(np.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


def test_constants_identities_and_dead_nodes_go_and_values_stay() -> None:
    nodes = [
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Add", ["two", "three"], ["five"]),
        helper.make_node("Identity", ["x"], ["x1"]),
        helper.make_node("Dropout", ["x1"], ["x2"]),
        helper.make_node("AveragePool", ["x2"], ["x3"], kernel_shape=[1, 1]),
        helper.make_node("Mul", ["x3", "five"], ["m"]),
        helper.make_node("Exp", ["x"], ["unused"]),
        helper.make_node("Concat", ["m"], ["c"], axis=1),
        helper.make_node("Identity", ["c"], ["y"]),
    ]
    model = graph(nodes, {"three": np.float32(3), "orphan": normal(4)})
    clean = simplify(model)
    assert operators(clean) == ["Mul"]
    assert [tensor.name for tensor in clean.graph.initializer] == ["five"]
    assert clean.graph.output[0].name == "y"
    assert same_outputs(model, clean)


def test_an_identity_between_input_and_output_survives() -> None:
    clean = simplify(graph([helper.make_node("Identity", ["x"], ["y"])], {}))
    assert operators(clean) == ["Identity"]
    onnx.checker.check_model(clean, full_check=True)


def test_one_value_under_two_output_names_survives() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Identity", ["r"], ["y"]),
        helper.make_node("Identity", ["r"], ["z"]),
    ]
    model = graph(nodes, {}, outputs=("y", "z"))
    clean = simplify(model)
    assert [value.name for value in clean.graph.output] == ["y", "z"]
    assert same_outputs(model, clean)


def test_quantized_constants_are_not_folded() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wf"]),
        helper.make_node("Mul", ["x", "wf"], ["y"]),
    ]
    clean = simplify(graph(nodes, {"w": np.int8([[[[3]]]]), "s": np.float32(0.5)}))
    assert operators(clean) == ["DequantizeLinear", "Mul"]


def test_shapes_of_static_inputs_are_folded() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Unsqueeze", ["n", "axes"], ["n1"]),
        helper.make_node("Concat", ["n1", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["y"]),
    ]
    weights: Weights = {"zero": np.int64(0), "axes": np.int64([0]), "rest": np.int64([-1])}
    model = graph(nodes, weights, shape=(3, 3, 8, 8))
    clean = simplify(model)
    assert operators(clean) == ["Reshape"]
    assert same_outputs(model, clean)


def test_spatial_means_become_global_average_pools() -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["kept"], keepdims=1),
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("ReduceMean", ["r", "axes"], ["dropped"], keepdims=0),
        helper.make_node("ReduceMean", ["x", "channel"], ["other"], keepdims=1),
    ]
    weights: Weights = {"axes": np.int64([-1, 2]), "channel": np.int64([1])}
    model = graph(nodes, weights, outputs=("kept", "dropped", "other"))
    clean = simplify(model)
    assert operators(clean) == ["GlobalAveragePool", "Relu", "GlobalAveragePool", "Flatten", "ReduceMean"]
    assert same_outputs(model, clean)


def test_captured_values_of_control_flow_are_kept() -> None:
    captured = helper.make_graph(
        [helper.make_node("Add", ["r", "one"], ["t"])],
        "then",
        [],
        [helper.make_tensor_value_info("t", 1, ["N", 3, 8, 8])],
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["r"], ["e"])],
        "else",
        [],
        [helper.make_tensor_value_info("e", 1, ["N", 3, 8, 8])],
    )
    nodes = [
        helper.make_node("Identity", ["x"], ["i"]),
        helper.make_node("Relu", ["i"], ["r0"]),
        helper.make_node("Identity", ["r0"], ["r"]),
        helper.make_node("If", ["yes"], ["y"], then_branch=captured, else_branch=other),
    ]
    model = graph(nodes, {"yes": np.bool_(True), "one": np.float32(1)})
    clean = simplify(model)
    assert operators(clean) == ["Relu", "If"]
    assert same_outputs(model, clean)


def fold_reference(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, norm: Weights, epsilon: float
) -> np.ndarray:
    """1x1 convolution and batch norm, step by step in float64."""
    y = np.einsum("nchw,mc->nmhw", x.astype(np.float64), weight[:, :, 0, 0].astype(np.float64))
    y = y + bias.astype(np.float64)[:, None, None]
    scale, shift, mean, var = (
        norm[k].astype(np.float64)[:, None, None] for k in ("scale", "shift", "mean", "var")
    )
    return scale * (y - mean) / np.sqrt(var + epsilon) + shift


def test_folding_a_batchnorm_is_exact_to_float32_rounding() -> None:
    norm, weight, bias = batchnorm_weights(6), normal(6, 3, 1, 1), normal(6)
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["y"], epsilon=1e-3),
    ]
    model = graph(nodes, {"w": weight, "b": bias, **norm})
    assert fold_batchnorm(model) == 1
    remove_unused(model)
    assert operators(model) == ["Conv"]
    x = images(2, (3, 8, 8))
    expected = fold_reference(x, weight, bias, norm, 1e-3)
    (found,) = evaluator(model)(x)
    assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max()


def test_grouped_and_transposed_convolutions_fold() -> None:
    for op_type, shape, group in (("Conv", (6, 1, 3, 3), 3), ("ConvTranspose", (3, 2, 3, 3), 3)):
        nodes = [
            helper.make_node(op_type, ["x", "c.weight"], ["c"], group=group),
            helper.make_node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["y"]),
        ]
        model = graph(nodes, {"c.weight": normal(*shape), **batchnorm_weights(6)})
        clean = simplify(model)
        assert operators(clean) == [op_type]
        assert {tensor.name for tensor in clean.graph.initializer} == {"c.weight", "c.bias"}
        assert same_outputs(model, clean)


def test_a_weight_shared_by_two_convolutions_is_not_changed_for_the_other() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["y"]),
        helper.make_node("Conv", ["x", "w"], ["z"]),
    ]
    model = graph(nodes, {"w": normal(6, 3, 1, 1), **batchnorm_weights(6)}, outputs=("y", "z"))
    clean = simplify(model)
    assert operators(clean) == ["Conv", "Conv"]
    assert same_outputs(model, clean)


def test_a_convolution_that_others_read_keeps_its_batchnorm() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["n"]),
        helper.make_node("Add", ["c", "n"], ["y"]),
    ]
    model = graph(nodes, {"w": normal(6, 3, 1, 1), **batchnorm_weights(6)})
    clean = simplify(model)
    assert operators(clean) == ["Conv", "BatchNormalization", "Add"]
    assert same_outputs(model, clean)


def test_a_lone_batchnorm_becomes_a_depthwise_convolution() -> None:
    node = helper.make_node("BatchNormalization", ["x", "scale", "shift", "mean", "var"], ["y"])
    model = graph([node], batchnorm_weights(3))
    changed = infer_shapes(model)
    name_nodes(changed)
    assert batchnorm_to_depthwise(changed) == 1
    assert operators(changed) == ["Conv"]
    assert same_outputs(model, changed)


@st.composite
def random_graphs(draw: st.DrawFn) -> ModelProto:
    """Chains with branches of the operators that clean-up rewrites, all on (N, 4, 6, 6)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    weights: Weights = {}
    nodes = []
    values = ["x"]
    for index in range(draw(st.integers(1, 7))):
        source, out = draw(st.sampled_from(values)), f"v{index}"
        kind = draw(
            st.sampled_from(["Identity", "Relu", "Conv", "BatchNormalization", "Add", "Mul", "Dropout"])
        )
        if kind == "Conv":
            weights[f"w{index}"] = rng.standard_normal((4, 4, 3, 3)).astype(np.float32) * 0.2
            nodes.append(helper.make_node("Conv", [source, f"w{index}"], [out], pads=[1, 1, 1, 1]))
        elif kind == "BatchNormalization":
            names = [f"{part}{index}" for part in ("scale", "shift", "mean", "var")]
            weights |= {name: rng.uniform(0.5, 1.5, 4).astype(np.float32) for name in names}
            nodes.append(helper.make_node(kind, [source, *names], [out]))
        elif kind == "Add":
            nodes.append(helper.make_node(kind, [source, draw(st.sampled_from(values))], [out]))
        elif kind == "Mul":
            weights[f"k{index}"] = rng.uniform(0.5, 1.5, (1, 4, 1, 1)).astype(np.float32)
            nodes.append(helper.make_node("Identity", [f"k{index}"], [f"i{index}"]))
            nodes.append(helper.make_node(kind, [source, f"i{index}"], [out]))
        else:
            nodes.append(helper.make_node(kind, [source], [out]))
        values.append(out)
    outputs = {values[-1], draw(st.sampled_from(values[1:]))}
    return graph(nodes, weights, shape=("N", 4, 6, 6), outputs=tuple(sorted(outputs)))


@given(random_graphs())
@settings(max_examples=40, deadline=None)
def test_clean_up_never_changes_what_is_computed(model: ModelProto) -> None:
    before = model.SerializeToString()
    clean = simplify(model)
    onnx.checker.check_model(clean, full_check=True)
    assert model.SerializeToString() == before
    assert [value.name for value in clean.graph.output] == [value.name for value in model.graph.output]
    assert len(clean.graph.node) <= len(model.graph.node)
    assert same_outputs(model, clean, shape=(4, 6, 6))
