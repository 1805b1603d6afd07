"""Latency tables from their files, which may come from elsewhere and be damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path

from deploycnn.core import Json
from deploycnn.errors import ArtifactError
from deploycnn.latency.model import SCHEMA, Error, LatencyTable, Sample


def load_table(path: Path) -> LatencyTable:
    """Read a table.

    Raises:
        ArtifactError: it is not one, is damaged, or is of another schema version.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["schema_version"] != SCHEMA:
            raise ArtifactError(
                f"{path}: schema version {value['schema_version']}, this version of deploycnn reads {SCHEMA}; "
                "measure it again with deploycnn latency-table"
            )
        return table_of(value)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path}: not a latency table ({type(error).__name__}: {error}); "
            "measure one with deploycnn latency-table"
        ) from error


def table_of(value: Json) -> LatencyTable:
    """The table whose ``to_json`` gave ``value``.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is not such a value.
    """
    table = LatencyTable(
        environment=value["environment"],
        runtime=str(value["runtime"]),
        precision=str(value["precision"]),
        batch_size=int(value["batch_size"]),
        threads=int(value["threads"]),
        step=int(value["step"]),
        layers={str(name): str(key) for name, key in value["layers"].items()},
        samples=tuple(
            Sample(kind=kind, width_in=int(a), width_out=int(b), ms=float(ms), config=int(config))
            for kind, rows in value["tables"].items()
            for a, b, ms, config in rows
        ),
        overhead_ms=float(value["overhead_ms"]),
        error=_error_of(value["error"]) if value["error"] else None,
    )
    _check(table)
    return table


def _check(table: LatencyTable) -> None:
    """Numbers that can be.

    Raises:
        ValueError: one cannot.
    """
    for sample in table.samples:
        row = f'"{sample.kind}" [{sample.width_in}, {sample.width_out}, {sample.ms:g}, {sample.config}]'
        if not (math.isfinite(sample.ms) and sample.ms >= 0):
            raise ValueError(f"{row}: milliseconds should be finite and not negative")
        if min(sample.width_in, sample.width_out) < 1:
            raise ValueError(f"{row}: widths should be at least 1")
    counts = {"step": table.step, "batch_size": table.batch_size, "threads": table.threads}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} should be at least 1, not {value}")
    if not table.dense_ms > 0:
        raise ValueError("no times of the dense model, configuration 0")
    if len({sample.config for sample in table.samples}) < 2:
        raise ValueError("no times of other widths than the dense model's")
    if table.error is not None and not (math.isfinite(table.error.median) and math.isfinite(table.error.p95)):
        raise ValueError("its error should be finite")


def _error_of(value: Json) -> Error:
    return Error(median=float(value["median"]), p95=float(value["p95"]), models=int(value["models"]))
