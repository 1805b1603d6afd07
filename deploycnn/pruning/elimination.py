"""Least loss at a price of cost, exactly: by eliminating one variable after the other (Bertele and Brioschi 1972).

Networks are nearly trees, so the tables that elimination makes stay small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


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


def elimination_order(problem: Problem) -> list[int]:
    """Variables in the order in which they are eliminated: next that whose table is smallest."""
    return [variable for variable, _ in _elimination(problem)]


def largest_table(problem: Problem) -> int:
    """Cells of the largest table that elimination makes."""
    return max((cells for _, cells in _elimination(problem)), default=0)


def _elimination(problem: Problem) -> list[tuple[int, int]]:
    """Variables in the order of their elimination, with the cells of their tables."""
    sizes = [len(loss) for loss in problem.losses]
    scopes = [set(factor.variables) for factor in problem.factors]
    left = set(range(len(sizes)))
    order: list[tuple[int, int]] = []
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
        order.append((chosen, tables[chosen]))
        left.remove(chosen)
    return order


@dataclass(frozen=True, slots=True)
class _Bucket:
    """A variable that was eliminated: ``total`` has an axis for it, then one for each of ``others``."""

    variable: int
    others: tuple[int, ...]
    total: FloatArray
    #: Buckets whose minima are within ``total``.
    children: tuple[int, ...]


def _eliminate(problem: Problem, weight: float, price: float, order: Sequence[int]) -> list[_Bucket]:
    """The least ``weight`` x loss + ``price`` x cost by what is not yet eliminated, variable by variable."""
    tables: list[tuple[tuple[int, ...], FloatArray, int | None]] = [
        ((index,), weight * loss, None) for index, loss in enumerate(problem.losses)
    ]
    tables += [(factor.variables, price * factor.cost, None) for factor in problem.factors]
    buckets: list[_Bucket] = []
    for variable in order:
        mine = [table for table in tables if variable in table[0]]
        tables = [table for table in tables if variable not in table[0]]
        scope = (variable, *sorted({item for names, _, _ in mine for item in names} - {variable}))
        total = np.zeros((1,) * len(scope))
        # Few variables first: sums grow to the full table as late as possible.
        for names, values, _ in sorted(mine, key=lambda table: table[1].size):
            total = total + _aligned(names, values, scope)
        total = np.broadcast_to(total, tuple(len(problem.losses[item]) for item in scope))
        children = tuple(origin for _, _, origin in mine if origin is not None)
        if len(scope) > 1:
            tables.append((scope[1:], total.min(axis=0), len(buckets)))
        buckets.append(_Bucket(variable, scope[1:], total, children))
    return buckets


def best_levels(problem: Problem, weight: float, price: float, order: Sequence[int]) -> tuple[int, ...]:
    """The levels of least ``weight`` x loss + ``price`` x cost."""
    levels = [0] * len(problem.losses)
    for bucket in reversed(_eliminate(problem, weight, price, order)):
        choice = bucket.total.argmin(axis=0)
        levels[bucket.variable] = int(choice[tuple(levels[item] for item in bucket.others)])
    return tuple(levels)


def levels_left(
    problem: Problem, budget: float, price: float, loss: float, order: Sequence[int]
) -> list[list[int]]:
    """For each variable the levels that a solution within ``budget`` and of at most ``loss`` may have.

    A level is left out where the dual value at ``price`` of the best solution with it is above ``loss``.
    """
    buckets = _eliminate(problem, 1.0, price, order)
    roots = {index: float(bucket.total.min()) for index, bucket in enumerate(buckets) if not bucket.others}
    least = sum(roots.values()) + price * (problem.fixed - budget)
    #: What the rest of the network adds to a bucket, by its ``others``.
    outside: dict[int, FloatArray] = {index: np.zeros(()) for index in roots}
    left: list[list[int]] = [[] for _ in problem.losses]
    root_of: dict[int, int] = {index: index for index in roots}
    for index in reversed(range(len(buckets))):
        bucket = buckets[index]
        whole = bucket.total + outside[index][None]
        marginals = whole.min(axis=tuple(range(1, whole.ndim))) - roots[root_of[index]] + least
        kept = np.flatnonzero(marginals <= loss + 1e-9 * max(1.0, abs(loss)))
        left[bucket.variable] = kept.tolist() or [int(marginals.argmin())]
        scope = (bucket.variable, *bucket.others)
        for child in bucket.children:
            separator = buckets[child].others
            rest = whole - _aligned(separator, buckets[child].total.min(axis=0), scope)
            rest = rest.min(axis=tuple(axis for axis, item in enumerate(scope) if item not in separator))
            kept_scope = [item for item in scope if item in separator]
            outside[child] = rest.transpose([kept_scope.index(item) for item in separator])
            root_of[child] = root_of[index]
    return left


def _aligned(names: tuple[int, ...], values: FloatArray, scope: tuple[int, ...]) -> FloatArray:
    """``values`` with an axis for each variable of ``scope``, of length 1 where it does not depend on it."""
    present = [item for item in scope if item in names]
    moved = values.transpose([names.index(item) for item in present])
    shape = [moved.shape[present.index(item)] if item in present else 1 for item in scope]
    found: FloatArray = moved.reshape(shape)
    return found
