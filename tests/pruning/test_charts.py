"""Widths as bars, and sensitivity against surgery by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deploycnn.pruning import importance
from deploycnn.pruning.charts import bar, sensitivity, width_table
from tests.pruning import nets
from tests.pruning.test_pruner import MAGNITUDE


def test_bars_are_as_long_as_the_widths() -> None:
    assert bar(64, 32, 64) == "█" * 12 + "░" * 12
    assert bar(16, 1, 64) == "█" + "░" * 5
    assert bar(1, 1, 512) == "█"
    table = width_table(
        {"a": {"before": [3, 16], "after": [3, 8]}, "b": {"before": [16, 32], "after": [8, 32]}}
    )
    assert table.rows == (("a", 16, 8, "█" * 12 + "░" * 12),)


def test_sensitivity_removes_the_least_of_one_group_at_a_time() -> None:
    model = nets.lively(nets.Residual(8, 16))
    images, seen = nets.images(8, count=4), []

    def answers(scored: nn.Module) -> float:
        with torch.no_grad():
            return float(scored(images).double().sum())

    before = copy.deepcopy(model.state_dict())
    table = sensitivity(
        model, images, MAGNITUDE, answers, ratios=(0.25, 0.5), progress=lambda *done: seen.append(done)
    )
    assert table.columns == ("group", "channels", "val top-1 without 25%", "val top-1 without 50%")
    by_name = {row[0]: row[1:] for row in table.rows}
    assert by_name["(nothing removed)"][1] == answers(model)
    assert [by_name["stem"][0], by_name["conv1"][0]] == [8, 16]
    (score,) = importance.magnitude(model, [g for g in nets_groups(model) if g.name == "conv1"], power=2)
    assert score is not None
    for place, count in ((1, 4), (2, 8)):
        silenced = copy.deepcopy(model)
        with torch.no_grad():
            for channel in score.argsort()[:count]:
                silenced.conv2.weight[:, channel] = 0
        assert by_name["conv1"][place] == pytest.approx(answers(silenced), rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert seen[-1] == (4, 4)


def nets_groups(model: nn.Module) -> tuple[importance.ChannelGroup, ...]:
    from deploycnn.pruning.structure import analyse

    return analyse(model, nets.images()).groups
