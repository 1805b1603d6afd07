from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, numpy_helper

from deploycnn.graph.export import export_onnx
from deploycnn.graph.model import check_onnx, is_quantized
from deploycnn.graph.parity import cpu_session, evaluator
from deploycnn.quantization import packs
from deploycnn.quantization.insertion import build, ranges_needed
from deploycnn.quantization.packed import fold, measure, narrow, packed, unfold, unpack, widen
from deploycnn.quantization.packs import RulePack, four_bits, weights_only
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


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_unfolding_undoes_folding(full: ModelProto, dtype: str) -> None:
    model = quantize(full, weights_only(CPU, dtype))  # type: ignore[arg-type]
    original = Counter(node.op_type for node in model.graph.node)
    batch = images(4, (3, 12, 12))
    before = evaluator(model)(batch)[0]
    stored = {
        item.name: item.raw_data for item in model.graph.initializer if item.name.endswith("_quantized")
    }
    fold(model)
    assert is_quantized(model)
    assert unfold(model) == 3
    check_onnx(model, "unfolded")
    assert Counter(node.op_type for node in model.graph.node) == original
    assert {item.name: item.raw_data for item in model.graph.initializer if item.name in stored} == stored
    np.testing.assert_array_equal(evaluator(model)(batch)[0], before)
    assert unfold(model) == 0


def test_a_product_of_real_constants_is_no_packed_weight(full: ModelProto) -> None:
    model = packed(quantize(full, weights_only(CPU)))
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.INT8:
            real = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(real, tensor.name))
    assert unpack(model) == 0
    assert not is_quantized(model)


def test_openvino_computes_the_same_from_packed_weights(full: ModelProto, tmp_path) -> None:
    openvino = pytest.importorskip("openvino")
    batch = images(4, (3, 12, 12))
    for pack in (weights_only(CPU), weights_only(CPU, "int4"), four_bits(CPU)):
        model = quantize(full, pack)
        path = tmp_path / "packed.onnx"
        onnx.save(packed(model), path)
        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found = compiled([batch])[compiled.output(0)]
        expected = evaluator(model, integers=False)(batch)[0]
        # Where activations are rounded too, a last bit of a sum decides which way now and then.
        limit = 1e-5 if pack.style == "weights" else 0.03
        assert np.linalg.norm(found - expected) < limit * np.linalg.norm(expected)


def test_weights_are_measured_as_the_file_stores_them(full: ModelProto) -> None:
    numbers = sum(
        np.prod(item.dims)
        for item in full.graph.initializer
        if len(item.dims) > 1 and item.data_type == TensorProto.FLOAT
    )
    for dtype, bits in (("int8", 8), ("int4", 4)):
        pack = replace(weights_only(CPU, dtype), sensitive_weight=None)  # type: ignore[arg-type]
        model = quantize(full, pack)
        found = measure(model)
        scales = sum(
            4 * np.prod(item.dims) for item in model.graph.initializer if item.name.endswith("_scale")
        )
        assert found.float_bytes == 4 * numbers
        assert found.stored_bytes == numbers * bits // 8 + scales
        assert found.four_bit_share == (bits == 4)
        assert measure(packed(model)) == found


def test_eight_bit_graphs_are_left_alone(full: ModelProto) -> None:
    eight = quantize(full, CPU)
    before = eight.SerializeToString()
    assert (widen(eight), narrow(eight)) == (0, 0)
    assert eight.SerializeToString() == before
