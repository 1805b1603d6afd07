"""Prune to a share of the parameters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import nn

from deploycnn.errors import PassRequirementError
from deploycnn.models.macs import count_params
from deploycnn.pruning.allocation import Ladder, losses_of, pinned
from deploycnn.pruning.budget import problem, sides_of, widths_by_ladder
from deploycnn.pruning.groups import ChannelGroup
from deploycnn.pruning.layers import MIXING, groups_of, is_depthwise, width
from deploycnn.pruning.solver import cheapest, solve

FloatArray = npt.NDArray[np.float64]

#: Share of all parameters by which the solver's budget is lowered at least where its solution has too many.
_LESS = 1e-3


def steps_for_params(
    model: nn.Module, groups: Sequence[ChannelGroup], found: Sequence[Ladder], ratio: float
) -> list[int]:
    """The step of each ladder at which the least importance is lost with at most ``ratio`` of the parameters.

    Raises:
        PassRequirementError: no widths have so few.
    """
    sized = {member.layer for group in groups for member in group.members} & {
        name for name, module in model.named_modules() if list(module.parameters(recurse=False))
    }

    def count(layer: str, inputs: FloatArray, outputs: FloatArray) -> FloatArray:
        module = model.get_submodule(layer)
        if not isinstance(module, MIXING):
            per_channel = sum(parameter.numel() for parameter in module.parameters()) / width(module, "out")
            return per_channel * outputs
        weight = module.weight.numel()
        bias = outputs if module.bias is not None else np.zeros_like(outputs)
        if is_depthwise(module):
            return weight / width(module, "out") * outputs + bias
        kernel = weight * groups_of(module) // (width(module, "in") * width(module, "out"))
        return kernel * inputs * outputs / groups_of(module) + bias

    whole = count_params(model)
    pinned_ladders = pinned(found)
    rest = whole - sum(
        sum(parameter.numel() for parameter in model.get_submodule(layer).parameters(recurse=False))
        for layer in sized
    )
    posed = problem(
        model, sorted(sized), groups, pinned_ladders, losses_of(pinned_ladders), count, fixed=float(rest)
    )
    places = widths_by_ladder(model, groups, pinned_ladders)

    def exactly(levels: Sequence[int]) -> float:
        """Parameters at these levels: the solver's sum differs where layers were taken apart (``budget.problem``)."""
        found = float(rest)
        for layer in sized:
            inputs, outputs = (np.array(float(side.at(levels))) for side in sides_of(model, layer, places))
            found += float(count(layer, inputs, outputs))
        return found

    goal = budget = ratio * whole
    while (solution := solve(posed, budget)) is not None:
        over = exactly(solution.levels) - goal
        if over <= 0:
            return [
                ladder.steps[level] for ladder, level in zip(pinned_ladders, solution.levels, strict=True)
            ]
        budget -= max(over, _LESS * whole)
    least = exactly(cheapest(posed)) / whole
    raise PassRequirementError(
        f"prune.params_ratio: {ratio:g} is out of reach, the least is {least:.4f}; raise it or max_ratio, or lower "
        "round_to"
    )
