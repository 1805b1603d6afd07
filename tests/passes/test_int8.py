from __future__ import annotations

import dataclasses
import json
from functools import partial

import pytest
from onnx import helper
from torch import nn

from deploycnn import schema
from deploycnn.core import Artifact
from deploycnn.errors import ArtifactError, DataError, PassRequirementError, PreprocessingError, RecipeError
from deploycnn.graph.model import is_quantized, load_onnx, save_onnx
from deploycnn.passes.export import Export
from deploycnn.passes.fp16 import Fp16
from deploycnn.passes.int8 import Int8
from deploycnn.quantization import rounding
from deploycnn.quantization.isa import Isa, detect_isa
from deploycnn.quantization.judge import Judge, val_batches
from deploycnn.quantization.lint import lint_model
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
    assert record["calibrator"] in {"minmax", "percentile 99.999", "mse"}
    (compared,) = [t["rows"] for t in draft.facts.record["tables"] if t["title"].startswith("Compared")]
    stayed = [row[0] for row in compared if row[1] and row[0] in {"equalize", "correct_bias"}]
    assert record["remedies"] == stayed
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


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    with pytest.MonkeyPatch.context() as patch:
        layers = [conv_bn_relu(3, 8), conv_bn_relu(8, 32), conv_bn_relu(32, 32)]
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
        source = torch_artifact(randomized(net), patch)
        ctx = context(tmp_path_factory.mktemp("deep"), pictures())
        return minted(Export().run(source, ctx), ctx)


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding is learned in few steps."""
    monkeypatch.setattr(rounding, "Settings", partial(rounding.Settings, iterations=60, samples=256))


def conv_bn_relu(read: int, made: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(read, made, 3, padding=1), nn.BatchNorm2d(made), nn.ReLU())


def test_four_bit_weights_run_on_integer_kernels_from_a_smaller_file(
    deep: Artifact, tmp_path, briefly: None
) -> None:
    records, sizes = {}, {}
    for weights in ("int8", "int4"):
        ctx = context(tmp_path / weights, pictures())
        facts = Int8(calibration_images=25, weights=weights).run(deep, ctx).facts
        records[weights], sizes[weights] = facts.record, facts.size_bytes
    record = records["int4"]["int8"]
    assert "4-bit (first, last and depthwise layers" in record["scheme"]
    assert record["fused"]["float_compute"] == 0
    held = record["weights"]
    assert held["four_bit_share"] == pytest.approx((8 * 32 * 9 + 32 * 32 * 9) / (held["float_bytes"] / 4))
    assert sizes["int8"] - sizes["int4"] > 5000
    precisions = [
        row[2] for table in records["int4"]["tables"] for row in table["rows"] if table["title"] == "Layers"
    ]
    assert precisions == ["int8", "w4a8", "w4a8", "int8"]
    assert records["int4"]["parity"]["max_rel_error"] < 0.5


def test_learned_rounding_is_the_default_of_four_bits_only(deep: Artifact, tmp_path, briefly: None) -> None:
    files = {}
    for name, options in {
        "default": {"weights": "int4"},
        "asked": {"weights": "int4", "adaround": True},
        "nearest": {"weights": "int4", "adaround": False},
        "eight": {},
        "eight nearest": {"adaround": False},
    }.items():
        ctx = context(tmp_path / name, pictures())
        Int8(calibration_images=20, **options).run(deep, ctx)
        files[name] = (ctx.output / "model.onnx").read_bytes()
    assert files["default"] == files["asked"] != files["nearest"]
    assert files["eight"] == files["eight nearest"]


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_only_computes_in_float_from_integers(
    deep: Artifact, tmp_path, briefly: None, weights: str
) -> None:
    ctx = context(tmp_path, pictures())
    facts = Int8(calibration_images=25, weights=weights, weights_only=True).run(deep, ctx).facts
    path = ctx.output / "model.onnx"
    model = load_onnx(path)
    assert is_quantized(model)
    assert not any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    record = facts.record["int8"]
    assert record["scheme"].startswith("weights only")
    assert (record["fused"]["stray"], record["fused"]["quantized"]) == (0, 0)
    assert (
        record["weights"]["float_bytes"] > (3 if weights == "int8" else 5) * record["weights"]["stored_bytes"]
    )
    assert facts.record["parity"]["max_rel_error"] < (0.05 if weights == "int8" else 0.5)
    assert record["do_no_harm"] == "not timed"
    assert lint_model(path).clean
    packed_artifact = dataclasses.replace(deep, path=path, facts=facts)
    with pytest.raises(PassRequirementError, match="packed"):
        Fp16().run(packed_artifact, context(tmp_path / "fp16", pictures()))


@pytest.mark.parametrize("options", [{"weights": "int4"}, {"weights_only": True}])
def test_small_weights_are_for_cpus(exported: Artifact, tmp_path, options) -> None:
    with pytest.raises(PassRequirementError, match="is for CPU targets, not tensorrt"):
        Int8(**options).run(exported, context(tmp_path, pictures(), target="tensorrt"))


def test_options_that_contradict_each_other_are_refused() -> None:
    for options, words in (
        ({"weights_only": True, "mode": "auto"}, "does not go with auto"),
        ({"weights_only": True, "activations": "int8"}, "leaves activations in float"),
        ({"mode": "auto", "equalize": True, "calibrator": "mse"}, "leave out calibrator, equalize"),
        ({"qat_epochs": 3}, "qat_epochs is for auto"),
        ({"judge_images": 100}, "give max_top1_drop too"),
    ):
        with pytest.raises(RecipeError, match=words):
            schema.build(Int8, options, "int8")


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


def batched(exported: Artifact, path, batch: int) -> Artifact:
    """The same model for batches of one size."""
    model = load_onnx(exported.path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]
    save_onnx(model, path)
    return dataclasses.replace(exported, path=path)


@pytest.mark.parametrize("batch", [3, 64])
def test_a_fixed_batch_of_any_size_is_filled_up(exported: Artifact, tmp_path, batch: int) -> None:
    fixed = batched(exported, tmp_path / "fixed.onnx", batch)
    records = {}
    for name, source in (("free", exported), ("fixed", fixed)):
        ctx = context(tmp_path / name, pictures())
        records[name] = Int8(calibration_images=25).run(source, ctx).facts.record
    assert records["fixed"]["parity"]["images"] == records["free"]["parity"]["images"] == 20
    assert records["fixed"]["parity"]["top1_agreement"] == records["free"]["parity"]["top1_agreement"]
    tables = {
        name: next(table["rows"] for table in record["tables"] if table["title"] == "Layers")
        for name, record in records.items()
    }
    for fixed_row, free_row in zip(tables["fixed"], tables["free"], strict=True):
        assert fixed_row[5] == pytest.approx(free_row[5], abs=1e-3)  # SQNR, dB


def test_auto_trains_before_more_than_a_few_layers_stay_float(
    exported: Artifact, tmp_path, monkeypatch
) -> None:
    """No budget below zero can be asked for, so the ladder is made to climb to its end."""
    from deploycnn.quantization import quantize

    monkeypatch.setattr(quantize, "FEW", -1.0)
    monkeypatch.setattr("deploycnn.quantization.int8_settings._AUTO_BUDGET", -0.5)
    monkeypatch.setattr(rounding, "Settings", partial(rounding.Settings, iterations=60, samples=256))
    ctx = context(tmp_path, pictures())
    facts = Int8(mode="auto", calibration_images=20, qat_epochs=1).run(exported, ctx).facts
    rows = next(table["rows"] for table in facts.record["tables"] if table["title"].startswith("Repair"))
    assert [row[0] for row in rows] == [
        "percentile", "mse", "equalize", "correct_bias", "adaround", "few float layers", "qat", "float layers",
    ]  # fmt: skip
    trained = rows[-2]
    assert trained[2] is not None, "the trained graph was judged"
    assert trained[5] > 0
    assert facts.record["int8"]["budget_met"] is False
    assert facts.record["int8"]["max_top1_drop"] == -0.5
    rungs = Int8(mode="auto", adaround=False, qat_epochs=0).options().ladder
    assert rungs == ("mse", "equalize", "correct_bias", "float layers")
    rungs = Int8(mode="auto", adaround=False, equalize=False, correct_bias=False).options().ladder
    assert rungs == ("mse", "few float layers", "qat", "float layers")


def test_ranges_suit_equalized_weights_and_biases_the_rounding() -> None:
    asked = Int8(adaround=True, correct_bias=True, equalize=True, absorb_bias=True).options()
    assert asked.remedies == ("equalize", "absorb_bias", "percentile", "mse", "adaround", "correct_bias")
    assert set(asked.if_better) == {"percentile", "mse"}
    default = Int8().options()
    assert default.remedies == ("percentile", "mse", "equalize", "correct_bias")
    assert set(default.if_better) == set(default.remedies)
    fixed = Int8(calibrator="entropy", equalize=False, correct_bias=False).options()
    assert (fixed.calibrator, fixed.remedies, fixed.if_better) == ("entropy", (), {})
    assert Int8(weights_only=True).options().remedies == ("equalize", "correct_bias")


def test_by_default_the_quietest_ranges_are_kept(exported: Artifact, tmp_path) -> None:
    """Against each calibrator on its own, judged by the record's own figures."""
    levels = {}
    for calibrator in ("auto", "minmax", "percentile", "mse"):
        ctx = context(tmp_path / calibrator, pictures())
        step = Int8(
            calibrator=calibrator, percentile=99.0, calibration_images=25, correct_bias=False, equalize=False
        )
        facts = step.run(exported, ctx).facts
        judge = Judge(load_onnx(exported.path), val_batches(pictures(), 20, 0))
        levels[calibrator] = judge(load_onnx(ctx.output / "model.onnx")).sqnr_db
        tables = {table["title"]: table["rows"] for table in facts.record["tables"]}
        if calibrator == "auto":
            compared = tables["Compared on a few val images"]
            chosen = facts.record["int8"]["calibrator"].split()[0]
    assert [row[0] for row in compared] == ["minmax", "percentile", "mse"]
    for name, *_, level, _, _ in compared:
        assert level == pytest.approx(levels[name], abs=0.05)
    assert levels["auto"] == levels[chosen] == max(levels.values())
    assert "Compared on a few val images" not in tables


