from __future__ import annotations

import dataclasses
import json

import pytest

from deploycnn import schema
from deploycnn.core import Artifact
from deploycnn.errors import DataError, PassRequirementError, PreprocessingError, RecipeError
from deploycnn.graph.model import is_quantized, load_onnx
from deploycnn.passes.export import Export
from deploycnn.passes.int8 import Int8
from deploycnn.quantization.isa import Isa, detect_isa
from tests.graph.nets import Residual, randomized
from tests.passes.onnx_support import context, minted, pictures, torch_artifact


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    with pytest.MonkeyPatch.context() as patch:
        source = torch_artifact(randomized(Residual()), patch)
        ctx = context(tmp_path_factory.mktemp("export"), pictures())
        return minted(Export().run(source, ctx), ctx)


def test_int8_writes_a_quantized_model_and_says_how(exported: Artifact, tmp_path) -> None:
    ctx = context(tmp_path, pictures())
    draft = Int8(calibration_images=25).run(exported, ctx)
    model = load_onnx(ctx.output / "model.onnx")
    assert is_quantized(model)
    assert draft.facts.precision == "int8"
    assert draft.facts.preprocessing == exported.facts.preprocessing
    assert draft.facts.size_bytes == (ctx.output / "model.onnx").stat().st_size
    assert draft.inputs == exported.inputs
    record = draft.facts.record["int8"]
    assert record["images"] == 25
    assert record["calibrator"] == "minmax"
    assert "asymmetric uint8" in record["scheme"]
    assert record["fused"]["quantized"] == 5
    assert record["fused"]["float_compute"] == 0
    assert record["isa"]["name"] == detect_isa().name
    parity = draft.facts.record["parity"]
    assert (parity["reference"], parity["source"]) == ("fp32 onnx", "val images")
    assert 0 < parity["max_rel_error"] < 0.2
    assert json.loads(json.dumps(dict(draft.facts.record), allow_nan=False)) == draft.facts.record


def test_equal_runs_write_equal_bytes(exported: Artifact, tmp_path) -> None:
    files = []
    for name in ("first", "second"):
        ctx = context(tmp_path / name, pictures())
        Int8(calibrator="percentile", percentile=99.0).run(exported, ctx)
        files.append((ctx.output / "model.onnx").read_bytes())
    assert files[0] == files[1]


def test_weights_lose_a_bit_where_this_cpu_saturates_unless_told_otherwise(
    exported, tmp_path, monkeypatch
) -> None:
    saturating = Isa(name="x86 without VNNI", saturates=True)
    monkeypatch.setattr("deploycnn.quantization.isa.detect_isa", lambda: saturating)
    schemes = {}
    for asked in (None, False):
        ctx = context(tmp_path / str(asked), pictures())
        record = Int8(calibration_images=5, reduce_range=asked).run(exported, ctx).facts.record["int8"]
        schemes[asked] = record["scheme"]
    assert "7-bit" in schemes[None]
    assert "7-bit" not in schemes[False]
    assert Int8().extra_identity() == {"saturates": True}
    assert Int8(reduce_range=False).extra_identity() is None


def test_activations_are_symmetric_off_the_cpu(exported: Artifact, tmp_path) -> None:
    ctx = context(tmp_path, pictures(), target="onnxruntime-cuda")
    assert "symmetric int8" in Int8(calibration_images=5).run(exported, ctx).facts.record["int8"]["scheme"]


def test_what_int8_cannot_do_is_refused(exported: Artifact, tmp_path) -> None:
    half = dataclasses.replace(exported, facts=dataclasses.replace(exported.facts, precision="fp16"))
    with pytest.raises(PassRequirementError, match="already fp16"):
        Int8().requires(half)
    with pytest.raises(PassRequirementError, match="name `data`"):
        Int8().run(exported, context(tmp_path, None))
    with pytest.raises(DataError, match="training split"):
        Int8().run(exported, context(tmp_path, pictures(train=0)))
    with pytest.raises(PassRequirementError, match="exclude: the model has no node"):
        Int8(exclude=("nowhere",)).run(exported, context(tmp_path, pictures()))
    other = dataclasses.replace(pictures().preprocessing, channels="bgr").to_json()
    changed = dataclasses.replace(exported, facts=dataclasses.replace(exported.facts, preprocessing=other))
    with pytest.raises(PreprocessingError, match="int8.*channels"):
        Int8().run(changed, context(tmp_path, pictures()))


@pytest.mark.parametrize(
    "options",
    [{"calibrator": "mode"}, {"percentile": 101.0}, {"calibration_images": 0}, {"activations": "int4"}],
)
def test_fields_out_of_range_are_refused(options) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        schema.build(Int8, options, "int8")
