"""A goal of latency from what a pass knows: a bench on this machine, or a table from another."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from deploycnn import environment, targets
from deploycnn.core import Context
from deploycnn.errors import PassRequirementError, RuntimeUnavailable
from deploycnn.latency.layers import Layer, layers_of
from deploycnn.latency.measure import Bench
from deploycnn.latency.model import LatencyTable
from deploycnn.latency.reading import load_table
from deploycnn.pruning.latency_goal import LatencyGoal


def latency_goal(
    model: nn.Module,
    images: Tensor,
    *,
    ratio: float,
    precision: str,
    table: Path | None,
    ctx: Context,
) -> LatencyGoal:
    """The goal, and what measures it.

    A table of this machine is used in place of measuring one, and the result is measured here as well; one of another
    machine stands alone: nothing can be measured there from here.

    Args:
        model: Dense, in evaluation mode.
        images: Example input (N, C, H, W).
        ratio: Share of the dense latency.
        precision: A ``targets.Precision``.
        table: A file, or ``None``.
        ctx: Of the pass.

    Raises:
        RuntimeUnavailable: this host lacks the target, and there is no table.
        PassRequirementError: the precision is none of the target's; the table is of another runtime, precision, batch
            size or number of threads, or lacks layers of this model.
        ArtifactError: the table cannot be read.
    """
    targets.check_half(precision, ctx.target, "prune.latency_precision")
    loaded = load_table(table) if table is not None else None
    if loaded is not None and table is not None:
        _check(loaded, table, precision, ctx)
    bench = _bench(model, images, precision, loaded, table, ctx)
    if loaded is not None:
        layers = layers_of_table(model, images, loaded, table)
    elif bench is not None:
        layers = bench.layers()
    else:
        raise RuntimeUnavailable(
            f"prune.latency_ratio: the target {ctx.target} cannot be timed on this host; deploycnn doctor tells why. "
            "Measure a table on a host that has it (deploycnn latency-table) and name it as latency_table"
        )
    return LatencyGoal(
        ratio=ratio,
        layers=layers,
        bench=bench,
        table=loaded,
        seed=ctx.seed,
        tell=ctx.progress,
    )


def _bench(
    model: nn.Module,
    images: Tensor,
    precision: str,
    loaded: LatencyTable | None,
    table: Path | None,
    ctx: Context,
) -> Bench | None:
    """What times the model here; ``None`` where nothing does, or where the table is of another machine."""
    stopwatch = ctx.stopwatch
    if stopwatch is None:
        return None
    batch_size, threads = stopwatch.settings[0]
    if loaded is not None:
        elsewhere = environment.Environment.from_json(loaded.environment, f"{table}: environment")
        if environment.detect().fingerprint != elsewhere.fingerprint:
            return None
        if loaded.threads != threads:
            raise PassRequirementError(
                f"prune.latency_table: {table} is of {loaded.threads} threads, the first of profile.threads is "
                f"{threads}; measure one for these, or change `profile`"
            )
    return Bench(
        model=model,
        images=images,
        stopwatch=stopwatch,
        precision=precision,
        batch_size=batch_size,
        threads=threads,
        target=ctx.target,
        tell=ctx.progress,
    )


def _check(loaded: LatencyTable, path: Path, precision: str, ctx: Context) -> None:
    runtimes = targets.get(ctx.target).runtimes
    if loaded.runtime not in (runtimes[:1] if targets.get(ctx.target).engines else runtimes):
        raise PassRequirementError(
            f"prune.latency_table: {path} is of {loaded.runtime}, the target {ctx.target} runs {runtimes[0]}"
        )
    stopwatch = ctx.stopwatch
    if stopwatch is not None and loaded.runtime != stopwatch.runtime:
        raise PassRequirementError(
            f"prune.latency_table: {path} is of {loaded.runtime}, what decides for the target {ctx.target} here is "
            f"{stopwatch.runtime}; measure one with `deploycnn latency-table --target {ctx.target}`, or name the "
            "target that the table is of"
        )
    if stopwatch is not None and loaded.batch_size != stopwatch.settings[0][0]:
        raise PassRequirementError(
            f"prune.latency_table: {path} is of batch size {loaded.batch_size}, the first of profile.batch_sizes is "
            f"{stopwatch.settings[0][0]}; measure one for that, or change `profile`"
        )
    if loaded.precision != precision:
        raise PassRequirementError(
            f"prune.latency_table: {path} is of {loaded.precision}, latency_precision asks for {precision}"
        )


def layers_of_table(model: nn.Module, images: Tensor, table: LatencyTable, path: Path | None) -> list[Layer]:
    """The layers, each with the table's kind for it: what runs behind a layer was seen where the table was measured.

    Raises:
        PassRequirementError: the table has none for a layer.
    """
    found = []
    for layer in layers_of(model, images[:1]):
        name = table.layers.get(layer.name)
        if name is None or not name.startswith(layer.kind.name.rpartition("[")[0]):
            raise PassRequirementError(
                f'prune.latency_table: {path} was measured with another model, it has no layer like "{layer.name}" '
                f"({layer.kind.name}); measure one with this model: deploycnn latency-table"
            )
        found.append(Layer(name=layer.name, kind=layer.kind, key=name))
    return found
