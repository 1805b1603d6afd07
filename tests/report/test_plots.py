"""Geometry: points where the numbers say, fronts that nothing beats, labels that can be read."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploycnn.report import plots, scales
from deploycnn.report.pareto import non_dominated, pareto, primary_rows
from tests.report.example import example_report

POINTS = st.lists(st.tuples(st.floats(0.01, 100), st.floats(0, 1)), min_size=1, max_size=30)


@given(POINTS)
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    def beaten(point: tuple[float, float]) -> bool:
        return any(other[0] <= point[0] and other[1] >= point[1] and other != point for other in points)

    assert set(non_dominated(points)) == {point for point in points if not beaten(point)}


@given(st.lists(st.floats(1e-3, 1e5), min_size=1, max_size=20), st.booleans())
def test_axes_hold_all_values_in_order(values: list[float], log: bool) -> None:
    axis = scales.axis(values, 50, 450, log=log)
    placed = [axis.place(value) for value in sorted(values)]
    assert placed == sorted(placed)
    assert placed[0] >= 50
    assert placed[-1] <= 450
    assert all(50 <= tick.at <= 450 for tick in axis.ticks)
    assert len({tick.text for tick in axis.ticks}) == len(axis.ticks) <= 20


def test_an_axis_is_logarithmic_only_where_a_linear_one_would_squeeze() -> None:
    assert not scales.axis([1.0, 3.9], 0, 100).log
    assert scales.axis([1.0, 4.1], 0, 100).log
    assert not scales.axis([0.0, 100.0], 0, 100).log
    middle = scales.axis([1.0, 100.0], 0, 100).place(10.0)
    assert middle == pytest.approx(50)


def test_points_stand_where_the_numbers_say() -> None:
    report = example_report()
    plot = pareto(report, 1080, 440)
    assert plot is not None
    rows = primary_rows(report)
    assert len(plot.points) == len(rows) == 8
    place = {(plot.x.place(row["median_ms"] or 0), row["runtime"]) for row in rows}
    by_shape = dict(plot.runtimes)
    assert {(point.x, by_shape[point.shape]) for point in plot.points} == place
    (winner,) = [point for point in plot.points if point.winner]
    assert winner.y == plot.y.place(439 / 450)
    assert winner.paired is not None
    low, high = winner.paired
    assert low > winner.y > high, "y grows downwards"
    assert plot.budget_y == plot.y.place(443 / 450 - 0.01)


@pytest.mark.parametrize("size", [(1080, 440), (380, 400)])
def test_labels_do_not_overlap_and_stay_inside(size: tuple[int, int]) -> None:
    report: Any = copy.deepcopy(dict(example_report()))
    for row in report["measurements"]:
        if row["median_ms"] is not None:  # all on one heap: the hardest case
            row["median_ms"] = 0.30 + row["median_ms"] / 100
            row["median_interval_ms"] = [row["median_ms"] * 0.99, row["median_ms"] * 1.01]
    plot = pareto(report, *size)
    assert plot is not None
    assert len(plot.labels) == 4

    def box(label: scales.Label) -> scales.Box:
        half = scales.CHAR_WIDTH * len(label.text) / 2
        return scales.Box(left=label.x - half, right=label.x + half, top=label.y - 7, bottom=label.y + 7)

    for one, two in itertools.combinations(plot.labels, 2):
        assert box(one).overlap(box(two)) == 0
    for label in plot.labels:
        area = scales.CHAR_WIDTH * len(label.text) * 14
        assert box(label).overlap(plot.frame) == pytest.approx(area)


def test_distribution_bands_nest_around_the_median() -> None:
    report = example_report()
    plot = plots.distributions(report, primary_rows(report), 1080)
    assert plot is not None
    assert len(plot.strips) == 8
    for strip in plot.strips:
        (l98, r98), (l90, r90), (l50, r50) = strip.bands
        assert l98 <= l90 <= l50 <= strip.median <= r50 <= r90 <= r98
    assert plots.distributions(report, primary_rows(report), 380).relative is None  # type: ignore[union-attr]


def test_curves_follow_numbers_and_leave_bookkeeping_out() -> None:
    history = [
        {"epoch": 1, "loss": 2.0, "lr": 0.1},
        {"epoch": 2, "loss": 1.0, "note": "x"},
        {"epoch": 3, "loss": 0.5},
    ]
    (curve,) = plots.curves(history)
    assert (curve.name, curve.first, curve.last, curve.final) == ("loss", "1", "3", "0.500")
    assert plots.curves(history[:1]) == []


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6), min_size=1))
def test_linear_ticks_are_evenly_spaced(values: list[float]) -> None:
    axis = scales.axis(values, 0, 1000, log=False)
    gaps = [b.at - a.at for a, b in itertools.pairwise(axis.ticks)]
    assert all(math.isclose(gap, gaps[0], abs_tol=0.05) for gap in gaps)
