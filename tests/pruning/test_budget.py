"""Widths that ladders leave, against what surgery leaves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from deploycnn.errors import PassRequirementError
from deploycnn.models.cifar_resnet import CifarResNet
from deploycnn.models.macs import count_params
from deploycnn.models.small_mobilenet import SmallMobileNetV2
from deploycnn.pruning import importance
from deploycnn.pruning.allocation import chosen, ladders, losses_of
from deploycnn.pruning.budget import problem, widths_by_ladder
from deploycnn.pruning.elimination import largest_table
from deploycnn.pruning.layers import width
from deploycnn.pruning.params_goal import steps_for_params
from deploycnn.pruning.pruner import Goal, prune
from deploycnn.pruning.solver import solve
from deploycnn.pruning.structure import analyse
from deploycnn.pruning.surgery import removals, remove


@pytest.mark.parametrize("net", [lambda: CifarResNet(8), SmallMobileNetV2])
def test_widths_are_those_that_surgery_leaves(net: type) -> None:
    torch.manual_seed(0)
    model = net().eval()
    groups = analyse(model, torch.randn(2, 3, 32, 32)).groups
    scores = importance.random(model, groups, seed=1)
    found = ladders(groups, scores, round_to=4, max_ratio=0.8, ratios=[None] * len(groups))
    random = np.random.default_rng(0)
    levels = [int(random.integers(len(ladder.steps))) for ladder in found]
    places = widths_by_ladder(model, groups, found)
    expected = {
        place: size.full - sum(int(by[levels[index]]) for index, by in size.taken.items())
        for place, size in places.items()
    }
    steps = [ladder.steps[level] for ladder, level in zip(found, levels, strict=True)]
    remove(model, removals(chosen(groups, found, steps)))
    assert expected == {(layer, side): width(model.get_submodule(layer), side) for layer, side in places}
    assert len(expected) > 10


class Inception(nn.Module):
    """Four branches that all read the four before them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(channels, 32, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x).relu() for branch in self.branches], dim=1)


def inceptions() -> nn.Module:
    """Three of them, one after the other."""
    return nn.Sequential(
        *(Inception(channels) for channels in (3, 128, 128)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 4),
    ).eval()


def test_branches_that_read_many_others_do_not_fill_the_memory() -> None:
    torch.manual_seed(0)
    model = inceptions()
    groups = analyse(model, torch.randn(2, 3, 8, 8)).groups
    found = ladders(
        groups,
        importance.magnitude(model, groups, power=2),
        round_to=2,
        max_ratio=0.9,
        ratios=[None] * len(groups),
    )
    assert len(found) == 12
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    posed = problem(
        model, layers, groups, found, losses_of(found), lambda _, inputs, outputs: inputs * outputs
    )
    assert largest_table(posed) <= 1_000_000
    dense = posed.cost([0] * 12)
    assert dense == 3 * 128 + 2 * 128 * 128
    solution = solve(posed, 0.6 * dense)
    assert solution is not None
    assert solution.cost <= 0.6 * dense


@pytest.mark.parametrize("net", [lambda: CifarResNet(8), SmallMobileNetV2])
def test_a_goal_of_parameters_is_met_and_hardly_undercut(net: type) -> None:
    torch.manual_seed(0)
    model = net()
    record = prune(
        model,
        torch.randn(2, 3, 32, 32),
        lambda model, groups: importance.magnitude(model, groups, power=2),
        Goal(params_ratio=0.6, round_to=2),
    )
    assert record["params_after"] == count_params(model)
    assert 0.59 < record["params_after"] / record["params_before"] <= 0.6


@pytest.mark.parametrize("ratio", [0.6, 0.2])
def test_a_goal_of_parameters_holds_where_the_solver_takes_layers_apart(ratio: float) -> None:
    torch.manual_seed(0)
    model = inceptions()
    record = prune(
        model,
        torch.randn(2, 3, 8, 8),
        lambda model, groups: importance.magnitude(model, groups, power=2),
        Goal(params_ratio=ratio, round_to=2),
    )
    assert record["params_after"] == count_params(model)
    assert 0.9 * ratio < record["params_after"] / record["params_before"] <= ratio


def test_too_few_parameters_are_refused_with_the_least() -> None:
    model = CifarResNet(8).eval()
    groups = analyse(model, torch.randn(2, 3, 32, 32)).groups
    scores = importance.random(model, groups, seed=1)
    found = ladders(groups, scores, round_to=8, max_ratio=0.5, ratios=[None] * len(groups))
    with pytest.raises(
        PassRequirementError, match=r"params_ratio: 0.01 is out of reach, the least is 0\.\d+"
    ):
        steps_for_params(model, groups, found, 0.01)
