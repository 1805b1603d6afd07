from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from deploycnn.core import Artifact, Facts
from deploycnn.errors import ParityError, PassRequirementError
from deploycnn.graph.model import load_onnx, save_onnx, tensor_specs
from deploycnn.passes.export import Export
from deploycnn.passes.fp16 import Fp16
from tests.graph.nets import Residual, graph, operators, randomized
from tests.passes.onnx_support import context, minted, pictures, torch_artifact


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    with pytest.MonkeyPatch.context() as patch:
        source = torch_artifact(randomized(Residual()), patch)
        ctx = context(tmp_path_factory.mktemp("export"), pictures())
        return minted(Export().run(source, ctx), ctx)


def test_fp16_halves_the_file_and_agrees(exported: Artifact, tmp_path) -> None:
    ctx = context(tmp_path, pictures())
    draft = Fp16().run(exported, ctx)
    model = load_onnx(ctx.output / "model.onnx")
    assert draft.facts.precision == "fp16"
    assert (draft.inputs[0].dtype, draft.outputs[0].dtype) == ("float32", "float32")
    assert draft.inputs == exported.inputs
    floats = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
    assert floats == []
    parity = draft.facts.record["parity"]
    assert parity["reference"] == "fp32 onnx"
    assert 0 < parity["max_rel_error"] < 0.01
    assert draft.facts.record["fp16"] == {
        "converted": 9, "casts": 2, "kept_fp32": {}, "activations_checked": True,
    }  # fmt: skip
    json.dumps(dict(draft.facts.record))
    assert dict(model.metadata_props and {p.key: p.value for p in model.metadata_props})


def test_activations_that_overflow_on_training_images_stay_fp32(tmp_path, monkeypatch) -> None:
    convolutions = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)]
    pool = nn.AdaptiveAvgPool2d(1)
    model = randomized(nn.Sequential(*convolutions, nn.ReLU(), pool, nn.Flatten(), nn.Linear(8, 5)))
    with torch.no_grad():
        convolutions[1].weight *= 5e4
        # The next layer brings the values back into range.
        convolutions[2].weight *= 1e-3
    source = torch_artifact(model, monkeypatch)
    ctx = context(tmp_path / "export", None)
    exported = minted(Export().run(source, ctx), ctx)
    draft = Fp16().run(exported, context(tmp_path / "fp16", pictures()))
    kept = draft.facts.record["fp16"]["kept_fp32"]
    assert list(kept) == ["1/Conv", "2/Conv", "3/Relu"]
    assert all('value "1/Conv_output_0" overflows FP16' in kept[name] for name in ("1/Conv", "2/Conv"))
    assert kept["3/Relu"] == 'computed in one kernel with "2/Conv", which stays FP32'


def test_activations_that_vanish_on_training_images_stay_fp32(tmp_path, monkeypatch) -> None:
    """Below 6.1e-5 FP16 has no normal numbers; what brings them back would multiply what is left of them."""
    convolutions = [nn.Conv2d(3, 8, 3, bias=False) for _ in range(1)] + [
        nn.Conv2d(8, 8, 3, bias=False) for _ in range(2)
    ]
    model = randomized(nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))
    with torch.no_grad():
        # Neither kernel is too small itself.
        convolutions[0].weight *= 1e-3
        convolutions[1].weight *= 1e-3
        convolutions[2].weight *= 1e5
    source = torch_artifact(model, monkeypatch)
    ctx = context(tmp_path / "export", None)
    exported = minted(Export().run(source, ctx), ctx)
    kept = Fp16().run(exported, context(tmp_path / "fp16", pictures())).facts.record["fp16"]["kept_fp32"]
    assert list(kept) == ["1/Conv", "2/Conv"]
    assert all('value "1/Conv_output_0" vanishes in FP16' in why for why in kept.values())


def test_kept_operators_are_recorded(exported: Artifact, tmp_path) -> None:
    ctx = context(tmp_path, None)
    draft = Fp16(keep_fp32_ops=("Gemm",)).run(exported, ctx)
    assert draft.facts.record["fp16"]["kept_fp32"] == {"head/Gemm": "as asked"}
    assert draft.facts.record["fp16"]["activations_checked"] is False
    assert draft.facts.record["parity"]["source"] == "random images"
    assert operators(load_onnx(ctx.output / "model.onnx"))[-2:] == ["Cast", "Gemm"]


def test_a_graph_that_computes_something_else_is_refused(exported: Artifact, tmp_path, monkeypatch) -> None:
    from deploycnn.graph import fp16

    def faulty(*arguments: object, **options: object) -> object:
        model, record = real(*arguments, **options)
        head = next(tensor for tensor in model.graph.initializer if tensor.name == "head.weight_fp16")
        head.raw_data = (np.frombuffer(head.raw_data, np.float16) * np.float16(1.2)).tobytes()
        return model, record

    real = fp16.convert_fp16
    monkeypatch.setattr(fp16, "convert_fp16", faulty)
    with pytest.raises(ParityError, match="FP16 graph differs from its fp32 onnx reference"):
        Fp16().run(exported, context(tmp_path, pictures()))


