"""Progress: plain lines without control codes, a live line on terminals, results apart from both."""

from __future__ import annotations

import io
import json
import re

import pytest

from deploycnn.cli import console as module
from deploycnn.cli.console import Console, echo, is_plain, print_json, print_report
from deploycnn.events import Events, Silent
from tests.report.example import example_report

HOSTILE = "\x1b[31mred\x1b[0m [bold]markup[/bold]\r\nsecond line"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _play(events: Events) -> None:
    events.step_started(f"pruned: train {HOSTILE}")
    events.progress(3, 10, f"epoch 3 {HOSTILE}")
    events.step_finished(f"pruned: train {HOSTILE}", "done", 75.0)
    events.step_finished("pruned: export", "hit", 0.0)
    events.step_started("pruned: int8")
    events.step_finished("pruned: int8", "failed", 1.5)
    events.note(f"note {HOSTILE}")
    events.warning("the machine is busy")
    events.error(f"int8: {HOSTILE}")


def test_plain_mode_is_one_line_per_event_without_control_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLAIN_PROGRESS_SECONDS", 0.0)
    stream = io.StringIO()
    with Console(stream=stream) as console:
        assert console.plain
        _play(console)
    lines = stream.getvalue().splitlines()
    shown = [re.sub(r"^\[ *\d+\.\d s\] ", "", line) for line in lines]
    hostile = "[31mred[0m [bold]markup[/bold] second line"
    assert shown == [
        f"run     pruned: train {hostile}",
        f"...     pruned: train {hostile}  30% epoch 3 {hostile}",
        f"done    pruned: train {hostile} (1 min 15 s)",
        "cached  pruned: export",
        "run     pruned: int8",
        "FAILED  pruned: int8 (1.5 s)",
        f"note    note {hostile}",
        "warning the machine is busy",
        f"error   int8: {hostile}",
    ]


def test_plain_progress_does_not_flood_a_log() -> None:
    stream = io.StringIO()
    with Console(stream=stream) as console:
        console.step_started("train")
        for done in range(1000):
            console.progress(done, 1000)
    assert len(stream.getvalue().splitlines()) == 1


def test_a_terminal_gets_a_live_line_and_a_record_of_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = _Terminal()
    with Console(stream=stream) as console:
        assert not console.plain
        _play(console)
    text = stream.getvalue()
    assert "\x1b[" in text
    assert "[bold]markup[/bold]" in text, "markup from outside is shown, not obeyed"
    for expected in ("✓ ", "(1 min 15 s)", "= ", "✗ ", "warning: ", "error: "):
        assert expected in text
    assert text.endswith("\x1b[?25h") or text.count("\x1b[?25l") == text.count("\x1b[?25h"), (
        "the cursor is back"
    )


def test_no_color_keeps_the_live_line_but_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = _Terminal()
    with Console(stream=stream) as console:
        console.error("broken")
        console.step_started("train")
    assert not re.search(r"\x1b\[(3\d|9\d|38;)[0-9;]*m", stream.getvalue())


@pytest.mark.parametrize(("plain", "expected"), [(True, True), (False, False)])
def test_plain_can_be_forced(plain: bool, expected: bool) -> None:
    assert Console(plain=plain, stream=_Terminal()).plain is expected


def test_a_dumb_terminal_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert is_plain(_Terminal())


def test_quiet_prints_warnings_only() -> None:
    # What failed is told once, at the end, by the command.
    stream = io.StringIO()
    with Console(quiet=True, stream=stream) as console:
        _play(console)
    assert [line.split("] ")[1].split()[0] for line in stream.getvalue().splitlines()] == ["warning"]


def test_progress_goes_to_stderr_and_json_is_all_of_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with Console() as console:
        _play(console)
    print_json(example_report())
    captured = capsys.readouterr()
    assert json.loads(captured.out) == example_report()
    assert "cached" in captured.err


def test_a_piped_report_has_no_control_codes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    print_report(example_report())
    captured = capsys.readouterr()
    assert captured.out.startswith("pruned_int8 is 3.1x faster")
    assert "\x1b" not in captured.out
    assert max(len(line) for line in captured.out.splitlines()) <= 100


def test_what_a_stream_cannot_encode_is_replaced() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    echo("−0.2 … 3", stream)
    assert raw.getvalue() == b"?0.2 ? 3\n"


def test_silence_implements_the_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    _play(Silent())
    assert capsys.readouterr() == ("", "")
