"""The Markdown form: the same values, and nothing from outside becomes markup."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploycnn.report import summary, words
from deploycnn.report.markdown import escape, fenced, render_markdown
from tests.report.example import example_report
from tests.report.hostile import hostile_report


def _prose(text: str) -> list[str]:
    """Lines outside code blocks."""
    lines, fence = [], ""
    for line in text.splitlines():
        run = re.match(r"`{3,}", line)
        if run and not fence:
            fence = run[0]
        elif fence and line == fence:
            fence = ""
        elif not fence:
            lines.append(line)
    assert not fence, "a code block never ends"
    return lines


def _tables(lines: list[str]) -> list[list[str]]:
    tables: list[list[str]] = [[]]
    for line in lines:
        if line.startswith("|"):
            tables[-1].append(line)
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


def test_the_summary_shows_what_the_json_says() -> None:
    report = example_report()
    first = _tables(_prose(render_markdown(report)))[0]
    for variant, line in zip(report["variants"], first[2:], strict=True):
        assert variant["name"].replace("_", r"\_") in line
        for column in summary.columns(report):
            assert escape(summary.cells(report, variant)[column.key].text) in line
        if variant["top1"] is not None:
            assert words.percent(variant["top1"]) in line


@pytest.mark.parametrize("make", [example_report, hostile_report])
def test_every_table_keeps_its_columns(make: object) -> None:
    tables = _tables(_prose(render_markdown(make())))  # type: ignore[operator]
    assert len(tables) == 5
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1


def test_hostile_strings_stay_text() -> None:
    lines = _prose(render_markdown(hostile_report()))
    text = "\n".join(lines)
    assert not re.search(r"(?<!\\)<", text), "an HTML tag"
    assert not re.search(r"(?<!\\)\[", text), "a link"
    assert not re.search(r"https?://|(?<!\\)www\.", text), "an address that would be linked"
    assert not [line for line in lines if re.match(r"#+ (title|heading)", line.strip())]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)


def test_recipes_cannot_end_their_code_block() -> None:
    assert fenced("a\n```\nb\n````", "yaml") == "`````yaml\na\n```\nb\n````\n`````"
    assert fenced("a:\n  b: \x1b[31m1", "yaml") == "```yaml\na:\n  b: [31m1\n```"


@given(st.text(max_size=40))
def test_escaped_text_is_one_line_and_reads_the_same(text: str) -> None:
    found = escape(text)
    assert "\n" not in found
    assert re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", found) == words.clean(text)
