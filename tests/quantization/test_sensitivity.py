"""The choice of float layers, against brute force on a model of additive noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploycnn.quantization.judge import Judgement
from deploycnn.quantization.sensitivity import Sensitivity, keep_within, measure_sensitivity

#: In the fakes a "graph" is the set of its float layers.
FLOAT_ALL = 60.0


def judge_of(noise: dict[str, float], scale: float = 0.1):
    """Noise powers add up; top-1 falls with them."""

    def judge(kept: Any) -> Judgement:
        total = sum(power for name, power in noise.items() if name not in kept)
        return Judgement(
            top1_drop=scale * total,
            agreement=1 - scale * total,
            sqnr_db=-10 * math.log10(total) if total else FLOAT_ALL,
            images=100,
        )

    return judge


def build(kept: Collection[str]) -> Any:
    return frozenset(kept)


def measured(noise: dict[str, float], gains: dict[str, float] | None) -> tuple[Sensitivity, ...]:
    macs = dict.fromkeys(noise, 10)
    return measure_sensitivity(list(noise), build, judge_of(noise), gains_ms=gains, macs=macs)  # type: ignore[arg-type]


def test_each_layer_is_quantized_alone() -> None:
    noise = {"a": 0.1, "b": 0.01, "c": 0.001}
    found = measured(noise, {"a": 1.0, "b": 2.0})
    assert [layer.node for layer in found] == ["a", "b", "c"]
    assert [layer.noise for layer in found] == pytest.approx([0.1, 0.01, 0.001])
    assert [layer.gain_ms for layer in found] == [1.0, 2.0, None]
    assert [layer.top1_drop for layer in found] == pytest.approx([0.01, 0.001, 0.0001])


def test_nothing_stays_float_where_the_budget_holds() -> None:
    noise = {"a": 0.1, "b": 0.1}
    found = keep_within(0.05, measured(noise, None), build, judge_of(noise))  # type: ignore[arg-type]
    assert (found.keep_float, found.met, found.trials) == (frozenset(), True, 1)


def test_a_budget_that_float_itself_misses_is_told() -> None:
    noise = {"a": 0.1, "b": 0.1}

    def judge(kept: Any) -> Judgement:
        return Judgement(top1_drop=0.3, agreement=0.5, sqnr_db=10, images=10)

    found = keep_within(0.01, measured(noise, None), build, judge)  # type: ignore[arg-type]
    assert not found.met
    assert found.keep_float == {"a", "b"}


def test_the_layer_that_saves_most_noise_for_its_time_goes_first() -> None:
    noise = {"dear": 0.1, "cheap": 0.1, "quiet": 0.001}
    gains = {"dear": 5.0, "cheap": 0.1, "quiet": 0.01}
    found = keep_within(0.0102, measured(noise, gains), build, judge_of(noise))  # type: ignore[arg-type]
    assert found.keep_float == {"cheap"}


def test_a_layer_that_turned_out_needless_is_given_back() -> None:
    # "free" ranks first because it costs nothing, though the budget needs only "loud".
    noise = {"free": 0.002, "loud": 0.1, "rest": 0.001}
    gains = {"free": 0.0, "loud": 1.0, "rest": 1.0}
    found = keep_within(0.0004, measured(noise, gains), build, judge_of(noise))  # type: ignore[arg-type]
    assert found.keep_float == {"loud"}


def test_layers_that_must_stay_float_do() -> None:
    noise = {"a": 0.1, "b": 0.1, "c": 0.1}
    judge = judge_of(noise)
    found = keep_within(0.0101, measured(noise, None), build, judge, always_float=["c"])  # type: ignore[arg-type]
    assert "c" in found.keep_float
    assert len(found.keep_float) == 2


layers = st.lists(st.tuples(st.floats(1e-4, 1.0), st.floats(0.01, 5.0)), min_size=1, max_size=7).map(
    lambda rows: (
        {f"l{i}": row[0] for i, row in enumerate(rows)},
        {f"l{i}": row[1] for i, row in enumerate(rows)},
    )
)


@settings(max_examples=60, deadline=None)
@given(layers, st.floats(0.0, 0.3))
def test_the_budget_is_met_and_the_cost_is_near_the_best(
    drawn: tuple[dict[str, float], dict[str, float]], budget: float
) -> None:
    noise, gains = drawn
    judge = judge_of(noise)
    found = keep_within(budget, measured(noise, gains), build, judge)  # type: ignore[arg-type]
    assert found.met
    assert judge(found.keep_float).within(budget)
    # No kept layer can be given back alone.
    for layer in found.keep_float:
        assert not judge(found.keep_float - {layer}).within(budget)
    feasible = [
        sum(gains[name] for name in kept)
        for count in range(len(noise) + 1)
        for kept in itertools.combinations(noise, count)
        if judge(frozenset(kept)).within(budget)
    ]
    # The greedy rule is off by one layer at most: the dearest.
    assert sum(gains[name] for name in found.keep_float) <= min(feasible) + max(gains.values()) + 1e-9
