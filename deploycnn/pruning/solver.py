"""Choose one level for every ladder: least loss within a budget of cost, where costs couple ladders.

The problem is a multiple-choice knapsack with terms over several variables (a layer costs what its input and output
widths say). Three steps:

1. Lagrangian relaxation. For a price of cost the best levels are found exactly (``elimination``). The best dual value
   bounds every solution from below (Everett 1963; Geoffrion 1974).
2. HiGHS chooses among the levels near those of the prices around the budget.
3. Elimination also tells for each level the least dual value of all solutions that have it. Levels for which that is
   above what step 2 found are in no better solution (fixing by reduced costs); HiGHS chooses among the others. Where it
   comes to its end, the result is an optimum.

The bounds of steps 1 and 3 hold for the whole problem.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from deploycnn.pruning.elimination import Problem, best_levels, elimination_order, levels_left

#: Prices tried between the two that enclose the budget.
_PRICES = 24
#: Levels on each side of a price's solution that the integer program may choose from.
_AROUND = 1
#: Seconds for the two integer programs, and the relative gap at which they may stop.
_NEAR_S, _LEFT_S, _GAP = 0.3, 0.5, 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Levels, and how good they are.

    Attributes:
        levels: One for each variable.
        loss: Of them.
        cost: Of them.
        bound: No levels within the budget lose less.
    """

    levels: tuple[int, ...]
    loss: float
    cost: float
    bound: float


def cheapest(problem: Problem) -> tuple[int, ...]:
    """The levels of least cost."""
    return best_levels(problem, 0.0, 1.0, elimination_order(problem))


def solve(problem: Problem, budget: float) -> Solution | None:
    """Least loss at a cost of at most ``budget``; ``None`` where nothing costs so little."""
    order = elimination_order(problem)
    low = best_levels(problem, 1.0, 0.0, order)
    if problem.cost(low) <= budget:
        return Solution(levels=low, loss=problem.loss(low), cost=problem.cost(low), bound=problem.loss(low))
    high = cheapest(problem)
    if problem.cost(high) > budget * (1 + 1e-12):
        return None
    bound, price, seen = _relax(problem, budget, low, high, order)
    within = [levels for levels in seen if problem.cost(levels) <= budget * (1 + 1e-12)]
    best = min(within, key=problem.loss)
    near = sorted(seen, key=lambda levels: abs(problem.cost(levels) - budget))[:4]
    found, _ = _integer_program(problem, budget, _around(problem, [best, *near]), seconds=_NEAR_S)
    best = _better(problem, budget, best, found)
    left = levels_left(problem, budget, price, problem.loss(best), order)
    if all(len(levels) == 1 for levels in left):
        bound = problem.loss(best)
    else:
        found, among = _integer_program(problem, budget, left, seconds=_LEFT_S)
        best = _better(problem, budget, best, found)
        bound = max(bound, min(among, problem.loss(best)))
    return Solution(levels=best, loss=problem.loss(best), cost=problem.cost(best), bound=bound)


def _better(
    problem: Problem, budget: float, best: tuple[int, ...], found: tuple[int, ...] | None
) -> tuple[int, ...]:
    """``found`` where it keeps to the budget and loses less."""
    if found is None or problem.cost(found) > budget * (1 + 1e-9):
        return best
    return min(best, found, key=problem.loss)


def integer_optimum(problem: Problem, budget: float, *, seconds: float) -> Solution | None:
    """What HiGHS finds by itself in ``seconds`` among all levels, and its bound: :func:`solve` is held against it."""
    allowed = [list(range(len(loss))) for loss in problem.losses]
    levels, bound = _integer_program(problem, budget, allowed, seconds=seconds)
    if levels is None:
        return None
    return Solution(levels=levels, loss=problem.loss(levels), cost=problem.cost(levels), bound=bound)


