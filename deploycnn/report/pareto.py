"""Geometry of the accuracy-latency plot; ``templates/plots.svg.j2`` draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploycnn.report import prose, words
from deploycnn.report.plots import LABEL_CHARS, colours
from deploycnn.report.scales import Axis, Box, Label, axis, place_labels
from deploycnn.report.schema import Measurement, Report, Variant

#: Number of marker shapes for runtimes.
SHAPES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A measured (variant, runtime) on the accuracy-latency plane.

    ``own`` is the interval of top-1 by itself, ``paired`` that of the difference to the baseline, hung on the
    baseline's top-1: the one that tells two variants apart. All positions are SVG units.
    """

    x: float
    y: float
    across: tuple[float, float] | None
    own: tuple[float, float] | None
    paired: tuple[float, float] | None
    colour: str
    shape: int
    main: bool
    winner: bool
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pareto:
    """The accuracy-latency plot. ``front`` is an SVG path; ``budget_y`` the lowest accuracy in budget."""

    width: float
    height: float
    frame: Box
    x: Axis
    y: Axis
    points: tuple[Point, ...]
    front: str
    labels: tuple[Label, ...]
    budget_y: float | None
    runtimes: tuple[tuple[int, str], ...]


def primary_rows(report: Report) -> list[Measurement]:
    """Measured rows at the primary batch size and thread count."""
    primary = report["primary"]
    return [
        row
        for row in report["measurements"]
        if row["median_ms"] is not None
        and row["batch_size"] == primary["batch_size"]
        and row["threads"] == primary["threads"]
    ]


def non_dominated(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (latency, top-1) pairs that no other pair beats in both, by latency."""
    front: list[tuple[float, float]] = []
    for latency, top1 in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or top1 > front[-1][1]:
            front.append((latency, top1))
    return front


def pareto(report: Report, width: float, height: float) -> Pareto | None:
    """The plot at the primary setting; ``None`` where no variant has both accuracy and latency."""
    variants = {variant["name"]: variant for variant in report["variants"]}
    base = variants[report["baseline"]["variant"]]["top1"]
    rows = [(row, variants[row["variant"]]) for row in primary_rows(report)]
    known = [(row, variant, top1) for row, variant in rows if (top1 := _top1(row, variant)) is not None]
    if not known:
        return None
    frame = Box(left=52, top=12, right=width - 14, bottom=height - 44)
    latencies = [
        value for row, _, _ in known for value in (row["median_ms"], *(row["median_interval_ms"] or ()))
    ]
    tops = [top1 for _, _, top1 in known]
    for _, variant, _ in known:
        tops += variant["top1_interval"] or []
        tops += _paired(variant, base) or []
    max_drop = (report["budget"] or {}).get("max_top1_drop")
    floor = base - max_drop if base is not None and max_drop is not None else None
    x = axis(
        [v for v in latencies if v is not None], frame.left, frame.right, margin=0.1, ticks=int(width / 90)
    )
    y = axis(
        [min(top, 1.0) for top in tops], frame.bottom, frame.top, label=_percent_tick, log=False, ticks=5
    )
    shapes = {spec: i % SHAPES for i, spec in enumerate(dict.fromkeys(row["runtime"] for row, _, _ in known))}
    tints = colours(report)
    points = tuple(
        _point(report, row, variant, top1, x, y, base, tints[variant["name"]], shapes[row["runtime"]])
        for row, variant, top1 in known
    )
    named = [
        (point.x, point.y, words.cut(variant["name"], LABEL_CHARS))
        for point, (_, variant, _) in zip(points, known, strict=True)
        if point.main
    ]
    front = non_dominated([(row["median_ms"] or 0.0, top1) for row, _, top1 in known])
    budget_y = y.place(floor) if floor is not None and y.low < floor < y.high else None
    return Pareto(
        width=width,
        height=height,
        frame=frame,
        x=x,
        y=y,
        points=tuple(sorted(points, key=lambda point: point.main)),
        front=_staircase([(x.place(latency), y.place(top1)) for latency, top1 in front], frame),
        labels=tuple(place_labels(named, [*_obstacles(points), *_caption(frame, budget_y)], frame)),
        budget_y=budget_y,
        runtimes=tuple((shape, spec) for spec, shape in shapes.items()),
    )


def _top1(row: Measurement, variant: Variant) -> float | None:
    own = row.get("top1")
    return variant["top1"] if own is None else own


def _paired(variant: Variant, base: float | None) -> list[float] | None:
    bounds = variant["top1_drop_interval"]
    if bounds is None or base is None or bounds[0] == bounds[1]:
        return None
    return [base - bounds[1], base - bounds[0]]


def _percent_tick(value: float) -> str:
    return f"{100 * value:.4g}%"


def _point(
    report: Report,
    row: Measurement,
    variant: Variant,
    top1: float,
    x: Axis,
    y: Axis,
    base: float | None,
    colour: str,
    shape: int,
) -> Point:
    median, winner = row["median_ms"] or 0.0, report["winner"]
    across, own, paired = row["median_interval_ms"], variant["top1_interval"], _paired(variant, base)
    main = row["runtime"] == variant["runtime"]
    lines = [f"{variant['name']} on {row['runtime']}", f"median {words.milliseconds(median)}"]
    if across:
        lines[-1] += f" ({words.significant(across[0])}{words.NOTHING}{words.significant(across[1])})"
    decimals = words.point_decimals(prose.test_images(report))
    lines.append(f"top-1 {words.percent(top1, decimals)}")
    if own:
        lines[-1] += f" ({words.percent_interval(own, decimals)})"
    return Point(
        x=x.place(median),
        y=y.place(top1),
        across=(x.place(across[0]), x.place(across[1])) if across else None,
        own=(y.place(own[0]), y.place(own[1])) if own and main else None,
        paired=(y.place(paired[0]), y.place(paired[1])) if paired and main else None,
        colour=colour,
        shape=shape,
        main=main,
        winner=main and winner is not None and winner["variant"] == variant["name"],
        title="\n".join(lines),
    )


def _obstacles(points: Sequence[Point]) -> list[Box]:
    boxes = []
    for point in points:
        reach = 8 if point.main else 5
        boxes.append(
            Box(left=point.x - reach, right=point.x + reach, top=point.y - reach, bottom=point.y + reach)
        )
        bars = (bar for bar in (point.own, point.paired) if bar)
        boxes += [Box(left=point.x - 3, right=point.x + 3, top=min(bar), bottom=max(bar)) for bar in bars]
        if point.across:
            boxes.append(
                Box(left=point.across[0], right=point.across[1], top=point.y - 2, bottom=point.y + 2)
            )
    return boxes


def _caption(frame: Box, budget_y: float | None) -> list[Box]:
    """Where the template writes "over the accuracy budget"."""
    if budget_y is None:
        return []
    return [Box(left=frame.right - 160, right=frame.right, top=budget_y, bottom=budget_y + 18)]


def _staircase(corners: Sequence[tuple[float, float]], frame: Box) -> str:
    """Down from the fastest, up at each further corner, right from the most accurate."""
    path = [f"M{corners[0][0]},{frame.bottom}V{corners[0][1]}"]
    path += [f"H{x}V{y}" for x, y in corners[1:]]
    return "".join([*path, f"H{frame.right}"])
