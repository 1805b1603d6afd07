"""The goal of each cut of several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from deploycnn.core import Json
from deploycnn.errors import PassRequirementError
from deploycnn.models.artifact import architecture, set_architecture
from deploycnn.models.cifar_resnet import CifarResNet
from deploycnn.models.macs import count_macs
from deploycnn.pruning.pruner import Goal, NothingToRemoveError
from deploycnn.pruning.schedule import _part, prune_in_steps
from tests.pruning import nets
from tests.pruning.test_pruner import MAGNITUDE


def test_each_cut_takes_the_same_share_of_what_is_left() -> None:
    def macs(left: float, step: int) -> float | None:
        part = _part(Goal(macs_ratio=0.25), {"macs_ratio": left, "pruning_ratio": 0.9}, step, 2)
        return part.macs_ratio if part is not None else None

    def channels(gone: float, step: int) -> float | None:
        part = _part(Goal(pruning_ratio=0.75), {"macs_ratio": 0.9, "pruning_ratio": gone}, step, 2)
        return part.pruning_ratio if part is not None else None

    assert macs(1.0, 1) == pytest.approx(0.5)
    assert macs(0.48, 2) == pytest.approx(0.25 / 0.48)  # what the first cut overshot is not lost
    assert macs(0.2, 2) is None
    assert channels(0.0, 1) == pytest.approx(0.5)
    assert channels(0.5, 2) == pytest.approx(0.5)
    assert channels(0.8, 2) is None


def in_steps(goal: Goal, steps: int, scratch: Path) -> tuple[nn.Module, Json, list[int]]:
    """A ResNet-20 pruned so, the record, and the numbers of the steps behind which it was tuned."""
    torch.manual_seed(0)
    model = CifarResNet(20).eval()
    set_architecture(model, architecture("zoo", {"name": "resnet20", "in_channels": 3}, 10))
    tuned: list[int] = []

    def tune(_: nn.Module, step: int) -> Json:
        tuned.append(step)
        return {}

    pruned, record = prune_in_steps(
        model, nets.images(32), MAGNITUDE, goal, steps=steps, tune=tune, scratch=scratch
    )
    return pruned, record, tuned


def test_a_cut_that_took_the_next_ones_share_along_is_enough(tmp_path: Path) -> None:
    # In multiples of 8 the first cut halves all widths, which meets the second one's goal as well.
    pruned, record, tuned = in_steps(Goal(macs_ratio=0.3), 3, tmp_path)
    ratios = [entry["macs_ratio"] for entry in record["steps"]]
    assert ratios[0] == ratios[1] > ratios[2]
    assert ratios[2] == record["macs_ratio"] <= 0.3
    assert tuned == [1]
    assert count_macs(pruned, (3, 32, 32)) == record["macs_after"]


@pytest.mark.parametrize(("ratio", "steps"), [(0.5, 6), (0.3, 4)])
def test_cuts_too_small_for_a_multiple_are_left_to_the_next(tmp_path: Path, ratio: float, steps: int) -> None:
    pruned, record, tuned = in_steps(Goal(pruning_ratio=ratio), steps, tmp_path)
    gone = [entry["pruning_ratio"] for entry in record["steps"]]
    assert len(gone) == steps
    assert gone == sorted(gone)
    assert len({0.0, *gone}) < steps + 1  # at least one cut was left out
    assert record["pruning_ratio"] == gone[-1] > 0
    assert count_macs(pruned, (3, 32, 32)) == record["macs_after"]
    assert tuned == [
        step for step in range(1, steps) if gone[step - 1] > (gone[step - 2] if step > 1 else 0.0)
    ]


def test_steps_that_cut_nothing_at_all_are_refused(tmp_path: Path) -> None:
    model = CifarResNet(20).eval()
    with pytest.raises(NothingToRemoveError, match="pruning_ratio: 0.01 is too little"):
        prune_in_steps(
            model,
            nets.images(32),
            MAGNITUDE,
            Goal(pruning_ratio=0.01),
            steps=2,
            tune=lambda _, __: {},
            scratch=tmp_path,
        )


def test_a_goal_that_cannot_be_parted_is_refused() -> None:
    with pytest.raises(PassRequirementError, match="steps: go with pruning_ratio or macs_ratio"):
        _part(Goal(), {"macs_ratio": 1.0, "pruning_ratio": 0.0}, 1, 2)


@pytest.mark.parametrize("steps", [2, 4])
def test_no_layer_loses_more_than_max_ratio_in_all_cuts_together(tmp_path: Path, steps: int) -> None:
    goal = Goal(macs_ratio=0.35, scope="global", round_to=2, max_ratio=0.5)
    _, record, _ = in_steps(goal, steps, tmp_path)
    assert record["macs_ratio"] <= 0.35
    left = [
        after / before
        for width in record["widths"].values()
        for before, after in zip(width["before"], width["after"], strict=True)
    ]
    assert min(left) == 0.5


def test_a_goal_out_of_reach_tells_what_was_asked_for(tmp_path: Path) -> None:
    goal = Goal(macs_ratio=0.1, round_to=2, max_ratio=0.5)
    with pytest.raises(
        PassRequirementError, match=r"cut \d of 3, each of the same share; asked for was macs_ratio 0.1"
    ):
        in_steps(goal, 3, tmp_path)
