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
from deploycnn.pruning.pruner import Goal
from deploycnn.pruning.schedule import _part, prune_in_steps
from tests.pruning import nets
from tests.pruning.test_pruner import MAGNITUDE


def test_each_cut_takes_the_same_share_of_what_is_left() -> None:
    goal = Goal(macs_ratio=0.25)
    assert _part(goal, 1.0, 1, 2).macs_ratio == pytest.approx(0.5)
    assert _part(goal, 0.48, 2, 2).macs_ratio == pytest.approx(
        0.25 / 0.48
    )  # what the first cut overshot is not lost
    assert _part(goal, 0.2, 2, 2).macs_ratio == 1.0
    channels = Goal(pruning_ratio=0.75)
    assert _part(channels, 1.0, 1, 2).pruning_ratio == pytest.approx(0.5)
    assert _part(channels, 0.5, 2, 2).pruning_ratio == pytest.approx(0.5)


def test_a_cut_that_took_the_next_ones_share_along_is_enough(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CifarResNet(20).eval()
    set_architecture(model, architecture("zoo", {"name": "resnet20", "in_channels": 3}, 10))
    tuned: list[int] = []

    def tune(_: nn.Module, step: int) -> Json:
        tuned.append(step)
        return {}

    # In multiples of 8 the first cut halves all widths, which meets the second one's goal as well.
    goal = Goal(macs_ratio=0.3)
    pruned, record = prune_in_steps(
        model, nets.images(32), MAGNITUDE, goal, steps=3, tune=tune, scratch=tmp_path
    )
    ratios = [entry["macs_ratio"] for entry in record["steps"]]
    assert ratios[0] == ratios[1] > ratios[2]
    assert ratios[2] == record["macs_ratio"] <= 0.3
    assert tuned == [1]
    assert count_macs(pruned, (3, 32, 32)) == record["macs_after"]


def test_a_goal_that_cannot_be_parted_is_refused() -> None:
    with pytest.raises(PassRequirementError, match="steps: go with pruning_ratio or macs_ratio"):
        _part(Goal(), 1.0, 1, 2)
