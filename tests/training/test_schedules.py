"""Schedules against those of torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from deploycnn.training import schedules
from tests.training.support import settings


def rates(make: object, total: int) -> list[float]:
    """Learning rates of a torch schedule over an optimizer whose peak is 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)  # type: ignore[operator]
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("total", "warmup"), [(100, 30), (40, 4), (10, 5)])
def test_one_cycle_is_torchs(total: int, warmup: int) -> None:
    expected = rates(
        lambda optimizer: lr_scheduler.OneCycleLR(
            optimizer, max_lr=1.0, total_steps=total + 1, pct_start=warmup / (total + 1), cycle_momentum=False
        ),
        total,
    )
    ours = [schedules.one_cycle(step, total + 1, warmup) for step in range(total)]
    assert ours == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("total", [1, 7, 100])
def test_cosine_is_torchs(total: int) -> None:
    expected = rates(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=total), total)
    ours = [schedules.cosine(step, total, 0) for step in range(total)]
    assert ours == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("total", [1, 7, 100])
def test_linear_is_torchs(total: int) -> None:
    expected = rates(
        lambda optimizer: lr_scheduler.LinearLR(
            optimizer, start_factor=1.0, end_factor=0.0, total_iters=total
        ),
        total,
    )
    assert [schedules.linear(step, total, 0) for step in range(total)] == pytest.approx(expected)


def test_warm_up_is_torchs_and_meets_the_cosine_at_its_peak() -> None:
    expected = rates(
        lambda optimizer: lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=9), total=10
    )
    assert [schedules.cosine(step, 50, 10) for step in range(10)] == pytest.approx(expected)
    assert [schedules.linear(step, 50, 10) for step in range(10)] == pytest.approx(expected)
    assert schedules.cosine(10, 50, 10) == schedules.linear(10, 50, 10) == 1.0


@given(
    name=st.sampled_from(["cosine", "linear", "one_cycle"]),
    total=st.integers(1, 400),
    share=st.floats(0, 1),
    data=st.data(),
)
def test_factors_stay_between_0_and_1(name: str, total: int, share: float, data: st.DataObject) -> None:
    warmup = min(round(share * total), total - 1)
    step = data.draw(st.integers(0, total - 1))
    assert 0 <= schedules.factor(name, step, total, warmup) <= 1  # type: ignore[arg-type]


@given(
    name=st.sampled_from(["cosine", "linear", "one_cycle"]),
    total=st.integers(3, 200),
    share=st.floats(0, 0.9),
)
def test_factors_rise_then_fall(name: str, total: int, share: float) -> None:
    warmup = round(share * total)
    factors = [schedules.factor(name, step, total, warmup) for step in range(total)]  # type: ignore[arg-type]
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)


def test_warm_up_steps_follow_the_schedule_and_leave_a_step() -> None:
    assert settings(epochs=30).warmup_steps(10) == 30
    assert settings(epochs=100).warmup_steps(10) == 50
    assert settings(epochs=10, schedule="one_cycle").warmup_steps(10) == 30
    assert settings(epochs=10, warmup_epochs=0.5).warmup_steps(10) == 5
    assert settings(epochs=1, warmup_epochs=0.99).warmup_steps(1) == 0
    assert settings(epochs=30).warmup_steps(10, 50) == 5
    assert settings(epochs=30, warmup_epochs=2).warmup_steps(10, 50) == 20


def test_warm_up_longer_than_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"warmup_epochs \(5\) should be less than epochs \(4\)"):
        settings(epochs=4, warmup_epochs=5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.0125),
        ({"batch_size": 256}, 0.2),
        ({"lr": 0.3}, 0.3),
        ({"optimizer": "adamw", "batch_size": 512}, 2e-3),
    ],
)
def test_the_default_rate_follows_optimizer_and_batch(options: dict[str, object], expected: float) -> None:
    assert settings(**options).peak_lr == pytest.approx(expected)
