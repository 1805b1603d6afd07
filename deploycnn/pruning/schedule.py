"""Prune in steps with training between them: what a cut damages is mended before the next cut ranks channels."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from deploycnn.core import Json
from deploycnn.errors import PassRequirementError
from deploycnn.files import write_json
from deploycnn.models.artifact import get_architecture, load_model, save_model
from deploycnn.models.macs import count_macs
from deploycnn.pruning.importance import Criterion
from deploycnn.pruning.layers import changed_widths, widths
from deploycnn.pruning.pruner import Goal, NothingToRemoveError, prune

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
        widths come in multiples: the cut before went far enough, or the next one will.

    Raises:
        PassRequirementError: see ``prune``.
    """
    shape = tuple(images.shape[1:])
    first_widths, first_macs = widths(model), count_macs(model, shape)
    record, done = _continued(scratch, steps)
    entries = list(record.pop("steps", ()))
    if done:
        model = load_model(scratch / f"step-{done}")
    for step in range(done + 1, steps + 1):
        reached = {
            name: record.get(name, none) for name, none in (("macs_ratio", 1.0), ("pruning_ratio", 0.0))
        }
        part = _part(dataclasses.replace(goal, first_widths=first_widths), reached, step, steps)
        try:
            cut = _cut(model, images, criterion, part, seed=seed, needed=step == steps and not record)
        except PassRequirementError as error:
            raise type(error)(
                f"{error} (that is cut {step} of {steps}, each of the same share; asked for was {_asked(goal)})"
            ) from error
        if cut is None:
            entries.append(reached)
            continue
        reached = {
            "macs_ratio": cut["macs_after"] / first_macs,
            "pruning_ratio": 1 - (1 - reached["pruning_ratio"]) * (1 - cut["pruning_ratio"]),
        }
        entries.append(reached if step == steps else {**reached, "training": tune(model, step)})
        since_first = {
            "macs_before": first_macs,
            "params_before": record.get("params_before", cut["params_before"]),
            "widths": changed_widths(first_widths, model),
        }
        record = {**cut, **since_first, **reached}
        if step < steps:
            _keep(model, {**record, "steps": entries}, scratch / f"step-{step}")
    return model, {**record, "steps": entries}


def _cut(
    model: nn.Module, images: Tensor, criterion: Criterion, part: Goal | None, *, seed: int, needed: bool
) -> Json | None:
    """Prune in place; ``None`` where widths come in multiples, so the cut before or the next one does this one's share.

    Raises:
        PassRequirementError: see ``prune``; also where nothing is to be removed, if that is ``needed``.
    """
    if part is None:
        return None
    try:
        return prune(model, images, criterion, part, seed=seed)
    except NothingToRemoveError:
        if needed:
            raise
        return None


def _part(goal: Goal, reached: Mapping[str, float], step: int, steps: int) -> Goal | None:
    """The goal of one cut: after step i of n, the n-th part of the way i times. ``None`` where that is reached."""
    if goal.macs_ratio is not None:
        ratio = goal.macs_ratio ** (step / steps) / reached["macs_ratio"]
        return dataclasses.replace(goal, macs_ratio=ratio) if ratio < 1 else None
    if goal.pruning_ratio is None:
        raise PassRequirementError(
            "prune.steps: go with pruning_ratio or macs_ratio; for other goals write one prune for each step"
        )
    ratio = 1 - (1 - goal.pruning_ratio) ** (step / steps) / (1 - reached["pruning_ratio"])
    return dataclasses.replace(goal, pruning_ratio=ratio) if ratio > 0 else None


def _asked(goal: Goal) -> str:
    return (
        f"macs_ratio {goal.macs_ratio:g}" if goal.macs_ratio else f"pruning_ratio {goal.pruning_ratio or 0:g}"
    )


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
