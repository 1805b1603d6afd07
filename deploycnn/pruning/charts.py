"""What pruning shows in the report: widths as bars, and how much accuracy each group costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from deploycnn.core import Json, Table
from deploycnn.pruning.groups import IntArray, Unit
from deploycnn.pruning.importance import Criterion
from deploycnn.pruning.structure import analyse, shrunk
from deploycnn.pruning.surgery import removals, remove, sharing

#: Signs of the longest bar.
_LONGEST = 24


def width_table(widths: Mapping[str, Json]) -> Table:
    """Output channels of each changed layer, before and after, drawn as a bar: full what stays, light what is gone.

    Args:
        widths: "widths" of what :func:`deploycnn.pruning.pruner.prune` returns.
    """
    changed = {
        name: (w["before"][1], w["after"][1]) for name, w in widths.items() if w["before"][1] != w["after"][1]
    }
    longest = max((before for before, _ in changed.values()), default=1)
    rows = tuple(
        (name, before, after, bar(before, after, longest)) for name, (before, after) in changed.items()
    )
    return Table(
        title="Output channels before and after", columns=("layer", "before", "after", "kept"), rows=rows
    )


def bar(before: int, after: int, longest: int) -> str:
    """A bar as long as ``before``, of which the share of ``after`` is full; at least one sign."""
    length = max(1, round(_LONGEST * before / longest))
    full = min(length, max(1, round(_LONGEST * after / longest)))
    return "█" * full + "░" * (length - full)


def sensitivity(
    model: nn.Module,
    images: Tensor,
    criterion: Criterion,
    top1: Callable[[nn.Module], float],
    *,
    ratios: Sequence[float] = (0.25, 0.5, 0.75),
    protect: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> Table:
    """Accuracy without the least important channels of one group at a time, untrained: Li et al. (ICLR 2017), figure 2.

    Args:
        model: Left as it is.
        images: Example input, (N, C, H, W).
        criterion: Ranks the channels.
        top1: Accuracy of a model, in [0, 1].
        ratios: Shares of a group's channels to remove.
        protect: As for ``prune``.
        seed: As for ``prune``.
        progress: Called with the number of models scored and of all.
    """
    groups = analyse(model, shrunk(model, images), protect=protect, seed=seed).groups
    scores = criterion(model, groups)
    rows: list[tuple[str | float | None, ...]] = [("(nothing removed)", None, *[top1(model)] * len(ratios))]
    done = 0
    for group, score in zip(groups, scores, strict=True):
        found: list[float | None] = []
        for ratio in ratios:
            if score is None:
                found.append(None)
            else:
                lost = _least(group.units, score, ratio)
                pruned = sharing(model)
                remove(pruned, removals([(group, lost)]))
                found.append(top1(pruned.eval()))
            done += 1
            progress(done, len(groups) * len(ratios))
        rows.append((group.name, group.width, *found))
    columns = ("group", "channels", *(f"val top-1 without {ratio:.0%}" for ratio in ratios))
    return Table(title="Sensitivity of the groups, before any training", columns=columns, rows=tuple(rows))


def _least(units: Sequence[Unit], score: npt.NDArray[np.float64], ratio: float) -> IntArray:
    """The least important channels of each unit; at least one channel stays."""
    lost = []
    for unit in units:
        order = np.argsort(score[unit.atoms].mean(axis=1), kind="stable")
        count = min(round(ratio * len(order)), len(order) - 1)
        lost.append(unit.atoms[order[:count]].ravel())
    return np.sort(np.concatenate(lost))
