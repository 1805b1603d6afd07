"""A report as table cells: the summary, and what is missing; HTML, Markdown and terminal only lay it out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deploycnn.report import words
from deploycnn.report.prose import test_images
from deploycnn.report.schema import Measurement, Report, Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """``text`` large, ``note`` small, ``value`` the exact number, ``tone`` good | bad | unsure | empty."""

    text: str = words.NOTHING
    note: str = ""
    value: float | int | str | None = None
    tone: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the summary. Where there is no room, the highest ``priority`` number goes first."""

    key: str
    title: str
    priority: int
    numeric: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Something that was asked for and has no numbers."""

    what: str
    status: str
    why: str


def batch_sizes(report: Report) -> list[int]:
    """Batch sizes of the summary: the primary one first, then the others in order."""
    found = {int(batch) for variant in report["variants"] for batch in variant["latency_ms"]}
    primary = report["primary"]["batch_size"]
    return [primary, *sorted(found - {primary})]


def columns(report: Report) -> list[Column]:
    """The summary's columns; those that nobody has a value for are left out."""
    batches = batch_sizes(report)
    latencies = [Column(key=f"latency:{batch}", title=f"ms, b{batch}", priority=2) for batch in batches]
    speedups = [Column(key=f"speedup:{batch}", title=f"speed-up, b{batch}", priority=1) for batch in batches]
    for extra in range(1, len(batches)):
        latencies[extra] = Column(key=latencies[extra].key, title=latencies[extra].title, priority=8)
        speedups[extra] = Column(key=speedups[extra].key, title=speedups[extra].title, priority=5)
    timing = [column for pair in zip(latencies, speedups, strict=True) for column in pair]
    candidates = [
        Column(key="name", title="variant", priority=0, numeric=False),
        Column(key="top1", title="top-1", priority=3),
        Column(key="change", title="change, points", priority=1),
        *timing,
        Column(key="size", title="size", priority=4),
        Column(key="macs", title="MACs", priority=7),
        Column(key="params", title="params", priority=9),
        Column(key="memory", title="peak memory", priority=10),
        Column(key="runtime", title="runtime", priority=6, numeric=False),
        Column(key="budget", title="budget", priority=2, numeric=False),
    ]
    rows = [cells(report, variant) for variant in report["variants"]]
    return [column for column in candidates if any(row[column.key] != Cell() for row in rows)]


def cells(report: Report, variant: Variant) -> dict[str, Cell]:
    """One row of the summary, by column key."""
    images = test_images(report)
    decimals = words.point_decimals(images)
    row = {
        "name": Cell(text=variant["name"], note=" → ".join(variant["passes"])),
        "top1": Cell(),
        "change": _change_cell(report, variant, decimals),
        "size": _scaled_cell(variant["size_bytes"], "B"),
        "params": _scaled_cell(variant["params"]),
        "macs": _scaled_cell(variant["macs"]),
        "memory": _scaled_cell(variant["peak_memory_bytes"], "B"),
        "runtime": Cell(text=variant["runtime"] or words.NOTHING, note=variant["precision"] or ""),
        "budget": _budget_cell(report, variant),
    }
    if variant["top1"] is not None:
        bounds = variant["top1_interval"]
        note = words.percent_interval(bounds, decimals) if bounds else ""
        row["top1"] = Cell(text=words.percent(variant["top1"], decimals), note=note, value=variant["top1"])
    for batch in batch_sizes(report):
        row[f"latency:{batch}"] = _latency_cell(variant, batch)
        row[f"speedup:{batch}"] = _speedup_cell(variant, batch)
    return row


def _scaled_cell(value: int | None, unit: str = "") -> Cell:
    return Cell() if value is None else Cell(text=words.scaled(value, unit), value=value)


def _change_cell(report: Report, variant: Variant, decimals: int) -> Cell:
    drop, bounds = variant["top1_drop"], variant["top1_drop_interval"]
    if drop is None:
        return Cell()
    if variant["name"] == report["baseline"]["variant"]:
        return Cell(text="baseline", value=drop)
    tone = "" if bounds is None else "bad" if bounds[0] > 0 else "good" if bounds[1] < 0 else ""
    note = words.change_interval(bounds, decimals) if bounds else ""
    return Cell(text=words.change(drop, decimals), note=note, value=drop, tone=tone)


