"""``report.md``: the same content as the page, compact, for a pull request or a mail."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deploycnn.report import prose, provenance, summary, words
from deploycnn.report.schema import Report, validate
from deploycnn.report.words import clean

#: What CommonMark and GitHub's dialect may read as markup inside a line.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~!&$@])")
#: Markup that counts only where a line begins.
_LEADING = re.compile(r"^(\d+)([.)])(?=\s|$)|^([-+=])(?=[-+=\s]|$)")
#: A bare address would become a link to wherever its author wanted.
_ADDRESS = re.compile(r"(?i)\b(https?|ftp|mailto):|\bwww\.")


def escape(text: object) -> str:
    """``text`` as Markdown that shows it literally, on one line."""
    line = _SPECIAL.sub(r"\\\1", clean(text))
    line = _ADDRESS.sub(lambda found: found[0][:-1] + f"\\{found[0][-1]}", line)
    return _LEADING.sub(lambda found: f"{found[1]}\\{found[2]}" if found[1] else f"\\{found[3]}", line)


def fenced(text: str, language: str = "") -> str:
    """``text`` as a code block whose fence is longer than any inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    kept = "\n".join(clean_line(line) for line in text.strip("\n").split("\n"))
    return f"{fence}{language}\n{kept}\n{fence}"


def clean_line(line: str) -> str:
    """One line of code without control characters; its indentation stays."""
    return line[: len(line) - len(line.lstrip(" "))] + clean(line)


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[bool] = ()) -> str:
    """A Markdown table of cells that are Markdown already."""
    marks = ["--:" if index < len(numeric) and numeric[index] else "---" for index in range(len(titles))]
    lines = [titles, marks, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown.

    Raises:
        ArtifactError: ``report`` is not a report of this schema version.
    """
    checked = validate(report)
    sections = [
        f"# {escape(checked['name'])}",
        f"**{escape(prose.headline(checked))}.**",
        f"Why this one: {escape(checked['winner']['why'])}" if checked["winner"] else "",
        "\n".join(f"> {escape(warning)}  " for warning in checked["warnings"]),
        "## Variants",
        _under(checked),
        _summary(checked),
        *_missing(checked),
        "## Every measurement",
        *_measurements(checked),
        "## How each variant was made",
        *_provenance(checked),
        *_facts("## Data", provenance.data_facts(checked)),
        *_facts("## Environment", provenance.nested_facts(checked["environment"])),
        "## How it was measured",
        "\n\n".join(escape(paragraph) for paragraph in prose.method(checked)),
        *_again(checked),
        f"{escape(prose.created(checked))}; exact numbers: report.json",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _under(report: Report) -> str:
    base, budget = report["baseline"], prose.limits(report)
    told = f"At {prose.setting(report)}, against {base['variant']} on {base['runtime']}."
    return escape(f"{told} Budget: {budget}." if budget else told)


def _summary(report: Report) -> str:
    columns = summary.columns(report)
    rows = []
    for variant in report["variants"]:
        known = summary.cells(report, variant)
        cells = [_cell(known[column.key], bare=column.key == "budget") for column in columns]
        rows.append(cells)
    return table([column.title for column in columns], rows, [column.numeric for column in columns])


def _cell(cell: summary.Cell, *, bare: bool = False) -> str:
    text = escape(cell.text)
    return f"{text} ({escape(', '.join(cell.note.splitlines()))})" if cell.note and not bare else text


def _missing(report: Report) -> list[str]:
    found = summary.missing(report)
    lines = [f"- **{escape(item.what)}** {item.status}: {escape(item.why)}" for item in found]
    return ["## Not measured, and why", "\n".join(lines)] if found else []


def _measurements(report: Report) -> list[str]:
    timing = ["median, ms", "p90", "p99", "images/s", "speed-up"]
    titles = ["variant", "runtime", "precision", *timing, "verdict", "note"]
    numeric = [False] * 3 + [True] * len(timing)
    sections = []
    for title, rows in summary.groups(report):
        cells = [
            [
                escape(row["variant"]),
                escape(row["runtime"]),
                escape(row["precision"] or words.NOTHING),
                *(_cell(cell) for cell in summary.measurement_cells(row)),
                row["verdict"] or row["status"],
                escape(row["why"] or row["disturbance"] or ""),
            ]
            for row in rows
        ]
        sections += [f"### {title}", table(titles, cells, numeric)]
    return sections


def _provenance(report: Report) -> list[str]:
    first = provenance.first_use(report)
    sections = []
    for variant in report["variants"]:
        lines = [f"- {key}: {escape(value)}" for key, value in provenance.variant_facts(report, variant)]
        shown: list[provenance.TableView] = []
        for title, names, more in provenance.flips(variant):
            tail = f", and {more} more" if more else ""
            lines.append(f"- {title}: {', '.join(escape(name) for name in names)}{tail}")
        for number, step in enumerate(variant["provenance"], start=1):
            took = f", {words.duration(step['seconds'])}" if step["seconds"] is not None else ""
            options = f" ({escape(words.flat(step['options']))})" if step["options"] else ""
            lines.append(f"{number}. **{escape(step['pass'])}**{options}, key {escape(step['key'])}{took}")
            if first[step["key"]] != variant["name"]:
                lines.append(f"   - shared with {escape(first[step['key']])}")
                continue
            lines += [f"   - {escape(key)}: {escape(value)}" for key, value in provenance.step_facts(step)]
            widths = provenance.widths(step["record"])
            if widths:
                told = ", ".join(f"{width.layer} {width.before} → {width.after}" for width in widths)
                lines.append(f"   - channels: {escape(told)}")
            shown += provenance.tables(step["record"])
        sections += [f"### {escape(variant['name'])}", "\n".join(lines)]
        for view in shown:
            cells = [[escape(cell) for cell in row] for row in view.rows]
            columns = [escape(column) for column in view.columns]
            sections += [f"#### {escape(view.title)}", table(columns, cells, list(view.numeric))]
    return sections


def _facts(title: str, facts: Sequence[tuple[str, str]]) -> list[str]:
    lines = "\n".join(f"- {escape(key)}: {escape(value)}" for key, value in facts)
    return [title, lines] if facts else []


def _again(report: Report) -> list[str]:
    command, recipe = report.get("command"), report.get("recipe")
    parts = [fenced(command, "sh") if command else "", fenced(recipe, "yaml") if recipe else ""]
    return ["## Do it again", *parts] if any(parts) else []
