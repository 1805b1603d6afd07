"""Measure a latency table of a model on this machine: what ``deploycnn latency-table`` does."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from deploycnn import registry, schema, targets
from deploycnn.core import Context, Source
from deploycnn.errors import ArtifactError, RuntimeUnavailable, SourceError

if TYPE_CHECKING:
    from torch import nn

    from deploycnn.latency.model import LatencyTable


def measure_table(
    model: str,
    *,
    target: str,
    precision: str,
    batch_size: int,
    threads: int,
    round_to: int | None = None,
    tell: Callable[[float, float, str], None] = lambda _done, _total, _message: None,
) -> LatencyTable:
    """Time a model at random widths on this machine.

    Args:
        model: A torch artifact's folder, or ``source:name``.
        target: Name of the target.
        precision: A ``targets.Precision``.
        batch_size: Images per run.
        threads: Of the runtime.
        round_to: Widths to time are multiples of this; the target's own step by default.
        tell: Told what is being done.

    Raises:
        RuntimeUnavailable: the target cannot be timed here.
        SourceError: the model cannot be made.
        ArtifactError: the folder is damaged.
        PassRequirementError: nothing of it can be pruned, or the precision is none of the target's.
    """
    import torch

    from deploycnn.latency.measure import Bench
    from deploycnn.latency.samples import configurations
    from deploycnn.profiling.stopwatch import RuntimeStopwatch
    from deploycnn.pruning.allocation import ladders
    from deploycnn.pruning.importance import random
    from deploycnn.pruning.latency_problem import draw
    from deploycnn.pruning.structure import analyse, shrunk
    from deploycnn.runtimes.base import create

    targets.check_half(precision, target, "latency-table: --precision")
    spec = targets.get(target).runtimes[0]
    runtime = create(spec)
    found = runtime.availability()
    if not found.ok:
        raise RuntimeUnavailable(f"latency-table: {target} ({spec}) cannot be timed here: {found.why}")
    net, shape = load(model)
    images = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
    bench = Bench(
        model=net.eval(),
        images=images,
        stopwatch=RuntimeStopwatch(runtime=spec, settings=((batch_size, threads),), image_shape=shape),
        precision=precision,
        batch_size=batch_size,
        threads=threads,
        target=target,
        tell=tell,
    )
    groups = analyse(net, shrunk(net, images)).groups
    climbed = ladders(
        groups,
        random(net, groups, seed=0),
        round_to=round_to or bench.step(),
        max_ratio=0.9,
        ratios=[None] * len(groups),
    )
    return bench.measure(configurations(lambda generator: draw(groups, climbed, generator)))


def load(model: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """The module and the shape (C, H, W) of its images.

    Raises:
        SourceError: it is no torch model.
        ArtifactError: a folder is damaged or states no image size.
    """
    from deploycnn.models.artifact import get_architecture, load_model
    from deploycnn.training.artifact import stored_facts

    path = Path(model)
    if path.is_dir():
        net = load_model(path)
        prepared = stored_facts(path).preprocessing or {}
        size = prepared.get("size") or get_architecture(net)["options"].get("input_size")
        if size is None:
            raise ArtifactError(
                f"latency-table: {model} states no image size; give the folder of a run's artifact, whose "
                "manifest.json has its preprocessing"
            )
        return net, (_channels(net), int(size[0]), int(size[1]))
    source, colon, name = model.partition(":")
    if not colon:
        raise SourceError(f'latency-table: "{model}" is neither an artifact\'s folder nor source:name')
    cls: type[Source] = registry.get("source", source)
    component: Source = schema.build(cls, {cls.main: name}, model)
    with tempfile.TemporaryDirectory(prefix="deploycnn-") as folder:
        output, scratch = Path(folder) / "output", Path(folder) / "scratch"
        output.mkdir()
        scratch.mkdir()
        draft = component.run(Context(output=output, scratch=scratch))
        if draft.format != "torch":
            raise SourceError(f"latency-table: {model} is an ONNX file; only torch models can be narrowed")
        channels, height, width = draft.inputs[0].shape[1:]
        if channels is None or height is None or width is None:
            raise ArtifactError(f"latency-table: {model} states no image size")
        return load_model(output), (channels, height, width)


def _channels(net: nn.Module) -> int:
    """Input channels of the first layer."""
    return int(next(parameter for parameter in net.parameters() if parameter.dim() == 4).shape[1])
