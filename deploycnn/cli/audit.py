"""``deploycnn audit``: what the builder made of a graph."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deploycnn.engines.audit import Audit

_PATH = click.Path(path_type=Path)


@click.command("audit", short_help="Show an engine's layers: precision got and asked for, fusion, reformats.")
@click.argument("engine", type=_PATH)
@click.option(
    "--onnx", type=_PATH, help="The graph that it was built from, where nothing beside the engine says it."
)
@click.option("--times", type=_PATH, help="JSON file of milliseconds by layer name, from a profiler.")
@click.option(
    "--measure",
    type=click.IntRange(min=1),
    metavar="BATCH",
    help="Time the layers on this GPU, for batches of this size.",
)
@click.option(
    "--fail-on",
    "conditions",
    multiple=True,
    metavar="CONDITION",
    help="Exit with 1 if it holds, e.g. 'int8_macs<0.9' or 'reformats>3'; repeatable.",
)
@click.option(
    "--trust-engine",
    is_flag=True,
    help="Load an engine that no manifest vouches for. An engine is executable code.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
def command(
    engine: Path,
    onnx: Path | None,
    times: Path | None,
    measure: int | None,
    conditions: tuple[str, ...],
    trust_engine: bool,
    as_json: bool,
) -> int:
    """Audit ENGINE: an engine file, or the folder of an artifact or bundle.

    Metrics for --fail-on: int8_macs, fp16_macs, bf16_macs, tf32_macs, fp32_macs, fp8_macs (shares of the
    multiply-accumulates), as_asked, reformats, layers, unmatched; with --times or --measure also time_ms and
    reformat_ms.
    """
    from deploycnn.cli.console import echo, print_json
    from deploycnn.engines.audit import Threshold
    from deploycnn.engines.auditing import audit_engine

    if times is not None and measure is not None:
        raise click.UsageError("--times and --measure both tell the layers' times; give one of them")
    thresholds = [Threshold.parse(text) for text in conditions]
    told: Path | Mapping[str, float] | None = times
    if measure is not None:
        from deploycnn.profile_engines import layer_times

        told = layer_times(engine, measure, trust=trust_engine)
    audited = audit_engine(engine, onnx=onnx, times=told, trust=trust_engine)
    metrics = audited.audit.metrics()
    failed = [
        f"{threshold} (it is {metrics[threshold.metric]:.4g})"
        for threshold in thresholds
        if threshold.holds(metrics)
    ]
    if as_json:
        print_json({**audited.to_json(), "failed": failed})
    else:
        echo(table(audited.audit))
        echo("")
        echo(audited.audit.census())
        if audited.source == "builder log":
            echo("(as the builder logged it; kernels and times are known on the GPU only)")
        for name in audited.audit.unmatched:
            echo(f"no layer says that it computes {name}")
    for text in () if as_json else failed:
        echo(f"failed: {text}")
    return 1 if failed else 0


def table(audit: Audit) -> str:
    """A line for each layer."""
    total = sum(row.macs for row in audit.rows) or 1
    timed = audit.total_ms is not None
    head = ("layer", "kind", "asked", "executed", "MACs", *(("ms",) if timed else ()), "ONNX nodes")
    lines = [head]
    for row in audit.rows:
        note = " (reformat)" if row.reformat else ""
        milliseconds = ("" if row.time_ms is None else f"{row.time_ms:.4f}",) if timed else ()
        share = f"{row.macs / total:.1%}" if row.macs else ""
        executed = f"{row.executed} !" if row.differs else row.executed
        nodes = ", ".join(row.onnx_nodes[:4]) + (
            f" and {len(row.onnx_nodes) - 4} more" if len(row.onnx_nodes) > 4 else ""
        )
        lines.append((_short(row.name), row.kind + note, row.asked, executed, share, *milliseconds, nodes))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head) - 1)]
    return "\n".join(
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]
        ).rstrip()
        for line in lines
    )


def _short(name: str, limit: int = 44) -> str:
    return name if len(name) <= limit else f"{name[: limit - 14]}...{name[-11:]}"
