"""Planted faults, and files of other tools."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

import deploycnn
from deploycnn.cli import main
from deploycnn.cli.lint import command
from deploycnn.errors import ArtifactError, PassRequirementError, RecipeError
from deploycnn.graph.model import save_onnx, sort_nodes
from deploycnn.quantization import packs
from deploycnn.quantization.insertion import build, ranges_needed
from deploycnn.quantization.isa import Isa
from deploycnn.quantization.lint import lint_graph
from deploycnn.quantization.lint_rules import RULES
from deploycnn.quantization.packed import packed
from deploycnn.quantization.packs import RulePack
from deploycnn.quantization.placement import place
from deploycnn.quantization.reading import read_qdq
from deploycnn.quantization.structure import COMPUTE
from tests.graph.nets import Weights
from tests.quantization.test_insertion import padded_shortcut, quantized
from tests.quantization.test_placement import conv, inception, node, residual, silu, squeeze
from tests.quantization.test_placement import model as model_of

CPU = packs.get("onnxruntime-cpu")
TENSORRT = packs.get("tensorrt")


def rules(model: ModelProto, pack: RulePack) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for finding in lint_graph(model, pack):
        found.setdefault(finding.rule, []).append(finding.node)
    return found


@pytest.mark.parametrize("target", [name for name in packs.PACKS if name != "tensorrt-rtx"])
@pytest.mark.parametrize("make", [residual, silu, squeeze, inception, padded_shortcut])
def test_our_own_placement_is_clean(make: Callable[[], ModelProto], target: str) -> None:
    pack = packs.get(target)
    assert rules(quantized(make(), pack), pack) == {}


@pytest.mark.parametrize("target", ["cpu", "openvino"])
@pytest.mark.parametrize("make", [residual, silu, squeeze, inception, padded_shortcut])
def test_our_own_file_with_a_layer_in_float_has_a_note(make: Callable[[], ModelProto], target: str) -> None:
    pack, full = packs.get(target), make()
    for layer in full.graph.node:
        if layer.op_type in COMPUTE:
            model = quantized(full, pack, keep_float=(layer.name,))
            assert rules(model, pack) == {"QDQ102": [layer.name]}


def test_a_float_layer_that_onnxruntime_makes_integers_of_is_found() -> None:
    full = residual()
    layer = [node.name for node in full.graph.node if node.op_type == "Conv"][1]
    model = quantized(full, replace(CPU, guards_float=False), keep_float=(layer,))
    assert rules(model, CPU) == {"QDQ102": [layer], "QDQ113": [layer]}
    assert rules(model, packs.get("openvino")) == {"QDQ102": [layer]}


def test_padding_on_integers_is_read_as_padding_of_real_numbers() -> None:
    model, between = (
        quantized(padded_shortcut(), replace(CPU, on_integers=kinds))
        for kinds in (CPU.on_integers, frozenset())
    )
    found, expected = read_qdq(model), read_qdq(between)
    assert sorted(node.op_type for node in found.model.graph.node) == sorted(
        node.op_type for node in expected.model.graph.node
    )
    assert len(found.activations) == len(expected.activations)
    one = np.asarray(1, dtype=np.uint8)
    model.graph.initializer.append(numpy_helper.from_array(one, "one"))
    next(node for node in model.graph.node if node.op_type == "Pad").input[2] = "one"
    assert len(read_qdq(model).activations) < len(expected.activations)


def joined_with_its_layer() -> ModelProto:
    """A ReLU's result beside what a convolution makes of it, as in DenseNets without activations behind."""
    weights: Weights = {}
    nodes = [
        conv("x", "stem", weights, (8, 3, 3, 3)),
        node("Relu", "stem", "r"),
        conv("r", "c", weights, (4, 8, 1, 1)),
        node("Concat", "r c", "joined", axis=1),
        conv("joined", "y", weights, (4, 12, 1, 1)),
    ]
    return model_of(nodes, weights)


def two_activations() -> ModelProto:
    """HardSwish of a ReLU: a convolution with the former alone would be one kernel in OpenVINO."""
    weights: Weights = {}
    nodes = [
        conv("x", "stem", weights, (8, 3, 3, 3)),
        node("Relu", "stem", "r"),
        node("HardSwish", "r", "h"),
        conv("h", "y", weights, (4, 8, 1, 1)),
    ]
    return model_of(nodes, weights)


