"""Choose one level for every ladder: least loss within a budget of cost, where costs couple ladders.

The problem is a multiple-choice knapsack with terms over several variables (a layer costs what its input and output
widths say). Three steps:

1. Lagrangian relaxation. For a price of cost the best levels are found exactly, by eliminating one variable after the
   other (Bertele and Brioschi 1972): networks are nearly trees, so tables stay small. The best dual value bounds every
   solution from below (Everett 1963; Geoffrion 1974).
2. Levels near those of the prices around the budget stay; the rest is left out.
3. What remains is solved as an integer program by HiGHS.

The bound of step 1 holds for the whole problem, so what step 2 leaves out is accounted for in the gap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

FloatArray = npt.NDArray[np.float64]

#: Prices tried between the two that enclose the budget.
_PRICES = 24
#: Levels on each side of a price's solution that the integer program may choose from.
_AROUND = 1
#: Seconds for the integer program, and the relative gap at which it may stop.
_TIME_S, _GAP = 1.0, 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """A cost that depends on the levels of some variables: an array with an axis for each."""

    variables: tuple[int, ...]
    cost: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What to choose.

    Attributes:
        losses: For each variable the loss at each of its levels, shape (levels,).
        factors: Costs; they add up.
        fixed: Cost that no level changes.
    """

    losses: tuple[FloatArray, ...]
    factors: tuple[Factor, ...]
    fixed: float = 0.0

    def cost(self, levels: Sequence[int]) -> float:
        """Cost at these levels."""
        parts = (float(f.cost[tuple(levels[v] for v in f.variables)]) for f in self.factors)
        return self.fixed + sum(parts)

    def loss(self, levels: Sequence[int]) -> float:
        """Loss at these levels."""
        return float(sum(loss[level] for loss, level in zip(self.losses, levels, strict=True)))


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
    return _best(problem, 0.0, 1.0, _order(problem))


def solve(problem: Problem, budget: float) -> Solution | None:
    """Least loss at a cost of at most ``budget``; ``None`` where nothing costs so little."""
    order = _order(problem)
    low = _best(problem, 1.0, 0.0, order)
    if problem.cost(low) <= budget:
        return Solution(levels=low, loss=problem.loss(low), cost=problem.cost(low), bound=problem.loss(low))
    high = cheapest(problem)
    if problem.cost(high) > budget * (1 + 1e-12):
        return None
    bound, seen = _relax(problem, budget, low, high, order)
    within = [levels for levels in seen if problem.cost(levels) <= budget * (1 + 1e-12)]
    best = min(within, key=problem.loss)
    near = sorted(seen, key=lambda levels: abs(problem.cost(levels) - budget))[:4]
    refined, _ = _integer_program(problem, budget, _around(problem, [best, *near]), seconds=_TIME_S)
    if (
        refined is not None
        and problem.cost(refined) <= budget * (1 + 1e-9)
        and problem.loss(refined) < problem.loss(best)
    ):
        best = refined
    return Solution(levels=best, loss=problem.loss(best), cost=problem.cost(best), bound=bound)


def integer_optimum(problem: Problem, budget: float, *, seconds: float) -> Solution | None:
    """What HiGHS finds by itself in ``seconds`` among all levels, and its bound: :func:`solve` is held against it."""
    allowed = [list(range(len(loss))) for loss in problem.losses]
    levels, bound = _integer_program(problem, budget, allowed, seconds=seconds)
    if levels is None:
        return None
    return Solution(levels=levels, loss=problem.loss(levels), cost=problem.cost(levels), bound=bound)


def _relax(
    problem: Problem, budget: float, low: tuple[int, ...], high: tuple[int, ...], order: Sequence[int]
) -> tuple[float, list[tuple[int, ...]]]:
    """The best dual bound, and the levels that were seen on the way.

    Prices are those at which the two enclosing solutions are equally good: a cutting plane of the dual function, which
    ends at its maximum.
    """
    seen = [low, high]
    bound = problem.loss(low)
    for _ in range(_PRICES):
        price = (problem.loss(high) - problem.loss(low)) / max(problem.cost(low) - problem.cost(high), 1e-300)
        levels = _best(problem, 1.0, price, order)
        value = problem.loss(levels) + price * (problem.cost(levels) - budget)
        bound = max(bound, value)
        at_low = problem.loss(low) + price * (problem.cost(low) - budget)
        if levels in (low, high) or value >= at_low - 1e-12 * max(1.0, abs(at_low)):
            break
        seen.append(levels)
        if problem.cost(levels) <= budget:
            high = levels
        else:
            low = levels
    return bound, seen


def _order(problem: Problem) -> list[int]:
    """Variables in the order in which they are eliminated: next that whose table is smallest."""
    sizes = [len(loss) for loss in problem.losses]
    scopes = [set(factor.variables) for factor in problem.factors]
    left, order = set(range(len(sizes))), []
    while left:
        tables = {
            variable: math.prod(
                sizes[item]
                for item in set().union({variable}, *(scope for scope in scopes if variable in scope))
            )
            for variable in sorted(left)
        }
        chosen = min(tables, key=tables.__getitem__)
        union = set().union(*(scope for scope in scopes if chosen in scope)) - {chosen}
        scopes = [scope for scope in scopes if chosen not in scope] + ([union] if union else [])
        order.append(chosen)
        left.remove(chosen)
    return order


def _best(problem: Problem, weight: float, price: float, order: Sequence[int]) -> tuple[int, ...]:
    """The levels of least ``weight`` x loss + ``price`` x cost, by elimination."""
    tables: list[tuple[tuple[int, ...], FloatArray]] = [
        ((index,), weight * loss) for index, loss in enumerate(problem.losses)
    ]
    tables += [(factor.variables, price * factor.cost) for factor in problem.factors]
    choices: list[tuple[int, tuple[int, ...], npt.NDArray[np.intp]]] = []
    for variable in order:
        mine = [table for table in tables if variable in table[0]]
        tables = [table for table in tables if variable not in table[0]]
        scope = (variable, *sorted({item for names, _ in mine for item in names} - {variable}))
        total = np.zeros((1,) * len(scope))
        # Few variables first: sums grow to the full table as late as possible.
        for names, values in sorted(mine, key=lambda table: table[1].size):
            total = total + _aligned(names, values, scope)
        total = np.broadcast_to(total, tuple(len(problem.losses[item]) for item in scope))
        choices.append((variable, scope[1:], total.argmin(axis=0)))
        if len(scope) > 1:
            tables.append((scope[1:], total.min(axis=0)))
    levels = [0] * len(problem.losses)
    for variable, others, choice in reversed(choices):
        levels[variable] = int(choice[tuple(levels[item] for item in others)])
    return tuple(levels)


def _aligned(names: tuple[int, ...], values: FloatArray, scope: tuple[int, ...]) -> FloatArray:
    """``values`` with an axis for each variable of ``scope``, of length 1 where it does not depend on it."""
    present = [item for item in scope if item in names]
    moved = values.transpose([names.index(item) for item in present])
    shape = [moved.shape[present.index(item)] if item in present else 1 for item in scope]
    found: FloatArray = moved.reshape(shape)
    return found


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
