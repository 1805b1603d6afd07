"""The goal of each cut of several."""

from __future__ import annotations

import pytest

from deploycnn.errors import PassRequirementError
from deploycnn.pruning.pruner import Goal
from deploycnn.pruning.schedule import _part


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


def test_a_goal_that_cannot_be_parted_is_refused() -> None:
    with pytest.raises(PassRequirementError, match="steps: go with pruning_ratio or macs_ratio"):
        _part(Goal(), 1.0, 1, 2)
