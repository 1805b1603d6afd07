from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deploycnn.quantization.rounding import (
    Problem,
    Settings,
    annealed,
    inverse_rectified_sigmoid,
    rectified_sigmoid,
    solve,
)

QUICK = Settings(iterations=250, batch_size=64, lr=3e-2)


def make(
    seed: int,
    *,
    samples: int = 128,
    groups: int = 1,
    outputs: int = 1,
    inputs: int = 6,
    relu: bool = False,
    addend: bool = False,
    bits: int = 4,
) -> Problem:
    """Correlated inputs, which is where nearest rounding is far from the best."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = normal(samples, groups, inputs) + 2 * normal(samples, groups, 1)
    weight = normal(groups, outputs, inputs)
    bias = 0.1 * normal(groups, outputs)
    shortcut = normal(samples, groups, outputs) if addend else None
    activate = torch.relu if relu else (lambda y: y)
    target = torch.einsum("sgk,gok->sgo", x, weight) + bias + (0 if shortcut is None else shortcut)
    top = 2 ** (bits - 1) - 1
    return Problem(
        inputs=x,
        targets=activate(target),
        addend=shortcut,
        weight=weight,
        scale=weight.abs().amax(dim=2, keepdim=True) / top,
        bias=bias,
        low=-top,
        high=top,
        activate=activate,
    )


def error(problem: Problem, integers: Tensor) -> float:
    """Independent of the code under test: float64 NumPy."""
    x, w = problem.inputs.double().numpy(), (integers * problem.scale).double().numpy()
    y = np.einsum("sgk,gok->sgo", x, w) + problem.bias.double().numpy()
    if problem.addend is not None:
        y = y + problem.addend.double().numpy()
    if problem.activate is torch.relu:
        y = np.maximum(y, 0)
    return float(np.square(y - problem.targets.double().numpy()).mean())


def nearest(problem: Problem) -> Tensor:
    return (problem.weight / problem.scale).round().clamp(problem.low, problem.high)


def best(problem: Problem) -> float:
    """The least error of all 2**K roundings of one output."""
    floor = (problem.weight / problem.scale).floor()
    choices = itertools.product((0.0, 1.0), repeat=floor.shape[2])
    return min(
        error(problem, (floor + torch.tensor(ups)).clamp(problem.low, problem.high)) for ups in choices
    )


def solved(problem: Problem, options: Settings = QUICK, seed: int = 0) -> Tensor:
    return solve(problem, options, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("relu", [False, True])
def test_it_comes_near_the_best_of_all_roundings_where_nearest_does_not(relu: bool) -> None:
    ours, brute, plain = [], [], []
    for seed in range(4):
        problem = make(seed, relu=relu, addend=relu)
        ours.append(error(problem, solved(problem)))
        brute.append(best(problem))
        plain.append(error(problem, nearest(problem)))
    assert all(found >= floor * (1 - 1e-6) for found, floor in zip(ours, brute, strict=True))
    assert sum(ours) < 1.5 * sum(brute)
    assert sum(plain) > 2 * sum(brute)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 999),
    groups=st.integers(1, 3),
    outputs=st.integers(1, 4),
    inputs=st.integers(1, 6),
    relu=st.booleans(),
    addend=st.booleans(),
)
def test_every_weight_is_decided_between_its_two_neighbours(
    seed: int, groups: int, outputs: int, inputs: int, relu: bool, addend: bool
) -> None:
    problem = make(seed, samples=40, groups=groups, outputs=outputs, inputs=inputs, relu=relu, addend=addend)
    found = solved(problem, Settings(iterations=10, batch_size=16))
    steps = problem.weight / problem.scale
    assert torch.equal(found, found.round())
    assert ((found == steps.floor()) | (found == steps.ceil())).all()
    assert found.min() >= problem.low
    assert found.max() <= problem.high


@given(h=st.floats(0.0, 1.0))
def test_the_relaxation_starts_at_the_float_weight(h: float) -> None:
    value = torch.tensor(h, dtype=torch.float64)
    assert rectified_sigmoid(inverse_rectified_sigmoid(value)).item() == pytest.approx(h, abs=1e-9)


def test_the_rectified_sigmoid_reaches_both_ends_with_finite_arguments() -> None:
    assert rectified_sigmoid(torch.tensor([-3.0, 0.0, 3.0])).tolist() == pytest.approx([0.0, 0.5, 1.0])


def test_the_sharpness_is_annealed_from_one_end_to_the_other() -> None:
    values = [annealed((20.0, 2.0), progress) for progress in np.linspace(0, 1, 11)]
    assert values[0] == 20.0
    assert values[-1] == pytest.approx(2.0)
    assert values == sorted(values, reverse=True)


def test_the_deciding_term_decides() -> None:
    # Without it most weights are left between 0 and 1, and cutting them at a half loses what was learned.
    problems = [make(seed, outputs=2, inputs=24, samples=300) for seed in range(2)]
    with_term = sum(error(problem, solved(problem)) for problem in problems)
    without = sum(error(problem, solved(problem, replace(QUICK, weight=0.0))) for problem in problems)
    assert with_term < 0.8 * without


def test_weights_that_are_multiples_of_the_scale_stay() -> None:
    problem = make(3, outputs=3)
    exact = nearest(problem)
    x = problem.inputs
    target = torch.einsum("sgk,gok->sgo", x, exact * problem.scale) + problem.bias
    same = Problem(
        inputs=x,
        targets=target,
        addend=None,
        weight=exact * problem.scale,
        scale=problem.scale,
        bias=problem.bias,
        low=problem.low,
        high=problem.high,
        activate=problem.activate,
    )
    assert torch.equal(solved(same), exact)


def test_the_seed_decides_everything() -> None:
    problem = make(5, outputs=4, inputs=16)
    assert torch.equal(solved(problem), solved(problem))


def test_samples_that_judge_are_not_learned_from() -> None:
    problem = make(6, outputs=2)
    spoiled = Problem(
        inputs=torch.cat((problem.inputs, torch.full((50, 1, 6), float("nan")))),
        targets=torch.cat((problem.targets, torch.zeros(50, 1, 2))),
        addend=None,
        weight=problem.weight,
        scale=problem.scale,
        bias=problem.bias,
        low=problem.low,
        high=problem.high,
        activate=problem.activate,
        judged=50,
    )
    assert torch.equal(solved(spoiled), solved(problem))


@given(st.integers(0, 50))
@settings(max_examples=10, deadline=None)
def test_zeros_stay_whatever_would_be_gained(seed: int) -> None:
    problem = make(seed, outputs=3, inputs=8)
    zero = torch.rand(problem.weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    # The targets are those of the dense weights: every zero has an error that rounding it up could lower.
    sparse = replace(problem, weight=problem.weight.masked_fill(zero, 0.0))
    found = solved(sparse, replace(QUICK, iterations=60, lr=0.2, weight=0.0))
    assert (found[zero] == 0).all()
    assert (found[~zero] != nearest(sparse)[~zero]).any()
