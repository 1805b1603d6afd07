"""The main job on a tiny model: what a person runs, what it leaves, and what it says when the input is bad."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deploycnn
from deploycnn import api, files, store
from deploycnn.cli import main
from deploycnn.errors import ArtifactError, DataError, DeployCNNError, RecipeError
from deploycnn.profile_models import parse_threads
from deploycnn.report.schema import validate

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "source": {"zoo": "lenet5"},
    "data": "digits",
    "target": "onnxruntime-cpu",
    "variants": {
        "fp32": [{"train": {"epochs": 2}}, "export"],
        "int8": [{"train": {"epochs": 2}}, "export", {"int8": {"calibration_images": 64}}],
        "small": [
            {"train": {"epochs": 2}},
            {"prune": {"pruning_ratio": 0.5, "round_to": 2}},
            {"distill": {"teacher": "fp32", "epochs": 1}},
            "export",
        ],
        "torch": [{"train": {"epochs": 2}}],
    },
    "profile": {
        "runtimes": ["onnxruntime", "pytorch"],
        "batch_sizes": [1, 4],
        "threads": [1],
        "budget_s": 0.1,
        "rounds": 6,
        "memory": False,
    },
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> api.Run:
    return deploycnn.compress(RECIPE, out=tmp_path_factory.mktemp("runs") / "tiny")


def test_the_report_keeps_to_its_schema_and_is_what_is_on_disk(run: api.Run) -> None:
    on_disk = json.loads((run.path / "report.json").read_text())
    assert validate(on_disk) == run.report
    assert (run.path / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert [variant["name"] for variant in run.report["variants"]] == ["fp32", "int8", "small", "torch"]
    assert {variant["status"] for variant in run.report["variants"]} == {"measured"}
    assert run.problems == ()


def test_each_format_is_measured_by_the_runtimes_that_open_it(run: api.Run) -> None:
    rows = {(row["variant"], row["runtime"]) for row in run.report["measurements"]}
    onnx = {(name, "onnxruntime:cpu") for name in ("fp32", "int8", "small")}
    assert rows == onnx | {("torch", "pytorch:eager")}
    assert len(run.report["measurements"]) == 2 * len(rows)


def test_figures_follow_from_the_raw_samples(run: api.Run) -> None:
    for row in run.report["measurements"]:
        raw = json.loads((run.path / row["samples"]["file"]).read_text())
        stored = next(item for item in raw["rows"] if item["label"] == f"{row['variant']}|{row['runtime']}")
        samples = np.concatenate([np.concatenate(blocks) for blocks in stored["samples_ms"]])
        assert row["median_ms"] == pytest.approx(np.median(samples), rel=1e-6)
        assert row["p99_ms"] == pytest.approx(np.quantile(samples, 0.99), rel=1e-6)


def test_accuracy_is_that_of_the_exported_file(run: api.Run) -> None:
    import onnxruntime

    data = api.open_data(api.load_recipe(RECIPE))
    assert data is not None
    session = onnxruntime.InferenceSession(str(run.path / "variants/small/model.onnx"))
    test = data.dataset.test
    images = np.stack([data.preprocessing.apply(test.decode(index)) for index in range(len(test))])
    predicted = session.run(None, {"images": images})[0].argmax(axis=1)
    reported = next(variant for variant in run.report["variants"] if variant["name"] == "small")
    assert reported["top1"] == pytest.approx(float((predicted == test.labels).mean()))
    low, high = reported["top1_interval"]
    assert low <= reported["top1"] <= high


def test_shared_steps_are_made_once_and_pruning_shows(run: api.Run) -> None:
    folders = [
        path.name.partition("-")[0] for path in (run.path / "artifacts").iterdir() if path.name != ".partial"
    ]
    assert sorted(folders) == ["distill", "export", "export", "int8", "prune", "train", "zoo"]
    assert not list((run.path / "artifacts/.partial").iterdir())
    fp32, _, small, _ = run.report["variants"]
    assert small["macs"] < 0.6 * fp32["macs"]
    assert small["params"] < fp32["params"]


def test_a_second_run_repeats_nothing_and_says_the_same(
    run: api.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = run.path / "recipe.yaml"
    assert main(["compress", str(recipe), "--out", str(run.path), "--json"]) == 0
    captured = capsys.readouterr()
    again = json.loads(captured.out)
    assert " run " not in captured.err
    assert {**again, "created": ""} == {**run.report, "created": "", "recipe": again["recipe"]}


def test_dry_run_writes_nothing(run: api.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(run.path / "recipe.yaml")
    assert main(["compress", recipe, "--out", str(tmp_path / "new"), "--dry-run"]) == 0
    assert "7 of 7 steps to run" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()
    changed = ["--set", "variants.small.1.prune.pruning_ratio=0.25"]
    assert main(["compress", recipe, "--out", str(run.path), "--dry-run", *changed]) == 0
    assert "3 of 7 steps to run" in capsys.readouterr().out


def test_the_same_recipe_and_seed_give_the_same_weights(run: api.Run, tmp_path: Path) -> None:
    other = {**RECIPE, "variants": {name: RECIPE["variants"][name] for name in ("fp32", "small")}}
    deploycnn.export(other, out=tmp_path / "again")
    for name in ("fp32", "small"):
        first, second = (
            run.path / f"variants/{name}/model.onnx",
            tmp_path / f"again/variants/{name}/model.onnx",
        )
        assert first.read_bytes() == second.read_bytes()


def test_profile_takes_runs_files_and_checkpoints(run: api.Run, tmp_path: Path) -> None:
    model = run.path / "variants/int8/model.onnx"
    weights = next((run.path / "artifacts").glob("train-*/model.safetensors"))
    loose = tmp_path / "loose.safetensors"
    loose.write_bytes(weights.read_bytes())
    result = deploycnn.profile(
        run.path / "variants/fp32", model, loose, recipe=run.path / "recipe.yaml", runtimes=["onnxruntime"],
        threads=(1,), budget_s=0.1, out=tmp_path / "profile",
    )  # fmt: skip
    variants = {variant["name"]: variant for variant in result.report["variants"]}
    assert len(variants) == 3
    assert variants["loose"]["top1"] == run.report["variants"][0]["top1"]
    assert variants["loose"]["top1_drop"] == 0
    assert result.report["winner"] is None


def test_a_kill_and_a_second_call_give_the_undisturbed_result(run: api.Run, tmp_path: Path) -> None:
    recipe, out = run.path / "recipe.yaml", tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "deploycnn",
        "export",
        str(recipe),
        "--variant",
        "small",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("artifacts/zoo-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "deploy").exists()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    made = out / "variants/small/model.onnx"
    assert made.read_bytes() == (run.path / "variants/small/model.onnx").read_bytes()


def test_the_bundle_predicts_without_this_package(run: api.Run, tmp_path: Path) -> None:
    from PIL import Image

    bundle = deploycnn.export(run.path / "recipe.yaml", variants=["int8"], out=run.path)["int8"]
    data = api.open_data(api.load_recipe(RECIPE))
    assert data is not None
    paths, expected = [], []
    for index in range(8):
        pixels = data.dataset.test.decode(index)
        path = tmp_path / f"{index}.png"
        Image.fromarray(pixels).save(path)
        paths.append(str(path))
        expected.append(data.preprocessing.apply(pixels))
    done = subprocess.run(
        [sys.executable, "-I", str(bundle / "predict.py"), *paths], capture_output=True, text=True, check=True
    )
    import onnxruntime

    session = onnxruntime.InferenceSession(str(bundle / "model.onnx"))
    logits = session.run(None, {"images": np.stack(expected)})[0]
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    odds /= odds.sum(axis=1, keepdims=True)
    for line, row in zip(done.stdout.splitlines(), odds, strict=True):
        _, name, probability = line.split("\t")
        assert name == data.dataset.classes[int(row.argmax())]
        assert float(probability) == pytest.approx(row.max(), abs=2e-3)


def test_the_bundle_names_images_that_it_cannot_read(run: api.Run, tmp_path: Path) -> None:
    from PIL import Image

    bundle = deploycnn.export(run.path / "recipe.yaml", variants=["int8"], out=run.path)["int8"]
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "good.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no image")
    names = ["missing.png", "cut.jpg", "text.png", "good.png"]
    script = [sys.executable, "-I", str(bundle / "predict.py")]
    done = subprocess.run([*script, *names], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.startswith("good.png\t")
    errors = done.stderr.splitlines()
    assert [line.split(":")[:2] for line in errors] == [["error", f" {name}"] for name in names[:3]]
    (bundle / "model.onnx").rename(bundle / "elsewhere.onnx")
    done = subprocess.run([*script, "good.png"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "model.onnx: missing" in done.stderr
    (bundle / "elsewhere.onnx").rename(bundle / "model.onnx")


def test_the_bundle_holds_weights_that_lie_beside_the_model(run: api.Run, tmp_path: Path) -> None:
    import dataclasses
    import hashlib

    import onnx

    from deploycnn import bundle

    artifact = store.load_artifact((run.path / "variants/fp32").resolve())
    large = tmp_path / "large"
    large.mkdir()
    onnx.save_model(
        onnx.load(artifact.path), large / "model.onnx", save_as_external_data=True, location="model.onnx.data",
        size_threshold=1000,
    )  # fmt: skip
    (large / "manifest.json").write_text("{}")
    (large / "log.txt").write_text("")
    moved = dataclasses.replace(artifact, path=large / "model.onnx")
    bundle.write_bundle(tmp_path / "best", moved, variant="fp32", runtime=None, evidence={})
    assert sorted(item.name for item in (tmp_path / "best").iterdir()) == [
        "deploy.json", "model.onnx", "model.onnx.data", "predict.py",
    ]  # fmt: skip
    described = json.loads((tmp_path / "best/deploy.json").read_text())
    weights = (tmp_path / "best/model.onnx.data").read_bytes()
    assert described["files"]["model.onnx.data"] == hashlib.sha256(weights).hexdigest()
    import onnxruntime

    onnxruntime.InferenceSession(str(tmp_path / "best/model.onnx"))


@pytest.mark.parametrize("victim", ["predictions", "memory", "timing", "report.json"])
def test_a_full_disk_while_measuring_is_one_line(
    run: api.Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    victim: str,
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run.path, out, symlinks=True)
    for name in ("report.json", "report.html", "report.md"):
        (out / name).unlink()
    for path in out.glob("measurements/*"):
        path.unlink()
    whole = files.write_text

    def full(path: Path, text: str) -> None:
        if path.name.startswith(victim):
            with files.storage_errors(path):
                raise OSError(errno.ENOSPC, "No space left on device")
        whole(path, text)

    monkeypatch.setattr(files, "write_text", full)
    settings = ["--set", "profile.memory=true"]
    code = main(["compress", str(out / "recipe.yaml"), "--out", str(out), "--quiet", *settings])
    lines = capsys.readouterr().err.splitlines()
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith("error: ")
    assert "no space left" in lines[0]
    assert not (out / "report.json").exists()
    assert not list(out.rglob(".*.tmp*"))


def test_a_batch_that_fits_no_memory_is_one_line_and_the_run_stays(
    run: api.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run.path, out, symlinks=True)
    before = (out / "report.json").read_bytes()
    settings = ["--set", "profile.batch_sizes=[1,1000000000]"]
    code = main(["compress", str(out / "recipe.yaml"), "--out", str(out), "--quiet", *settings])
    lines = capsys.readouterr().err.splitlines()
    assert (code, len(lines)) == (2, 1)
    assert "batch size 1000000000" in lines[0]
    assert (out / "report.json").read_bytes() == before


@pytest.mark.parametrize("victim", ["copyfile", "symlink_to"])
def test_a_full_disk_in_export_is_one_line(
    run: api.Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    victim: str,
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run.path, out, symlinks=True)
    shutil.rmtree(out / "deploy", ignore_errors=True)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil if victim == "copyfile" else Path, victim, full)
    code = main(["export", str(out / "recipe.yaml"), "--variant", "int8", "--out", str(out), "--quiet"])
    lines = capsys.readouterr().err.splitlines()
    assert (code, len(lines)) == (2, 1)
    assert "no space left" in lines[0]
    assert not (out / "deploy/int8").exists()
    assert not list((out).glob("deploy/.int8*"))


def test_accuracy_that_could_not_be_measured_is_a_problem(
    run: api.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run.path, out, symlinks=True)
    for path in out.glob("measurements/predictions-*"):
        path.unlink()

    def broken(*_: Any, **__: Any) -> None:
        raise DataError("photo.png: vanished")

    monkeypatch.setattr("deploycnn.profiling.accuracy.evaluate", broken)
    assert main(["compress", str(out / "recipe.yaml"), "--out", str(out), "--quiet"]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert told == [
        "error: accuracy of fp32, int8, small on onnxruntime:cpu: photo.png: vanished",
        "error: accuracy of torch on pytorch:eager: photo.png: vanished",
    ]


def test_a_failing_baseline_is_told_once_when_quiet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    variants = "{a: [export, {int8: {exclude: [no_such_node]}}], b: [export]}"
    path.write_text(f"source: {{zoo: lenet5}}\ndata: digits\nvariants: {variants}\n")
    assert main(["compress", str(path), "--out", str(tmp_path / "run"), "--quiet"]) == 2
    assert capsys.readouterr().err.count("no_such_node") == 1


def test_a_variant_that_fails_is_reported_and_the_others_are_measured(tmp_path: Path, capfd: Any) -> None:
    recipe = {
        **RECIPE,
        "variants": {
            "fp32": [{"train": {"epochs": 2}}, "export"],
            "bad": [{"train": {"epochs": 2}}, "export", {"int8": {"exclude": ["no_such_node"]}}],
        },
    }
    run = deploycnn.compress(recipe, out=tmp_path / "run")
    bad = run.report["variants"][1]
    assert (bad["status"], bad["top1"], bad["latency_ms"]) == ("failed", None, {})
    assert "no_such_node" in bad["why"]
    assert len(run.problems) == 1
    assert run.report["variants"][0]["status"] == "measured"


def test_a_diverging_training_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    recipe = {**RECIPE, "variants": {"fp32": [{"train": {"epochs": 3, "lr": 1e12}}, "export"]}}
    with pytest.raises(DeployCNNError, match=r"train: .*(NaN|finite|diverged)"):
        deploycnn.compress(recipe, out=tmp_path / "run")
    assert not list((tmp_path / "run/artifacts").glob("train-*"))
    assert not (tmp_path / "run/report.json").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("source: {zoo: resnet21}\nvariants: {a: [export]}", "resnet20"),
        (
            "source: {zoo: lenet5}\nvariants: {a: [export, {prune: {pruning_ratio: 0.5}}]}",
            "move it before `export`",
        ),
        ("source: {zoo: lenet5}\nvariants: {a: [export]}\nprofle: {}", 'did you mean "profile"?'),
        ("source: {onnx: missing.onnx}\nvariants: {a: []}", "no such file"),
        ("source: {zoo: lenet5}\nvariants: {a: [{train: {epochs: 1}}, export]}", "needs images"),
        (
            "source: {zoo: lenet5}\ndata: digits\nvariants: {a: [export, int8, int8]}",
            "variants.a.2: int8: the model is already int8; put int8 directly behind export",
        ),
        (
            "source: {zoo: lenet5}\ndata: digits\nvariants: {a: [export, fp16, int8]}",
            "variants.a.2: int8: the model is already fp16; put int8 directly behind export",
        ),
        (
            "source: {zoo: lenet5}\ndata: digits\nvariants: {a: [export, qat]}",
            "variants.a.1: qat: the model is fp32, not quantized; put int8 before it",
        ),
        (
            "source: {zoo: lenet5}\ndata: digits\nvariants: {a: [export, int8, {fp16: {dtype: bf16}}]}",
            "variants.a.2: fp16: dtype bf16 behind int8 would round the scales",
        ),
        (
            "source: {zoo: lenet5}\ndata: digits\nvariants: {a: [export, {int8: {weights: int4}}, fp16]}",
            "variants.a.2: fp16: int8 left the weights packed",
        ),
        (
            "source: {zoo: lenet5}\ndata: digits\nvariants: {a: [export, int8, to_torch, export]}",
            "variants.a.2: to_torch: the model is int8; training wants fp32",
        ),
    ],
)
def test_bad_recipes_end_with_one_line_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, expected: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    assert main(["compress", str(path), "--out", str(tmp_path / "run"), "--plain", "--quiet"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert expected in errors[0]
    assert not (tmp_path / "run/report.json").exists()


def test_an_unavailable_reference_is_refused_before_any_work(tmp_path: Path) -> None:
    recipe = {**RECIPE, "profile": {"runtimes": ["onnxruntime:cuda"]}}
    with pytest.raises(DeployCNNError, match="onnxruntime:cuda"):
        deploycnn.compress(recipe, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_schema_is_left_alone(run: api.Run, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"schema_version": store.SCHEMA_VERSION + 1}))
    assert main(["compress", str(run.path / "recipe.yaml"), "--out", str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_an_unknown_variant_is_named(run: api.Run) -> None:
    with pytest.raises(RecipeError, match='no variant "fp33"; did you mean "fp32"'):
        deploycnn.export(run.path / "recipe.yaml", variants=["fp33"], out=run.path)


def test_models_that_could_not_be_measured_are_problems(run: api.Run, tmp_path: Path) -> None:
    model, torch = run.path / "variants/fp32/model.onnx", run.path / "variants/torch"
    options: dict[str, Any] = {"runtimes": ["onnxruntime"], "threads": (1,), "budget_s": 0.1}
    done = deploycnn.profile(model, torch, **options, out=tmp_path / "second")
    (problem,) = done.problems
    assert problem.endswith("not measured: none of the runtimes opens it")
    with pytest.raises(DeployCNNError, match="baseline .*: not measured: none of the runtimes opens it"):
        deploycnn.profile(torch, model, **options, out=tmp_path / "first")
    assert not (tmp_path / "first/report.json").exists()


@pytest.mark.parametrize(
    ("models", "options", "expected"),
    [
        (["missing.onnx"], {}, "missing.onnx: missing"),
        (["w.pt"], {}, "w.pt: a checkpoint holds weights only"),
        (["w.onnx"], {"budget_s": 0.0}, "profile.budget_s: should be greater than 0, got 0.0"),
        (["w.onnx"], {"budget_s": float("nan")}, "profile.budget_s: should be a finite number, got NaN"),
        (["w.onnx"], {"budget_s": float("inf")}, "profile.budget_s: should be a finite number, got Infinity"),
        (["w.onnx"], {"budget_s": 1e6}, "profile.budget_s: should be less than or equal to 86400"),
        (["w.onnx"], {"batch_sizes": (0,)}, "profile.batch_sizes.0: should be greater than or equal to 1"),
        (["w.onnx"], {"threads": ("al",)}, "profile.threads.0: should be a valid integer or 'all'"),
    ],
)
def test_profile_refuses_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: list[str], options: Any, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("w.pt", "w.onnx"):
        Path(name).write_bytes(b"")
    with pytest.raises(DeployCNNError) as caught:
        deploycnn.profile(*models, **options)
    assert expected in str(caught.value)
    assert not Path("runs").exists()


@pytest.mark.parametrize("threads", ["0", "-1", "x", "\u00b2", ""])
def test_threads_are_a_number_or_all(threads: str) -> None:
    with pytest.raises(RecipeError, match="should be a number above 0"):
        parse_threads(threads)


def test_profile_leaves_the_report_of_a_recipe_alone(run: api.Run) -> None:
    before = (run.path / "report.json").read_bytes()
    with pytest.raises(ArtifactError, match="choose another --out"):
        deploycnn.profile(run.path / "variants/fp32", out=run.path)
    assert (run.path / "report.json").read_bytes() == before


def test_profile_ignores_damaged_neighbours(run: api.Run, tmp_path: Path) -> None:
    shutil.copytree(run.path / "artifacts", tmp_path / "artifacts")
    exported = next((tmp_path / "artifacts").glob("int8-*"))
    (tmp_path / "artifacts/other").mkdir()
    (tmp_path / "artifacts/other/manifest.json").write_text("{")
    done = deploycnn.profile(exported, threads=(1,), budget_s=0.1, out=tmp_path / "out")
    assert done.report["variants"][0]["passes"] == ["train", "export", "int8"]


def test_unusable_images_leave_an_earlier_run_as_it_was(run: api.Run, tmp_path: Path) -> None:
    before = (run.path / "recipe.yaml").read_bytes()
    (tmp_path / "images/only").mkdir(parents=True)
    with pytest.raises(DataError):
        deploycnn.compress(RECIPE, data=tmp_path / "images", out=run.path)
    with pytest.raises(DataError):
        deploycnn.export(RECIPE, data=tmp_path / "images", out=tmp_path / "new")
    assert (run.path / "recipe.yaml").read_bytes() == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["compres"], "No such command 'compres'"),
        (
            ["profile", "a.onnx", "--batch-size", "0"],
            "Invalid value for '--batch-size': 0 is not in the range",
        ),
        (["profile"], "Missing argument 'MODELS...'"),
    ],
)
def test_usage_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {expected}")
    assert "--help` tells what it takes" in line


def test_a_bundle_of_an_earlier_winner_goes_where_nothing_wins(run: api.Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run", symlinks=True)
    (tmp_path / "run/best").mkdir(exist_ok=True)
    (tmp_path / "run/best/deploy.json").write_text("{}")
    again = {**RECIPE, "profile": {**RECIPE["profile"], "accuracy": False}}
    assert deploycnn.compress(again, out=tmp_path / "run").winner is None
    assert not (tmp_path / "run/best").exists()
