"""The summary for a terminal: as many columns as there is room for, the least important left out first."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from deploycnn.report import prose, summary
from deploycnn.report.schema import Report, validate
from deploycnn.report.words import clean, cut

_GAP = 2
#: Names and reasons are cut to this many characters before any column is left out.
_LONGEST_NAME = 32


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """``text`` in lines of at most ``width`` characters, all but the first indented."""
    return textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False) or [""]


def render_text(report: Mapping[str, Any], *, width: int = 100) -> str:
    """Headline, table and what is missing, as plain text.

    Args:
        report: As written to ``report.json``.
        width: Lines are at most this long; at least 40.

    Raises:
        ArtifactError: ``report`` is not a report of this schema version.
    """
    checked = validate(report)
    width = max(40, width)
    columns, rows = table(checked, width)
    lines = aligned([column.title for column in columns], rows, [column.numeric for column in columns])
    parts = [*wrap(clean(prose.headline(checked)), width), "", *lines, *_notes(checked, width)]
    return "\n".join(parts)


def aligned(titles: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> list[str]:
    """Lines of a plain table: titles, a rule, the rows; numbers to the right."""
    every = [titles, *rows]
    widths = [max(len(row[index]) for row in every) for index in range(len(titles))]
    lines = []
    for row in every:
        cells = zip(row, widths, numeric, strict=True)
        padded = (cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells)
        lines.append((" " * _GAP).join(padded).rstrip())
    return [lines[0], "-" * max(len(line) for line in lines), *lines[1:]]


def print_rich(report: Mapping[str, Any], *, width: int) -> None:
    """The same on a terminal that knows colours, on standard output.

    Raises:
        ArtifactError: ``report`` is not a report of this schema version.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    checked = validate(report)
    columns, rows = table(checked, width)
    winner = checked["winner"]["variant"] if checked["winner"] else None
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, _GAP - 1, 0, 0), show_edge=False)
    for column in columns:
        grid.add_column(Text(column.title), justify="right" if column.numeric else "left", no_wrap=True)
    styles = {"good": "green", "bad": "red", "unsure": "yellow"}
    for variant, row in zip(checked["variants"], rows, strict=True):
        known = summary.cells(checked, variant)
        # Text, not markup: brackets in names are to be read, not obeyed.
        shown = [
            Text(text, style=styles.get(known[column.key].tone, ""))
            for column, text in zip(columns, row, strict=True)
        ]
        grid.add_row(*shown, style="bold" if variant["name"] == winner else "")
    console = Console(width=width, highlight=False)
    console.print(Text(clean(prose.headline(checked)), style="bold"))
    console.print()
    console.print(grid)
    for line in _notes(checked, width):
        console.print(Text(line, style="dim"))


def table(report: Report, width: int) -> tuple[list[summary.Column], list[list[str]]]:
    """Columns and cells that fit into ``width`` characters.

    Of intervals and columns the less important goes first (:data:`_STAGES`); at last names are cut.
    """
    every = summary.columns(report)
    for noted, least in _STAGES:
        keep = list(every)
        while _needed(*_cells(report, keep, noted)) > width:
            last = max(keep, key=lambda column: column.priority)
            if last.priority < least:
                break
            keep.remove(last)
        else:
            return _cells(report, keep, noted)
    columns, rows = _cells(report, keep, ())
    room = max(8, max(len(row[0]) for row in rows) - (_needed(columns, rows) - width))
    return columns, [[cut(row[0], room), *row[1:]] for row in rows]


#: What is tried, in order: columns that show their intervals, and the least priority that may be left out.
_STAGES: tuple[tuple[tuple[str, ...], int], ...] = (
    (("top1", "change", "speedup"), 6),
    (("change", "speedup"), 4),
    ((), 1),
)


def _cells(
    report: Report, columns: Sequence[summary.Column], noted: Sequence[str]
) -> tuple[list[summary.Column], list[list[str]]]:
    rows = []
    for variant in report["variants"]:
        known = summary.cells(report, variant)
        row = []
        for column in columns:
            cell = known[column.key]
            shown = cell.note and cell.text != "1x" and column.key.partition(":")[0] in noted
            row.append(cut(clean(f"{cell.text} ({cell.note})" if shown else cell.text), _LONGEST_NAME))
        rows.append(row)
    return list(columns), rows


def _needed(columns: Sequence[summary.Column], rows: Sequence[Sequence[str]]) -> int:
    widest = [max(len(column.title), *(len(row[i]) for row in rows)) for i, column in enumerate(columns)]
    return sum(widest) + _GAP * (len(columns) - 1)


def _notes(report: Report, width: int) -> list[str]:
    base = report["baseline"]
    first = f"At {prose.setting(report)}, against {base['variant']} on {base['runtime']}. "
    lines = [
        "",
        *wrap(clean(first + (f"Budget: {prose.limits(report)}." if report["budget"] else "")), width),
    ]
    for item in summary.missing(report):
        lines += wrap(clean(f"{item.status}: {item.what}: {item.why}"), width, "  ")
    for warning in report["warnings"]:
        lines += wrap(clean(f"warning: {warning}"), width, "  ")
    return lines
