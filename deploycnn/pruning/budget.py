"""From ladders and a cost of layers to the solver's problem: widths are sums of what ladders leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import nn

from deploycnn.pruning.allocation import Ladder
from deploycnn.pruning.elimination import Factor, Problem, largest_table
from deploycnn.pruning.groups import ChannelGroup
from deploycnn.pruning.layers import MIXING, Side, is_depthwise, width

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

#: Cells of one factor's table, and of one that elimination makes of several. Layers behind more ladders than fit (long
#: concatenations, or several branches that all read several others) are taken apart, those of the largest tables first.
_CELLS = 1_000_000

#: (layer, channels in, channels out) -> cost, for arrays of widths.
Cost = Callable[[str, FloatArray, FloatArray], FloatArray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """Channels of a side of a layer: ``full`` minus what each ladder takes at its steps."""

    full: int
    taken: Mapping[int, IntArray]

    def at(self, levels: Sequence[int]) -> int:
        """Channels that are left at these levels of all variables."""
        return self.full - sum(int(by[levels[index]]) for index, by in self.taken.items())


def widths_by_ladder(
    model: nn.Module, groups: Sequence[ChannelGroup], found: Sequence[Ladder]
) -> dict[tuple[str, str], Width]:
    """What every side of a layer loses at the steps of each ladder."""
    taken: dict[tuple[str, str], dict[int, IntArray]] = {}
    for index, ladder in enumerate(found):
        group = groups[ladder.group]
        # The position of a channel in the order of removal; one that is not of this ladder is never removed.
        position = np.full(group.width, ladder.atoms.shape[0])
        position[ladder.atoms] = np.arange(ladder.atoms.shape[0])[:, None]
        for member in group.members:
            hit = np.sort(position[member.roots])
            lost = np.searchsorted(hit, np.asarray(ladder.steps), side="left").astype(np.int64)
            if lost.any():
                place = taken.setdefault((member.layer, member.side), {})
                place[index] = place[index] + lost if index in place else lost
    found_widths = {
        place: Width(full=width(model.get_submodule(place[0]), place[1]), taken=lost)  # type: ignore[arg-type] # a side
        for place, lost in taken.items()
    }
    for layer, side in list(found_widths):
        if is_depthwise(model.get_submodule(layer)):
            found_widths[layer, "in"] = found_widths[layer, side]
    return found_widths


def problem(
    model: nn.Module,
    layers: Sequence[str],
    groups: Sequence[ChannelGroup],
    found: Sequence[Ladder],
    losses: Sequence[FloatArray],
    cost: Cost,
    *,
    fixed: float = 0.0,
    blocks: Sequence[Collection[str]] = (),
) -> Problem:
    """The solver's problem.

    Args:
        model: Dense.
        layers: Names of the layers that cost something.
        groups: Prunable groups.
        found: Ladders; each is a variable whose levels are its steps.
        losses: Of each ladder by step, then of each block: kept, dropped.
        cost: Of layers.
        fixed: Cost that widths do not change.
        blocks: Layers that cost nothing where the block is dropped; each a variable of two levels, after the ladders.
    """
    places = widths_by_ladder(model, groups, found)
    sides = {layer: sides_of(model, layer, places) for layer in layers}
    block_of = {layer: len(found) + index for index, held in enumerate(blocks) for layer in held}
    most = _CELLS
    while True:
        factors = _factors(sides, found, cost, block_of, most)
        constant = sum(float(factor.cost) for factor in factors if not factor.variables)
        built = Problem(
            losses=tuple(losses),
            factors=_merged([factor for factor in factors if factor.variables]),
            fixed=fixed + constant,
        )
        if most == 1 or largest_table(built) <= _CELLS:
            return built
        most //= 10


def sides_of(model: nn.Module, layer: str, places: Mapping[tuple[str, str], Width]) -> tuple[Width, Width]:
    """What a layer's cost depends on: (in, out), and where it mixes no channels its output twice."""
    module = model.get_submodule(layer)
    first: Side = "in" if isinstance(module, MIXING) else "out"

    def side(name: Side) -> Width:
        return places.get((layer, name)) or Width(full=width(module, name), taken={})

    return side(first), side("out")


def _factors(
    sides: Mapping[str, tuple[Width, Width]],
    found: Sequence[Ladder],
    cost: Cost,
    block_of: Mapping[str, int],
    most: int,
) -> list[Factor]:
    """Costs of layers, each a table of at most so many cells, or taken apart."""
    factors: list[Factor] = []
    for layer, pair in sides.items():
        variables = tuple(sorted({index for side in pair for index in side.taken}))
        if math.prod(len(found[index].steps) for index in variables) <= most:
            grids = [_grid(side, variables, found) for side in pair]
            shape = np.broadcast_shapes(*(grid.shape for grid in grids))
            values = cost(layer, *(np.broadcast_to(grid, shape) for grid in grids))
            parts = [Factor(variables=variables, cost=np.asarray(values))]
        else:
            parts = _apart(layer, pair, variables, found, cost)
        factors += [_unless_dropped(part, block_of[layer]) for part in parts] if layer in block_of else parts
    return factors


def _unless_dropped(factor: Factor, block: int) -> Factor:
    """The same cost, and none where the block is dropped."""
    kept_or_not = np.stack([factor.cost, np.zeros_like(factor.cost)], axis=-1)
    return Factor(variables=(*factor.variables, block), cost=kept_or_not)


def _grid(side: Width, variables: Sequence[int], found: Sequence[Ladder]) -> FloatArray:
    """Channels for all combinations of steps, an axis per variable."""
    total = np.full((1,) * len(variables), float(side.full))
    for axis, index in enumerate(variables):
        if index in side.taken:
            shape = [1] * len(variables)
            shape[axis] = len(found[index].steps)
            total = total - side.taken[index].reshape(shape)
    found_widths: FloatArray = np.maximum(total, 1.0)
    return found_widths


def _apart(
    layer: str, sides: Sequence[Width], variables: Sequence[int], found: Sequence[Ladder], cost: Cost
) -> list[Factor]:
    """A cost over too many ladders as what each saves alone; the measurement afterwards corrects the sum."""
    dense = float(cost(layer, *(np.array(float(side.full)) for side in sides)))
    factors = []
    for number, index in enumerate(variables):
        alone = [_grid(side, (index,), found) for side in sides]
        shape = np.broadcast_shapes(*(grid.shape for grid in alone))
        saved = cost(layer, *(np.broadcast_to(grid, shape) for grid in alone)) - dense
        factors.append(Factor(variables=(index,), cost=saved + (dense if number == 0 else 0.0)))
    return factors


def _merged(factors: Sequence[Factor]) -> tuple[Factor, ...]:
    """Factors over the same variables become one."""
    merged: dict[tuple[int, ...], FloatArray] = {}
    for factor in factors:
        before = merged.get(factor.variables)
        merged[factor.variables] = factor.cost if before is None else before + factor.cost
    return tuple(Factor(variables=variables, cost=cost) for variables, cost in merged.items())