def _relax(
    problem: Problem, budget: float, low: tuple[int, ...], high: tuple[int, ...], order: Sequence[int]
) -> tuple[float, float, list[tuple[int, ...]]]:
    """The best dual bound, its price, and the levels that were seen on the way.

    Prices are those at which the two enclosing solutions are equally good: a cutting plane of the dual function, which
    ends at its maximum.
    """
    seen = [low, high]
    bound, best_price = problem.loss(low), 0.0
    for _ in range(_PRICES):
        price = (problem.loss(high) - problem.loss(low)) / max(problem.cost(low) - problem.cost(high), 1e-300)
        levels = best_levels(problem, 1.0, price, order)
        value = problem.loss(levels) + price * (problem.cost(levels) - budget)
        if value > bound:
            bound, best_price = value, price
        at_low = problem.loss(low) + price * (problem.cost(low) - budget)
        if levels in (low, high) or value >= at_low - 1e-12 * max(1.0, abs(at_low)):
            break
        seen.append(levels)
        if problem.cost(levels) <= budget:
            high = levels
        else:
            low = levels
    return bound, best_price, seen


def _around(problem: Problem, centres: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Levels near those of ``centres``, for each variable."""
    found = []
    for index, loss in enumerate(problem.losses):
        near = {
            level + offset
            for levels in centres
            for level in (levels[index],)
            for offset in range(-_AROUND, _AROUND + 1)
        }
        found.append(sorted(level for level in near if 0 <= level < len(loss)))
    return found


def _integer_program(
    problem: Problem, budget: float, allowed: Sequence[Sequence[int]], *, seconds: float
) -> tuple[tuple[int, ...] | None, float]:
    """The best levels among ``allowed`` that HiGHS finds in its time (``None``: none), and its bound of their loss.

    A binary for each level, and a number in [0, 1] for each cell of a factor, whose sums along an axis are the binaries
    of that axis.
    """
    starts = np.concatenate([[0], np.cumsum([len(levels) for levels in allowed])])
    objective = [float(problem.losses[v][level]) for v, levels in enumerate(allowed) for level in levels]
    cost = [0.0] * len(objective)
    rows: list[tuple[int, int, float]] = []
    right: list[float] = []

    def equal(entries: Sequence[tuple[int, float]], value: float) -> None:
        rows.extend((len(right), column, factor) for column, factor in entries)
        right.append(value)

    for variable, levels in enumerate(allowed):
        equal([(int(starts[variable]) + k, 1.0) for k in range(len(levels))], 1.0)
    for factor in problem.factors:
        sub = factor.cost[np.ix_(*(allowed[v] for v in factor.variables))]
        if len(factor.variables) == 1:
            for k, value in enumerate(sub):
                cost[int(starts[factor.variables[0]]) + k] += float(value)
            continue
        first = len(objective)
        objective += [0.0] * sub.size
        cost += sub.ravel().tolist()
        cells = first + np.arange(sub.size).reshape(sub.shape)
        for axis, variable in enumerate(factor.variables):
            for k in range(sub.shape[axis]):
                summed = cells.take(k, axis=axis).ravel()
                equal([*((int(cell), 1.0) for cell in summed), (int(starts[variable]) + k, -1.0)], 0.0)
    count, binaries = len(objective), int(starts[-1])
    index, column, value = zip(*rows, strict=True)
    matrix = coo_matrix((value, (index, column)), shape=(len(right), count)).tocsr()
    scale = max(1e-12, budget)
    found = milp(
        np.array(objective),
        constraints=[
            LinearConstraint(matrix, right, right),
            LinearConstraint(np.array(cost)[None, :] / scale, -np.inf, (budget - problem.fixed) / scale),
        ],
        integrality=np.concatenate([np.ones(binaries), np.zeros(count - binaries)]),
        bounds=Bounds(0, 1),
        options={"time_limit": seconds, "mip_rel_gap": _GAP},
    )
    bound = -math.inf if found.mip_dual_bound is None else float(found.mip_dual_bound)
    if found.x is None:
        return None, bound
    levels = tuple(
        choices[int(np.argmax(found.x[int(starts[v]) : int(starts[v + 1])]))]
        for v, choices in enumerate(allowed)
    )
    return levels, bound
