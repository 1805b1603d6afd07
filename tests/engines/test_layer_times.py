"""Times of layers by a profiler that is TensorRT's in shape."""

from __future__ import annotations

import types
from typing import Any

from deploycnn.engines.layer_times import layer_times


class IProfiler:
    """As the binding's: the base must be initialized explicitly."""

    def __init__(self) -> None:
        self.ready = True


class Context:
    profiler: Any = None


FLAVOUR: Any = types.SimpleNamespace(module=types.SimpleNamespace(IProfiler=IProfiler))


def test_each_layer_has_the_median_of_its_sums_and_warmups_do_not_count() -> None:
    context, runs = Context(), iter([100.0, 100.0, 100.0, 1.0, 3.0, 2.0])

    def run() -> None:
        assert context.profiler.ready
        milliseconds = next(runs)
        context.profiler.report_layer_time("conv1", milliseconds)
        context.profiler.report_layer_time("reformat", 0.25)
        context.profiler.report_layer_time("reformat", 0.5)

    found = layer_times(FLAVOUR, context, run, runs=3, warmup=3)
    assert found == {"conv1": 2.0, "reformat": 0.75}
