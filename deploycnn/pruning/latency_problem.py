"""A goal of latency as the solver's problem, and what its solutions mean for the model."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import numpy as np
from torch import nn

from deploycnn.core import Json
from deploycnn.latency.layers import Layer
from deploycnn.latency.model import LatencyTable
from deploycnn.models.delta import drop
from deploycnn.pruning.allocation import Ladder, chosen, losses_of
from deploycnn.pruning.budget import problem, sides_of, widths_by_ladder
from deploycnn.pruning.dropping import Block
from deploycnn.pruning.elimination import Problem
from deploycnn.pruning.groups import ChannelGroup
from deploycnn.pruning.solver import Solution
from deploycnn.pruning.surgery import Removals, removals, remove


def cut(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    found: Sequence[Ladder],
    steps: Sequence[int],
    dropped: Sequence[str],
) -> nn.Module:
    """A copy of ``model`` without channels and blocks."""
    pruned = copy.deepcopy(model)
    remove(pruned, removals(chosen(groups, found, steps)))
    drop(pruned, dropped)
    return pruned


def posed_problem(
    model: nn.Module,
    layers: Sequence[Layer],
    groups: Sequence[ChannelGroup],
    found: Sequence[Ladder],
    table: LatencyTable,
    blocks: Sequence[Block] = (),
) -> Problem:
    """Widths and blocks against latency, for the solver."""
    kinds = {layer.name: layer.key for layer in layers}
    return problem(
        model,
        list(kinds),
        groups,
        found,
        [*losses_of(found), *(block.losses for block in blocks)],
        lambda layer, inputs, outputs: table.cost(kinds[layer], inputs, outputs),
        blocks=[block.layers & kinds.keys() for block in blocks],
    )


def layer_rows(
    model: nn.Module,
    layers: Sequence[Layer],
    groups: Sequence[ChannelGroup],
    found: Sequence[Ladder],
    solution: Solution,
    table: LatencyTable,
    gone: Collection[str] = (),
) -> list[Json]:
    """Widths and predicted milliseconds of each layer, before and after; of those that are ``gone``, 0 after."""
    places = widths_by_ladder(model, groups, found)
    rows = []
    for layer in layers:
        inputs, outputs = sides_of(model, layer.name, places)
        kept = (0, 0) if layer.name in gone else (inputs.at(solution.levels), outputs.at(solution.levels))
        before = float(table.cost(layer.key, float(inputs.full), float(outputs.full)))
        after = float(table.cost(layer.key, float(kept[0]), float(kept[1]))) if kept[1] else 0.0
        rows.append(
            {
                "layer": layer.name,
                "in": [inputs.full, kept[0]],
                "out": [outputs.full, kept[1]],
                "ms": [before, after],
            }
        )
    return rows


def draw(groups: Sequence[ChannelGroup], found: Sequence[Ladder], generator: np.random.Generator) -> Removals:
    """A random width configuration: every ladder at a step of its own."""
    steps = [int(generator.choice(ladder.steps)) for ladder in found]
    return removals(chosen(groups, found, steps))
