"""How a variant was made, in words: from the records that its passes left.

Drawn are a record's ``tables`` and ``histograms``, which any pass may leave, ``training.epochs`` and
``pruning.widths``; everything else is told as it is, so that a new pass needs nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deploycnn.report import words
from deploycnn.report.schema import Report, Step, Variant

#: A record's value longer than this is cut: the manifest has all of it.
_LONGEST = 400
#: A mapping that is longer as text than this gets a line for each of its keys.
_ONE_LINE = 110


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """Channels of one layer, before and after pruning; shares in percent of the widest and of ``before``."""

    layer: str
    before: int
    after: int
    before_share: float
    kept_share: float


def widths(record: Mapping[str, Any]) -> list[Width]:
    """Output channels of the layers that pruning made narrower; empty where nothing was pruned."""
    pruning = record.get("pruning")
    found = pruning.get("widths") if isinstance(pruning, Mapping) else None
    if not isinstance(found, Mapping):
        return []
    # A layer that only reads fewer channels keeps its own.
    pairs = [
        (str(layer), int(change["before"][-1]), int(change["after"][-1])) for layer, change in found.items()
    ]
    pairs = [(layer, before, after) for layer, before, after in pairs if after != before]
    widest = max((before for _, before, _ in pairs), default=1)
    return [
        Width(
            layer=layer,
            before=before,
            after=after,
            before_share=round(100 * before / widest, 1),
            kept_share=round(100 * after / before, 1),
        )
        for layer, before, after in pairs
    ]


def history(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The epochs of a record's training; empty where there was none."""
    training = record.get("training")
    found = training.get("epochs") if isinstance(training, Mapping) else None
    return [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []


@dataclass(frozen=True, slots=True, kw_only=True)
class TableView:
    """A table as text; ``numeric`` says which columns are aligned as numbers."""

    title: str
    columns: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(record: Mapping[str, Any]) -> list[TableView]:
    """The tables that a pass left."""
    found = []
    for table in _listed(record, "tables"):
        rows = [list(row) for row in table["rows"]]
        found.append(
            TableView(
                title=str(table["title"]),
                columns=tuple(str(column) for column in table["columns"]),
                numeric=tuple(
                    any(_is_number(row[index]) for row in rows)
                    and all(row[index] is None or _is_number(row[index]) for row in rows)
                    for index in range(len(table["columns"]))
                ),
                rows=tuple(tuple(_cell(value) for value in row) for row in rows),
            )
        )
    return found


def _listed(record: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = record.get(key)
    return [item for item in found if isinstance(item, Mapping)] if isinstance(found, list) else []


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return words.significant(value) if 1e-4 <= abs(value) < 1e7 or value == 0 else f"{value:.2e}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else words.flat(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class HistogramView:
    """A histogram as the page draws it, in percent: bars of (left, width, height), and the marked range."""

    title: str
    bars: tuple[tuple[float, float, float], ...]
    low_at: float
    high_at: float
    start: str
    stop: str
    marked: str


def histograms(record: Mapping[str, Any]) -> list[HistogramView]:
    """The histograms that a pass left; heights are by the fourth root, so that rare values stay visible."""
    found = []
    for item in _listed(record, "histograms"):
        counts, start, stop = item["counts"], float(item["start"]), float(item["stop"])
        peak = max(counts, default=0) or 1
        width = 100 / max(len(counts), 1)
        span = stop - start or 1.0
        low, high = float(item["low"]), float(item["high"])
        found.append(
            HistogramView(
                title=str(item["title"]),
                bars=tuple(
                    (round(index * width, 2), round(width, 2), round(100 * (count / peak) ** 0.25, 1))
                    for index, count in enumerate(counts)
                    if count
                ),
                low_at=round(100 * min(max((low - start) / span, 0), 1), 2),
                high_at=round(100 * min(max((high - start) / span, 0), 1), 2),
                start=words.significant(start),
                stop=words.significant(stop),
                marked=f"{words.significant(low)} … {words.significant(high)}",
            )
        )
    return found


def step_facts(step: Step) -> list[tuple[str, str]]:
    """What a step's record says beside what is drawn, parity and calibration first."""
    record = dict(step["record"])
    for key, drawn in (("training", "epochs"), ("pruning", "widths")):
        if isinstance(record.get(key), Mapping):
            record[key] = {name: value for name, value in record[key].items() if name != drawn}
    first = [key for key in ("training", "pruning", "parity", "calibration") if key in record]
    rest = [key for key in record if key not in {*first, "tables", "histograms"}]
    return nested_facts({key: record[key] for key in (*first, *rest)})


def variant_facts(report: Report, variant: Variant) -> list[tuple[str, str]]:
    """Facts of a variant that the summary table has no room for."""
    found = []
    if variant["parity"] is not None:
        found.append(("parity", _shorten(words.flat(variant["parity"]))))
    if variant["val_top1_drop"] is not None:
        bounds = variant["val_top1_drop_interval"]
        interval = f" ({words.change_interval(bounds)})" if bounds else ""
        found.append(("change on val", f"{words.change(variant['val_top1_drop'])} points{interval}"))
    if variant["mcnemar_p"] is not None:
        found.append(("McNemar p", words.significant(variant["mcnemar_p"])))
    if (agreement := variant.get("agreement")) is not None:
        bounds = variant.get("agreement_interval")
        interval = f" ({words.percent_interval(bounds, 2)})" if bounds else ""
        found.append(
            ("same class as the baseline", f"{words.percent(agreement, 2)}{interval} of the test images")
        )
    if variant["size_bytes"] is not None:
        found.append(("size on disk", f"{variant['size_bytes']:,} bytes"))
    base = next(other for other in report["variants"] if other["name"] == report["baseline"]["variant"])
    for key, title in (("params", "parameters"), ("macs", "MACs")):
        value, reference = variant.get(key), base.get(key)
        if isinstance(value, int):
            less = (
                f" ({reference / value:.2f}x fewer)"
                if isinstance(reference, int) and 0 < value < reference
                else ""
            )
            found.append((title, f"{value:,}{less}"))
    return found


def flips(variant: Variant) -> Iterator[tuple[str, list[str], int]]:
    """Images that changed sides: (title, names, how many more there are)."""
    flipped = variant["flipped"]
    if flipped is None:
        return
    for kind, title in (
        ("right_to_wrong", "right before, wrong now"),
        ("wrong_to_right", "wrong before, right now"),
    ):
        images = flipped["right_to_wrong"] if kind == "right_to_wrong" else flipped["wrong_to_right"]
        if images["count"]:
            more = max(0, images["count"] - len(images["names"]))
            yield f"{words.plural(images['count'], 'test image')} {title}", images["names"], more


def first_use(report: Report) -> dict[str, str]:
    """Step key -> the variant that told about it first: shared prefixes are told once."""
    found: dict[str, str] = {}
    for variant in report["variants"]:
        for step in variant["provenance"]:
            found.setdefault(step["key"], variant["name"])
    return found


def nested_facts(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as flat (key, value) pairs; a short inner one stays on one line."""
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{label(key)}"
        if isinstance(value, Mapping) and len(words.flat(value)) > _ONE_LINE:
            found += nested_facts(value, f"{name}: ")
        else:
            found.append((name, _shorten(words.flat(value))))
    return found


def data_facts(report: Report) -> list[tuple[str, str]]:
    """The dataset in words; empty without data."""
    data = report["data"]
    if data is None:
        return []
    counts = ", ".join(f"{name} {count}" for name, count in data["counts"].items())
    found = [
        ("dataset", data["name"]),
        ("images", counts),
        (
            words.plural(len(data["classes"]), "class").replace("classs", "classes"),
            ", ".join(data["classes"]),
        ),
        ("fingerprint", data["fingerprint"]),
    ]
    preprocessing = data.get("preprocessing")
    return found + (nested_facts(preprocessing, "preprocessing: ") if preprocessing else [])


def label(key: object) -> str:
    """A JSON key as people read it."""
    return str(key).replace("_", " ")


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