def _latency_cell(variant: Variant, batch: int) -> Cell:
    quantiles = variant["latency_ms"].get(str(batch))
    if quantiles is None:
        return Cell()
    note = f"p90 {words.significant(quantiles['p90'])}\np99 {words.significant(quantiles['p99'])}"
    return Cell(text=words.significant(quantiles["median"]), note=note, value=quantiles["median"])


def _speedup_cell(variant: Variant, batch: int) -> Cell:
    speedup = variant["speedup"].get(str(batch))
    if speedup is None:
        return Cell()
    if speedup["verdict"] == "baseline":
        return Cell(text="1x", note="baseline", value=speedup["ratio"])
    note = words.ratio_interval(speedup["ratio"], speedup["low"], speedup["high"])
    tone = {"faster": "good", "slower": "bad"}.get(speedup["verdict"], "unsure")
    return Cell(text=words.ratio(speedup["ratio"]), note=note, value=speedup["ratio"], tone=tone)


def _budget_cell(report: Report, variant: Variant) -> Cell:
    if variant["status"] != "measured":
        return Cell(text=variant["status"], note=variant["why"], tone="bad")
    winner = report["winner"]
    won = winner is not None and winner["variant"] == variant["name"]
    text, tone = {
        True: ("within", "good"),
        False: ("over", "bad"),
        "unproven": ("unproven", "unsure"),
        None: ("", ""),
    }[variant["within_budget"]]
    if won:
        return Cell(
            text="winner", note=text if text != "within" else "", tone="good" if text != "unproven" else tone
        )
    return Cell(text=text or words.NOTHING, tone=tone)


def missing(report: Report) -> list[Missing]:
    """Everything without numbers, with its reason; rows of one runtime with one reason are told once."""
    found = [
        Missing(what=variant["name"], status=variant["status"], why=variant["why"])
        for variant in report["variants"]
        if variant["status"] != "measured"
    ]
    unmeasured = {variant["name"] for variant in report["variants"] if variant["status"] != "measured"}
    groups: dict[tuple[str, str, str], list[Measurement]] = {}
    for row in report["measurements"]:
        if row["status"] != "measured" and row["variant"] not in unmeasured:
            groups.setdefault((row["runtime"], row["status"], row["why"]), []).append(row)
    everyone = {variant["name"] for variant in report["variants"]} - unmeasured
    for (runtime, status, why), rows in groups.items():
        names = _unique(row["variant"] for row in rows)
        who = "" if set(names) == everyone else f": {', '.join(names)}"
        found.append(Missing(what=f"{runtime}{who}", status=status, why=why))
    return found


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def groups(report: Report) -> list[tuple[str, list[Measurement]]]:
    """Measurements by setting ("batch 1, 1 thread"), the primary one first; rows in the variants' order.

    Rows that were not measured at all stand in :func:`missing`; here are numbers, and failures among them.
    """
    order = {variant["name"]: index for index, variant in enumerate(report["variants"])}
    primary = (report["primary"]["batch_size"], report["primary"]["threads"])
    found: dict[tuple[int, int], list[Measurement]] = {}
    for row in report["measurements"]:
        if row["status"] != "not measured":
            found.setdefault((row["batch_size"], row["threads"]), []).append(row)
    settings = sorted(found, key=lambda setting: (setting != primary, setting))
    return [
        (
            f"batch {batch}, {words.plural(threads, 'thread')}",
            sorted(found[batch, threads], key=lambda row: order[row["variant"]]),
        )
        for batch, threads in settings
    ]


def measurement_cells(row: Measurement) -> list[Cell]:
    """Median, p90, p99, images/s and speed-up of one row."""
    bounds = row["median_interval_ms"]
    digits = words.significant
    times = (row["median_ms"], row["p90_ms"], row["p99_ms"])
    cells = [Cell() if time is None else Cell(text=digits(time), value=time) for time in times]
    if bounds is not None and row["median_ms"] is not None:
        note = f"{digits(bounds[0])}{words.NOTHING}{digits(bounds[1])}"
        cells[0] = Cell(text=digits(row["median_ms"]), note=note, value=row["median_ms"])
    throughput, ratio, low, high = row["throughput_ips"], row["ratio"], row["low"], row["high"]
    cells.append(Cell() if throughput is None else Cell(text=digits(throughput), value=throughput))
    if ratio is None:
        cells.append(Cell())
    elif row["verdict"] == "baseline" or low is None or high is None:
        cells.append(Cell(text=words.ratio(ratio), value=ratio))
    else:
        note = words.ratio_interval(ratio, low, high)
        cells.append(Cell(text=words.ratio(ratio), note=note, value=ratio))
    return cells