@pytest.mark.parametrize("target", ["cpu", "onnxruntime-cpu", "openvino"])
@pytest.mark.parametrize("make", [joined_with_its_layer, two_activations])
def test_a_relu_that_became_a_range_is_seen(make: Callable[[], ModelProto], target: str) -> None:
    pack = packs.get(target)
    plan = place(full := make(), pack)
    ranges = {name: (0.0 if name == "r" else -1.5, 2.0 + k) for k, name in enumerate(ranges_needed(plan))}
    model = build(full, plan, ranges)
    assert rules(model, pack) == {}
    if make is joined_with_its_layer:
        assert "Relu" not in [held.op_type for held in model.graph.node]


def test_concats_of_clipped_values_still_want_one_scale() -> None:
    weights: Weights = {}
    nodes = [
        *(
            part
            for name in "ab"
            for part in (conv("x", name, weights, (8, 3, 3, 3)), node("Relu", name, f"{name}r"))
        ),
        node("Concat", "ar br", "joined", axis=1),
        conv("joined", "y", weights, (4, 16, 1, 1)),
    ]
    full = model_of(nodes, weights)
    for pack, expected in ((CPU, {}), (replace(CPU, tie_concat=False), {"QDQ108": ["joined", "joined"]})):
        plan = place(full, pack)
        ranges = {name: (-1.5, 2.0 + k) for k, name in enumerate(ranges_needed(plan))}
        assert rules(build(full, plan, ranges), CPU) == expected


def cast_between(model: ModelProto, value: str, reader: str) -> None:
    """Let one reader see a value through FP16, as where parts of a graph stay FP32."""
    model.graph.node.extend(
        [
            helper.make_node(
                "Cast", [value], [f"{value}_half"], name=f"{value}_to_half", to=TensorProto.FLOAT16
            ),
            helper.make_node(
                "Cast", [f"{value}_half"], [f"{value}_full"], name=f"{value}_to_full", to=TensorProto.FLOAT
            ),
        ]
    )
    node = named(model, reader)
    node.input[list(node.input).index(value)] = f"{value}_full"
    sort_nodes(model)


def test_casts_between_float_types_round_nothing_and_move_no_rounding() -> None:
    good, faulty = quantized(residual(), TENSORRT), quantized(residual(), TENSORRT)
    round_edge(faulty, "b", "sum", like="r")
    for model, expected in ((good, {}), (faulty, {"QDQ107": ["sum"]})):
        assert rules(model, TENSORRT) == expected
        for value in list(named(model, "sum").input):
            cast_between(model, value, "sum")
        assert rules(model, TENSORRT) == expected


def test_a_cast_that_hides_integers_from_a_layer_is_found() -> None:
    model = quantized(residual(), TENSORRT)
    layer = next(node for node in model.graph.node if node.op_type == "Conv")
    cast_between(model, layer.input[0], layer.name)
    assert "QDQ101" in rules(model, TENSORRT)


def named(model: ModelProto, name: str) -> NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def change(model: ModelProto, name: str, to: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(to(numpy_helper.to_array(tensor)), name))


def bypass(model: ModelProto, value: str, reader: str) -> None:
    """Let one reader of a rounded value read it in float."""
    node = named(model, reader)
    for position, name in enumerate(node.input):
        if name == f"{value}_DequantizeLinear_Output":
            node.input[position] = value


def round_edge(model: ModelProto, value: str, reader: str, like: str) -> None:
    """Put a Q/DQ pair of its own, with the numbers of another, in front of one reader."""
    numbers = list(named(model, f"{like}_QuantizeLinear").input[1:])
    model.graph.node.extend(
        [
            helper.make_node("QuantizeLinear", [value, *numbers], [f"{value}_q"], name=f"{value}_extra_q"),
            helper.make_node(
                "DequantizeLinear", [f"{value}_q", *numbers], [f"{value}_dq"], name=f"{value}_extra"
            ),
        ]
    )
    node = named(model, reader)
    for position, name in enumerate(node.input):
        if name in {value, f"{value}_DequantizeLinear_Output"}:
            node.input[position] = f"{value}_dq"
    sort_nodes(model)


