"""How many channels each group gives up, and which.

Widths stay multiples of ``round_to``: vectorized kernels, INT8 ones above all, handle 8 channels as fast as
5. So a unit of channels has a ladder of widths, and is pruned down some of its steps, least important
channels first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from deploycnn.pruning.groups import ChannelGroup, IntArray, Unit
from deploycnn.pruning.importance import Scores

Scope = Literal["layer", "global"]

#: Bisection halves the interval of pruning ratios this many times: 2 ** -30 is finer than one channel of any
#: model.
_HALVINGS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """What a unit of channels can be pruned to.

    Attributes:
        group: Index of its group.
        atoms: Channels that fall together, least important first, shape (A, S).
        importance: Of each atom, divided by the unit's mean, shape (A,).
        steps: Numbers of atoms to remove, ascending from 0.
        ratio: Share to remove that the recipe names for its group; ``None`` where it names none.
        layers: Layers that make these channels: what all blocks of a residual stage add to counts for each of them.
    """

    group: int
    atoms: IntArray
    importance: npt.NDArray[np.float64]
    steps: tuple[int, ...]
    ratio: float | None
    layers: int = 1

    def nearest(self, ratio: float) -> int:
        """The step nearest to a share of channels; of two equally near ones that which removes fewer."""
        return min(self.steps, key=lambda step: (abs(step - ratio * len(self.atoms)), step))

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.atoms.size


def ladders(
    groups: Sequence[ChannelGroup],
    scores: Sequence[Scores],
    *,
    round_to: int,
    max_ratio: float,
    ratios: Sequence[float | None],
    kept: Sequence[float] | None = None,
) -> list[Ladder]:
    """One ladder per unit of each group that has scores.

    Args:
        groups: Prunable groups.
        scores: Importance of each group's channels.
        round_to: Widths are multiples of this; the least is one multiple.
        max_ratio: Most that a unit may lose.
        ratios: For each group the ratio that the recipe names for it.
        kept: For each group the share of its channels that earlier cuts left, of which ``max_ratio`` tells as well; all
            by default.
    """
    found = []
    for index, (group, score) in enumerate(zip(groups, scores, strict=True)):
        if score is None:
            continue
        for unit in group.units:
            importance = score[unit.atoms].mean(axis=1)
            order = np.argsort(importance, kind="stable")
            mean = float(importance.mean())
            found.append(
                Ladder(
                    group=index,
                    atoms=unit.atoms[order],
                    importance=importance[order] / mean if mean > 0 else np.ones(len(order)),
                    steps=_steps(
                        unit, round_to, 1 - (1 - max_ratio) / (1.0 if kept is None else kept[index])
                    ),
                    ratio=ratios[index],
                    layers=len(group.producers),
                )
            )
    return found


def _steps(unit: Unit, round_to: int, max_ratio: float) -> tuple[int, ...]:
    count, size = unit.atoms.shape
    multiple = round_to // math.gcd(round_to, size)
    # A ratio such as 0.3 has no exact binary form; 10 channels of which 0.3 may go keep 7, not 8.
    least = max(1, math.ceil(count * (1 - max_ratio) - 1e-9))
    widths = [width for width in range(multiple, count, multiple) if width >= least]
    return (0, *(count - width for width in reversed(widths)))


def pinned(found: Sequence[Ladder]) -> list[Ladder]:
    """The ladders, those whose ratio the recipe names with that step alone."""
    return [
        ladder if ladder.ratio is None else replace(ladder, steps=(ladder.nearest(ladder.ratio),))
        for ladder in found
    ]


def losses_of(found: Sequence[Ladder]) -> list[npt.NDArray[np.float64]]:
    """What each ladder loses at each of its steps, comparable across ladders.

    The share of its importance that a unit gives up, for each channel and each layer that makes it: the mean-normalized
    scores that the scope "global" ranks by, added up. A channel of a residual stream is made by every block.
    """
    losses = []
    for ladder in found:
        sums = np.concatenate([[0.0], np.cumsum(ladder.importance)]) * ladder.atoms.shape[1] * ladder.layers
        losses.append(sums[list(ladder.steps)])
    return losses


def allocate(found: Sequence[Ladder], pruning_ratio: float, scope: Scope) -> list[int]:
    """The step of each ladder.

    Args:
        found: All ladders.
        pruning_ratio: Share of channels to remove where the recipe names no other.
        scope: "layer": each ladder by this ratio. "global": this share of all channels together, those whose
            importance, relative to the mean of their unit, is least.
    """
    steps = [ladder.nearest(pruning_ratio if ladder.ratio is None else ladder.ratio) for ladder in found]
    if scope == "layer":
        return steps
    blocks = []
    for index, ladder in enumerate(found):
        if ladder.ratio is None:
            steps[index] = 0
            importance = 0.0
            for lower, upper in itertools.pairwise(ladder.steps):
                # Importance rises along a ladder, up to rounding: no step may sort before the one below it.
                importance = max(importance, float(ladder.importance[lower:upper].mean()))
                blocks.append((importance, index, upper, (upper - lower) * ladder.atoms.shape[1]))
    target = pruning_ratio * sum(ladder.channels for ladder in found if ladder.ratio is None)
    removed = 0
    for _, index, step, channels in sorted(blocks):
        if abs(removed + channels - target) >= abs(removed - target):
            break
        steps[index], removed = step, removed + channels
    return steps


def give_back(found: Sequence[Ladder], steps: Sequence[int], fits: Callable[[list[int]], bool]) -> list[int]:
    """Undo steps that a goal does not need, the most important first.

    A goal is crossed by one block, and where that one is large (the channels of a whole residual stream) more is
    gone than was asked for.

    Args:
        found: All ladders.
        steps: Of ``allocate``.
        fits: Whether other steps meet the goal too.
    """
    kept = list(steps)
    undoable = {index for index, ladder in enumerate(found) if ladder.ratio is None and kept[index]}
    while undoable:
        lower = {index: found[index].steps[found[index].steps.index(kept[index]) - 1] for index in undoable}
        index = max(
            undoable,
            key=lambda i: (float(found[i].importance[lower[i] : kept[i]].mean()), -i),
        )
        trial = [*kept[:index], lower[index], *kept[index + 1 :]]
        if fits(trial):
            kept = trial
        if kept[index] != lower[index] or not kept[index]:
            undoable.discard(index)
    return kept


def chosen(
    groups: Sequence[ChannelGroup], found: Sequence[Ladder], steps: Sequence[int]
) -> list[tuple[ChannelGroup, IntArray]]:
    """The channels that each group loses, sorted; groups that lose none are left out."""
    lost: dict[int, list[IntArray]] = {}
    for ladder, step in zip(found, steps, strict=True):
        if step:
            lost.setdefault(ladder.group, []).append(ladder.atoms[:step].ravel())
    return [(groups[index], np.sort(np.concatenate(parts))) for index, parts in sorted(lost.items())]


def ratio_for_macs(macs_at: Callable[[float], int], limit: int) -> float | None:
    """The smallest pruning ratio at which the model has at most ``limit`` MACs; ``None`` where there is none.

    Args:
        macs_at: MACs left at a pruning ratio in [0, 1]; must not rise with it.
        limit: Most MACs allowed.
    """
    low, high = 0.0, 1.0
    if macs_at(high) > limit:
        return None
    if macs_at(low) <= limit:
        return low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if macs_at(middle) <= limit:
            high = middle
        else:
            low = middle
    return high


def ratios_of(groups: Sequence[ChannelGroup], wanted: Mapping[str, float]) -> list[float | None]:
    """The ratio that ``wanted`` (module name -> ratio) has for each group.

    A name counts for all layers in the module. Where several names fit, the longest wins, then the lowest
    ratio.
    """
    found: list[float | None] = []
    for group in groups:
        fitting = [
            (-len(name), ratio)
            for name, ratio in wanted.items()
            if any(layer == name or layer.startswith(name + ".") for layer in group.producers)
        ]
        found.append(min(fitting)[1] if fitting else None)
    return found
