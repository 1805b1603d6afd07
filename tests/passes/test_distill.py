from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from deploycnn import plan, registry, schema
from deploycnn.core import Artifact, Context, Facts
from deploycnn.data.augment import Augmentation
from deploycnn.errors import ArtifactError, PassRequirementError, PreprocessingError, RecipeError
from deploycnn.models.artifact import load_model
from deploycnn.passes.distill import Distill, before_pruning
from deploycnn.passes.train import Train
from deploycnn.training import artifact as training_artifact
from deploycnn.training import checkpoint, loop
from deploycnn.training.logit_cache import LogitCache
from deploycnn.training.losses import Distillation
from tests.passes.training_support import DATA, QUICK, as_artifact, make_artifact, other_size
from tests.training.support import make_context, same_bits


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("teacher")
    ctx = make_context(folder, DATA)
    draft = Train(**{**QUICK, "epochs": 10, "optimizer": "adamw", "lr": 3e-3}).run(
        make_artifact(folder / "source"), ctx
    )
    assert draft.facts.record["training"]["kept_val_top1"] > 0.9
    return as_artifact(draft, ctx.output)


def distill(folder: Path, teacher: Artifact, **options: Any) -> tuple[Artifact, Context]:
    student = make_artifact(folder / "student", seed=5)
    ctx = make_context(folder / "run", DATA, references={"fp32": teacher})
    step = Distill(**{**QUICK, "teacher": "fp32", **options})
    assert step.references() == ("fp32",)
    return as_artifact(step.run(student, ctx), ctx.output), ctx


@pytest.mark.parametrize(("method", "epochs"), [("kd", 10), ("dkd", 30), ("dist", 10)])
def test_a_student_learns_from_its_teacher_without_labels(
    tmp_path: Path, teacher: Artifact, method: str, epochs: int
) -> None:
    options = {"epochs": epochs, "optimizer": "adamw", "lr": 3e-3, "label_weight": 0.0, "method": method}
    trained, _ = distill(tmp_path, teacher, **options)
    record = trained.facts.record
    assert record["training"]["kept_val_top1"] > 0.9 > record["training"]["initial_val_top1"]
    assert record["teacher"]["name"] == "fp32"
    assert record["teacher"]["val_top1"] > 0.9
    json.dumps(record, allow_nan=False)