def test_openvino_takes_int8_where_it_has_no_zero_point() -> None:
    pack = packs.get("openvino")
    assert rules(quantized(residual(), pack, (-2.0, 2.0)), pack) == {}
    made = quantized(residual(), pack, (-2.0, 2.0))
    change(made, "x_zero_point", lambda array: array + array.dtype.type(3))
    assert rules(made, pack) == {"QDQ002": ["x_DequantizeLinear"]}
    symmetric = quantized(residual(), TENSORRT)
    change(symmetric, "x_zero_point", lambda array: array + array.dtype.type(3))
    assert rules(symmetric, TENSORRT) == {"QDQ003": ["x_DequantizeLinear"]}


def test_planted_faults_in_numbers() -> None:
    made = quantized(residual(), CPU)
    change(made, "a.w_zero_point", lambda array: array + 1)
    change(made, "b.w_scale", lambda array: array * np.float32(0))
    assert rules(made, CPU) == {"QDQ005": ["a"], "QDQ008": ["b.w_DequantizeLinear"]}
    symmetric = replace(CPU, activation=TENSORRT.activation)
    assert set(rules(quantized(residual(), symmetric), CPU)) == {"QDQ002", "QDQ105"}
    assert rules(quantized(residual(), replace(CPU, per_channel=False)), CPU) == {
        "QDQ006": ["stem", "a", "b", "y"]
    }
    saturating = packs.get("cpu", Isa(name="x86 without VNNI", saturates=True))
    assert rules(quantized(residual(), CPU), saturating) == {"QDQ007": ["stem", "a", "b", "y"]}
    assert rules(quantized(residual(), saturating), saturating) == {}


def test_a_missing_pair_behind_a_layer() -> None:
    made = quantized(residual(), CPU)
    bypass(made, "r", "sum")
    assert rules(made, CPU) == {"QDQ104": ["stem"]}


def test_a_half_quantized_layer() -> None:
    made = quantized(residual(), TENSORRT)
    bypass(made, "ar", "b")
    assert rules(made, TENSORRT) == {"QDQ101": ["b"]}


def test_a_layer_left_in_float_is_a_note() -> None:
    made = quantized(residual(), replace(TENSORRT, min_product=1))
    bypass(made, "ar", "b")
    weight = numpy_helper.from_array(np.float32(np.ones((16, 16, 3, 3))), "b.float")
    made.graph.initializer.append(weight)
    named(made, "b").input[1] = "b.float"
    # The addition has no integer convolution left to be fused into.
    assert rules(made, TENSORRT) == {"QDQ107": ["sum"], "QDQ102": ["b"]}
    assert {item.rule: item.severity for item in lint_graph(made, TENSORRT)}["QDQ102"] == "note"


def test_the_conv_branch_of_an_addition() -> None:
    made = quantized(residual(), TENSORRT)
    round_edge(made, "b", "sum", like="r")
    assert rules(made, TENSORRT) == {"QDQ107": ["sum"]}
    made = quantized(residual(), TENSORRT)
    bypass(made, "r", "sum")
    found = rules(made, TENSORRT)
    assert found in ({"QDQ107": ["sum"]}, {})


def test_pairs_inside_activations_and_gates() -> None:
    made = quantized(silu(), TENSORRT)
    round_edge(made, "c", "m", like="m")
    assert rules(made, TENSORRT) == {"QDQ106": ["m"]}
    made = quantized(residual(), TENSORRT)
    round_edge(made, "a", "ar", like="ar")
    assert rules(made, TENSORRT) == {"QDQ105": ["ar"]}


def test_layers_that_the_target_wants_float() -> None:
    made = quantized(squeeze(), replace(TENSORRT, float_gates=False))
    found = rules(made, TENSORRT)
    assert found["QDQ103"] == ["f1", "f2"]


def test_scales_of_concatenations_and_pools() -> None:
    untied = quantized(inception(), CPU)
    for value in ("j", "p"):
        for name in (f"{value}_QuantizeLinear", f"{value}_DequantizeLinear"):
            named(untied, name).input[1] = "own"
    untied.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "own"))
    assert rules(untied, CPU) == {"QDQ108": ["j", "j"], "QDQ109": ["p"]}


def test_a_value_that_is_rounded_twice() -> None:
    made = quantized(residual(), CPU)
    round_edge(made, "r", "a", like="r")
    assert rules(made, CPU) == {"QDQ112": ["r_extra_q"]}


