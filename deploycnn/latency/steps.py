"""Find the widths that cost no more than smaller ones: a kernel's block, measured and not assumed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from deploycnn.core import Stopwatch
from deploycnn.graph.model import save_onnx
from deploycnn.latency.model import Kind

#: Convolutions in a row in the models that are timed.
_DEPTH = 6
#: Steps that are considered.
STEPS = (1, 2, 4, 8, 16, 32)
#: Rounding a width up may cost this share of its time; half as much on average.
TOLERANCE = 0.05
#: Share of the widths that may do worse: those just above a multiple.
_WORSE = 0.15
#: Least sides of the images that are timed, one after the other: where what a node costs whatever its width hides the
#: steps, any rounding seems to be free. On GPUs that takes large images.
_LEAST_SIDES = (32, 128, 512)
#: The widest row must take so many times as long as the narrowest, else the times tell no steps.
_TELLING = 3.0
#: The step where none is told: what fits most kernels.
_UNTOLD = 8
#: Widths that are timed: every one, as steps show between them.
WIDTHS = (8, 41)
_BUDGET_S = 0.5

Prepare = Callable[[ModelProto], ModelProto]


def find(
    kinds: Sequence[Kind],
    stopwatch: Stopwatch,
    *,
    batch_size: int,
    threads: int,
    prepare: Prepare = lambda graph: graph,
) -> int:
    """The largest step that widths may be rounded up to for free, for the model's commonest kind of convolution.

    Args:
        kinds: Of all the model's layers.
        stopwatch: Of the target.
        batch_size: Images per run.
        threads: Of the runtime.
        prepare: Quantizes a graph, where that is what is timed.
    """
    whole = [
        kind
        for kind in kinds
        if kind.op == "conv" and kind.groups == "1" and kind.widest[0] >= 8 and len(kind.outputs) == 2
    ]
    if not whole:
        return _UNTOLD
    kind = max(dict.fromkeys(whole), key=lambda item: whole.count(item) * _macs(item))
    for side in _LEAST_SIDES:
        times = measure(
            kind, stopwatch, batch_size=batch_size, threads=threads, least_side=side, prepare=prepare
        )
        if max(times.values()) >= _TELLING * min(times.values()):
            return step_of(times)
    return _UNTOLD


def step_of(times: Mapping[int, float]) -> int:
    """The largest step at which rounding up costs at most ``TOLERANCE``, but for ``_WORSE`` of the widths.

    Of the widths that are multiples of the step below: those off it are slow whatever is done. On average it costs
    half of that at most, or less than nothing: a kernel may do well just above a multiple and badly everywhere else.
    """
    best = 1
    for step in STEPS[1:]:
        costs = sorted(
            times[-(-width // step) * step] / ms - 1
            for width, ms in times.items()
            if width % best == 0 and width % step and -(-width // step) * step in times
        )
        # Of few widths one, too, as a neighbour on the machine may have disturbed it.
        worse = min(max(1, int(_WORSE * len(costs))), len(costs) - 1)
        kept = costs[: len(costs) - worse]
        if kept and (kept[-1] <= TOLERANCE or np.mean(kept) <= TOLERANCE / 2):
            best = step
    return best


def measure(
    kind: Kind,
    stopwatch: Stopwatch,
    *,
    batch_size: int,
    threads: int,
    least_side: int = _LEAST_SIDES[0],
    prepare: Prepare = lambda graph: graph,
) -> dict[int, float]:
    """Milliseconds of a row of convolutions of one kind, by width, on maps of ``least_side`` pixels or more."""
    widths = range(*WIDTHS)
    height, breadth = (max(side, least_side) for side in kind.outputs)
    shape = (3, height, breadth)
    with tempfile.TemporaryDirectory(prefix="deploycnn-") as name:
        paths = {}
        for width in widths:
            paths[str(width)] = Path(name) / f"{width}.onnx"
            graph = prepare(row(width, kind.kernel, shape))
            save_onnx(graph, paths[str(width)])
        speeds = stopwatch.race(paths, batch_size=batch_size, threads=threads, budget_s=_BUDGET_S)
    first = next(iter(speeds.values())).median_ms
    return {int(width): first / speed.ratio for width, speed in speeds.items()}


def row(width: int, kernel: tuple[int, ...], shape: tuple[int, int, int]) -> ModelProto:
    """A classifier of one width: convolutions of one kernel in a row."""
    random = np.random.default_rng(width)
    nodes, weights = [], []
    value, channels = "images", shape[0]
    for index in range(_DEPTH + 1):
        scale = (2 / (channels * kernel[0] * kernel[1])) ** 0.5
        weight = (random.standard_normal((width, channels, *kernel)) * scale).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"conv{index}.weight"))
        weights.append(numpy_helper.from_array(np.full(width, 0.1, np.float32), f"conv{index}.bias"))
        pads = [side // 2 for side in kernel] * 2
        nodes.append(
            helper.make_node(
                "Conv",
                [value, f"conv{index}.weight", f"conv{index}.bias"],
                [f"c{index}"],
                name=f"conv{index}/Conv",
                pads=pads,
            )
        )
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"], name=f"relu{index}/Relu"))
        value, channels = f"r{index}", width
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["pooled"], name="pool/GlobalAveragePool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["logits"], name="flatten/Flatten"))
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", width])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def _macs(kind: Kind) -> int:
    return int(np.prod([*kind.kernel, *kind.outputs, *kind.widest]))
