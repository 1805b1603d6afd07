"""What stands in ``report.json``, as types; the contract with every program that reads it.

``SCHEMA_VERSION`` changes when a reader of the old form would misread the new one. Keys that a reader may
miss are ``NotRequired``; every other key is always there and ``null`` where there is nothing to say.

Conventions: ``top1`` and its drops are in [0, 1] (a drop is baseline minus variant: positive is worse);
intervals are ``[low, high]`` at the confidence stated in ``method``; latencies are milliseconds for one whole
batch; ratios are baseline latency / variant latency (above 1 is faster); batch sizes as keys are strings,
because JSON has no other keys.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired, cast

from annotated_types import Ge, Interval, Len, MinLen
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from deploycnn.errors import ArtifactError

SCHEMA_VERSION = 1

#: How a variant or a measurement ended. Only "measured" carries numbers that may be compared.
Status = Literal["measured", "failed", "not measured"]
#: What the interval of the ratio says; "baseline" marks the reference itself.
Verdict = Literal["faster", "slower", "indistinguishable", "baseline"]
#: Whether the drop stays below the budget: "unproven" where its interval reaches beyond it.
WithinBudget = bool | Literal["unproven"] | None

_Fraction = Annotated[float, Interval(ge=0, le=1)]
_Bounds = Annotated[list[float], Len(2, 2)]
_Count = Annotated[int, Ge(0)]
_Name = Annotated[str, MinLen(1)]

#: Probabilities at which latency samples are summarised: fine enough to draw a distribution from, and at the
#: tails, where deployment decisions are made, finer.
PROBABILITIES: tuple[float, ...] = (
    0.0, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5,
    0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99, 1.0,
)  # fmt: skip


class SkippedFile(TypedDict):
    """A file that was left out of the dataset."""

    path: str
    why: str


class DataSummary(TypedDict):
    """The images: ``counts`` by split name ("train", "val", "test")."""

    name: str
    counts: dict[str, _Count]
    classes: list[str]
    fingerprint: str
    skipped: list[SkippedFile]
    preprocessing: NotRequired[dict[str, Any] | None]


class Baseline(TypedDict):
    """The variant, and the runtime it ran on, that everything is compared with."""

    variant: _Name
    runtime: str


class Budget(TypedDict, total=False):
    """What the user is ready to pay; every limit is optional."""

    max_top1_drop: float
    max_size_bytes: int
    max_latency_ms: float


class Winner(TypedDict):
    """The fastest variant within the budget, and why it is that one."""

    variant: _Name
    runtime: str
    why: str


class Primary(TypedDict):
    """The setting whose numbers stand in the headline and decide the winner."""

    runtimes: list[str]
    threads: int
    batch_size: int


class Quantiles(TypedDict):
    """Latency of one batch, in milliseconds."""

    median: float
    p90: float
    p99: float


class Speedup(TypedDict):
    """Baseline latency / this latency, with its interval."""

    ratio: float
    low: float
    high: float
    verdict: Verdict


class FlippedImages(TypedDict):
    """How many test images changed sides; ``names`` may be fewer than ``count``."""

    count: _Count
    names: list[str]


class Flipped(TypedDict):
    """Test images on which the variant and the baseline disagree about right and wrong."""

    right_to_wrong: FlippedImages
    wrong_to_right: FlippedImages


#: One step of a variant's chain. ``record`` is what the pass wrote about itself. The report draws
#: ``training.epochs`` (list of {"epoch": ..., other numbers}) and ``pruning.widths`` ({layer: {"before":
#: [in, out], "after": [in, out]}}), and lists everything else as it is.
Step = TypedDict(
    "Step",
    {
        "pass": str,
        "key": str,
        "options": dict[str, Any],
        "seconds": float | None,
        "record": dict[str, Any],
        "warnings": NotRequired[list[str]],  # not there in what earlier versions wrote
    },
)


class Variant(TypedDict):
    """One variant: accuracy on the test split, and speed on ``runtime`` with ``primary.threads`` threads.

    ``agreement`` is the share of test images whose predicted class is the baseline's, right or wrong. ``passes`` are
    the steps in words ("prune", "int8"); ``precision`` is what ran, or where nothing did, what the file holds;
    ``latency_ms`` and ``speedup`` are by batch size. Figures are null where ``status`` is not "measured" or where there
    were no data; ``why`` then says why.
    """

    name: _Name
    passes: list[str]
    runtime: str | None
    precision: str | None
    top1: _Fraction | None
    top1_interval: _Bounds | None
    top1_drop: float | None
    top1_drop_interval: _Bounds | None
    val_top1_drop: float | None
    val_top1_drop_interval: _Bounds | None
    mcnemar_p: _Fraction | None
    agreement: NotRequired[_Fraction | None]
    agreement_interval: NotRequired[_Bounds | None]
    flipped: Flipped | None
    latency_ms: dict[str, Quantiles]
    speedup: dict[str, Speedup]
    size_bytes: _Count | None
    params: _Count | None
    macs: _Count | None
    peak_memory_bytes: _Count | None
    parity: dict[str, Any] | None
    within_budget: WithinBudget
    status: Status
    why: str
    provenance: list[Step]


class Samples(TypedDict):
    """The raw samples in short: ``quantiles_ms[i]`` at ``probabilities[i]``; ``file`` holds them all."""

    count: _Count
    file: str | None
    probabilities: list[float]
    quantiles_ms: list[float]


class Measurement(TypedDict):
    """One (variant, runtime:mode, executed precision, batch size, threads).

    ``reference`` is the ``id`` of the row that ``ratio`` compares with (null on the reference itself);
    ``disturbance`` says in words what the machine did meanwhile that makes the row less trustworthy; ``top1``
    is this runtime's own, where it was measured on several.
    """

    id: _Name
    variant: _Name
    runtime: _Name
    precision: str | None
    batch_size: Annotated[int, Ge(1)]
    threads: Annotated[int, Ge(1)]
    status: Status
    why: str
    median_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    median_interval_ms: _Bounds | None
    throughput_ips: float | None
    ratio: float | None
    low: float | None
    high: float | None
    verdict: Verdict | None
    reference: str | None
    sessions: _Count
    warmup: _Count
    disturbance: str | None
    samples: Samples | None
    top1: NotRequired[_Fraction | None]


class Method(TypedDict, total=False):
    """How the timing was done, for the method note. ``confidence`` is in [0, 1]."""

    confidence: _Fraction
    blocks: int
    runs_per_block: int
    warmup_runs: int
    sessions: int
    resamples: int


@with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))  # holds for all inside, too
class Report(TypedDict):
    """The whole of ``report.json``.

    ``winner`` is null where nothing won; ``why_no_winner`` then says why. ``recipe`` is the resolved recipe
    as YAML text.
    """

    schema_version: Literal[1]
    name: str
    created: str
    environment: dict[str, Any]
    data: DataSummary | None
    baseline: Baseline
    budget: Budget | None
    winner: Winner | None
    why_no_winner: str
    primary: Primary
    variants: Annotated[list[Variant], MinLen(1)]
    measurements: list[Measurement]
    warnings: list[str]
    method: NotRequired[Method]
    recipe: NotRequired[str]
    command: NotRequired[str]


@functools.cache
def _adapter() -> TypeAdapter[Report]:
    return TypeAdapter(Report)


def _where(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    more = error.error_count() - 1
    tail = f" (and {more} more)" if more else ""
    if first["type"] == "missing":
        return f"{path} is missing{tail}"
    if first["type"] == "extra_forbidden":
        return f"unknown key {path}{tail}"
    shown = repr(first["input"])
    return f"{path}: {first['msg']}, found {shown if len(shown) <= 60 else shown[:57] + '...'}{tail}"


def validate(report: Mapping[str, Any], where: str = "report.json") -> Report:
    """Check ``report`` against the schema and return it, unchanged.

    Args:
        report: As read from JSON (or about to be written).
        where: The file, for the error message.

    Raises:
        ArtifactError: foreign ``schema_version``, a missing, unknown or ill-typed key, or a name that
            refers to nothing.
    """
    if not isinstance(report, Mapping):
        raise ArtifactError(f"{where}: not a report (expected a JSON object, found {type(report).__name__})")
    version = report.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise ArtifactError(
            f"{where}: schema_version is {version!r}, this deploycnn reads {SCHEMA_VERSION}; "
            "render it with the version that wrote it, or run the recipe again"
        )
    try:
        # Through JSON, which is what is promised: a tuple is fine, an object that only looks right is not.
        _adapter().validate_json(json.dumps(report))
    except ValidationError as error:
        raise ArtifactError(f"{where}: {_where(error)}") from error
    checked = cast("Report", report)
    _check_names(checked, where)
    return checked


def _check_names(report: Report, where: str) -> None:
    names = [variant["name"] for variant in report["variants"]]
    ids = [row["id"] for row in report["measurements"]]
    for kind, values in (("variants", names), ("measurements", ids)):
        if len(set(values)) != len(values):
            twice = next(value for value in values if values.count(value) > 1)
            raise ArtifactError(f'{where}: {kind}: "{twice}" stands there twice')
    wanted = [("baseline.variant", report["baseline"]["variant"], names)]
    if report["winner"] is not None:
        wanted.append(("winner.variant", report["winner"]["variant"], names))
    for row in report["measurements"]:
        wanted.append((f"measurements[{row['id']}].variant", row["variant"], names))
        if row["reference"] is not None:
            wanted.append((f"measurements[{row['id']}].reference", row["reference"], ids))
    for key, value, known in wanted:
        if value not in known:
            raise ArtifactError(f'{where}: {key}: "{value}" is not in this report')


def summarize_samples(latencies_ms: Sequence[float], file: str | None = None) -> Samples:
    """The raw samples of one row as quantiles, linearly interpolated (NumPy's default method).

    Raises:
        ValueError: there are none, or one is not finite.
    """
    ordered = sorted(float(value) for value in latencies_ms)
    if not ordered or not all(math.isfinite(value) for value in ordered):
        raise ValueError("latencies_ms must be finite and not empty")
    quantiles = []
    for probability in PROBABILITIES:
        position = probability * (len(ordered) - 1)
        below = math.floor(position)
        above = min(below + 1, len(ordered) - 1)
        quantiles.append(ordered[below] + (ordered[above] - ordered[below]) * (position - below))
    return {
        "count": len(ordered),
        "file": file,
        "probabilities": list(PROBABILITIES),
        "quantiles_ms": quantiles,
    }
