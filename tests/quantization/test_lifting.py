"""Padding on integers is read as padding of real numbers, whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from deploycnn.errors import PassRequirementError
from deploycnn.graph.model import infer_shapes
from deploycnn.graph.observe import observe
from deploycnn.quantization import packs
from deploycnn.quantization.calibration import calibrate, choose_ranges, values_of
from deploycnn.quantization.insertion import build
from deploycnn.quantization.isa import Isa
from deploycnn.quantization.lifting import lift_clips, lift_pads
from deploycnn.quantization.lint import lint_graph
from deploycnn.quantization.placement import place
from deploycnn.quantization.preparation import prepare

VNNI = Isa(name="avx512_vnni", saturates=False)
AMOUNTS = np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64)


def model_of(
    nodes: Iterable[NodeProto], constants: dict[str, np.ndarray], image: list[int | str | None]
) -> ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, image)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def outputs(model: ModelProto, images: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"images": images})[0]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def padded_by_hand(
    *, filling: int | None, zero: np.ndarray | None, scale: np.ndarray, mode: str = "constant"
) -> ModelProto:
    """Q -> Pad -> DQ -> Conv."""
    numbers = ["scale"] if zero is None else ["scale", "zero"]
    constants = {"scale": scale, "amounts": AMOUNTS, "w": noise(8, 3, 3, 3)}
    constants |= {} if zero is None else {"zero": zero}
    constants |= {} if filling is None else {"filling": np.array(filling, np.uint8)}
    axis = {"axis": 1} if scale.ndim else {}
    padding = ["q", "amounts"] if filling is None else ["q", "amounts", "filling"]
    nodes = [
        helper.make_node("QuantizeLinear", ["images", *numbers], ["q"], name="round", **axis),
        helper.make_node("Pad", padding, ["p"], name="pad", mode=mode),
        helper.make_node("DequantizeLinear", ["p", *numbers], ["real"], name="unround", **axis),
        helper.make_node("Conv", ["real", "w"], ["y"], name="conv"),
    ]
    return model_of(nodes, constants, ["n", 3, 8, 8])


@pytest.mark.parametrize(
    ("model", "lifted"),
    [
        (padded_by_hand(filling=100, zero=np.uint8(100), scale=np.float32(0.05)), True),
        (padded_by_hand(filling=None, zero=np.uint8(0), scale=np.float32(0.05)), True),
        (padded_by_hand(filling=None, zero=None, scale=np.float32(0.05)), True),
        (padded_by_hand(filling=None, zero=np.uint8(100), scale=np.float32(0.05), mode="reflect"), True),
        (padded_by_hand(filling=None, zero=np.uint8(100), scale=np.float32(0.05)), False),
        (padded_by_hand(filling=7, zero=np.uint8(100), scale=np.float32(0.05)), False),
        (
            padded_by_hand(
                filling=100, zero=np.array([100, 120, 140], np.uint8), scale=np.full(3, 0.05, np.float32)
            ),
            False,
        ),
    ],
    ids=["zero-point", "default", "no-zero-point", "reflect", "not-zero", "another", "per-channel"],
)
def test_what_is_lifted_computes_the_same(model: ModelProto, lifted: bool) -> None:
    read = ModelProto.FromString(model.SerializeToString())
    names = lift_pads(read)
    assert set(names.values()) == ({"pad"} if lifted else set())
    np.testing.assert_array_equal(outputs(read, noise(2, 3, 8, 8)), outputs(model, noise(2, 3, 8, 8)))
    pad = next(node for node in read.graph.node if node.op_type == "Pad")
    (maker,) = (node for node in read.graph.node if node.output[0] == pad.input[0])
    assert maker.op_type == ("DequantizeLinear" if lifted else "QuantizeLinear")


def padded_twice() -> ModelProto:
    """Two paddings one behind the other in front of a quantized layer, as ``int8`` writes them for CPUs."""
    pack = packs.get("cpu", VNNI)
    nodes = [
        helper.make_node("Pad", ["images", "amounts"], ["p"], name="pad"),
        helper.make_node("Pad", ["p", "amounts"], ["pp"], name="pad_again"),
        helper.make_node("Conv", ["pp", "w"], ["y"], name="conv"),
    ]
    model = prepare(model_of(nodes, {"amounts": AMOUNTS, "w": noise(8, 3, 3, 3)}, ["n", 3, 8, 8]), pack)
    plan = place(model, pack, [])
    ranges = choose_ranges(plan, calibrate(model, [noise(2, 3, 8, 8)], values=values_of(plan)))
    return build(model, plan, ranges)


def test_paddings_in_a_row_are_all_read() -> None:
    model = padded_twice()
    assert [node.op_type for node in model.graph.node].count("Pad") > 1
    assert lint_graph(model, packs.get("cpu", VNNI)) == ()
    read = ModelProto.FromString(model.SerializeToString())
    assert lift_pads(read)
    np.testing.assert_array_equal(outputs(read, noise(2, 3, 8, 8)), outputs(model, noise(2, 3, 8, 8)))


def test_findings_name_nodes_of_the_file() -> None:
    model = padded_twice()
    findings = lint_graph(model, packs.get("tensorrt"))
    assert "QDQ002" in {finding.rule for finding in findings}
    assert {finding.node for finding in findings} <= {node.name for node in model.graph.node}
    assert len({(finding.rule, finding.node, finding.what) for finding in findings}) == len(findings)


def test_images_that_a_model_of_any_size_cannot_take_are_refused() -> None:
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["c"], name="conv"),
        helper.make_node("Flatten", ["c"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "g"], ["y"], name="head"),
    ]
    constants = {"w": noise(8, 3, 3, 3), "g": noise(8 * 36, 10)}
    model = infer_shapes(model_of(nodes, constants, ["n", 3, "h", "w"]))
    seen = list[str]()
    observe(model, ["c"], [noise(1, 3, 8, 8)], lambda value, _: seen.append(value))
    assert seen == ["c"]
    with pytest.raises(PassRequirementError, match=r"images of shape \(1, 3, 12, 12\).*head.*preprocessing"):
        observe(model, ["y"], [noise(1, 3, 12, 12)], lambda value, _: seen.append(value))


def clipped_by_its_range(
    zero: np.ndarray | None, op: str = "Conv", *, read_twice: bool = False, output: bool = False
) -> ModelProto:
    """A layer, Q, DQ, a layer."""
    constants = {"scale": np.float32(0.05), "w": noise(3, 3, 1, 1), "w2": noise(4, 3, 1, 1)}
    constants |= {} if zero is None else {"zero": zero}
    numbers = ["scale"] if zero is None else ["scale", "zero"]
    nodes = [
        helper.make_node(op, ["images", "w"] if op != "Tanh" else ["images"], ["c"], name="c"),
        helper.make_node("QuantizeLinear", ["c", *numbers], ["q"], name="round"),
        helper.make_node("DequantizeLinear", ["q", *numbers], ["real"], name="unround"),
        helper.make_node("Conv", ["real", "w2"], ["z" if read_twice else "y"], name="conv"),
    ]
    if read_twice:
        nodes += [
            helper.make_node("GlobalAveragePool", ["c"], ["g"], name="g"),
            helper.make_node("Conv", ["g", "w2"], ["gz"], name="gz"),
            helper.make_node("Add", ["z", "gz"], ["y"], name="y"),
        ]
    model = model_of(nodes, constants, ["n", 3, 8, 8])
    if output:
        model.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, None))
    return model


@pytest.mark.parametrize(
    ("model", "lifted"),
    [
        (clipped_by_its_range(np.uint8(0)), True),
        (clipped_by_its_range(None), True),
        (clipped_by_its_range(np.int8(-128)), True),
        (clipped_by_its_range(np.int8(-128), "Add"), True),
        (clipped_by_its_range(np.uint8(1)), False),
        (clipped_by_its_range(np.int8(0)), False),
        (clipped_by_its_range(np.uint8(0), "Tanh"), False),
        (clipped_by_its_range(np.uint8(0), read_twice=True), False),
        (clipped_by_its_range(np.uint8(0), output=True), False),
    ],
    ids=["uint8", "default", "int8", "sum", "below zero", "symmetric", "no layer", "read twice", "output"],
)
def test_a_range_from_zero_is_a_relu(model: ModelProto, lifted: bool) -> None:
    if model.graph.node[0].op_type == "Add":
        model.graph.initializer[1].CopyFrom(numpy_helper.from_array(noise(3, 1, 1), "w"))
    read = ModelProto.FromString(model.SerializeToString())
    names = lift_clips(read)
    assert list(names.values()) == (["c"] if lifted else [])
    assert [node.op_type for node in read.graph.node].count("Relu") == lifted
    np.testing.assert_array_equal(outputs(read, noise(2, 3, 8, 8)), outputs(model, noise(2, 3, 8, 8)))
