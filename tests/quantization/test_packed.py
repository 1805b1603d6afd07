from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto

from deploycnn.graph.export import export_onnx
from deploycnn.graph.model import check_onnx
from deploycnn.graph.parity import cpu_session, evaluator
from deploycnn.quantization import packs
from deploycnn.quantization.insertion import build, ranges_needed
from deploycnn.quantization.packed import fold, narrow, widen
from deploycnn.quantization.packs import RulePack, weights_only
from deploycnn.quantization.placement import place
from deploycnn.quantization.preparation import prepare
from deploycnn.quantization.types import NumberFormat
from tests.graph.nets import Residual, images, randomized

CPU = packs.get("onnxruntime-cpu")


@pytest.fixture(scope="module")
def full() -> ModelProto:
    return prepare(export_onnx(randomized(Residual()), (3, 12, 12), opset=18, classes=None))


def quantize(full: ModelProto, pack: RulePack) -> ModelProto:
    plan = place(full, pack)
    return build(full, plan, dict.fromkeys(ranges_needed(plan), (-3.0, 3.0)))


def optimized(model: ModelProto, tmp_path) -> Counter[str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)


def test_widened_weights_run_on_integer_kernels_and_compute_the_same(full: ModelProto, tmp_path) -> None:
    four = quantize(full, replace(CPU, weight=NumberFormat(dtype="int4", symmetric=True)))
    batch = images(4, (3, 12, 12))
    before = evaluator(four, integers=False)(batch)[0]
    size = four.ByteSize()
    assert optimized(four, tmp_path)["QLinearConv"] == 0
    assert widen(four) == 3
    check_onnx(four, "widened")
    np.testing.assert_array_equal(evaluator(four, integers=False)(batch)[0], before)
    assert optimized(four, tmp_path)["QLinearConv"] == 2
    kinds = Counter(tensor.data_type for tensor in four.graph.initializer if len(tensor.dims) > 1)
    assert kinds == {TensorProto.INT4: 3}
    assert four.ByteSize() < size + 1000


def test_narrowing_undoes_widening(full: ModelProto) -> None:
    four = quantize(full, replace(CPU, weight=NumberFormat(dtype="int4", symmetric=True)))
    original = Counter(node.op_type for node in four.graph.node)
    batch = images(4, (3, 12, 12))
    before = evaluator(four, integers=False)(batch)[0]
    widen(four)
    assert narrow(four) == 3
    check_onnx(four, "narrowed")
    assert Counter(node.op_type for node in four.graph.node) == original
    np.testing.assert_array_equal(evaluator(four, integers=False)(batch)[0], before)
    assert narrow(four) == 0


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_folded_weights_are_converted_when_the_file_is_loaded(full: ModelProto, tmp_path, dtype: str) -> None:
    model = quantize(full, weights_only(CPU, dtype))  # type: ignore[arg-type]
    batch = images(4, (3, 12, 12))
    before = evaluator(model)(batch)[0]
    assert optimized(model, tmp_path)["DequantizeLinear"] == 3
    assert fold(model) == 3
    check_onnx(model, "folded")
    np.testing.assert_allclose(evaluator(model)(batch)[0], before, rtol=1e-5, atol=1e-6)
    found = optimized(model, tmp_path)
    assert found["DequantizeLinear"] + found["Cast"] + found["Mul"] == 0
    assert cpu_session(model).run(None, {"images": batch})[0].shape == before.shape


def test_eight_bit_graphs_are_left_alone(full: ModelProto) -> None:
    eight = quantize(full, CPU)
    before = eight.SerializeToString()
    assert (widen(eight), narrow(eight)) == (0, 0)
    assert eight.SerializeToString() == before
