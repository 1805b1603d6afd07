from __future__ import annotations

import errno
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from deploycnn.errors import StorageError
from deploycnn.training import checkpoint

STATE = {"identity": "me", "model": {"weight": torch.arange(3.0)}}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c.pt", STATE)
    state = checkpoint.load(tmp_path / "c.pt", "me")
    assert state is not None
    assert torch.equal(state["model"]["weight"], torch.arange(3.0))
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_a_checkpoint_of_another_training_does_not_count(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c.pt", STATE)
    assert checkpoint.load(tmp_path / "c.pt", "you") is None
    assert checkpoint.load(tmp_path / "other.pt", "me") is None


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_a_truncated_checkpoint_does_not_count(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(path, STATE)
    path.write_bytes(path.read_bytes()[:keep])
    assert checkpoint.load(path, "me") is None


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("exploded"),)  # type: ignore[return-value]


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"identity": "me", "version": checkpoint.VERSION, "model": Bomb()}, "torch.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Bomb()))
    assert checkpoint.load(Path("torch.pt"), "me") is None
    assert checkpoint.load(Path("plain.pt"), "me") is None
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "no space left"), (errno.EACCES, "cannot be written")]
)
def test_a_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(path, STATE)

    def fail(descriptor: int) -> None:
        raise OSError(code, "as planted")

    monkeypatch.setattr(checkpoint.os, "fsync", fail)
    with pytest.raises(StorageError, match=words):
        checkpoint.save(path, {"identity": "me", "model": {}})
    assert [item.name for item in tmp_path.iterdir()] == ["c.pt"]
    state = checkpoint.load(path, "me")
    assert state is not None
    assert "weight" in state["model"]


class FullDisk(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_up_while_writing_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's writer must hand the OSError through, as it does for file objects but not for paths."""
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, _: save(state, FullDisk()))
    with pytest.raises(StorageError, match="no space left"):
        checkpoint.save(tmp_path / "c.pt", {"identity": "me", "model": {"weight": torch.zeros(100_000)}})
    assert list(tmp_path.iterdir()) == []
