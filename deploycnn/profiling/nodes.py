"""Milliseconds of each node, as runtimes themselves tell them.

A profile slows a model down and its sum is not the model's latency: nodes are compared with one another here, whole
models in races.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from deploycnn.optional import require
from deploycnn.profiling.child import ask

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: Runs that are profiled, and runs before them.
RUNS, WARMUP = 20, 3

#: What may be fused into the linear node before it: activations, and scales and shifts by constants.
_FUSED = frozenset(
    {"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "Mul", "Add", "BatchNormalization"}
)
#: How names of linear operators end, onnxruntime's own ones too (FusedConv, QLinearConv, QGemm, ...).
_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")

#: What onnxruntime adds to the names of nodes that it moves to another layout or fuses with an activation.
_ADDED = re.compile(r"^fused |(_token_\d+|_nchwc|_nhwc)$")


def onnxruntime_node_ms(
    model: Path, images_NCHW: npt.NDArray[np.float32], threads: int, mode: str = "cpu"
) -> dict[str, float]:
    """Median time of each node of the optimized graph, in the order in which they run.

    A fused node goes by the name of what it was made of, of the convolution where there is one; nodes that onnxruntime
    put in (``Transpose``, ``ReorderInput``) have names of its own.
    """
    import onnx

    from deploycnn.runtimes.onnxruntime_sessions import node_events

    makers = _makers(onnx.load(str(model), load_external_data=False).graph)
    return node_medians(
        node_events(model, images_NCHW, mode=mode, threads=threads, runs=WARMUP + RUNS), makers
    )


def cuda_node_ms(model: Path, images_NCHW: npt.NDArray[np.float32], threads: int) -> dict[str, float]:
    """The same on the CUDA provider, whose nodes only enqueue their kernels: the driver waits for each of them here.

    ``CUDA_LAUNCH_BLOCKING`` (CUDA C++ Programming Guide, "Concurrent Execution between Host and Device") is read when
    CUDA starts, hence the process of its own. Each node's time holds what waiting costs.
    """
    request = {"path": str(model.absolute()), "shape": images_NCHW.shape, "threads": threads, "mode": "cuda"}
    return ask(
        "deploycnn.profiling.node_child",
        request,
        f"onnxruntime:cuda: {model}",
        environ={"CUDA_LAUNCH_BLOCKING": "1"},
    )


@dataclass(frozen=True, slots=True)
class Makers:
    """Value -> name of the node that makes it: onnxruntime names nodes after values when it moves them.

    Attributes:
        nodes: By whatever makes the value.
        linear: By the linear node that may have what makes the value fused into it.
    """

    nodes: Mapping[str, str]
    linear: Mapping[str, str]

    def name(self, value: str, kernel: str) -> str:
        """Of the node whose kernel is called ``value``; ``value`` itself, where that is no value."""
        return (self.linear if kernel.endswith(_LINEAR) else self.nodes).get(value, value)


def _makers(graph: Any) -> Makers:
    made_by = {name: node for node in graph.node if node.op_type != "Constant" for name in node.output}
    linear = {}
    for value, maker in made_by.items():
        node = maker
        while node.op_type in _FUSED:
            before = [made_by[name] for name in node.input if name in made_by]
            if len(before) != 1:  # a graph's input, or two branches that meet
                break
            node = before[0]
        linear[value] = (node if node.op_type.endswith(_LINEAR) else maker).name
    return Makers({value: node.name for value, node in made_by.items()}, linear)


def node_medians(
    events: Sequence[Mapping[str, Any]],
    makers: Makers | None = None,
    *,
    runs: int = WARMUP + RUNS,
    warmup: int = WARMUP,
) -> dict[str, float]:
    """Median milliseconds by node, from onnxruntime's profiling events, in the order of one run.

    Args:
        events: All of them; every run leaves the same sequence.
        makers: Of the values of the graph that was run.
        runs: How many were made.
        warmup: How many of them are left out, at the beginning.
    """
    makers = makers or Makers({}, {})
    known = set(makers.nodes.values())
    kernels = [
        event
        for event in events
        if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time")
    ]
    length = len(kernels) // runs
    found: dict[str, float] = {}
    for position in range(length):
        kernel = str(kernels[position].get("args", {}).get("op_name"))
        name = makers.name(
            _ADDED.sub("", str(kernels[position]["name"]).removesuffix("_kernel_time")), kernel
        )
        times = [float(event["dur"]) / 1e3 for event in kernels[warmup * length + position :: length]]
        if name in found and name not in known:
            # What onnxruntime put in shares a name; its place in the order tells where it belongs.
            name = f"{name}#{position}"
        found[name] = found.get(name, 0.0) + median(times)
    return found


def openvino_node_ms(model: Path, images_NCHW: npt.NDArray[np.float32], threads: int) -> dict[str, float]:
    """Median time of each executed layer, by its name in the ONNX graph where OpenVINO kept it."""
    openvino = require("openvino")
    core = openvino.Core()
    read = core.read_model(str(model))
    read.reshape(list(images_NCHW.shape))
    compiled = core.compile_model(
        read,
        "CPU",
        {
            "PERF_COUNT": True,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
        },
    )
    request = compiled.create_infer_request()
    times: dict[str, list[float]] = collections.defaultdict(list)
    for run in range(WARMUP + RUNS):
        request.infer({0: images_NCHW})
        if run >= WARMUP:
            for info in request.profiling_info:
                if info.real_time.total_seconds() > 0:
                    times[info.node_name].append(info.real_time.total_seconds() * 1e3)
    return {name.removesuffix("/WithoutBiases"): median(values) for name, values in times.items()}


#: By runtime.
PROFILERS: Mapping[str, Callable[[Path, npt.NDArray[np.float32], int], dict[str, float]]] = {
    "onnxruntime:cpu": onnxruntime_node_ms,
    "onnxruntime:cuda": cuda_node_ms,
    "openvino:f32": openvino_node_ms,
}
