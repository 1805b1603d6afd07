"""What TensorRT says, kept: one logger for the process, because the library holds on to the first that it gets."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

#: TensorRT's severities from the worst, by their value.
SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")


@dataclass(slots=True)
class Log:
    """Messages in the order in which they came, as (severity, text)."""

    records: list[tuple[str, str]] = field(default_factory=list)

    def add(self, severity: int, text: str) -> None:
        """Keep a message."""
        self.records.append((SEVERITIES[min(severity, len(SEVERITIES) - 1)], text.strip("\n")))

    def errors(self) -> list[str]:
        """Texts of errors, in order."""
        return [text for severity, text in self.records if severity in ("INTERNAL_ERROR", "ERROR")]

    def warnings(self) -> list[str]:
        """Texts of warnings, in order."""
        return [text for severity, text in self.records if severity == "WARNING"]

    def layer_information(self) -> str | None:
        """What the builder logs of the layers that it made (at detailed verbosity), or ``None``."""
        return next((text for _, text in reversed(self.records) if text.startswith("Layers:")), None)

    def text(self, least: str = "VERBOSE") -> str:
        """All messages at least as severe as ``least``, one a line."""
        kept = SEVERITIES[: SEVERITIES.index(least) + 1]
        return "".join(f"{severity}: {text}\n" for severity, text in self.records if severity in kept)


_lock = threading.Lock()
_sinks: list[Log] = []


def dispatch(severity: int, text: str) -> None:
    """Give a message to every log that listens."""
    with _lock:
        sinks = tuple(_sinks)
    for sink in sinks:
        sink.add(severity, text)


@contextlib.contextmanager
def listening(log: Log | None = None) -> Iterator[Log]:
    """Collect what TensorRT says meanwhile (in any thread: the library has one logger)."""
    own = log if log is not None else Log()
    with _lock:
        _sinks.append(own)
    try:
        yield own
    finally:
        with _lock:
            _sinks[:] = [sink for sink in _sinks if sink is not own]


def make_logger(module: Any) -> Any:
    """An ``ILogger`` of ``module`` that dispatches to the logs that listen."""

    class _Logger(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            dispatch(int(severity), msg)

    return _Logger()
