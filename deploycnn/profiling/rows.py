"""A row of raw timing samples, and its form on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from deploycnn.core import Json
from deploycnn.errors import ArtifactError
from deploycnn.profiling.disturbance import Disturbance
from deploycnn.runtimes.base import Executed

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingRow:
    """Every timed run of one candidate.

    Attributes:
        label: The candidate's.
        runtime: ``name:mode`` as asked for.
        executed: What really ran; ``None`` where nothing did.
        batch_size: Images in one run.
        threads: As asked for.
        samples_ms: Milliseconds per run (one whole batch): rounds of blocks of runs. Empty: not measured.
        warmup_runs: Runs discarded before each block.
        group: Rows timed side by side share it; only these are paired.
        disturbance: What else the machine did.
        why: Why it was not measured; empty where it was.
    """

    label: str
    runtime: str
    executed: Executed | None
    batch_size: int
    threads: int
    samples_ms: tuple[tuple[tuple[float, ...], ...], ...]
    warmup_runs: int
    group: str
    disturbance: Disturbance | None = None
    why: str = ""

    @property
    def measured(self) -> bool:
        """Whether there are samples."""
        return bool(self.samples_ms)

    @property
    def flat_ms(self) -> list[float]:
        """All samples, in the order in which they were taken."""
        return [value for blocks in self.samples_ms for block in blocks for value in block]

    def to_json(self) -> Json:
        """As plain values; times to the nanosecond, which is what the clock gives."""
        executed = self.executed
        return {
            "schema_version": SCHEMA_VERSION,
            "label": self.label,
            "runtime": self.runtime,
            "executed": executed and asdict(executed),
            "batch_size": self.batch_size,
            "threads": self.threads,
            "warmup_runs": self.warmup_runs,
            "group": self.group,
            "disturbance": self.disturbance and self.disturbance.to_json(),
            "why": self.why,
            "samples_ms": [
                [[round(value, 6) for value in block] for block in blocks] for blocks in self.samples_ms
            ],
        }

    @classmethod
    def from_json(cls, value: Json, where: str = "timing row") -> TimingRow:
        """Read what ``to_json`` gave.

        Raises:
            ArtifactError: another schema version, a missing key, or samples that are no positive numbers.
        """
        if not isinstance(value, Mapping) or value.get("schema_version") != SCHEMA_VERSION:
            found = value.get("schema_version") if isinstance(value, Mapping) else type(value).__name__
            raise ArtifactError(
                f"{where}: schema_version is {found!r}, expected {SCHEMA_VERSION}; measure again"
            )
        try:
            return cls(
                label=value["label"],
                runtime=value["runtime"],
                executed=Executed(**value["executed"]) if value["executed"] else None,
                batch_size=value["batch_size"],
                threads=value["threads"],
                samples_ms=_samples(value["samples_ms"]),
                warmup_runs=value["warmup_runs"],
                group=value["group"],
                disturbance=Disturbance.from_json(value["disturbance"]) if value["disturbance"] else None,
                why=value["why"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{where}: damaged ({type(error).__name__}: {error}); measure again"
            ) from error


def _samples(value: Any) -> tuple[tuple[tuple[float, ...], ...], ...]:
    samples = tuple(tuple(tuple(float(run) for run in block) for block in blocks) for blocks in value)
    if not all(math.isfinite(run) and run > 0 for blocks in samples for block in blocks for run in block):
        raise ValueError("samples_ms must be finite and positive")
    return samples
