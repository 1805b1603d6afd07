"""What a branch or a loop body reads from outside stays as it is under its name, whatever is rewritten around it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from deploycnn.graph.model import infer_shapes, lasting_names, load_onnx, names_used, save_onnx
from deploycnn.graph.parity import cpu_session
from deploycnn.quantization import packs
from deploycnn.quantization.equalization import equalize
from deploycnn.quantization.preparation import prepare
from tests.graph.nets import Weights, images
from tests.quantization.test_insertion import quantized
from tests.quantization.test_placement import conv, node
from tests.quantization.test_placement import model as model_of

Array = npt.NDArray[np.float32]
MAPS = ("N", 4, 8, 8)


def branching(clip: tuple[str, str] = ("Relu", "r")) -> ModelProto:
    """A clipped value that a convolution reads, and both branches of an If."""
    kind, value = clip
    weights: Weights = {"low": np.float32(0), "high": np.float32(1), "two": np.float32(2)}
    weights["zero"] = np.float32(0)

    def branch(name: str, inner: NodeProto) -> object:
        return helper.make_graph(
            [inner], name, [], [helper.make_tensor_value_info(inner.output[0], TensorProto.FLOAT, None)]
        )

    bounds = " low high" if kind == "Clip" else ""
    nodes = [
        conv("x", "c", weights, (16, 3, 3, 3)),
        node(kind, f"c{bounds}", value),
        node("ReduceMax", "x", "most", keepdims=0),
        node("Greater", "most zero", "is_bright"),
        helper.make_node(
            "If",
            ["is_bright"],
            ["chosen"],
            name="if",
            then_branch=branch("then", helper.make_node("Mul", [value, "two"], ["doubled"])),
            else_branch=branch("else", helper.make_node("Identity", [value], ["same"])),
        ),
        conv(value, "d", weights, (16, 16, 1, 1)),
        node("Relu", "d", "s"),
        conv("s", "e", weights, (16, 16, 1, 1)),
        node("Concat", "chosen e", "joined", axis=1),
        conv("joined", "y", weights, (4, 32, 1, 1)),
    ]
    return infer_shapes(model_of(nodes, weights))


def run(model: ModelProto, x: Array, *, optimize: bool = True) -> Array:
    found: Array = cpu_session(model, optimize=optimize).run(None, {"x": x})[0]
    return found


def sqnr_db(right: Array, found: Array) -> float:
    noise = float(np.square(right.astype(np.float64) - found).sum())
    return 10 * np.log10(float(np.square(right, dtype=np.float64).sum()) / max(noise, 1e-30))


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "openvino", "tensorrt", "onnxruntime-cuda"])
@pytest.mark.parametrize("clip", [("Relu", "r"), ("Clip", "k")], ids=["relu", "clip"])
def test_a_branch_reads_what_the_float_graph_gives_it(clip: tuple[str, str], target: str) -> None:
    full, pack = branching(clip), packs.get(target)
    made = quantized(prepare(full, pack), pack, (-20.0, 20.0))
    x = images(4, (3, 8, 8))
    for optimize in (False, True):
        assert sqnr_db(run(full, x), run(made, x, optimize=optimize)) > 15


def test_equalized_the_graph_computes_the_same() -> None:
    full = prepare(branching())
    x = images(8, (3, 8, 8))
    same = equalize(full, [x])
    assert sqnr_db(run(full, x), run(same, x)) > 100


def looping() -> ModelProto:
    """A loop whose body calls a value of its own as the graph calls a later one."""
    body = helper.make_graph(
        [
            helper.make_node("Relu", ["state"], ["later"]),
            helper.make_node("Add", ["later", "outer"], ["next"]),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, MAPS),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, MAPS),
        ],
    )
    weights: Weights = {"three": np.int64(3), "yes": np.bool_(True), "outer": np.float32(0.5)}
    nodes = [
        conv("x", "c", weights, (4, 3, 3, 3)),
        helper.make_node("Loop", ["three", "yes", "c"], ["looped"], name="loop", body=body),
        conv("looped", "later", weights, (4, 4, 1, 1)),
        conv("later", "y", weights, (4, 4, 1, 1)),
    ]
    image, result = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ("N", channels, 8, 8))
        for name, channels in (("x", 3), ("y", 4))
    )
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", [image], [result], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_names_inside_a_body_are_its_own(tmp_path: Path) -> None:
    model = looping()
    loop = next(held for held in model.graph.node if held.op_type == "Loop")
    assert set(names_used(loop)) == {"three", "yes", "c", "outer"}
    assert lasting_names(model.graph) == {"y", "outer"}
    path = tmp_path / "model.onnx"
    save_onnx(model, path)
    x = images(2, (3, 8, 8))
    np.testing.assert_array_equal(run(load_onnx(path), x), run(model, x))


def test_lasting_names_are_those_that_branches_read_and_the_outputs() -> None:
    assert lasting_names(branching().graph) == {"r", "two", "y"}
