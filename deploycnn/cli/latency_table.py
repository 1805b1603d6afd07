"""``deploycnn latency-table``: measure what layers cost on a target, for ``prune.latency_table``."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from deploycnn.targets import Precision

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("latency-table", short_help="Measure what a model's layers cost on a target, by width.")
@click.argument("model")
@click.option(
    "--target", default="onnxruntime-cpu", show_default=True, metavar="TARGET", help="Where to time."
)
@click.option(
    "--precision",
    type=click.Choice(get_args(Precision)),
    default="fp32",
    show_default=True,
    help="Of the graphs; FP16 for GPUs only.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Images per run."
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Of the runtime.")
@click.option(
    "--round-to", type=click.IntRange(min=1), help="Widths to time. [default: the target's own step]"
)
@click.option("--out", "-o", type=_FILE, required=True, help="The table, a JSON file.")
def command(
    model: str, target: str, precision: str, batch_size: int, threads: int, round_to: int | None, out: Path
) -> None:
    """Time MODEL at random widths on this machine and write a table of what its layers cost.

    MODEL is a torch artifact (a folder with model.safetensors and architecture.json), or a source and a name:
    zoo:resnet56, torchvision:resnet50, timm:NAME (with random weights). The table serves `prune: {latency_ratio: ...,
    latency_table: table.json}` on any machine.
    """
    from deploycnn.cli.console import Console, echo
    from deploycnn.latency_tables import measure_table

    if not out.parent.is_dir():
        raise click.BadParameter(f"{out.parent} is no folder; make it first", param_hint="--out")
    with Console(plain=None, quiet=False) as console:
        table = measure_table(
            model,
            target=target,
            precision=precision,
            batch_size=batch_size,
            threads=threads,
            round_to=round_to,
            tell=console.progress,
        )
    table.save(out)
    echo(f"{out}: {len(table.samples)} layer times, steps of {table.step} channels")
    if table.error is not None:
        echo(
            f"error for whole models: {table.error.median:.1%} in the median, {table.error.p95:.1%} at the 95th "
            f"percentile ({table.error.models} models, cross-validated)"
        )