def test_biases_in_the_wrong_type() -> None:
    from tests.quantization.test_placement import model, node, normal

    nodes = [node("Conv", "x w b", "c"), node("Relu", "c", "y")]
    made = model(nodes, {"w": normal(16, 3, 1, 1), "b": normal(16)})
    assert rules(quantized(made, replace(CPU, integer_bias=False)), CPU) == {"QDQ009": ["c"]}
    assert rules(quantized(made, replace(TENSORRT, integer_bias=True)), TENSORRT) == {"QDQ009": ["c"]}
    wrong = quantized(made, CPU)
    change(wrong, "b_quantized_scale", lambda array: array * 2)
    assert rules(wrong, CPU) == {"QDQ010": ["c"]}
    # One scale for all biases, where the weights have one for each channel.
    single = quantized(made, CPU)
    for name in ("b_quantized_scale", "b_quantized_zero_point"):
        change(single, name, lambda array: array[:1])
    assert rules(single, CPU)["QDQ010"] == ["c"]
    change(single, "b_quantized_scale", lambda array: np.repeat(array, 5))
    with pytest.raises(PassRequirementError, match=r'node "b_.*": 5 scales for values of shape \(16,\)'):
        rules(single, CPU)


def test_weights_with_a_scale_for_each_block_are_told() -> None:
    """``block_size`` of operator set 21: no kernel of a convolution or product takes them."""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.integers(-7, 8, (64, 16)).astype(np.int8),
        "w_scale": rng.uniform(0.01, 0.1, (2, 16)).astype(np.float32),
        "scale": np.float32(0.05),
        "zero": np.uint8(128),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"], name="xq"),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"], name="xd"),
        helper.make_node("DequantizeLinear", ["w", "w_scale"], ["wd"], name="wd", axis=0, block_size=32),
        helper.make_node("MatMul", ["xd", "wd"], ["y"], name="product"),
    ]
    made = helper.make_graph(
        nodes,
        "blocks",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 16])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    found = [finding for finding in lint_graph(model, CPU) if finding.rule == "QDQ006"]
    assert [(finding.node, finding.what) for finding in found] == [
        ("product", "blocks of weights with scales of shape (2, 16)")
    ]
    reading = read_qdq(model)
    held = next(t for t in reading.model.graph.initializer if t.dims == [64, 16])
    expected = constants["w"] * np.repeat(constants["w_scale"], 32, axis=0)
    np.testing.assert_allclose(numpy_helper.to_array(held), expected, rtol=1e-6)


def test_weights_only_is_a_note() -> None:
    assert set(rules(packed(quantized(residual(), packs.weights_only(CPU))), CPU)) == {"QDQ011"}


