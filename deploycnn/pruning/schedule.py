"""Prune in steps with training between them: what a cut damages is mended before the next cut ranks channels."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from deploycnn.core import Json
from deploycnn.errors import PassRequirementError
from deploycnn.files import write_json
from deploycnn.models.artifact import get_architecture, load_model, save_model
from deploycnn.models.macs import count_macs
from deploycnn.pruning.importance import Criterion
from deploycnn.pruning.layers import widths
from deploycnn.pruning.pruner import Goal, prune

#: Trains a model in place after the cut of that number, and says how it went.
Tune = Callable[[nn.Module, int], Json]


def prune_in_steps(
    model: nn.Module,
    images: Tensor,
    criterion: Criterion,
    goal: Goal,
    *,
    steps: int,
    tune: Tune,
    scratch: Path,
    seed: int = 0,
) -> tuple[nn.Module, Json]:
    """Reach a goal in several cuts, each of the same share of what is left; the last one is not tuned.

    After each step the model is kept in ``scratch``, from where an interrupted run goes on.

    Args:
        model: As for :func:`deploycnn.pruning.pruner.prune`.
        images: Likewise.
        criterion: Scores channels anew before each cut.
        goal: Of the whole; with ``pruning_ratio`` or ``macs_ratio``, without ``ratios``.
        steps: Number of cuts.
        tune: Called between cuts.
        scratch: Existing folder.
        seed: As for ``prune``.

    Returns:
        The model and what was done; "steps" has an entry per cut, without "training" where nothing was cut because
        the cut before went far enough.

    Raises:
        PassRequirementError: see ``prune``.
    """
    shape = tuple(images.shape[1:])
    first_widths, first_macs = widths(model), count_macs(model, shape)
    record, done = _continued(scratch, steps)
    if done:
        model = load_model(scratch / f"step-{done}")
    for step in range(done + 1, steps + 1):
        left = 1.0
        if record:
            left = record["macs_ratio"] if goal.macs_ratio is not None else 1 - record["pruning_ratio"]
        part = _part(goal, left, step, steps)
        if part.macs_ratio == 1.0 or part.pruning_ratio == 0.0:
            # Widths come in multiples: the cut before took this one's share along.
            reached = {name: record[name] for name in ("macs_ratio", "pruning_ratio")}
            record = {**record, "steps": [*record["steps"], reached]}
            continue
        cut = prune(model, images, criterion, part, seed=seed)
        now = widths(model)
        removed = 1 - (1 - (record["pruning_ratio"] if record else 0.0)) * (1 - cut["pruning_ratio"])
        entry = {"macs_ratio": cut["macs_after"] / first_macs, "pruning_ratio": removed}
        if step < steps:
            entry["training"] = tune(model, step)
        record = {
            **cut,
            "macs_before": first_macs,
            "macs_ratio": cut["macs_after"] / first_macs,
            "params_before": record["params_before"] if record else cut["params_before"],
            "pruning_ratio": removed,
            "widths": {
                name: {"before": list(first_widths[name]), "after": list(width)}
                for name, width in now.items()
                if width != first_widths[name]
            },
            "steps": [*(record["steps"] if record else []), entry],
        }
        if step < steps:
            _keep(model, record, scratch / f"step-{step}")
    return model, record


def _part(goal: Goal, left: float, step: int, steps: int) -> Goal:
    """The goal of one cut, of what is ``left`` of 1: after step i of n, the n-th part of the way i times."""
    if goal.macs_ratio is not None:
        ratio = goal.macs_ratio ** (step / steps) / left
        return dataclasses.replace(goal, macs_ratio=min(ratio, 1.0))
    if goal.pruning_ratio is None:
        raise PassRequirementError(
            "prune.steps: go with pruning_ratio or macs_ratio; for other goals write one prune for each step"
        )
    kept = (1 - goal.pruning_ratio) ** (step / steps) / left
    return dataclasses.replace(goal, pruning_ratio=max(0.0, 1 - kept))


def _keep(model: nn.Module, record: Json, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder, get_architecture(model))
    # Last and at once, so that a folder with it is whole.
    write_json(folder / "record.json", record)


def _continued(scratch: Path, steps: int) -> tuple[Json, int]:
    """Record and number of the last step that was kept; nothing and 0 where there is none."""
    for step in range(steps - 1, 0, -1):
        path = scratch / f"step-{step}" / "record.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8")), step
    return {}, 0
