"""Intervals and tests against published examples, other implementations, brute force and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from deploycnn.profiling.proportions import mcnemar_p, paired_difference_interval, wilson_interval


def test_wilson_is_newcombes_example() -> None:
    """Newcombe (1998), Stat. Med. 17, 857-872, table I: 81 of 263 and 15 of 148."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@given(trials=st.integers(1, 5000), share=st.floats(0, 1), confidence=st.sampled_from([0.9, 0.95, 0.99]))
def test_wilson_is_scipys(trials: int, share: float, confidence: float) -> None:
    successes = round(share * trials)
    expected = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, trials, confidence) == pytest.approx(
        (expected.low, expected.high), abs=1e-9
    )


def test_tango_is_fagerlands_example() -> None:
    """Airway hyper-responsiveness before and after transplantation: 1, 1, 7, 12 of 21 pairs.

    Fagerland, Lydersen and Laake (2014), Stat. Med. 33, 2850-2875: Tango's interval is (-0.517, -0.026).
    """
    assert paired_difference_interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


def score(difference: float, only_first: int, only_second: int, trials: int) -> float:
    """The score statistic with the nuisance parameter from a numerical maximum of the likelihood."""

    def loss(rate: float) -> float:  # rate = P(only second); P(only first) = rate + difference
        parts = (
            (only_first, rate + difference),
            (only_second, rate),
            (trials - only_first - only_second, 1 - 2 * rate - difference),
        )
        return -sum(count * math.log(max(share, 1e-300)) for count, share in parts if count)

    low, high = max(0.0, -difference), (1 - difference) / 2
    best = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-13})
    variance = trials * (2 * best.x + difference - difference**2)
    return float((only_first - only_second - trials * difference) / math.sqrt(variance))


@settings(deadline=None, max_examples=40)
@given(trials=st.integers(30, 2000), first=st.floats(0.01, 0.3), second=st.floats(0.01, 0.3))
def test_tango_limits_are_where_the_score_test_is_just_significant(
    trials: int, first: float, second: float
) -> None:
    only_first, only_second = max(1, round(first * trials)), max(1, round(second * trials))
    low, high = paired_difference_interval(only_first, only_second, trials)
    assert low < (only_first - only_second) / trials < high
    assert score(low, only_first, only_second, trials) == pytest.approx(1.959964, abs=2e-3)
    assert score(high, only_first, only_second, trials) == pytest.approx(-1.959964, abs=2e-3)


@given(first=st.integers(0, 50), second=st.integers(0, 50), rest=st.integers(1, 500))
def test_tango_is_antisymmetric_and_bounded(first: int, second: int, rest: int) -> None:
    trials = first + second + rest
    low, high = paired_difference_interval(first, second, trials)
    mirrored = paired_difference_interval(second, first, trials)
    assert mirrored == pytest.approx((-high, -low), abs=1e-9)
    assert -1 <= low <= (first - second) / trials <= high <= 1


def test_no_disagreement_still_has_a_width() -> None:
    low, high = paired_difference_interval(0, 0, 360)
    assert low == pytest.approx(-high)
    assert 0.005 < high < 0.02


@pytest.mark.parametrize(
    ("only_first", "only_second", "trials"), [(0.02, 0.015, 360), (0.01, 0.01, 5000), (0.05, 0.01, 400)]
)
def test_tango_covers_the_true_drop(only_first: float, only_second: float, trials: int) -> None:
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(trials, [only_first, only_second, 1 - only_first - only_second], 1000)
    held = 0
    for first, second, _ in drawn.tolist():
        low, high = paired_difference_interval(first, second, trials)
        held += low <= only_first - only_second <= high
    assert 0.93 <= held / 1000 <= 0.975


@given(first=st.integers(0, 300), second=st.integers(0, 300))
def test_mcnemar_is_the_binomial_test(first: int, second: int) -> None:
    expected = stats.binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
    assert mcnemar_p(first, second) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("counts", [(3, 2, 4), (-1, 0, 4), (0, 0, 0)])
def test_impossible_counts_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="trials"):
        paired_difference_interval(*counts)


def test_impossible_arguments_of_wilson_are_refused() -> None:
    with pytest.raises(ValueError, match="trials"):
        wilson_interval(5, 4)
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(1, 4, 1.5)
