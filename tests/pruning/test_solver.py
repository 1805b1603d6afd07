"""Choices within a budget, against all choices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploycnn.pruning.elimination import Factor, Problem, elimination_order, levels_left
from deploycnn.pruning.solver import cheapest, integer_optimum, solve


def random_problem(seed: int, variables: int, levels: int) -> Problem:
    """A chain with a variable that all others share, as a residual stream is, and one factor of three."""
    random = np.random.default_rng(seed)
    sizes = [int(random.integers(2, levels + 1)) for _ in range(variables)]
    losses = tuple(np.concatenate([[0.0], np.cumsum(random.random(size - 1))]) for size in sizes)
    pairs = [(index, index + 1) for index in range(variables - 1)] + [
        (0, index) for index in range(2, variables)
    ]
    factors = [Factor(variables=pair, cost=_falling(random, [sizes[v] for v in pair])) for pair in pairs]
    if variables > 3:
        factors.append(Factor(variables=(0, 1, 3), cost=_falling(random, [sizes[v] for v in (0, 1, 3)])))
    return Problem(losses=losses, factors=tuple(factors), fixed=float(random.random()))


def _falling(random: np.random.Generator, shape: list[int]) -> np.ndarray:
    cost = random.random(shape)
    for axis in range(len(shape)):
        cost = np.flip(np.cumsum(np.flip(cost, axis), axis=axis), axis)
    return cost


def exhaustive(problem: Problem, budget: float) -> float | None:
    losses = [
        problem.loss(levels)
        for levels in itertools.product(*(range(len(loss)) for loss in problem.losses))
        if problem.cost(levels) <= budget
    ]
    return min(losses) if losses else None


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    variables=st.integers(2, 5),
    levels=st.integers(2, 4),
    share=st.floats(0.02, 1.0),
)
def test_the_solution_is_the_best_of_all_and_known_to_be(
    seed: int, variables: int, levels: int, share: float
) -> None:
    problem = random_problem(seed, variables, levels)
    low, high = problem.cost(cheapest(problem)), problem.cost([0] * variables)
    budget = low + share * (high - low) + 1e-9
    best = exhaustive(problem, budget)
    found = solve(problem, budget)
    assert best is not None
    assert found is not None
    assert found.cost <= budget * (1 + 1e-9)
    assert found.cost == pytest.approx(problem.cost(found.levels))
    assert found.loss == pytest.approx(problem.loss(found.levels))
    assert found.bound <= best + 1e-9
    # So small a problem is solved to the end, and known to be.
    assert found.loss == pytest.approx(best, rel=1e-4, abs=1e-9)
    assert found.bound == pytest.approx(best, rel=1e-4, abs=1e-9)


@given(seed=st.integers(0, 1000), price=st.floats(0, 3), share=st.floats(0.02, 1.0))
@settings(max_examples=30, deadline=None)
def test_levels_are_left_out_exactly_where_their_dual_value_is_too_high(
    seed: int, price: float, share: float
) -> None:
    problem = random_problem(seed, 4, 4)
    low, high = problem.cost(cheapest(problem)), problem.cost([0] * 4)
    budget, loss = low + share * (high - low), float(np.random.default_rng(seed).random() * 3)
    left = levels_left(problem, budget, price, loss, elimination_order(problem))
    every = list(itertools.product(*(range(len(loss)) for loss in problem.losses)))
    for variable, kept in enumerate(left):
        least = [
            min(
                problem.loss(levels) + price * (problem.cost(levels) - budget)
                for levels in every
                if levels[variable] == level
            )
            for level in range(len(problem.losses[variable]))
        ]
        expected = [level for level, value in enumerate(least) if value <= loss]
        assert kept == (expected or [int(np.argmin(least))])


def test_parts_that_share_no_cost_are_bounded_together() -> None:
    """Two variables of costs of their own: the bound of one counts what the other loses at least."""
    losses = (np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    factors = tuple(Factor(variables=(index,), cost=np.array([2.0, 0.0])) for index in range(2))
    problem = Problem(losses=losses, factors=factors)
    # Within 2 one of the two has to go down, at a loss of 1.
    assert levels_left(problem, 2.0, 0.5, 0.99, elimination_order(problem)) == [[0], [0]]
    assert levels_left(problem, 2.0, 0.5, 1.0, elimination_order(problem)) == [[0, 1], [0, 1]]


@given(seed=st.integers(0, 1000), share=st.floats(0.02, 0.98))
@settings(max_examples=20, deadline=None)
def test_the_integer_program_by_itself_finds_the_best_of_all(seed: int, share: float) -> None:
    problem = random_problem(seed, 4, 4)
    low, high = problem.cost(cheapest(problem)), problem.cost([0] * 4)
    budget = low + share * (high - low) + 1e-9
    found = integer_optimum(problem, budget, seconds=20)
    assert found is not None
    assert found.loss == pytest.approx(exhaustive(problem, budget), rel=1e-4)
    assert found.bound == pytest.approx(found.loss, rel=1e-4)


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_cheapest_levels_are_the_cheapest_of_all(seed: int) -> None:
    problem = random_problem(seed, 4, 3)
    every = itertools.product(*(range(len(loss)) for loss in problem.losses))
    assert problem.cost(cheapest(problem)) == pytest.approx(min(problem.cost(levels) for levels in every))


def test_nothing_is_found_below_the_cheapest() -> None:
    problem = random_problem(3, 4, 3)
    assert solve(problem, 0.999 * problem.cost(cheapest(problem))) is None


def test_nothing_is_lost_where_the_budget_allows_all() -> None:
    problem = random_problem(4, 4, 3)
    found = solve(problem, problem.cost([0] * 4))
    assert found is not None
    assert found.loss == found.bound == 0