def test_how_weights_are_stored_is_told() -> None:
    plain = quantized(residual(), packs.weights_only(CPU))
    assert set(rules(plain, CPU)) == {"QDQ011", "QDQ015"}
    four = quantized(residual(), packs.four_bits(CPU))
    direct = rules(four, CPU)
    assert set(direct) == {"QDQ013"}
    assert set(rules(packed(four), CPU)) == set()
    assert set(rules(packed(four), packs.get("openvino"))) == set()
    assert "QDQ014" in set(rules(packed(four), packs.get("tensorrt")))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """onnxruntime's quantizer at its defaults, and its operator format."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = 1

        def get_next(self) -> dict[str, np.ndarray] | None:
            self.left -= 1
            image = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
            return {"x": image} if self.left >= 0 else None

    folder = tmp_path_factory.mktemp("theirs")
    save_onnx(residual(), folder / "float.onnx")
    quantize_static(folder / "float.onnx", folder / "qdq.onnx", Reader())
    quantize_static(folder / "float.onnx", folder / "qop.onnx", Reader(), quant_format=QuantFormat.QOperator)
    return folder / "qdq.onnx", folder / "qop.onnx"


def test_files_of_onnxruntimes_quantizer(theirs: tuple[Path, Path]) -> None:
    report = deploycnn.lint(theirs[0], "onnxruntime-cpu", isa=Isa(name="avx512_vnni", saturates=False))
    assert {finding.rule for finding in report.findings} == {"QDQ002", "QDQ006"}
    assert not report.clean
    symmetric = deploycnn.lint(theirs[0], "tensorrt")
    assert {"QDQ003", "QDQ107"} <= {finding.rule for finding in symmetric.findings}
    assert {finding.rule for finding in deploycnn.lint(theirs[1], "openvino").findings} == {"QDQ001"}


def test_what_cannot_be_checked_is_refused(tmp_path: Path, theirs: tuple[Path, Path]) -> None:
    save_onnx(residual(), tmp_path / "float.onnx")
    with pytest.raises(PassRequirementError, match="not quantized, so there is nothing to lint"):
        deploycnn.lint(tmp_path / "float.onnx")
    with pytest.raises(ArtifactError, match="no such file"):
        deploycnn.lint(tmp_path / "none.onnx")
    with pytest.raises(ArtifactError, match="cannot be read.*give an .onnx file"):
        deploycnn.lint(tmp_path)
    for name in ("report.json", "notes.txt"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ArtifactError, match=f"{name}: not an ONNX model"):
            deploycnn.lint(tmp_path / name)
    with pytest.raises(RecipeError, match='unknown lint rule "QDQ06"'):
        deploycnn.lint(theirs[0], ignore=["QDQ06"])
    assert main(["lint", str(tmp_path / "float.onnx")]) == 2


def test_the_command_line(tmp_path: Path, theirs: tuple[Path, Path]) -> None:
    runner = CliRunner(env={"COLUMNS": "80"})
    result = runner.invoke(command, [str(theirs[0]), "--target", "tensorrt"])
    assert result.exit_code == 1
    assert "QDQ003 error: asymmetric activations" in result.output
    assert max(len(line) for line in result.output.splitlines()) <= 80
    ours = tmp_path / "ours.onnx"
    save_onnx(quantized(residual(), TENSORRT), ours)
    clean = runner.invoke(command, [str(ours), "--target", "tensorrt"])
    assert (clean.exit_code, "clean" in clean.output) == (0, True)
    as_json = runner.invoke(command, [str(theirs[0]), "--target", "tensorrt", "--ignore", "QDQ003", "--json"])
    assert as_json.exit_code == 1
    assert '"rule": "QDQ107"' in as_json.output
    assert "QDQ003" not in as_json.output


def test_the_rules_are_documented() -> None:
    page = Path(deploycnn.__file__).parent.parent / "docs" / "quantization.md"
    if not page.exists():
        pytest.skip("the documentation is not installed")
    text = page.read_text()
    for rule in RULES.values():
        assert f"| {rule.id} | {rule.severity} | {rule.title} |" in text


def test_the_order_of_the_nodes_does_not_matter(tmp_path: Path) -> None:
    made = quantized(residual(), TENSORRT)
    straight = deploycnn.lint(_saved(made, tmp_path), "onnxruntime-cpu")
    turned = ModelProto.FromString(made.SerializeToString())
    del turned.graph.node[:]
    turned.graph.node.extend(reversed(made.graph.node))
    assert straight.findings
    assert deploycnn.lint(_saved(turned, tmp_path), "onnxruntime-cpu") == straight


def test_local_functions_are_looked_into(tmp_path: Path) -> None:
    pair = [
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["o"]),
    ]
    function = helper.make_function(
        "own", "Pair", ["a", "s", "z"], ["o"], pair, [helper.make_opsetid("", 17)]
    )
    nodes = [
        node("Relu", "x", "r"),
        helper.make_node("Pair", ["r", "s", "z"], ["d"], "pair", domain="own"),
        node("Conv", "d w", "y"),
    ]
    made = _plain(nodes, {"w": np.ones((4, 3, 3, 3), np.float32), "s": np.float32(0.1), "z": np.uint8(0)})
    made.opset_import.append(helper.make_opsetid("own", 1))
    made.functions.append(function)
    report = deploycnn.lint(_saved(made, tmp_path), "onnxruntime-cpu")
    assert {finding.rule for finding in report.findings} == {"QDQ102", "QDQ111"}


def test_pairs_within_a_branch_are_not_passed_over(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])],
        "branch",
        [],
        [helper.make_tensor_value_info("q", TensorProto.UINT8, None)],
    )
    choice = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    made = _plain([choice], {"s": np.float32(0.1), "z": np.uint8(0), "c": np.bool_(True)})
    with pytest.raises(PassRequirementError, match="has Q/DQ inside a branch or loop"):
        deploycnn.lint(_saved(made, tmp_path))


def test_float_biases_are_no_error_where_onnxruntime_rounds_them() -> None:
    biased = model_of(
        [node("Conv", "x w b", "c"), node("Relu", "c", "y")],
        {"w": np.ones((16, 3, 1, 1), np.float32), "b": np.ones(16, np.float32)},
    )
    made = quantized(biased, replace(CPU, integer_bias=False))
    severity = {
        target: {
            finding.severity for finding in lint_graph(made, packs.get(target)) if finding.rule == "QDQ009"
        }
        for target in ("onnxruntime-cpu", "cpu", "openvino")
    }
    assert severity == {"onnxruntime-cpu": {"warning"}, "cpu": {"warning"}, "openvino": set()}


def test_a_relu_that_the_range_has_done_already_is_no_fault() -> None:
    """``QDQKeepRemovableActivations`` leaves such ones; onnxruntime removes them, and the pair in front of them."""
    made = quantized(residual(), CPU)
    pair, reader = named(made, "ar_DequantizeLinear"), named(made, "b")
    again = [
        helper.make_node("Relu", [pair.output[0]], ["kept"], "kept"),
        helper.make_node("QuantizeLinear", ["kept", *pair.input[1:]], ["kept_q"], "kept_q"),
        helper.make_node("DequantizeLinear", ["kept_q", *pair.input[1:]], ["kept_dq"], "kept_dq"),
    ]
    made.graph.node.extend(again)
    reader.input[0] = "kept_dq"
    sort_nodes(made)
    assert rules(made, CPU) == {}


def test_operators_on_integers_against_the_rules_are_not_called_float() -> None:
    """An addition between float operators, rounded on all sides: onnxruntime has a kernel for it."""
    full = model_of([node("Selu", "x", "s"), node("Add", "s x", "t"), node("Selu", "t", "y")], {})
    made = ModelProto.FromString(full.SerializeToString())
    made.graph.initializer.extend(
        [numpy_helper.from_array(np.float32(0.1), "scale"), numpy_helper.from_array(np.uint8(128), "zero")]
    )
    del made.graph.node[:]
    for name in ("x", "s", "t"):
        made.graph.node.append(helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}_q"]))
        made.graph.node.append(
            helper.make_node("DequantizeLinear", [f"{name}_q", "scale", "zero"], [f"{name}_dq"])
        )
    for operator in full.graph.node:
        read = [f"{name}_dq" if name != "x" or operator.name == "t" else name for name in operator.input]
        made.graph.node.append(helper.make_node(operator.op_type, read, list(operator.output), operator.name))
    sort_nodes(made)
    said = {finding.node: finding.what for finding in lint_graph(made, CPU) if finding.rule == "QDQ111"}
    assert "computes in float" in said["y"]
    assert "computes in float" not in said["t"]


def _plain(nodes: list[NodeProto], constants: dict[str, np.ndarray]) -> ModelProto:
    """A graph that is not checked: from images ``x`` to ``y``."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    held = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    return helper.make_model(
        helper.make_graph(nodes, "plain", ends[:1], ends[1:], held),
        opset_imports=[helper.make_opsetid("", 17)],
    )


