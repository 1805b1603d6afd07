"""Figures of variants and measurements, each with its interval, as they stand in report.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deploycnn import measure
from deploycnn.core import Artifact
from deploycnn.recipe import Budget, Profile

if TYPE_CHECKING:
    from deploycnn.data.base import Data
    from deploycnn.measure import Measured, Timing
    from deploycnn.profiling.accuracy import Drop
    from deploycnn.profiling.rows import TimingRow

#: Names of flipped images that are listed in the report; all predictions are in measurements/.
LISTED_FLIPS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A variant as it was made: its artifact, or why there is none."""

    name: str
    passes: tuple[str, ...]
    artifact: Artifact | None
    why: str = ""
    parity: Mapping[str, Any] | None = None
    provenance: Sequence[Mapping[str, Any]] = field(default=())


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that a report is made from."""

    name: str
    entries: Sequence[Entry]
    baseline: str
    measured: Measured
    profile: Profile
    budget: Budget | None
    data: Data | None
    #: The resolved recipe as YAML, where there is one.
    recipe: str | None = None


class Figures:
    """Derives everything that is told of single variants and measurements."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.measured = inputs.measured
        self.primary_threads = measure.thread_counts(inputs.profile.threads)[0]
        self.primary_batch_size = inputs.profile.batch_sizes[0]
        self.reference_runtime = self._reference_runtime()

    def _reference_runtime(self) -> str:
        """The first runtime that opens the baseline's format and works here."""
        from deploycnn import registry

        baseline = next(entry for entry in self.inputs.entries if entry.name == self.inputs.baseline)
        for spec in self.measured.runtimes:
            accepts = registry.get("runtime", spec.partition(":")[0]).accepts
            if (
                spec not in self.measured.unavailable
                and baseline.artifact
                and baseline.artifact.format in accepts
            ):
                return spec
        return self.measured.runtimes[0]

    # -- timing ----------------------------------------------------------------------------------

    def row(self, timing: Timing, name: str, spec: str) -> TimingRow | None:
        """The row of a variant on a runtime, or ``None`` where it was not among the candidates."""
        wanted = measure.label(name, spec)
        return next((row for row in timing.rows if row.label == wanted), None)

    def reference(self, timing: Timing) -> TimingRow | None:
        """The row that ratios are taken against, or ``None`` where it could not be measured."""
        row = self.row(timing, self.inputs.baseline, self.reference_runtime)
        return row if row is not None and row.measured else None

    def primary(self) -> Timing:
        """The timing at the setting that decides."""
        return next(
            timing
            for timing in self.measured.timings
            if (timing.threads, timing.batch_size) == (self.primary_threads, self.primary_batch_size)
        )

    def speedup(self, timing: Timing, row: TimingRow) -> dict[str, Any] | None:
        """Reference latency / this latency with its interval and verdict."""
        from deploycnn.profiling.statistics import compare

        reference = self.reference(timing)
        if reference is None or not row.measured:
            return None
        found = compare(reference, row)
        return {"ratio": found.ratio, "low": found.low, "high": found.high, "verdict": found.verdict}

    def fastest_runtime(self, name: str) -> str | None:
        """The runtime with the lowest median at the primary setting."""
        medians = {
            spec: median
            for spec in self.measured.runtimes
            if (median := self.median_ms(self.primary(), name, spec)) is not None
        }
        return min(medians, key=lambda spec: medians[spec]) if medians else None

    def median_ms(self, timing: Timing, name: str, spec: str) -> float | None:
        """Median latency of a variant on a runtime, or ``None``."""
        from deploycnn.profiling.statistics import summarize

        row = self.row(timing, name, spec)
        return summarize(row).median_ms if row is not None and row.measured else None

    def measurements(self) -> list[dict[str, Any]]:
        """All rows of ``measurements[]``."""
        rows = []
        for timing in self.measured.timings:
            for entry in self.inputs.entries:
                rows += [
                    self.measurement(timing, entry, spec)
                    for spec in self.measured.runtimes
                    if self.wanted(entry, spec)
                ]
        return rows

    def wanted(self, entry: Entry, spec: str) -> bool:
        """Whether the runtime opens the variant's format, so that a row is expected."""
        from deploycnn import registry

        accepts = registry.get("runtime", spec.partition(":")[0]).accepts
        return entry.artifact is not None and entry.artifact.format in accepts

    def measurement(self, timing: Timing, entry: Entry, spec: str) -> dict[str, Any]:
        """One row of ``measurements[]``."""
        from deploycnn.profiling.statistics import summarize
        from deploycnn.report.schema import summarize_samples

        row = self.row(timing, entry.name, spec)
        reference = self.reference(timing)
        blank = dict.fromkeys(
            ("precision", "median_ms", "p90_ms", "p99_ms", "median_interval_ms", "throughput_ips", "ratio", "low",
             "high", "verdict", "reference", "disturbance", "samples")
        )  # fmt: skip
        base = {
            "id": self.identify(entry.name, spec, timing),
            "variant": entry.name,
            "runtime": spec,
            "batch_size": timing.batch_size,
            "threads": timing.threads,
            **blank,
            "sessions": 0,
            "warmup": 0,
        }
        if row is None or not row.measured:
            why = row.why if row is not None else self.measured.unavailable.get(spec, "")
            return {**base, "status": "not measured", "why": why}
        summary = summarize(row)
        speedup = self.speedup(timing, row) or {}
        is_reference = reference is not None and row.label == reference.label
        top1 = self.measured.predictions.get((entry.name, spec, "test"))
        return {
            **base,
            "status": "measured",
            "why": "",
            "precision": row.executed.precision if row.executed else None,
            "median_ms": summary.median_ms,
            "p90_ms": summary.p90_ms,
            "p99_ms": summary.p99_ms,
            "median_interval_ms": list(summary.median_interval_ms),
            "throughput_ips": summary.throughput_ips,
            **speedup,
            "reference": None
            if is_reference or reference is None
            else self.identify(self.inputs.baseline, self.reference_runtime, timing),
            "sessions": summary.sessions,
            "warmup": row.warmup_runs,
            "disturbance": row.disturbance.words if row.disturbance else None,
            "samples": summarize_samples(row.flat_ms, timing.file),
            **({"top1": top1.top1} if top1 is not None else {}),
        }

    @staticmethod
    def identify(name: str, spec: str, timing: Timing) -> str:
        """Name of a row, unique in the report."""
        return f"{name}|{spec}|b{timing.batch_size}|t{timing.threads}"

    # -- variants --------------------------------------------------------------------------------

    def variant(self, entry: Entry) -> dict[str, Any]:
        """One entry of ``variants[]``."""
        runtime = self.fastest_runtime(entry.name) if entry.artifact else None
        facts = entry.artifact.facts if entry.artifact else None
        result: dict[str, Any] = {
            "name": entry.name,
            "passes": list(entry.passes),
            "runtime": runtime,
            "precision": facts.precision if facts else None,
            **self.accuracy(entry, runtime),
            "latency_ms": {},
            "speedup": {},
            "size_bytes": facts.size_bytes if facts else None,
            "params": facts.params if facts else None,
            "macs": facts.macs if facts else None,
            "peak_memory_bytes": self.measured.memory_bytes.get((entry.name, runtime or "")),
            "parity": dict(entry.parity) if entry.parity else None,
            "provenance": [dict(step) for step in entry.provenance],
        }
        if entry.artifact is None:
            return {**result, "status": "failed", "why": entry.why}
        if runtime is None:
            return {**result, "status": "not measured", "why": self.why_not_measured(entry)}
        from deploycnn.profiling.statistics import summarize

        for timing in self.measured.timings:
            row = self.row(timing, entry.name, runtime)
            if timing.threads != self.primary_threads or row is None or not row.measured:
                continue
            if row.executed is not None:
                result["precision"] = row.executed.precision
            summary, batch = summarize(row), str(timing.batch_size)
            result["latency_ms"][batch] = {
                "median": summary.median_ms,
                "p90": summary.p90_ms,
                "p99": summary.p99_ms,
            }
            speedup = self.speedup(timing, row)
            if speedup is not None:
                result["speedup"][batch] = speedup
        return {**result, "status": "measured", "why": self.measured.failures.get((entry.name, runtime), "")}

    def why_not_measured(self, entry: Entry) -> str:
        """Why no runtime gave a figure for this variant."""
        reasons = [
            f"{spec}: {row.why}"
            for spec in self.measured.runtimes
            if (row := self.row(self.primary(), entry.name, spec))
        ]
        return "; ".join(reasons) or "none of the runtimes opens it"

    def accuracy(self, entry: Entry, runtime: str | None) -> dict[str, Any]:
        """Top-1, its drop against the baseline, and what flipped."""
        from deploycnn.profiling import accuracy

        nothing = dict.fromkeys(
            ("top1", "top1_interval", "top1_drop", "top1_drop_interval", "val_top1_drop", "val_top1_drop_interval",
             "mcnemar_p", "agreement", "agreement_interval", "flipped", "within_budget")
        )  # fmt: skip
        test = self.measured.predictions.get((entry.name, runtime or "", "test"))
        if test is None:
            return nothing
        result = {**nothing, "top1": test.top1, "top1_interval": list(test.top1_interval())}
        base_test = self.measured.predictions.get((self.inputs.baseline, self.reference_runtime, "test"))
        base_val = self.measured.predictions.get((self.inputs.baseline, self.reference_runtime, "val"))
        val = self.measured.predictions.get((entry.name, runtime or "", "val"))
        if (entry.name, runtime) == (self.inputs.baseline, self.reference_runtime):
            # The baseline against itself: no estimate, so no interval that could reach beyond the budget.
            within = None if self.inputs.budget is None else True
            return {**result, "top1_drop": 0.0, "top1_drop_interval": [0.0, 0.0], "val_top1_drop": 0.0,
                    "val_top1_drop_interval": [0.0, 0.0], "within_budget": within}  # fmt: skip
        if base_test is not None:
            paired = accuracy.compare(base_test, test)
            result |= {
                "top1_drop": paired.drop,
                "top1_drop_interval": list(paired.interval),
                "mcnemar_p": paired.mcnemar_p,
                "agreement": paired.agreement,
                "agreement_interval": list(paired.agreement_interval),
                "flipped": self.flipped(paired),
                "within_budget": self.within_budget(paired.interval),
            }
        if base_val is not None and val is not None:
            paired = accuracy.compare(base_val, val)
            result |= {"val_top1_drop": paired.drop, "val_top1_drop_interval": list(paired.interval)}
        return result

    def flipped(self, paired: Drop) -> dict[str, Any] | None:
        """Names of the test images that changed sides."""
        if self.inputs.data is None:
            return None
        lost, gained = paired.names(self.inputs.data.dataset.test)
        return {
            kind: {"count": len(names), "names": names[:LISTED_FLIPS]}
            for kind, names in (("right_to_wrong", lost), ("wrong_to_right", gained))
        }

    def within_budget(self, interval: Sequence[float]) -> bool | str | None:
        """By the test split: proven, disproven, or neither."""
        if self.inputs.budget is None:
            return None
        limit = self.inputs.budget.max_top1_drop
        if interval[1] <= limit:
            return True
        return False if interval[0] > limit else "unproven"
