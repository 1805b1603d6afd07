"""What a running plan tells whoever watches it; standard library only.

``execute`` speaks to this protocol and knows nothing of terminals. ``deploycnn.cli.console.Console`` is the
implementation for people; :class:`Silent` is the one for programs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

#: How a step ended: its artifact was already there, it was made now, or it failed.
Outcome = Literal["hit", "done", "failed"]


class Events(Protocol):
    """A listener. No method may raise, and none may block for longer than it takes to print a line."""

    def step_started(self, title: str) -> None:
        """A step begins; ``title`` names it to a person ("pruned_int8: distill")."""
        ...

    def progress(self, done: float, total: float, message: str = "") -> None:
        """The running step has done ``done`` of ``total`` units; ``message`` says what it is doing."""
        ...

    def step_finished(self, title: str, outcome: Outcome, seconds: float) -> None:
        """The step called ``title`` ended after ``seconds`` of wall-clock time."""
        ...

    def note(self, text: str) -> None:
        """Something worth knowing that asks for no action."""
        ...

    def warning(self, text: str) -> None:
        """Something that makes a result less trustworthy or less complete than was asked for."""
        ...

    def error(self, text: str) -> None:
        """Something that failed, in one line."""
        ...


@contextmanager
def told(events: Events, title: str) -> Iterator[None]:
    """Tell ``events`` that a step begins, and how it ends: failed, if an error leaves the block."""
    started = time.perf_counter()
    outcome: Outcome = "failed"
    events.step_started(title)
    try:
        yield
        outcome = "done"
    finally:
        events.step_finished(title, outcome, time.perf_counter() - started)


class Silent:
    """Listen to nothing: the default of the Python API."""

    def step_started(self, title: str) -> None:
        """Ignore it."""

    def progress(self, done: float, total: float, message: str = "") -> None:
        """Ignore it."""

    def step_finished(self, title: str, outcome: Outcome, seconds: float) -> None:
        """Ignore it."""

    def note(self, text: str) -> None:
        """Ignore it."""

    def warning(self, text: str) -> None:
        """Ignore it."""

    def error(self, text: str) -> None:
        """Ignore it."""