def test_the_teacher_is_left_alone(tmp_path: Path, teacher: Artifact) -> None:
    before = load_model(teacher.path)
    distill(tmp_path, teacher)
    assert same_bits(before, load_model(teacher.path))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "kd"}, (4.0, 0.9, pytest.approx(0.1))),
        ({"method": "kd", "alpha": 0.5, "temperature": 2.0}, (2.0, 0.5, 0.5)),
        ({"method": "dkd"}, (4.0, 1.0, 1.0)),
        ({"method": "dist", "label_weight": 0.0}, (1.0, 1.0, 0.0)),
    ],
)
def test_what_is_minimized(
    tmp_path: Path,
    teacher: Artifact,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    expected: tuple[float, float, float],
) -> None:
    seen: list[Distillation] = []

    def fit(
        model: object, data: object, settings: object, *, loss: Distillation, spent_s: float, **_: object
    ) -> None:
        assert spent_s > 0  # loading the teacher, which is a part of `max_minutes`
        seen.append(loss)
        raise KeyboardInterrupt

    monkeypatch.setattr(training_artifact, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        distill(tmp_path, teacher, **options)
    (loss,) = seen
    assert (loss.temperature, loss.alpha, loss.label_weight) == expected
    assert not loss.teacher.training
    assert not any(parameter.requires_grad for parameter in loss.teacher.parameters())


def test_the_same_recipe_gives_the_same_bits(tmp_path: Path, teacher: Artifact) -> None:
    first, _ = distill(tmp_path / "first", teacher)
    second, _ = distill(tmp_path / "second", teacher)
    assert first.path.read_bytes() == second.path.read_bytes()


def test_a_teacher_from_a_folder(tmp_path: Path, teacher: Artifact) -> None:
    folder = tmp_path / "kept"
    shutil.copytree(teacher.path.parent, folder)
    facts = {"preprocessing": teacher.facts.preprocessing, "classes": list(teacher.facts.classes)}
    (folder / "manifest.json").write_text(json.dumps({"facts": facts}))
    student = make_artifact(tmp_path / "student", seed=5)
    step = Distill(teacher_folder=folder, **QUICK)
    assert step.references() == ()
    ctx = make_context(tmp_path / "run", DATA)
    trained = as_artifact(step.run(student, ctx), ctx.output)
    assert trained.facts.record["teacher"]["name"] == str(folder)
    by_name, _ = distill(tmp_path / "by_name", teacher)
    assert trained.path.read_bytes() == by_name.path.read_bytes()


def test_the_content_of_a_teachers_folder_enters_the_key(tmp_path: Path, teacher: Artifact) -> None:
    folder = tmp_path / "kept"
    shutil.copytree(teacher.path.parent, folder)
    step = Distill(teacher_folder=folder)
    before = plan.identity_of(step)["teacher_folder"]
    text = (folder / "architecture.json").read_text()
    (folder / "architecture.json").write_text(text + " ")
    assert plan.identity_of(step)["teacher_folder"] != before


def test_a_damaged_manifest_is_told(tmp_path: Path, teacher: Artifact) -> None:
    folder = tmp_path / "kept"
    shutil.copytree(teacher.path.parent, folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"manifest\.json: damaged"):
        Distill(teacher_folder=folder, **QUICK).run(
            make_artifact(tmp_path / "student"), make_context(tmp_path / "run", DATA)
        )


def test_a_teacher_of_other_preprocessing_is_refused(tmp_path: Path, teacher: Artifact) -> None:
    other = dataclasses.replace(teacher, facts=Facts(preprocessing=other_size(DATA)))
    with pytest.raises(PreprocessingError, match="the teacher fp32"):
        distill(tmp_path, other)


def test_a_student_of_other_preprocessing_is_refused(tmp_path: Path, teacher: Artifact) -> None:
    student = make_artifact(tmp_path / "student", facts=Facts(preprocessing=other_size(DATA)))
    ctx = make_context(tmp_path / "run", DATA, references={"fp32": teacher})
    with pytest.raises(PreprocessingError, match="distill: the model"):
        Distill(teacher="fp32", **QUICK).run(student, ctx)


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path) -> None:
    other = make_artifact(tmp_path / "teacher", classes=5)
    with pytest.raises(PassRequirementError, match=r"the teacher fp32 returns shape \(5,\)"):
        distill(tmp_path, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of `teacher` (a variant's name), `teachers` and `teacher_folder`"),
        ({"teacher": "a", "teachers": ["b"]}, "give one of `teacher`"),
        ({"teachers": ["a", "a"]}, "teachers should be different ones"),
        ({"teachers": ["a", "b"], "teacher_weights": [1.0]}, "one for each of `teachers`: 2, not 1"),
        ({"teachers": ["a", "b"], "teacher_weights": [0.0, 0.0]}, "not be negative, nor all 0"),
        ({"teacher": "a", "feature_layers": ["layer1"]}, "need `features`"),
        ({"teacher": "fp32", "beta": 2.0}, "beta belongs to dkd and dist"),
        ({"teacher": "fp32", "temperature": 0}, "temperature"),
        ({"teacher": "fp32", "method": "fitnet"}, "method"),
        ({"teacher": "fp32", "features": "hints"}, "features"),
        ({"teachr": "fp32"}, 'did you mean "teacher"'),
    ],
)
def test_recipes_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        schema.build(Distill, options, "variants.pruned.1.distill")
    assert message in str(caught.value)


def test_it_shares_the_fields_of_train() -> None:
    ours, theirs = (set(schema.field_names(cls)) for cls in (Distill, Train))
    assert theirs - ours == {"skip_trained"}
    assert all(help_ for _, _, _, help_ in schema.describe(Distill))
    assert registry.get("pass", "distill") is Distill
    assert Distill(teacher="fp32").reestimate_bn
    assert Distill(teacher="fp32").peak_lr == 0.05


# -- features, several teachers, self, caching ---------------------------------------------------


@pytest.mark.parametrize("features", ["at", "fitnet"])
def test_features_alone_teach(tmp_path: Path, teacher: Artifact, features: str) -> None:
    """Without labels and logits the student's maps come nearer to the teacher's."""
    options = {"features": features, "alpha": 0.0, "label_weight": 0.0, "keep": "last"}
    trained, ctx = distill(tmp_path, teacher, epochs=6, **options)
    (pairs,) = trained.facts.record["features"]
    assert all(ours == theirs for ours, theirs in pairs)
    epochs = trained.facts.record["training"]["epochs"]
    assert epochs[-1]["loss"] < 0.8 * epochs[0]["loss"]
    # What compared the maps is no part of the model.
    before, after = load_model(tmp_path / "student" / "model.safetensors"), load_model(trained.path)
    assert [name for name, _ in before.named_parameters()] == [name for name, _ in after.named_parameters()]
    state = torch.load(ctx.scratch / checkpoint.FILE, weights_only=True)
    assert bool(state["trained"]) is (features == "fitnet")


class Stop(Exception):  # noqa: N818 - not an error
    """The user's Ctrl-C."""


FLIPS = Augmentation(horizontal_flip=True)


