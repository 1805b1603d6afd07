"""Milliseconds of each layer of an engine, by TensorRT's own profiler; it needs the GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from deploycnn.engines.flavour import Flavour


def layer_times(
    flavour: Flavour, context: Any, run: Callable[[], object], *, runs: int = 20, warmup: int = 3
) -> dict[str, float]:
    """Time the layers that a context executes.

    With a profiler attached the layers run one after another with events between them, so their sum is more than what
    the engine takes without one: these times say where it goes, not how fast the engine is.

    Args:
        flavour: The library that ``context`` is of.
        context: An execution context whose input is set. It keeps the profiler, so it should serve nothing else.
        run: Enqueues it once and waits until it is done.
        runs: Runs that are timed.
        warmup: Runs before them that are not.

    Returns:
        Layer name, as the inspector says it, -> median over the runs. A layer that one run reports several times
        counts with the sum. Empty where the engine was built with profiling_verbosity: none.
    """
    base = flavour.module.IProfiler

    class _Profiler(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)
            self.seen: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.seen[layer_name] = self.seen.get(layer_name, 0.0) + float(ms)

    profiler = _Profiler()
    context.profiler = profiler
    kept: dict[str, list[float]] = {}
    for index in range(warmup + runs):
        profiler.seen = {}
        run()
        if index < warmup:
            continue
        for name, milliseconds in profiler.seen.items():
            kept.setdefault(name, []).append(milliseconds)
    return {name: statistics.median(values) for name, values in kept.items()}
