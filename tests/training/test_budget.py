"""Budgets in minutes, on a clock that the test turns."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deploycnn.training import loop, precision
from deploycnn.training.budget import Pace, Plan, steps_that_fit
from deploycnn.training.evaluate import evaluate
from deploycnn.training.history import History
from deploycnn.training.losses import CrossEntropy
from deploycnn.training.settings import TrainingSettings
from deploycnn.training.step import Stepper
from tests.training.support import make_context, make_data, make_model, same_bits, settings

DATA = make_data()  # 3 steps an epoch


class Clock:
    """Steps and validations take what the test says; all else takes no time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step_s: float = 1.0, validate_s: float = 2.0) -> None:
        self.now, self.step_s, self.validate_s = 0.0, step_s, validate_s
        self.rates: list[float] = []
        step = Stepper.step

        def timed_step(stepper: Stepper, batch: object, lr: float) -> object:
            self.now += self.step_s
            self.rates.append(lr)
            return step(stepper, batch, lr)  # type: ignore[arg-type]

        def timed_evaluate(*args: object, **options: object) -> object:
            self.now += self.validate_s
            return evaluate(*args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(Stepper, "step", timed_step)
        monkeypatch.setattr(loop, "evaluate", timed_evaluate)
        monkeypatch.setattr(loop, "clock", lambda: self.now)
        monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)


def fit(folder: Path, options: TrainingSettings, **context: object) -> tuple[torch.nn.Module, History]:
    model = make_model()
    ctx = make_context(folder, DATA, **context)  # type: ignore[arg-type]
    return model, loop.fit(model, DATA, options, loss=CrossEntropy(), ctx=ctx)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "one_cycle"])
def test_the_minutes_are_used_and_the_rate_ends_low(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    clock = Clock(monkeypatch)
    _, history = fit(tmp_path, settings(epochs=1000, max_minutes=2, lr=0.01, schedule=schedule))
    # 120 s: 2 of validation, 3 of probing, then epochs of 3 + 2 s
    assert 110 < clock.now <= 120
    assert history.stopped == "max_minutes"
    taught = [rate for rate in clock.rates if rate > 0]
    assert sum(epoch.steps for epoch in history.epochs) == len(taught) == pytest.approx(69, abs=2)
    assert taught[-1] < 0.01 * 0.03
    assert max(taught) == pytest.approx(0.01, rel=0.05)


def test_what_preparing_the_teacher_took_is_part_of_the_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    options = settings(epochs=1000, max_minutes=2, lr=0.01)
    ctx = make_context(tmp_path, DATA)
    history = loop.fit(make_model(), DATA, options, loss=CrossEntropy(), ctx=ctx, spent_s=60)
    assert 50 < clock.now <= 60
    assert history.epochs[-1].lr < 0.01 * 0.05


def test_a_machine_that_gets_slower_is_planned_for_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    rates = clock.rates

    def slower(done: float, total: float, message: str = "") -> None:
        clock.step_s = 3.0 if len(rates) > 30 else 1.0

    monkeypatch.setattr(loop, "REPORT_INTERVAL_S", 0)
    _, history = fit(tmp_path, settings(epochs=1000, max_minutes=2, lr=0.01), progress=slower)
    assert 105 < clock.now <= 122
    assert history.epochs[-1].lr < 0.01 * 0.05
    later = rates[10:]
    assert later == sorted(later, reverse=True)  # no jump up where the plan changed


def test_a_long_epoch_is_planned_anew_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def slower(done: float, total: float, message: str = "") -> None:
        clock.step_s = 4.0 if done > 0 else 1.0

    monkeypatch.setattr(loop, "REPORT_INTERVAL_S", 0)
    options = settings(epochs=50, max_minutes=1, batch_size=2)
    _, history = fit(tmp_path, options, progress=slower)
    assert [epoch.epoch for epoch in history.epochs] == [1]
    assert history.epochs[0].steps < 24
    assert clock.now <= 60
    assert history.epochs[0].lr < 0.1 * options.peak_lr


def test_epochs_end_it_where_they_are_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    limited, history = fit(tmp_path / "limited", settings(epochs=3, max_minutes=60))
    assert (history.stopped, len(history.epochs)) == ("finished", 3)
    # Steps that were only timed have left no trace.
    assert same_bits(limited, fit(tmp_path / "free", settings(epochs=3))[0])


def test_probing_leaves_no_trace_in_averages_and_optimizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    options = {"epochs": 2, "optimizer": "adamw", "lr": 0.01, "ema": 0.9}
    limited, _ = fit(tmp_path / "limited", settings(**options, max_minutes=60))
    assert same_bits(limited, fit(tmp_path / "free", settings(**options))[0])


def test_one_step_is_always_taken(tmp_path: Path) -> None:
    _, history = fit(tmp_path, settings(epochs=50, max_minutes=1e-9))
    assert ([epoch.steps for epoch in history.epochs], history.stopped) == ([1], "max_minutes")


class Stop(Exception):  # noqa: N818 - not an error
    """The user's Ctrl-C."""


@pytest.mark.parametrize("at", [2, 9, 14])
def test_a_continued_budget_goes_on_with_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    options = settings(epochs=1000, max_minutes=0.6, ema=0.9)
    Clock(monkeypatch)
    whole, history = fit(tmp_path / "whole", options)
    monkeypatch.undo()
    Clock(monkeypatch)
    monkeypatch.setattr(loop, "REPORT_INTERVAL_S", 0)
    left = [at]

    def stop(done: float, total: float, message: str = "") -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Stop

    with pytest.raises(Stop):
        fit(tmp_path / "parts", options, progress=stop)
    continued, history_again = fit(tmp_path / "parts", options)
    assert same_bits(continued, whole)
    assert [epoch.steps for epoch in history_again.epochs] == [epoch.steps for epoch in history.epochs]


@given(
    seconds=st.floats(0, 5000),
    step_s=st.floats(0.01, 5),
    pause_s=st.floats(0, 20),
    steps_per_epoch=st.integers(1, 50),
    taken=st.integers(0, 200),
)
def test_what_fits_is_what_counting_finds(
    seconds: float, step_s: float, pause_s: float, steps_per_epoch: int, taken: int
) -> None:
    pace = Pace(steps=10, steps_s=10 * step_s, pause_s=pause_s)
    found = steps_that_fit(seconds, pace, steps_per_epoch=steps_per_epoch, taken=taken)

    def needed(steps: int) -> float:
        pauses = math.ceil((taken % steps_per_epoch + steps) / steps_per_epoch)
        return steps * pace.step_s + pauses * pause_s

    room = seconds * 0.98
    assert found == 0 or needed(found) <= room + 1e-6
    assert needed(found + 1) > room - 1e-6


@given(parts=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_a_stretched_plan_goes_from_its_beginning_to_its_end_without_a_jump(parts: list[int]) -> None:
    plan = Plan(total=100, warmup=10, left=100)
    shares = [0.0]
    for left in parts:
        before = plan.position / plan.total
        plan.stretch(left, limited=True)
        assert plan.position / plan.total == pytest.approx(before, abs=1e-9)
        assert plan.warmup / plan.total == pytest.approx(0.1)
        if plan.left:
            plan.advance()
            shares.append(plan.position / plan.total)
    assert shares == sorted(shares)
    while plan.left:
        plan.advance()
    assert plan.position == pytest.approx(plan.total)
