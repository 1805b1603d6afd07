"""Steps that are taken to be timed and then undone: in which arithmetic to train, and how many steps a budget holds."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator

from deploycnn import cache, environment
from deploycnn.training.precision import Precision
from deploycnn.training.step import Stepper
from deploycnn.training.view import View

#: Steps that are timed before a budget in minutes is planned, after some slow first ones; fewer where they take long.
PACE_STEPS, PACE_WARMUP, PACE_S = 20, 2, 10.0
#: Views on which every arithmetic is tried, after a slow first one; fewer where they take long.
RACE_VIEWS, RACE_S = 5, 10.0
#: Trainings of fewer steps stay in float32: a race would take much of what it can save.
WORTH_STEPS = 200
#: Share of float32's time that other arithmetic may take: at less gain it is not worth its rounding.
WORTH_SHARE = 0.85

Clock = Callable[[], float]


@contextlib.contextmanager
def undone(stepper: Stepper) -> Iterator[None]:
    """Put model and optimizer back as they were."""
    kept = copy.deepcopy(stepper.state())
    stepper.model.train()
    yield
    stepper.restore(kept)


def pace(stepper: Stepper, views: Iterable[View], warmup: int, clock: Clock) -> tuple[int, float]:
    """How many steps were timed, and what they took in seconds."""
    steps, seconds = 0, 0.0
    with undone(stepper):
        started = begun = clock()
        for index, view in enumerate(views, start=1):
            stepper.step(view, 0.0)[0].item()  # waits for a GPU
            if index == warmup:
                begun = clock()
            elif index > warmup:
                steps, seconds = index - warmup, clock() - begun
                if steps == PACE_STEPS or clock() - started > PACE_S:
                    break
    return steps, seconds


def fastest(
    stepper: Stepper, views: Iterable[View], identity: str, clock: Clock
) -> tuple[Precision, dict[str, float]]:
    """The arithmetic to train in, of ``stepper.choices``, and the seconds that a step takes in each.

    Remembered for this training on this machine, so that a second run ends with the same bits.
    """
    where = f"{identity}|{environment.detect().fingerprint}"
    seconds: dict[str, float] | None = cache.load("training", where)
    if seconds is None or set(seconds) != set(stepper.choices):
        seconds = _race(stepper, views, clock)
        cache.store("training", where, seconds)
    first = stepper.choices[0]
    best = min(stepper.choices, key=lambda choice: seconds[choice])
    return (best if seconds[best] <= WORTH_SHARE * seconds[first] else first), seconds


def _race(stepper: Stepper, views: Iterable[View], clock: Clock) -> dict[str, float]:
    times: dict[str, list[float]] = {choice: [] for choice in stepper.choices}
    remaining = iter(views)
    first = next(remaining)
    with undone(stepper):
        started = clock()
        for index, view in enumerate(itertools.chain((first, first), remaining)):
            # Without indices a teacher's logits are not remembered: they may differ in the last bits.
            unknown = dataclasses.replace(view, indices=None)
            for choice in stepper.choices:
                stepper.precision = choice
                begun = clock()
                stepper.step(unknown, 0.0)[0].item()
                if index > 0:
                    times[choice].append(clock() - begun)
            if index == RACE_VIEWS or (index > 0 and clock() - started > RACE_S):
                break
    return {choice: statistics.median(taken) for choice, taken in times.items()}
