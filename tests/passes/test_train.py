from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deploycnn import registry, schema
from deploycnn.core import Facts
from deploycnn.errors import PassRequirementError, PreprocessingError, RecipeError
from deploycnn.models.artifact import load_model
from deploycnn.passes.train import Train
from deploycnn.training import checkpoint
from tests.passes.training_support import DATA, QUICK, as_artifact, make_artifact, other_size
from tests.training.support import CLASSES, make_context, same_bits

ROOT = Path(__file__).parents[2]


def test_a_trained_artifact_carries_its_history_and_preprocessing(tmp_path: Path) -> None:
    source = make_artifact(tmp_path / "source")
    ctx = make_context(tmp_path / "run", DATA)
    draft = Train(**QUICK).run(source, ctx)
    trained = as_artifact(draft, ctx.output)
    assert sorted(path.name for path in ctx.output.iterdir()) == ["architecture.json", "model.safetensors"]
    assert not same_bits(load_model(trained.path), load_model(source.path))
    facts = draft.facts
    assert (facts.params, facts.macs, facts.classes) == (1, 2, CLASSES)
    assert facts.preprocessing == DATA.preprocessing.to_json()
    assert len(facts.record["training"]["epochs"]) == 2
    json.dumps(schema.to_json(facts), allow_nan=False)


def test_the_model_of_the_source_is_left_alone(tmp_path: Path) -> None:
    source = make_artifact(tmp_path / "source")
    before = source.path.read_bytes()
    Train(**QUICK).run(source, make_context(tmp_path / "run", DATA))
    assert source.path.read_bytes() == before


@pytest.mark.parametrize(
    ("weights", "trains"),
    [({"tensors": 10}, False), ({"tensors": 9, "new_head": ["fc.weight"]}, True), (None, True)],
)
def test_skip_trained_keeps_weights_that_a_source_loaded(
    tmp_path: Path, weights: dict[str, object] | None, trains: bool
) -> None:
    facts = Facts(record={"weights": weights} if weights else {})
    source = make_artifact(tmp_path / "source", facts=facts)
    ctx = make_context(tmp_path / "run", DATA)
    draft = Train(skip_trained=True, **QUICK).run(source, ctx)
    trained = load_model(as_artifact(draft, ctx.output).path)
    assert same_bits(trained, load_model(source.path)) is not trains
    assert draft.facts.record["training"]["kept_epoch"] > 0 if trains else True


def test_other_preprocessing_is_refused(tmp_path: Path) -> None:
    source = make_artifact(tmp_path / "source", facts=Facts(preprocessing=other_size(DATA)))
    with pytest.raises(PreprocessingError, match="train: the model.*scale: signed there, unit here"):
        Train(**QUICK).run(source, make_context(tmp_path / "run", DATA))


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    source = make_artifact(tmp_path / "source", classes=7)
    with pytest.raises(PassRequirementError, match=r"returns shape \(7,\), the data have 3 classes"):
        Train(**QUICK).run(source, make_context(tmp_path / "run", DATA))


def test_other_class_names_are_refused(tmp_path: Path) -> None:
    source = make_artifact(tmp_path / "source", facts=Facts(classes=("dot", "bar", "frame")))
    with pytest.raises(
        PassRequirementError, match=r"\(dot, bar, frame\), the data have 3 \(bar, dot, frame\)"
    ):
        Train(**QUICK).run(source, make_context(tmp_path / "run", DATA))


def test_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PassRequirementError, match="has no `data`"):
        Train(**QUICK).run(make_artifact(tmp_path / "source"), make_context(tmp_path / "run"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "epochs"),
        ({"lr": 0}, "lr"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"epocs": 3}, 'did you mean "epochs"'),
        ({"warmup_epochs": 9, "epochs": 9}, "warmup_epochs (9.0) should be less than epochs (9)"),
        ({"augment": {"horizontal_flips": True}}, 'did you mean "horizontal_flip"'),
    ],
)
def test_recipes_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        schema.build(Train, options, "variants.fp32.0.train")
    assert message in str(caught.value)


def test_every_field_has_help_and_survives_json() -> None:
    assert all(help_ for _, _, _, help_ in schema.describe(Train))
    step = schema.build(Train, {"lr": 0.2, "augment": {"horizontal_flip": True}}, "train")
    assert schema.build(Train, schema.to_json(step), "train") == step
    assert registry.get("pass", "train") is Train


def test_the_pass_is_found_without_loading_torch() -> None:
    code = "import sys, deploycnn.passes.train, deploycnn.passes.distill; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# -- kill -9 -------------------------------------------------------------------------------------

WORKER = """
import os, pathlib, signal, sys
from deploycnn.passes.train import Train
from deploycnn.training import checkpoint, loop
from tests.passes.training_support import DATA, QUICK, as_artifact, make_artifact
from tests.training.support import make_context

folder, kind, count = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def countdown(*_):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)

loop.REPORT_INTERVAL_S = 0
if kind == "sync":  # the new checkpoint is written but not yet in place
    checkpoint.os = type("os", (), {"fsync": countdown})
progress = countdown if kind == "step" else lambda *_: None
source_folder = folder / "source"
import shutil; shutil.rmtree(source_folder, ignore_errors=True)
source = make_artifact(source_folder)
ctx = make_context(folder, DATA, progress=progress)
Train(**QUICK).run(source, ctx)
"""


def worker(folder: Path, kind: str = "none", count: int = 0) -> int:
    command = [sys.executable, "-c", WORKER, str(folder), kind, str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def test_killed_at_three_moments_the_weights_are_the_same_bits(tmp_path: Path) -> None:
    assert worker(tmp_path / "whole") == 0
    for kind, count in (("step", 2), ("sync", 2), ("step", 3)):
        assert worker(tmp_path / "killed", kind, count) == -signal.SIGKILL
    assert worker(tmp_path / "killed") == 0
    first, second = (
        (tmp_path / name / "output" / "model.safetensors").read_bytes() for name in ("whole", "killed")
    )
    assert first == second


def test_what_the_worker_leaves_when_killed(tmp_path: Path) -> None:
    """The test above would prove little if the kills came before the first checkpoint."""
    assert worker(tmp_path, "sync", 2) == -signal.SIGKILL
    names = {path.name for path in (tmp_path / "scratch").iterdir()}
    assert names == {"checkpoint.pt", "checkpoint.tmp"}
    state = torch.load(tmp_path / "scratch" / checkpoint.FILE, weights_only=True)
    assert state["progress"]["epochs"] == []


def test_training_that_harms_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from deploycnn.training.artifact import trained_draft
    from deploycnn.training.history import History

    source = make_artifact(tmp_path / "source")
    for kept, warned in ((0.7, True), (0.9, False)):
        history = History(
            epochs=(), initial_val_top1=0.8, kept_epoch=1, kept_val_top1=kept, stopped="finished", precision="fp32",
            device="cpu",
        )  # fmt: skip
        caplog.clear()
        ctx = make_context(tmp_path / f"{kept}", DATA)
        trained_draft(source, load_model(source.path), history, ctx)
        assert ("training made val top-1 worse: 0.8000 before, 0.7000 kept" in caplog.text) == warned