def _saved(model: ModelProto, folder: Path) -> Path:
    save_onnx(model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize("shape", [(3,), (3, 5)], ids=["vector", "on the left"])
def test_weights_without_an_axis_of_channels_are_read(shape: tuple[int, ...], tmp_path: Path) -> None:
    order = ["d", "x"] if len(shape) == 2 else ["x", "d"]
    made = _plain(
        [
            helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], name="dq"),
            helper.make_node("MatMul", order, ["y"], name="product"),
        ],
        {"w": np.ones(shape, np.int8), "s": np.float32(0.1), "z": np.int8(0)},
    )
    report = deploycnn.lint(_saved(made, tmp_path), "onnxruntime-cpu")
    assert "QDQ006" not in {finding.rule for finding in report.findings}


def test_a_zero_point_that_is_no_number_is_a_finding(tmp_path: Path) -> None:
    made = quantized(padded_shortcut(), CPU)
    pad = next(held for held in made.graph.node if held.op_type == "Pad")
    zero = next(tensor for tensor in made.graph.initializer if tensor.name == pad.input[2])
    zero.CopyFrom(numpy_helper.from_array(np.zeros(3, np.uint8), zero.name))
    assert deploycnn.lint(_saved(made, tmp_path), "onnxruntime-cpu").findings
