"""The run directory: whole or not at all, checked, locked, and never mistaken for something else."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from deploycnn import files
from deploycnn.core import Draft, Facts, TensorSpec
from deploycnn.errors import ArtifactError, StorageError
from deploycnn.plan import Step
from deploycnn.store import Store, load_artifact
from tests.fakes import Model

STEP = Step(
    key="ab" * 32,
    name="model",
    component=Model(name="m"),
    produces="torch",
    parent=None,
    references={},
    variants=("a",),
)
SPEC = TensorSpec(name="images", dtype="float32", shape=(None, 3, 8, 8))
DRAFT = Draft(
    format="torch",
    inputs=(SPEC,),
    outputs=(SPEC,),
    facts=Facts(params=3, classes=("a", "b"), record={"x": [1, None]}),
)


def commit(store: Store) -> Path:
    with store.workplace(STEP) as (output, _):
        (output / "model.safetensors").write_bytes(b"weights")
        return store.commit(STEP, DRAFT, output, seconds=1.5, extra={"seed": 0}).path


def test_commit_and_load_give_the_same_artifact(tmp_path: Path) -> None:
    with Store.open(tmp_path / "run") as store:
        assert not store.has(STEP)
        path = commit(store)
        artifact = store.load(STEP)
    assert path.read_bytes() == b"weights"
    assert (artifact.key, artifact.inputs, artifact.facts.params) == (STEP.key, (SPEC,), 3)
    assert artifact.facts.size_bytes == 7
    assert artifact.facts.classes == ("a", "b")
    assert artifact.facts.record == {"x": [1, None]}


def test_an_interrupted_step_leaves_no_artifact_and_keeps_its_scratch(tmp_path: Path) -> None:
    with Store.open(tmp_path / "run") as store:
        with pytest.raises(KeyboardInterrupt), store.workplace(STEP) as (output, scratch):
            (output / "model.safetensors").write_bytes(b"half")
            (scratch / "checkpoint").write_bytes(b"epoch 3")
            raise KeyboardInterrupt
        assert not store.has(STEP)
        with store.workplace(STEP) as (output, scratch):
            assert list(output.iterdir()) == []
            assert (scratch / "checkpoint").read_bytes() == b"epoch 3"


@pytest.mark.parametrize("damage", ["change", "truncate", "delete"])
def test_a_damaged_artifact_is_found(tmp_path: Path, damage: str) -> None:
    with Store.open(tmp_path / "run") as store:
        path = commit(store)
        if damage == "delete":
            path.unlink()
        else:
            path.write_bytes(b"Weights" if damage == "change" else b"weig")
        with pytest.raises(ArtifactError, match=r"model\.safetensors"):
            store.load(STEP)
        store.discard(STEP)
        assert not store.has(STEP)


def test_a_manifest_of_another_schema_is_refused(tmp_path: Path) -> None:
    with Store.open(tmp_path / "run") as store:
        folder = commit(store).parent
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(ArtifactError, match="schema version 99"):
        load_artifact(folder)


@pytest.mark.parametrize("content", ["", "[]", '{"schema_version": 1}', '{"schema_version": 1, "files": []}'])
def test_a_damaged_manifest_is_named_and_made_again(tmp_path: Path, content: str) -> None:
    with Store.open(tmp_path / "run") as store:
        folder = commit(store).parent
        (folder / "manifest.json").write_text(content)
        with pytest.raises(ArtifactError, match=r"manifest\.json: damaged.*; delete the folder"):
            store.load(STEP)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with Store.open(tmp_path / "run"):
        with pytest.raises(ArtifactError, match="another process"), Store.open(tmp_path / "run"):
            pass
    with Store.open(tmp_path / "run") as store:
        assert store.root.is_dir()


@pytest.mark.parametrize(
    ("marker", "expected"),
    [
        ('{"schema_version": 7}', "run schema 7"),
        ("{", "damaged"),
        ("[]", "damaged"),
        (None, "is not a run directory"),
    ],
)
def test_foreign_folders_are_left_alone(tmp_path: Path, marker: str | None, expected: str) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    if marker is not None:
        (tmp_path / "run.json").write_text(marker)
    before = sorted(item.name for item in tmp_path.iterdir())
    with pytest.raises(ArtifactError, match=expected), Store.open(tmp_path):
        pass
    assert sorted(item.name for item in tmp_path.iterdir()) == before


def test_a_full_disk_is_one_clear_error_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StorageError, match=r"a\.json: no space left"):
        files.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_a_measurement_that_cannot_be_read_does_not_count(tmp_path: Path) -> None:
    with Store.open(tmp_path / "run") as store:
        store.write_measurement("m", {"a": 1})
        assert store.measurement("m") == {"a": 1}
        (store.measurements / "m.json").write_text('{"a":')
        assert store.measurement("m") is None
        assert store.measurement("other") is None


def test_a_place_where_no_folder_can_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(StorageError, match=r"file/run: cannot be made \(Not a directory\); .* --out"),
        Store.open(tmp_path / "file" / "run"),
    ):
        pass
    assert (tmp_path / "file").read_text() == "x"
