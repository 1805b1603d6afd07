"""Geometry of distributions and training curves; ``templates/plots.svg.j2`` draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploycnn.report import words
from deploycnn.report.scales import CHAR_WIDTH, Axis, Tick, axis
from deploycnn.report.schema import Measurement, Report

#: Number of colours in the style sheet, beside the baseline's grey.
COLOURS = 8
#: Labels longer than this are cut; the tooltip has all of it.
LABEL_CHARS = 26


def colours(report: Report) -> dict[str, str]:
    """Variant name -> CSS class of its colour; the baseline is grey."""
    baseline = report["baseline"]["variant"]
    others = [variant["name"] for variant in report["variants"] if variant["name"] != baseline]
    return {baseline: "base"} | {name: f"c{i % COLOURS}" for i, name in enumerate(others)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """One latency distribution: ``bands`` (left, right) hold 98, 90 and 50% of the runs."""

    y: float
    name: str
    runtime: str
    colour: str
    bands: tuple[tuple[float, float], ...]
    median: float
    spread: tuple[tuple[float, float], ...]
    middle: float
    text: str
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Distributions:
    """Distributions on one axis (``x``), and beside it each relative to its own median (``relative``)."""

    width: float
    height: float
    x: Axis
    relative: Axis | None
    strips: tuple[Strip, ...]
    stacked: bool
    bottom: float


_BANDS = ((0.01, 0.99), (0.05, 0.95), (0.25, 0.75))


def distributions(report: Report, rows: Sequence[Measurement], width: float) -> Distributions | None:
    """Distributions of ``rows`` (one setting), from their stored quantiles; ``None`` where none has any."""
    drawn = [(row, _quantiles(row)) for row in rows if row["samples"]]
    if not drawn:
        return None
    stacked = width < 600
    longest = max(len(row["variant"]) + len(row["runtime"]) for row, _ in drawn) + 3
    gutter = 8.0 if stacked else min(330.0, 14 + CHAR_WIDTH * longest)
    split = width - 60 if stacked else gutter + 0.6 * (width - gutter)
    pitch, top = (42.0, 28.0) if stacked else (26.0, 18.0)
    bottom = top + pitch * len(drawn) - pitch / 2 + 6
    ends = [at[p] for _, at in drawn for p in (0.01, 0.99)]
    x = axis(ends, gutter, split - 24, ticks=int((split - gutter) / 80))
    relative = None
    if not stacked:
        shares = [at[p] / at[0.5] - 1 for _, at in drawn for p in (0.01, 0.99)]
        relative = axis(shares, split + 26, width - 66, label=_percent_change, log=False, ticks=3)
    tints = colours(report)
    strips = tuple(
        _strip(row, at, top + pitch * index, tints[row["variant"]], x, relative)
        for index, (row, at) in enumerate(drawn)
    )
    return Distributions(
        width=width, height=bottom + 34, x=x, relative=relative, strips=strips, stacked=stacked, bottom=bottom
    )


def _percent_change(share: float) -> str:
    return "0%" if abs(share) < 1e-9 else f"{words.signed(100 * share, 0)}%"


def _quantiles(row: Measurement) -> dict[float, float]:
    """Latency at the probabilities that are drawn, read off the stored ones (nearest)."""
    samples = row["samples"]
    if samples is None:
        return {}
    stored = list(zip(samples["probabilities"], samples["quantiles_ms"], strict=True))
    wanted = {0.5, 1.0, *(p for band in _BANDS for p in band)}
    return {p: min(stored, key=lambda pair: abs(pair[0] - p))[1] for p in wanted}


def _strip(
    row: Measurement, at: Mapping[float, float], y: float, colour: str, x: Axis, relative: Axis | None
) -> Strip:
    median = at[0.5]
    spread: tuple[tuple[float, float], ...] = ()
    if relative is not None:
        spread = tuple(
            (relative.place(at[a] / median - 1), relative.place(at[b] / median - 1)) for a, b in _BANDS
        )
    told = ", ".join(f"p{100 * p:g} {words.significant(value)}" for p, value in sorted(at.items()) if p < 1)
    return Strip(
        y=y,
        name=words.cut(row["variant"], LABEL_CHARS),
        runtime=row["runtime"],
        colour=colour,
        bands=tuple((x.place(at[a]), x.place(at[b])) for a, b in _BANDS),
        median=x.place(median),
        spread=spread,
        middle=relative.place(0.0) if relative is not None else 0.0,
        text=words.milliseconds(median),
        title=f"{row['variant']} on {row['runtime']}\n{told}, max {words.milliseconds(at[1.0])}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One training curve: an SVG path in a ``width`` x ``height`` box."""

    name: str
    width: float
    height: float
    path: str
    end: tuple[float, float]
    ticks: tuple[Tick, ...]
    first: str
    last: str
    final: str


#: Keys of a training history that are bookkeeping, not results.
_NOT_CURVES = frozenset({"epoch", "step", "steps", "seconds", "learning_rate", "lr"})


def curves(history: Sequence[Mapping[str, Any]], width: float = 250, height: float = 116) -> list[Curve]:
    """One curve for every number that a training history follows; entries without it are left out."""
    names = dict.fromkeys(key for entry in history for key in entry if key not in _NOT_CURVES)
    found = []
    for name in names:
        pairs = [
            (float(entry.get("epoch", index + 1)), float(entry[name]))
            for index, entry in enumerate(history)
            if isinstance(entry.get(name), int | float) and not isinstance(entry[name], bool)
        ]
        if len(pairs) < 2:
            continue
        x = axis([pair[0] for pair in pairs], 40, width - 8, margin=0, log=False)
        y = axis([pair[1] for pair in pairs], height - 18, 8, margin=0.05, log=False, ticks=3)
        placed = [(x.place(epoch), y.place(value)) for epoch, value in pairs]
        found.append(
            Curve(
                name=name,
                width=width,
                height=height,
                path="M" + "L".join(f"{px},{py}" for px, py in placed),
                end=placed[-1],
                ticks=y.ticks,
                first=f"{pairs[0][0]:g}",
                last=f"{pairs[-1][0]:g}",
                final=words.significant(pairs[-1][1]),
            )
        )
    return found