@pytest.mark.parametrize(
    "options",
    [
        {"features": "fitnet", "mixup": 0.4, "ema": 0.9},
        {"method": "dkd", "augment": FLIPS},
        {"features": "at", "method": "dist", "cutmix": 1.0, "label_smoothing": 0.1},
    ],
)
def test_interrupted_and_continued_gives_the_same_bits(
    tmp_path: Path, teacher: Artifact, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(loop, "REPORT_INTERVAL_S", 0)
    options = {**QUICK, "epochs": 3, **options}
    whole, _ = distill(tmp_path / "whole", teacher, **options)
    student = make_artifact(tmp_path / "student", seed=5)
    for stop in (6, 5):
        left = [stop]

        def progress(done: float, total: float, message: str = "", left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise Stop

        ctx = make_context(tmp_path / "parts", DATA, references={"fp32": teacher}, progress=progress)
        with pytest.raises(Stop):
            Distill(teacher="fp32", **options).run(student, ctx)
    ctx = make_context(tmp_path / "parts", DATA, references={"fp32": teacher})
    continued = as_artifact(Distill(teacher="fp32", **options).run(student, ctx), ctx.output)
    assert continued.path.read_bytes() == whole.path.read_bytes()


@pytest.mark.parametrize("augment", [Augmentation(), FLIPS])
def test_cached_or_not_the_bits_are_the_same(
    tmp_path: Path, teacher: Artifact, monkeypatch: pytest.MonkeyPatch, augment: Augmentation
) -> None:
    calls: dict[bool, int] = {}
    compute = LogitCache._compute

    def counted(cache: LogitCache, *args: Any) -> Any:
        calls[cached] = calls.get(cached, 0) + 1
        return compute(cache, *args)

    monkeypatch.setattr(LogitCache, "_compute", counted)
    made = []
    for cached in (True, False):
        options = {**QUICK, "epochs": 8, "augment": augment, "cache_teacher": cached}
        trained, _ = distill(tmp_path / str(cached), teacher, **options)
        made.append(trained.path.read_bytes())
    assert made[0] == made[1]
    assert calls[True] < calls[False] == 8 * 3


def test_several_teachers(tmp_path: Path, teacher: Artifact) -> None:
    other = make_artifact(tmp_path / "other", seed=9)
    student = make_artifact(tmp_path / "student", seed=5)
    ctx = make_context(tmp_path / "run", DATA, references={"fp32": teacher, "other": other})
    step = Distill(teachers=("fp32", "other"), teacher_weights=(2.0, 1.0), **QUICK)
    assert step.references() == ("fp32", "other")
    trained = as_artifact(step.run(student, ctx), ctx.output)
    told = trained.facts.record["teachers"]
    assert [entry["name"] for entry in told] == ["fp32", "other"]
    assert trained.facts.record["teacher"] == told[0]
    # A teacher of weight 0 changes nothing but the order of additions.
    ctx = make_context(tmp_path / "alone", DATA, references={"fp32": teacher, "other": other})
    alone = Distill(teachers=("fp32", "other"), teacher_weights=(1.0, 0.0), **QUICK).run(student, ctx)
    single, _ = distill(tmp_path / "single", teacher)
    ours, theirs = load_model(as_artifact(alone, ctx.output).path), load_model(single.path)
    for first, second in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def test_self_is_the_model_before_it_was_first_pruned(tmp_path: Path, teacher: Artifact) -> None:
    def stage(name: str, **record: Any) -> Artifact:
        return dataclasses.replace(teacher, key=name, facts=Facts(record=record))

    chain = (
        stage("source"),
        stage("trained"),
        stage("cut", pruning={}),
        stage("tuned"),
        stage("cut2", pruning={}),
    )
    ctx = make_context(tmp_path, DATA, lineage=chain)
    assert before_pruning(chain[-1], ctx).key == "trained"
    sparse = (stage("source"), stage("zeros", sparsity={}))
    assert before_pruning(sparse[-1], make_context(tmp_path, DATA, lineage=sparse)).key == "source"
    plain = chain[:2]
    assert before_pruning(plain[-1], make_context(tmp_path, DATA, lineage=plain)).key == "trained"


def test_a_model_teaches_itself(tmp_path: Path, teacher: Artifact) -> None:
    student = dataclasses.replace(
        make_artifact(tmp_path / "student", seed=5), facts=Facts(record={"pruning": {}})
    )
    ctx = make_context(tmp_path / "run", DATA, lineage=(teacher, student))
    step = Distill(teacher="self", **QUICK)
    assert step.references() == ()
    trained = as_artifact(step.run(student, ctx), ctx.output)
    assert trained.facts.record["teacher"]["name"] == "self"
    by_name, _ = distill(tmp_path / "by_name", teacher)
    assert trained.path.read_bytes() == by_name.path.read_bytes()
