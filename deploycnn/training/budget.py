"""How many steps a budget holds, so that the learning rate is down when the budget is spent.

A budget in epochs is a number of steps. One in minutes becomes one: steps are timed first, then planned, and
planned again while training goes on, because machines do not keep their pace. The schedule only knows which share
of it is done; a new plan stretches or shrinks what is left of it, and leaves no jump. Standard library only.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

#: Part of the time left that is planned for; the rest is for what nobody can foresee.
_PLANNED_SHARE = 0.98
#: Weight that earlier steps keep when a new plan is made.
_MEMORY = 0.8


@dataclass(slots=True, kw_only=True)
class Plan:
    """Where training stands on its schedule.

    Attributes:
        total: Length of the schedule in steps of the present pace; not whole after a new plan.
        warmup: Of these, steps of rising learning rate.
        left: Steps still to be taken; the position on the schedule is ``total - left``.
        taken: Steps taken.
        limited: Whether time, not epochs, ends it.
    """

    total: float
    warmup: float
    left: int
    taken: int = 0
    limited: bool = False

    @property
    def position(self) -> float:
        """Of the next step, from 0 to ``total``."""
        return self.total - self.left

    def advance(self) -> None:
        """Note that a step was taken."""
        self.taken, self.left = self.taken + 1, self.left - 1

    def stretch(self, left: int, *, limited: bool) -> None:
        """Let ``left`` steps, at least 0, do what is left of the schedule."""
        self.limited = limited
        if left == 0 or self.left == 0:
            self.left = 0
            return
        ratio = left / self.left
        self.total, self.warmup, self.left = self.total * ratio, self.warmup * ratio, left

    def to_state(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)


@dataclass(slots=True, kw_only=True)
class Pace:
    """What time training has taken.

    Attributes:
        spent_s: Since the beginning, all told; what an interruption lost is not counted.
        steps_s: Taken by ``steps`` steps, those long ago counting less.
        steps: How many were timed, likewise.
        pause_s: What lies between two epochs: validation and saving.
    """

    spent_s: float = 0.0
    steps_s: float = 0.0
    steps: float = 0.0
    pause_s: float = 0.0

    def add(self, steps: int, seconds: float) -> None:
        """Note what ``steps`` more steps took."""
        self.steps, self.steps_s = self.steps + steps, self.steps_s + seconds

    def fade(self) -> None:
        """Let what was noted so far count less than what follows."""
        self.steps, self.steps_s = _MEMORY * self.steps, _MEMORY * self.steps_s

    @property
    def step_s(self) -> float:
        """Mean seconds of a step; 0 where none was timed."""
        return self.steps_s / self.steps if self.steps else 0.0

    def to_state(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)


def steps_that_fit(seconds: float, pace: Pace, *, steps_per_epoch: int, taken: int) -> int:
    """Steps that fit into ``seconds``, each epoch's pause included; 0 where not even one does.

    Args:
        seconds: That are left.
        pace: With at least one timed step.
        steps_per_epoch: Steps between two pauses.
        taken: Steps so far, which say how far away the next pause is.
    """
    to_epoch_end = steps_per_epoch - taken % steps_per_epoch
    left = seconds * _PLANNED_SHARE
    first_s = to_epoch_end * pace.step_s + pace.pause_s
    if left < first_s:
        return min(to_epoch_end, max(0, math.floor((left - pace.pause_s) / pace.step_s)))
    whole, rest = divmod(left - first_s, steps_per_epoch * pace.step_s + pace.pause_s)
    part = max(0, math.floor((rest - pace.pause_s) / pace.step_s))
    return to_epoch_end + int(whole) * steps_per_epoch + min(part, steps_per_epoch)
