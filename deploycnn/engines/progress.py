"""How far TensorRT's builder is, and the way to stop it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from deploycnn.core import ProgressFn
from deploycnn.engines.flavour import Flavour


class Phases:
    """The builder's nested phases as one number between 0 and 1."""

    def __init__(self, progress: ProgressFn) -> None:
        self.progress = progress
        self.lock = threading.Lock()
        #: Phase -> [parent, steps, steps done].
        self.open: dict[str, tuple[str | None, int, int]] = {}
        self.reached = 0.0

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase of ``steps`` steps begins, within ``parent`` where there is one."""
        with self.lock:
            self.open[phase] = (parent, max(1, steps), 0)

    def step(self, phase: str, step: int) -> None:
        """One of its steps is done."""
        with self.lock:
            if phase not in self.open:
                return
            parent, steps, _ = self.open[phase]
            self.open[phase] = (parent, steps, min(step + 1, steps))
            # Phases come and go; what is shown only grows.
            self.reached = max(self.reached, self._fraction())
            self.progress(self.reached, 1.0, phase.lower())

    def finish(self, phase: str) -> None:
        """A phase has ended."""
        with self.lock:
            self.open.pop(phase, None)

    def _fraction(self) -> float:
        """Done of the outermost phase, with that of the phases within its current step."""
        inner: dict[str | None, list[str]] = {}
        for phase, (parent, _, _) in self.open.items():
            inner.setdefault(parent, []).append(phase)
        fraction, width, level = 0.0, 1.0, inner.get(None, [])
        while level:
            phase = level[-1]
            _, steps, done = self.open[phase]
            fraction += width * done / steps
            width *= (1.0 if done < steps else 0.0) / steps
            level = inner.get(phase, [])
        return min(fraction, 1.0)


def make_monitor(flavour: Flavour, phases: Phases, go_on: Callable[[], bool]) -> Any:
    """An ``IProgressMonitor`` that tells ``phases``; the builder stops at the step at which ``go_on`` is false."""
    base = flavour.module.IProgressMonitor

    class _Monitor(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step_index: int) -> bool:
            phases.step(phase_name, step_index)
            return go_on()

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return _Monitor()
