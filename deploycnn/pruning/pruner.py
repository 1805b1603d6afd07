"""Prune a model in place: find groups, rank, choose, cut, check."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deploycnn.core import Json
from deploycnn.errors import PassRequirementError
from deploycnn.models.delta import drop
from deploycnn.models.macs import count_macs, count_params
from deploycnn.pruning.allocation import (
    Ladder,
    Scope,
    allocate,
    chosen,
    give_back,
    ladders,
    ratio_for_macs,
    ratios_of,
)
from deploycnn.pruning.costs import macs_after, macs_by_layer
from deploycnn.pruning.groups import ChannelGroup, IntArray, Protected
from deploycnn.pruning.importance import Criterion, Scores
from deploycnn.pruning.latency_goal import LatencyGoal
from deploycnn.pruning.layers import changed_widths, widths
from deploycnn.pruning.params_goal import steps_for_params
from deploycnn.pruning.structure import Structure, analyse, check_modules, is_inside, shrunk
from deploycnn.pruning.surgery import TOLERANCE, Removals, difference, removals, remove
from deploycnn.pruning.tracing import forward

#: Widths are multiples of this where neither the recipe nor the target says another number.
DEFAULT_STEP = 8


class NothingToRemoveError(PassRequirementError):
    """A goal that is reached before any channel is removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What to remove.

    Attributes:
        pruning_ratio: Share of the prunable channels to remove, or ``None``.
        macs_ratio: Share of the MACs to keep at most, or ``None``.
        params_ratio: Share of the parameters to keep at most, or ``None``.
        latency: Share of the latency on a target to keep, or ``None``; exactly one of these four is given.
        scope: "layer" ranks channels within their group, "global" across the model.
        round_to: Widths stay multiples of this; ``None``: 8, and with ``latency`` the step of the target's kernels.
        max_ratio: Most that a group may lose.
        first_widths: ``layers.widths`` before earlier cuts, where ``max_ratio`` holds for all of them together.
        protect: Names of modules whose output channels stay.
        ratios: Module name -> share of its channels to remove.
    """

    pruning_ratio: float | None = None
    macs_ratio: float | None = None
    params_ratio: float | None = None
    latency: LatencyGoal | None = None
    scope: Scope = "layer"
    round_to: int | None = None
    max_ratio: float = 0.9
    first_widths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    protect: tuple[str, ...] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)


def prune(model: nn.Module, images: Tensor, criterion: Criterion, goal: Goal, *, seed: int = 0) -> Json:
    """Remove channels from ``model``, in place.

    Args:
        model: From images to logits; float32, on the CPU. It ends in evaluation mode.
        images: Example input, (N, C, H, W) with N >= 2; the check after surgery runs on it.
        criterion: Scores the channels (see ``importance.py``).
        goal: How much, and where not.
        seed: Seed of the trials that find out what can be pruned.

    Returns:
        What was done, as plain JSON: MACs, parameters and widths before and after, and what was left alone,
        why.

    Raises:
        PassRequirementError: the model does not work, nothing of it can be pruned, a name is unknown, or the
            MACs asked for cannot be reached.
    """
    shapes = _shapes(model, images, "before pruning")
    shape = tuple(images.shape[1:])
    macs, params, old_widths = count_macs(model, shape), count_params(model), widths(model)
    trial = shrunk(model, images)
    structure = analyse(model, trial, protect=goal.protect, seed=seed)
    _check_ratios(model, structure, goal.ratios)
    scores = criterion(model, structure.groups)
    if goal.round_to is None:
        goal = dataclasses.replace(goal, round_to=goal.latency.step() if goal.latency else DEFAULT_STEP)
    found = ladders(
        structure.groups,
        scores,
        round_to=goal.round_to or DEFAULT_STEP,
        max_ratio=goal.max_ratio,
        kept=[
            old_widths[group.name][1] / goal.first_widths.get(group.name, old_widths[group.name])[1]
            for group in structure.groups
        ],
        ratios=ratios_of(structure.groups, goal.ratios),
    )
    protected = (*structure.protected, *_left_alone(structure.groups, scores, found, goal))
    blocks = goal.latency.blocks if goal.latency is not None else ()
    if not blocks and not any(len(ladder.steps) > 1 for ladder in found):
        raise PassRequirementError(f"prune: no layer can be pruned: {_summary(protected)}")
    losses, dropped = _losses(model, images, structure, found, goal, macs)
    cuts = removals(losses)
    _check_surgery(model, trial, cuts, structure)
    remove(model, cuts)
    drop(model, dropped)
    if _shapes(model, images, "after pruning") != shapes:
        raise RuntimeError("pruning changed the shape of the outputs")
    after = count_macs(model, shape)
    return {
        "round_to": goal.round_to,
        **({"latency": goal.latency.record} if goal.latency is not None else {}),
        "macs_before": macs,
        "macs_after": after,
        "macs_ratio": after / macs,
        "params_before": params,
        "params_after": count_params(model),
        "pruning_ratio": _share_removed(structure.groups, losses, dropped),
        "widths": changed_widths(old_widths, model),
        "protected": [
            {"layers": list(kept.layers), "channels": kept.channels, "reason": kept.reason}
            for kept in protected
        ],
    }


def _shapes(model: nn.Module, images: Tensor, when: str) -> list[tuple[int, ...]]:
    """Shapes of the outputs for ``images``, which must be finite."""
    with torch.no_grad():
        outputs = forward(model, images)
    if not all(bool(torch.isfinite(output).all()) for output in outputs):
        raise PassRequirementError(
            f"prune: the model's outputs {when} hold NaN or infinity; its weights are damaged: train it again"
        )
    return [tuple(output.shape) for output in outputs]


def _check_ratios(model: nn.Module, structure: Structure, ratios: Mapping[str, float]) -> None:
    """Every name in ``ratios`` must be a module in which something can be pruned."""
    check_modules(model, ratios, "prune.ratios")
    for name in ratios:
        if not any(is_inside(layer, name) for group in structure.groups for layer in group.producers):
            reasons = [
                p.reason for p in structure.protected if any(is_inside(layer, name) for layer in p.layers)
            ]
            why = reasons[0] if reasons else "it holds no layer that makes channels"
            raise PassRequirementError(
                f'prune.ratios: nothing in "{name}" can be pruned: {why}; remove the name'
            )


def _left_alone(
    groups: Sequence[ChannelGroup], scores: Sequence[Scores], found: Sequence[Ladder], goal: Goal
) -> list[Protected]:
    """Groups that could be pruned, but for the criterion or their width."""
    steps = dict.fromkeys(range(len(groups)), 1)
    for ladder in found:
        steps[ladder.group] = max(steps[ladder.group], len(ladder.steps))
    left = []
    for index, group in enumerate(groups):
        if scores[index] is None:
            reason = "the importance has nothing to rank these channels by"
        elif steps[index] == 1:
            reason = (
                f"no smaller multiple of round_to = {goal.round_to} within max_ratio = {goal.max_ratio:g}"
            )
        else:
            continue
        left.append(Protected(layers=group.producers, channels=group.width, reason=reason))
    return left


def _summary(protected: Sequence[Protected]) -> str:
    reasons = list(dict.fromkeys(kept.reason for kept in protected))
    return "; ".join(reasons) if reasons else "it has no convolution or linear layer"


def _losses(
    model: nn.Module,
    images: Tensor,
    structure: Structure,
    found: Sequence[Ladder],
    goal: Goal,
    macs: int,
) -> tuple[list[tuple[ChannelGroup, IntArray]], tuple[str, ...]]:
    """The channels that each group loses, and the blocks that are dropped.

    Raises:
        PassRequirementError: the goal cannot be reached.
        NothingToRemoveError: it asks for nothing.
    """
    dropped: tuple[str, ...] = ()
    if goal.pruning_ratio is not None:
        steps = allocate(found, goal.pruning_ratio, goal.scope)
    elif goal.latency is not None:
        steps, dropped = goal.latency.choose(model, structure.groups, found)
    elif goal.params_ratio is not None:
        steps = steps_for_params(model, structure.groups, found, goal.params_ratio)
    elif goal.macs_ratio is not None:
        steps = _steps_for_macs(model, images, structure, found, goal.macs_ratio, goal.scope, macs)
    else:
        raise TypeError("a goal needs pruning_ratio, macs_ratio, params_ratio or latency")
    losses = chosen(structure.groups, found, steps)
    if not losses and goal.pruning_ratio is not None:
        raise NothingToRemoveError(
            f"prune.pruning_ratio: {goal.pruning_ratio:g} is too little for any width to reach the next multiple of "
            f"round_to = {goal.round_to}; raise it, lower round_to, or set scope: global"
        )
    if not losses and not dropped:
        raise NothingToRemoveError(
            "prune: the goal is so near to the dense model that no channel needs to go; lower it or leave prune out"
        )
    return losses, dropped


def _share_removed(
    groups: Sequence[ChannelGroup], losses: Sequence[tuple[ChannelGroup, IntArray]], dropped: Sequence[str]
) -> float:
    """Of the prunable channels; those that only dropped blocks make are gone as well."""
    total = sum(group.width for group in groups)
    lost = {group.name: len(channels) for group, channels in losses}
    lost |= {
        group.name: group.width
        for group in groups
        if dropped and all(any(is_inside(layer, block) for block in dropped) for layer in group.producers)
    }
    return sum(lost.values()) / total if total else 0.0


def _steps_for_macs(
    model: nn.Module,
    images: Tensor,
    structure: Structure,
    found: Sequence[Ladder],
    macs_ratio: float,
    scope: Scope,
    macs: int,
) -> list[int]:
    """The step of each ladder at which at most ``macs_ratio`` of ``macs`` is left."""
    by_layer = macs_by_layer(model, images)
    fixed = macs - sum(by_layer.values())  # what other operators compute does not shrink here
    limit = int(macs_ratio * macs)

    def macs_with(steps: Sequence[int]) -> int:
        return fixed + macs_after(model, by_layer, removals(chosen(structure.groups, found, steps)))

    def macs_at(ratio: float) -> int:
        return macs_with(allocate(found, ratio, scope))

    ratio = ratio_for_macs(macs_at, limit)
    if ratio is None:
        raise PassRequirementError(
            f"prune.macs_ratio: {macs_ratio:g} is out of reach, the least is {macs_at(1.0) / macs:.4f}; "
            "raise it or max_ratio, or lower round_to"
        )
    steps = allocate(found, ratio, scope)
    return give_back(found, steps, lambda trial: macs_with(trial) <= limit) if scope == "global" else steps


def _check_surgery(model: nn.Module, images: Tensor, cuts: Removals, structure: Structure) -> None:
    """The pruned model must compute what the model computes with the same channels silenced.

    Raises:
        RuntimeError: it does not, although each group was tried out: an error of ours.
    """
    exact = copy.deepcopy(model).double()
    found = difference(exact, cuts, images.double(), training_heads=structure.training_heads)
    if isinstance(found, str) or found > TOLERANCE:
        raise RuntimeError(f"pruning would break the model although its parts were tried out ({found})")