def test_only_fp32_models_with_something_to_convert_are_taken(exported: Artifact, tmp_path) -> None:
    half = dataclasses.replace(exported, facts=dataclasses.replace(exported.facts, precision="fp16"))
    with pytest.raises(PassRequirementError, match="already fp16"):
        Fp16().requires(half)
    Fp16().requires(exported)
    with pytest.raises(PassRequirementError, match="nothing can be converted"):
        Fp16(keep_fp32_ops=tuple(set(operators(load_onnx(exported.path))))).run(
            exported, context(tmp_path, None)
        )


def test_a_static_batch_is_run_at_its_own_size(tmp_path) -> None:
    from onnx import helper

    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    model = graph([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": weight}, shape=(2, 3, 12, 12))
    save_onnx(model, tmp_path / "model.onnx")
    source = Artifact(
        key="k", format="onnx", path=tmp_path / "model.onnx", inputs=tensor_specs(model.graph.input),
        outputs=tensor_specs(model.graph.output), parents=(), facts=Facts(),
    )  # fmt: skip
    record = Fp16().run(source, context(tmp_path / "fp16", pictures())).facts.record
    assert record["parity"]["batch_sizes"] == [2]
    assert record["parity"]["top1_agreement"] is None


def test_behind_int8_the_rest_becomes_half(exported: Artifact, tmp_path) -> None:
    """The integers stay as they are, the types at the edges too, and each constant is stored once."""
    from deploycnn.passes.int8 import Int8

    data = pictures()
    ctx = context(tmp_path / "int8", data, target="tensorrt")
    int8 = minted(Int8(calibration_images=8).run(exported, ctx), ctx)
    ctx = context(tmp_path / "half", data)
    draft = Fp16().run(int8, ctx)
    assert draft.facts.precision == "int8_fp16"
    assert draft.facts.record["parity"]["reference"] == "int8 onnx"
    before, after = load_onnx(int8.path), load_onnx(ctx.output / "model.onnx")
    assert [item.dtype for item in (*draft.inputs, *draft.outputs)] == ["float32", "float32"]
    for operator in ("QuantizeLinear", "DequantizeLinear"):
        assert operators(after).count(operator) == operators(before).count(operator) > 0
    assert integers(after) == integers(before)
    types = [tensor.data_type for tensor in after.graph.initializer]
    assert TensorProto.FLOAT16 in types
    assert TensorProto.FLOAT not in types
    assert draft.facts.size_bytes < int8.path.stat().st_size * 1.2


def integers(model) -> list[bytes]:
    """Contents of all int8 constants that are no zero points."""
    found = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT8]
    return sorted(numpy_helper.to_array(tensor).tobytes() for tensor in found if len(tensor.dims) > 1)


def test_bf16_is_an_option(exported: Artifact, tmp_path) -> None:
    ctx = context(tmp_path, pictures())
    draft = Fp16(dtype="bf16").run(exported, ctx)
    assert draft.facts.precision == "bf16"
    assert 1e-4 < draft.facts.record["parity"]["max_rel_error"] < 0.1
    types = {tensor.data_type for tensor in load_onnx(ctx.output / "model.onnx").graph.initializer}
    assert TensorProto.BFLOAT16 in types
    assert TensorProto.FLOAT not in types
    int8 = dataclasses.replace(exported, facts=dataclasses.replace(exported.facts, precision="int8"))
    with pytest.raises(PassRequirementError, match="bf16 behind int8"):
        Fp16(dtype="bf16").requires(int8)


def test_kept_operators_that_do_not_exist_are_refused_with_the_nearest(exported: Artifact, tmp_path) -> None:
    with pytest.raises(
        PassRequirementError, match='keep_fp32_ops: the model has no operator or node "Convv".*Conv'
    ):
        Fp16(keep_fp32_ops=("Convv",)).run(exported, context(tmp_path, pictures()))


def test_a_batch_larger_than_the_images_at_hand_is_filled_up(exported: Artifact, tmp_path) -> None:
    model = load_onnx(exported.path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 32
    del model.graph.value_info[:]
    save_onnx(model, tmp_path / "fixed.onnx")
    source = dataclasses.replace(exported, path=tmp_path / "fixed.onnx")
    parity = Fp16().run(source, context(tmp_path, pictures())).facts.record["parity"]
    assert (parity["images"], parity["batch_sizes"]) == (16, [32])
    assert 0 < parity["max_rel_error"] < 0.01
