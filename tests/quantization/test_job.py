"""A whole quantization, with a stopwatch that says what a test wants to hear."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from deploycnn.core import Speed
from deploycnn.errors import PassRequirementError, TimingUnavailable
from deploycnn.graph.export import export_onnx
from deploycnn.graph.model import is_quantized, load_onnx, save_onnx
from deploycnn.graph.probe import calibration_batches
from deploycnn.quantization import packs
from deploycnn.quantization.harm import FLOAT
from deploycnn.quantization.job import Job
from deploycnn.quantization.judge import val_batches
from deploycnn.quantization.quantize import FLOAT_LAYERS, Options
from deploycnn.quantization.types import NumberFormat
from tests.graph.nets import Residual, randomized
from tests.passes.onnx_support import pictures

DATA = pictures()
CPU = packs.get("onnxruntime-cpu")


@dataclass
class Stopwatch:
    """Says that every graph but the float one has ``ratio``."""

    ratio: float
    runtime: str = "onnxruntime:cpu"
    settings: tuple[tuple[int, int], ...] = ((1, 1),)
    raced: list[list[str]] = field(default_factory=list)

    def race(self, models: Mapping[str, Path], **_: object) -> dict[str, Speed]:
        self.raced.append(list(models))
        assert all(path.exists() for path in models.values())
        return {
            name: Speed(
                median_ms=1.0,
                ratio=1.0 if name == FLOAT else self.ratio,
                low=1.0 if name == FLOAT else self.ratio - 0.05,
                high=1.0 if name == FLOAT else self.ratio + 0.05,
            )
            for name in models
        }

    def layer_ms(self, model: Path, **_: object) -> dict[str, float]:
        slow = is_quantized(load_onnx(model)) and self.ratio < 1
        return {node.name: 2.0 if slow else 1.0 for node in load_onnx(model).graph.node}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "model.onnx"
    save_onnx(export_onnx(randomized(Residual()), (3, 12, 12), opset=18, classes=["a"]), path)
    return path


def run(exported: Path, tmp_path: Path, options: Options, **changes: object):
    output = tmp_path / "int8.onnx"
    arguments = {"judging": partial(val_batches, DATA, seed=0), "pack": CPU, **changes}
    job = Job(
        source=exported,
        output=output,
        options=options,
        images=lambda: calibration_batches(DATA, 20, 0),
        total=20,
        scratch=tmp_path,
        **arguments,
    )
    record = job.run()
    text = json.dumps({"record": record.to_json(), "tables": record.tables()}, allow_nan=False)
    return load_onnx(output), record, text


def test_integer_layers_that_the_runtime_computes_in_float_are_told(exported: Path, tmp_path: Path) -> None:
    warnings: list[str] = []
    run(exported, tmp_path, Options(calibrator="minmax"), warn=warnings.append)
    assert not warnings
    # ReLUs are no ranges then, and stand between the layer and its Q.
    symmetric = replace(CPU, activation=NumberFormat(dtype="int8", symmetric=True))
    _, record, _ = run(exported, tmp_path, Options(calibrator="minmax"), warn=warnings.append, pack=symmetric)
    unfused = [layer.node for layer in record.layers if not layer.fused]
    assert unfused
    (told,) = warnings
    assert told.startswith(
        f"{len(unfused)} of {len(record.layers)} integer layers are computed in float by onnxruntime"
    )
    assert f'"{unfused[0]}"' in told


def test_calibration_images_compare_where_there_is_no_val_split(exported: Path, tmp_path: Path) -> None:
    options = Options(calibrator="minmax", remedies=("mse",), if_better={"mse": float("inf")})
    for judging, split in (({}, "val"), ({"judging": None}, "calibration")):
        _, record, _ = run(exported, tmp_path, options, **judging)
        judged = [step.judgement for step in record.quantized.compared]
        assert [item.images for item in judged] == [20, 20]
        assert all((item.top1_drop is None) == (split == "calibration") for item in judged)
        assert any(table["title"] == f"Compared on a few {split} images" for table in record.tables())


def test_what_is_faster_on_integers_is_shipped(exported: Path, tmp_path: Path) -> None:
    watch = Stopwatch(ratio=2.0)
    model, record, text = run(exported, tmp_path, Options(calibrator="minmax"), stopwatch=watch)
    assert is_quantized(model)
    assert record.precision == "int8"
    assert "2.00x" in record.to_json()["do_no_harm"]
    assert all(layer.int8_ms == layer.float_ms == 1.0 for layer in record.layers)
    assert "Integers against float in onnxruntime:cpu" in text
    assert record.histograms


def test_where_no_integer_graph_is_faster_float_is_returned_and_named(exported: Path, tmp_path: Path) -> None:
    watch = Stopwatch(ratio=0.8)
    model, record, _ = run(exported, tmp_path, Options(calibrator="minmax"), stopwatch=watch)
    assert not is_quantized(model)
    assert record.precision == "fp32"
    assert model.graph == load_onnx(exported).graph
    assert "float is returned" in record.to_json()["do_no_harm"]
    assert {layer.why for layer in record.layers} == {"no integer graph was faster"}
    assert {layer.precision for layer in record.layers} == {"float"}
    assert record.to_json()["quantized_nodes"] == 0
    assert len(watch.raced[0]) > 2, "blocks in float were tried"


@pytest.mark.parametrize("where", ["layer_ms", "race"])
@pytest.mark.parametrize("budget", [None, 0.5])
def test_where_no_engine_is_made_here_integers_ship_untimed_and_it_is_told(
    where: str, budget: float | None, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TimingUnavailable("no engine here")

    monkeypatch.setattr(Stopwatch, where, fail)
    warnings: list[str] = []
    options = Options(calibrator="minmax", max_top1_drop=budget)
    watch = Stopwatch(ratio=2.0, runtime="tensorrt:trt")
    model, record, _ = run(exported, tmp_path, options, stopwatch=watch, warn=warnings.append)
    assert is_quantized(model)
    assert record.to_json()["do_no_harm"] == "not timed"
    assert len(warnings) == 1
    assert "no engine here" in warnings[0]


def test_without_a_stopwatch_it_says_that_nothing_was_timed(exported: Path, tmp_path: Path) -> None:
    _, record, _ = run(exported, tmp_path, Options(calibrator="minmax"))
    assert record.to_json()["do_no_harm"] == "not timed"
    assert record.precision == "int8"


def test_a_climb_is_told_rung_by_rung(exported: Path, tmp_path: Path) -> None:
    options = Options(
        calibrator="percentile",
        ladder=("mse", "equalize", "correct_bias", FLOAT_LAYERS),
        max_top1_drop=-1.0,
    )
    _, record, text = run(exported, tmp_path, options)
    tried = record.quantized.tried
    assert [step.rung for step in tried] == ["percentile", *options.ladder]
    assert record.quantized.met is False
    assert "Repair ladder, judged on val" in text
    assert "Sensitivity" in text
    assert record.to_json()["judged"]["images"] == 20


def test_what_does_not_fit_is_refused_before_anything_is_written(exported: Path, tmp_path: Path) -> None:
    _, _, _ = run(exported, tmp_path, Options(calibrator="minmax"))
    again = tmp_path / "again"
    again.mkdir()
    with pytest.raises(PassRequirementError, match="already quantized"):
        run(tmp_path / "int8.onnx", again, Options(calibrator="minmax"))
    with pytest.raises(PassRequirementError, match='no node "nowhere"'):
        run(exported, again, Options(calibrator="minmax", exclude=("nowhere",)))
    assert not list(again.iterdir())


def test_a_budget_without_images_to_judge_by_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(PassRequirementError, match="needs validation images"):
        run(exported, tmp_path, Options(calibrator="minmax", max_top1_drop=0.1), judging=None)


def test_why_a_layer_is_float_is_told(exported: Path, tmp_path: Path) -> None:
    options = Options(calibrator="minmax", ladder=(FLOAT_LAYERS,), max_top1_drop=-1.0, exclude=("conv/Conv",))
    _, record, _ = run(exported, tmp_path, options)
    reasons = {layer.node: layer.why for layer in record.layers}
    assert reasons.pop("conv/Conv") == "as asked"
    assert set(reasons.values()) == {"too sensitive for the accuracy budget"}


def test_noise_of_layers_is_against_the_graph_that_was_rounded(exported: Path, tmp_path: Path) -> None:
    _, plain, _ = run(exported, tmp_path, Options(calibrator="minmax"))
    _, equalized, _ = run(
        exported, tmp_path, Options(calibrator="minmax", remedies=("equalize", "correct_bias"))
    )
    told = [
        (before.sqnr_db, after.sqnr_db)
        for before, after in zip(plain.layers, equalized.layers, strict=True)
        if before.sqnr_db is not None and after.sqnr_db is not None
    ]
    assert len(told) == 2, "the last layer's result is float"
    assert all(after > before - 6 for before, after in told)


def test_a_graph_of_which_all_is_float_is_called_so(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deploycnn.quantization import quantize
    from deploycnn.quantization.sensitivity import Mixed

    def everything(_budget: float, layers, build, judge) -> Mixed:
        kept = frozenset(layer.node for layer in layers)
        return Mixed(keep_float=kept, judgement=judge(build(kept)), met=True, trials=1)

    monkeypatch.setattr(quantize, "keep_within", everything)
    model, record, _ = run(
        exported, tmp_path, Options(calibrator="minmax", ladder=(FLOAT_LAYERS,), max_top1_drop=-1e-9)
    )
    assert not is_quantized(model)
    assert record.precision == "fp32"
    assert record.to_json()["quantized_nodes"] == 0
    assert {layer.why for layer in record.layers} == {"too sensitive for the accuracy budget"}


def test_a_budget_needs_a_classifier(exported: Path, tmp_path: Path) -> None:
    model = load_onnx(exported)
    pooled = next(node for node in model.graph.node if node.op_type == "GlobalAveragePool")
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(pooled.output[0], TensorProto.FLOAT, None))
    path = tmp_path / "features.onnx"
    save_onnx(model, path)
    with pytest.raises(PassRequirementError, match=r"features\.onnx: a budget is a drop of top-1"):
        run(path, tmp_path, Options(calibrator="minmax", max_top1_drop=0.1))


def test_float_that_ships_has_not_the_judgement_of_the_integers(exported: Path, tmp_path: Path) -> None:
    options = Options(calibrator="minmax", ladder=(), max_top1_drop=-1.0)
    _, record, _ = run(exported, tmp_path, options, stopwatch=Stopwatch(ratio=0.8))
    assert record.precision == "fp32"
    assert "budget_met" not in record.to_json()
    assert all(layer.sqnr_db is None for layer in record.layers)
