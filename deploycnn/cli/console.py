"""What a person sees while a plan runs, and how results are printed.

Progress goes to standard error, results to standard output, so ``deploycnn ... --json | jq`` always works.
On a terminal progress is live (rich, imported only then); elsewhere, or with ``--plain``, every event is one
line without control codes. ``NO_COLOR`` takes the colours away and leaves the live line; ``TERM=dumb`` is
plain.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from deploycnn.report.words import clean, duration

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress, TaskID

    from deploycnn.events import Outcome

#: In plain mode a running step says how far it is at most this often: logs are read afterwards.
PLAIN_PROGRESS_SECONDS = 10.0
#: The live line is redrawn at most this often.
REDRAWS_PER_SECOND = 8

_MARKS = {"hit": ("=", "dim"), "done": ("✓", "green"), "failed": ("✗", "bold red")}
_WORDS = {"hit": "cached", "done": "done", "failed": "FAILED"}


def is_plain(stream: TextIO) -> bool:
    """Whether ``stream`` takes plain lines only: not a terminal, or one that says it is dumb."""
    return not stream.isatty() or os.environ.get("TERM") == "dumb"


def echo(text: str, stream: TextIO | None = None) -> None:
    """Print ``text`` and a newline; characters that the stream cannot encode are replaced, never fatal."""
    out = stream or sys.stdout
    encoding = getattr(out, "encoding", None) or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding), file=out, flush=True)


def print_json(value: Any) -> None:
    """Print ``value`` as indented JSON on standard output: the last thing a ``--json`` command prints."""
    echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_report(report: Mapping[str, Any], *, plain: bool = False) -> None:
    """Print the report's headline and table on standard output, as wide as the terminal."""
    from deploycnn.report.text import print_rich, render_text

    width = shutil.get_terminal_size((100, 24)).columns
    if plain or is_plain(sys.stdout):
        echo(render_text(report, width=width))
    else:
        print_rich(report, width=width)


class Console:
    """Tell a person how a plan gets on; implements :class:`deploycnn.events.Events`.

    Use it as a context manager, or call :meth:`close` before printing results: a live line must be taken away
    first.

    Args:
        plain: Force plain lines (``True``) or the live line (``False``); decide by the stream when ``None``.
        quiet: Print warnings only. What fails is told at the end, with the result or instead of it.
        stream: Standard error when ``None``.
    """

    def __init__(
        self, *, plain: bool | None = None, quiet: bool = False, stream: TextIO | None = None
    ) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._plain = is_plain(self._stream) if plain is None else plain
        self._started = time.monotonic()
        self._spoke = 0.0
        self._title = ""
        self._rich: RichConsole | None = None
        self._live: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def plain(self) -> bool:
        """Whether this console prints plain lines."""
        return self._plain

    def close(self) -> None:
        """Take the live line away. Harmless when called twice."""
        if self._live is not None:
            self._live.stop()
            self._live, self._task = None, None

    def step_started(self, title: str) -> None:
        """Show that a step runs."""
        self._title = clean(title)
        self._spoke = time.monotonic()
        if self._quiet:
            return
        if self._plain:
            self._line("run", self._title)
            return
        live = self._ensure_live()
        if self._task is not None:
            live.remove_task(self._task)
        self._task = live.add_task(self._title, total=None, message="")

    def progress(self, done: float, total: float, message: str = "") -> None:
        """Move the live line, or print a line when the last one is :data:`PLAIN_PROGRESS_SECONDS` old."""
        if self._quiet:
            return
        said = clean(message)
        if not self._plain:
            if self._live is not None and self._task is not None:
                self._live.update(self._task, completed=done, total=total or None, message=said)
            return
        now = time.monotonic()
        if now - self._spoke >= PLAIN_PROGRESS_SECONDS:
            self._spoke = now
            share = f"{100 * done / total:3.0f}%" if total else f"{done:g}"
            self._line("...", " ".join(part for part in (self._title, share, said) if part))

    def step_finished(self, title: str, outcome: Outcome, seconds: float) -> None:
        """Leave one line that says how the step ended."""
        name = clean(title)
        took = "" if outcome == "hit" else f" ({duration(seconds)})"
        if self._live is not None and self._task is not None:
            self._live.remove_task(self._task)
            self._task = None
        if self._quiet:
            return
        if self._plain:
            self._line(_WORDS[outcome], f"{name}{took}")
        else:
            mark, style = _MARKS[outcome]
            self._styled((f"{mark} ", style), (name, style if outcome == "failed" else ""), (took, "dim"))

    def note(self, text: str) -> None:
        """Print something worth knowing."""
        if not self._quiet:
            self._say("note", text, "dim")

    def warning(self, text: str) -> None:
        """Print something that makes a result less trustworthy."""
        self._say("warning", text, "yellow")

    def error(self, text: str) -> None:
        """Print something that failed."""
        if self._quiet:
            return
        self._say("error", text, "bold red")

    def _say(self, kind: str, text: str, style: str) -> None:
        if self._plain:
            self._line(kind, clean(text))
        else:
            self._styled((f"{kind}: ", style), (clean(text), "dim" if kind == "note" else ""))

    def _line(self, kind: str, text: str) -> None:
        echo(f"[{time.monotonic() - self._started:8.1f} s] {kind:<7} {text}", self._stream)

    def _ensure_rich(self) -> RichConsole:
        if self._rich is None:
            from rich.console import Console as RichConsole

            self._rich = RichConsole(file=self._stream, force_terminal=True, highlight=False)
        return self._rich

    def _styled(self, *parts: tuple[str, str]) -> None:
        from rich.text import Text

        # Text, not markup: brackets in file names and messages are to be read, not obeyed.
        self._ensure_rich().print(Text.assemble(*parts), soft_wrap=True)

    def _ensure_live(self) -> Progress:
        if self._live is None:
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._live = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[message]}", style="dim", markup=False),
                TimeElapsedColumn(),
                console=self._ensure_rich(),
                refresh_per_second=REDRAWS_PER_SECOND,
                transient=True,
                redirect_stdout=False,  # results belong to standard output, also while a step runs
            )
            self._live.start()
        return self._live