def test_asymmetric_activations_are_for_cpus(exported: Artifact, tmp_path) -> None:
    with pytest.raises(PassRequirementError, match="activations: uint8 is for CPU targets, not tensorrt"):
        Int8(activations="uint8").run(exported, context(tmp_path, pictures(), target="tensorrt"))


@pytest.mark.parametrize(
    ("rules", "timed"),
    [("target", True), ("openvino", True), ("onnxruntime-cpu", False), ("tensorrt", False)],
)
def test_rules_for_other_kernels_are_not_raced(exported: Artifact, tmp_path, rules: str, timed: bool) -> None:
    class Refuses:
        runtime, settings = "openvino:f32", ((1, 1),)

        def race(self, *_: object, **__: object):
            raise RuntimeError("raced")

        def layer_ms(self, *_: object, **__: object) -> dict[str, float]:
            return {}

    ctx = context(tmp_path, pictures(), target="openvino", stopwatch=Refuses())
    step = Int8(calibration_images=5, rules=rules)
    if timed:
        with pytest.raises(RuntimeError, match="raced"):
            step.run(exported, ctx)
    else:
        assert step.run(exported, ctx).facts.record["int8"]["do_no_harm"] == "not timed"
    assert Int8(rules="onnxruntime-cpu")._same_kernels("cpu")
    assert not Int8(rules="openvino")._same_kernels("cpu")


@pytest.mark.parametrize("fault", ["opset", "operator"])
def test_what_onnxruntime_lacks_is_one_error(exported: Artifact, tmp_path, fault: str) -> None:
    model = load_onnx(exported.path)
    if fault == "opset":
        next(item for item in model.opset_import if not item.domain).version = 99
    else:
        next(node for node in model.graph.node if node.op_type == "Relu").domain = "my.ops"
        model.opset_import.append(helper.make_opsetid("my.ops", 1))
    path = tmp_path / "strange.onnx"
    save_onnx(model, path)
    strange = dataclasses.replace(exported, path=path)
    with pytest.raises((ArtifactError, PassRequirementError), match="99" if fault == "opset" else r"my\.ops"):
        Int8(calibration_images=5).run(strange, context(tmp_path, pictures()))
