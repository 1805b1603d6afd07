"""GELUs become those that onnxruntime fuses, with the same bits before it does."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from deploycnn.graph.export import export_onnx
from deploycnn.graph.gelu import order_gelu


def spelled_out(
    *, halved_first: bool = True, half: float = 0.5, read_twice: bool = False, other: bool = False
) -> ModelProto:
    """x * (0.5 * (1 + erf(x / sqrt(2)))), or the other way round."""
    x, y = ("half", "s") if halved_first else ("x", "s")
    nodes = [
        helper.make_node("Div", ["x", "root"], ["d"], name="div"),
        helper.make_node("Erf", ["d"], ["e"], name="erf"),
        helper.make_node("Add", ["e", "one"], ["s"], name="add"),
        helper.make_node("Mul", [x, y], ["h"], name="first"),
        helper.make_node(
            "Mul", ["z" if other else "x", "h"] if halved_first else ["h", "half"], ["y"], name="second"
        ),
    ]
    outputs = ["y", *(["h"] if read_twice else [])]
    values = {"root": np.sqrt(2.0), "one": 1.0, "half": half}
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [64])
            for name in ("x", *(["z"] if other else []))
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [64]) for name in outputs],
        [numpy_helper.from_array(np.float32(value), name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(model: ModelProto, x: np.ndarray, *, fused: bool) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if fused else level.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


def test_the_bits_stay_the_same() -> None:
    x = np.linspace(-6, 6, 64, dtype=np.float32)
    model = spelled_out()
    expected = run(model, x, fused=False)
    assert order_gelu(model) == 1
    np.testing.assert_array_equal(run(model, x, fused=False), expected)
    np.testing.assert_allclose(expected, nn.functional.gelu(torch.from_numpy(x)).numpy(), atol=1e-6)
    assert order_gelu(model) == 0


@pytest.mark.parametrize(
    "options", [{"halved_first": False}, {"half": 0.25}, {"read_twice": True}, {"other": True}]
)
def test_other_products_stay(options: dict[str, object]) -> None:
    model = spelled_out(**options)
    before = model.SerializeToString()
    assert order_gelu(model) == 0
    assert model.SerializeToString() == before


def test_onnxruntime_fuses_what_is_exported(tmp_path: object) -> None:
    torch.manual_seed(0)
    model = export_onnx(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 4, 1)).eval(), (3, 8, 8), opset=18
    )
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = f"{tmp_path}/optimized.onnx"
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert "Gelu" in kinds
    assert "Erf" not in kinds
