"""Checkpoints that are there whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deploycnn.errors import StorageError
from deploycnn.training.budget import Pace, Plan
from deploycnn.training.evaluate import Score
from deploycnn.training.history import Epoch

#: Name of the checkpoint in a pass's scratch folder.
FILE = "checkpoint.pt"
#: Bump when the contents change meaning: older checkpoints are then not continued.
VERSION = 4


@dataclass(slots=True, kw_only=True)
class Progress:
    """What has been reached: with the states of model and optimizer, all that later epochs depend on.

    Attributes:
        initial: On val, before the first step.
        best: On val, of all epochs so far.
        best_epoch: Counted from 1; 0 where there is none yet.
        best_state: The model after that epoch, on the CPU; empty where only the last epoch counts.
        epochs: Finished ones.
        plan: Where training stands on its schedule.
        pace: What time it has taken.
    """

    initial: Score
    plan: Plan
    pace: Pace
    best: Score | None = None
    best_epoch: int = 0
    best_state: dict[str, Tensor] = field(default_factory=dict)
    epochs: list[Epoch] = field(default_factory=list)

    def to_state(self) -> dict[str, Any]:
        """As tensors and plain values."""
        return {
            "initial": dataclasses.asdict(self.initial),
            "plan": self.plan.to_state(),
            "pace": self.pace.to_state(),
            "best": dataclasses.asdict(self.best) if self.best else None,
            "best_epoch": self.best_epoch,
            "best_state": self.best_state,
            "epochs": [dataclasses.asdict(epoch) for epoch in self.epochs],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        """The inverse of :meth:`to_state`."""
        return cls(
            initial=Score(**state["initial"]),
            plan=Plan(**state["plan"]),
            pace=Pace(**state["pace"]),
            best=Score(**state["best"]) if state["best"] else None,
            best_epoch=state["best_epoch"],
            best_state=state["best_state"],
            epochs=[Epoch(**epoch) for epoch in state["epochs"]],
        )


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain values) to ``path``: beside it first, synced, then renamed.

    A process killed at any moment leaves either the old checkpoint or the new one.

    Raises:
        StorageError: no space or no permission.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"{path}: no space left on the disk; free some, run again") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise StorageError(f"{path}: cannot be written ({error.strerror})") from error
        raise


def load(path: Path, identity: str) -> dict[str, Any] | None:
    """The state saved at ``path``, on the CPU; tensors and plain values only, no code.

    Returns:
        ``None`` where there is no checkpoint, it is damaged, or it belongs to another training than
        ``identity`` names: training then starts from its beginning, which gives the same result.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except (
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
    ):  # what torch raises for files that it cannot read
        return None
    if not isinstance(state, dict) or state.get("version") != VERSION or state.get("identity") != identity:
        return None
    return state
