"""``report.html``: one file that loads nothing, rendered from ``report.json`` alone.

Everything that comes from outside (names of variants, classes and files, error texts) passes Jinja's
autoescaping; the page's own policy forbids scripts and requests besides.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from deploycnn.report import plots, prose, provenance, summary, words
from deploycnn.report.pareto import pareto
from deploycnn.report.schema import Measurement, Report, Variant, validate

_TEMPLATES = Path(__file__).parent / "templates"
#: Widths of the two drawings of each plot, in pixels: a phone gets its own, not a shrunken one.
WIDE, NARROW = 1080, 380


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render_html(report: Mapping[str, Any]) -> str:
    """The report as one HTML page.

    Raises:
        ArtifactError: ``report`` is not a report of this schema version.
    """
    checked = validate(report)
    result, _, details = prose.headline(checked).partition("; ")
    tints = plots.colours(checked)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report={"recipe": "", "command": "", **checked},
            style=Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8")),  # noqa: S704 - our own file
            created=prose.created(checked),
            result=result,
            details=details,
            tiles=_tiles(checked),
            setting=prose.setting(checked),
            limits=prose.limits(checked),
            nothing=words.NOTHING,
            level=prose.level(checked),
            # Parameters stand with each variant below: the table is full enough.
            columns=[column for column in summary.columns(checked) if column.key != "params"],
            rows=[_summary_row(checked, variant, tints) for variant in checked["variants"]],
            pareto_wide=pareto(checked, WIDE, 440),
            pareto_narrow=pareto(checked, NARROW, 400),
            missing=summary.missing(checked),
            groups=_groups(checked, tints),
            variants=_variants(checked, tints),
            data=provenance.data_facts(checked),
            skipped=_skipped(checked),
            environment=provenance.nested_facts(checked["environment"]),
            method=prose.method(checked),
            payload=_payload(checked),
        )
    )


def _payload(report: Report) -> Markup:
    """The report as JSON that cannot leave its script element."""
    text = json.dumps(report, ensure_ascii=True, allow_nan=False)
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)  # noqa: S704 - the three characters that mean something in HTML are gone


def _won(report: Report, variant: Variant) -> bool:
    winner = report["winner"]
    return winner is not None and winner["variant"] == variant["name"]


def _tiles(report: Report) -> list[dict[str, str]]:
    """The winner's four figures against the baseline."""
    winner = report["winner"]
    if winner is None:
        return []
    variant = prose.variant_named(report, winner["variant"])
    base = prose.variant_named(report, report["baseline"]["variant"])
    row, reference = summary.cells(report, variant), summary.cells(report, base)
    batch = report["primary"]["batch_size"]
    than = f"{base['name']}: "
    latency = row[f"latency:{batch}"]
    tiles = [
        ("speed-up", row[f"speedup:{batch}"], row[f"speedup:{batch}"].note),
        ("top-1, change in points", row["change"], row["change"].note),
        ("median latency, ms", latency, f"{than}{reference[f'latency:{batch}'].text}"),
        ("size on disk", row["size"], f"{than}{reference['size'].text}"),
    ]
    return [
        {"what": what, "text": cell.text, "note": note, "tone": cell.tone}
        for what, cell, note in tiles
        if cell != summary.Cell()
    ]


def _summary_row(report: Report, variant: Variant, tints: Mapping[str, str]) -> dict[str, Any]:
    return {
        "name": variant["name"],
        "won": _won(report, variant),
        "colour": tints[variant["name"]],
        "status": variant["status"],
        "why": variant["why"],
        "cells": summary.cells(report, variant),
    }


def _groups(report: Report, tints: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "title": title,
            "rows": [_measurement_row(row, tints) for row in rows],
            "wide": plots.distributions(report, rows, WIDE),
            "narrow": plots.distributions(report, rows, NARROW),
        }
        for title, rows in summary.groups(report)
    ]


def _measurement_row(row: Measurement, tints: Mapping[str, str]) -> dict[str, Any]:
    cells = summary.measurement_cells(row)
    note = row["why"] if row["status"] != "measured" else row["disturbance"] or ""
    samples = row["samples"]
    return {
        "id": row["id"],
        "variant": row["variant"],
        "runtime": row["runtime"],
        "precision": row["precision"] or words.NOTHING,
        "colour": tints[row["variant"]],
        "cells": cells,
        "verdict": row["verdict"] if row["status"] == "measured" else row["status"],
        "tone": {"faster": "good", "slower": "bad", "failed": "bad"}.get(
            row["verdict"] or row["status"], "soft"
        ),
        "runs": samples["count"] if samples else words.NOTHING,
        "note": note,
    }


def _variants(report: Report, tints: Mapping[str, str]) -> list[dict[str, Any]]:
    first = provenance.first_use(report)
    return [
        {
            "name": variant["name"],
            "colour": tints[variant["name"]],
            "won": _won(report, variant),
            "chain": " → ".join(variant["passes"]),
            "status": variant["status"],
            "why": variant["why"],
            "facts": provenance.variant_facts(report, variant),
            "flips": [
                {"title": title, "names": names, "more": more}
                for title, names, more in provenance.flips(variant)
            ],
            "steps": [
                {
                    "name": step["pass"],
                    "key": step["key"],
                    "seconds": words.duration(step["seconds"]) if step["seconds"] is not None else "",
                    "options": words.flat(step["options"]),
                    "same_as": "" if first[step["key"]] == variant["name"] else first[step["key"]],
                    "curves": plots.curves(provenance.history(step["record"])),
                    "widths": provenance.widths(step["record"]),
                    "tables": provenance.tables(step["record"]),
                    "histograms": provenance.histograms(step["record"]),
                    "facts": provenance.step_facts(step),
                }
                for step in variant["provenance"]
            ],
        }
        for variant in report["variants"]
    ]


def _skipped(report: Report) -> str:
    count = len(report["data"]["skipped"]) if report["data"] else 0
    return f"{words.plural(count, 'file')} left out"
