"""The terminal table: never wider than asked, most important columns last to go, no control codes."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
from rich.console import Console

from deploycnn.report.text import print_rich, render_text, table
from tests.report.example import example_report
from tests.report.hostile import hostile_report


@pytest.mark.parametrize("make", [example_report, hostile_report])
@pytest.mark.parametrize("width", [40, 60, 80, 100, 140, 200])
def test_no_line_is_longer_than_the_terminal(make: Any, width: int) -> None:
    assert max(len(line) for line in render_text(make(), width=width).splitlines()) <= width


def test_eighty_columns_hold_what_decides() -> None:
    titles = [column.title for column in table(example_report(), 80)[0]]
    assert titles == ["variant", "top-1", "change, points", "ms, b1", "speed-up, b1", "budget"]
    assert "3.1x (2.9–3.3)" in render_text(example_report(), width=80)


def test_wider_terminals_show_more() -> None:
    shown = [{column.key for column in table(example_report(), width)[0]} for width in (80, 140, 220)]
    assert shown[0] < shown[1] < shown[2]
    assert "memory" in shown[2]


def test_the_text_says_why_something_is_missing() -> None:
    text = " ".join(render_text(example_report(), width=100).split())
    assert "failed: fp16: parity 0.31 exceeds the tolerance 0.05" in text
    assert "not measured: onnxruntime:cuda: CUDAExecutionProvider is not in this onnxruntime build" in text


def test_plain_text_has_no_control_characters_whatever_the_names() -> None:
    text = render_text(hostile_report(), width=120)
    assert not [char for char in text if char != "\n" and (ord(char) < 32 or 127 <= ord(char) < 160)]
    assert "\u202e" not in text


def test_rich_shows_every_cell_uncut(monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (80, 140):
        stream = io.StringIO()
        monkeypatch.setattr(
            "rich.console.Console",
            lambda *, width, highlight, stream=stream: Console(
                file=stream, width=width, highlight=highlight, color_system=None
            ),
        )
        print_rich(example_report(), width=width)
        text = stream.getvalue()
        assert max(len(line) for line in text.splitlines()) <= width
        assert "…" not in text.replace(" … ", " ")
        _, rows = table(example_report(), width)
        assert all(cell in text for row in rows for cell in row)


def test_verdicts_in_words() -> None:
    report: Any = copy.deepcopy(dict(example_report()))
    winner = next(variant for variant in report["variants"] if variant["name"] == "pruned_int8")
    winner["speedup"]["1"] = {"ratio": 0.5, "low": 0.4, "high": 0.8, "verdict": "slower"}
    assert "is 2.0x slower (1.2–2.5) than fp32" in " ".join(render_text(report, width=200).split())
    winner["speedup"]["1"] = {"ratio": 1.01, "low": 0.97, "high": 1.04, "verdict": "indistinguishable"}
    text = " ".join(render_text(report, width=200).split())
    assert "cannot be told apart in speed from fp32 (ratio 0.97–1.04)" in text
