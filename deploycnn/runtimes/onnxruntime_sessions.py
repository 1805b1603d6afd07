"""Sessions of ONNX Runtime: made, held to the provider that was asked for, and asked what they execute."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycnn import optional
from deploycnn.errors import ArtifactError, RuntimeUnavailable
from deploycnn.gpu import ort as gpu_ort
from deploycnn.graph.onnxruntime_errors import onnxruntime_errors
from deploycnn.runtimes.common import COMPUTE_OPS, GraphFacts, check_batch, graph_facts, graph_precision

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np
    import numpy.typing as npt

PROVIDERS = {"cpu": "CPUExecutionProvider", **gpu_ort.PROVIDERS}
_RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"


def node_events(
    path: Path, images_NCHW: npt.NDArray[np.float32], *, mode: str, threads: int, runs: int
) -> list[dict[str, Any]]:
    """The events of onnxruntime's profiler for so many runs (onnxruntime.ai, "Profiling tools").

    Raises:
        RuntimeUnavailable: not installed, or the provider does not load or does not take the graph.
        ArtifactError: the file cannot be loaded, or an operator fails on the images.
    """
    ort = optional.require("onnxruntime")
    if mode != "cpu":
        gpu_ort.require_provider(ort, mode)
    with tempfile.TemporaryDirectory(prefix="deploycnn-") as folder:
        request = gpu_ort.Request(mode=mode)
        session = create_session(ort, path, request, threads, profile=Path(folder) / "profile")
        check_assignment(session, mode, str(path))
        check_input(session, path, len(images_NCHW))
        feed = {session.get_inputs()[0].name: images_NCHW}
        with onnxruntime_errors(path, version()):
            for _ in range(runs):
                session.run(None, feed)
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return events


def version() -> str:
    """Of the installed onnxruntime; empty where none is."""
    from importlib import metadata

    for name in ("onnxruntime-gpu", "onnxruntime"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def check_input(session: Any, path: Path, batch_size: int) -> None:
    """Check that a session takes such batches.

    Raises:
        ArtifactError: several inputs, other element types, or another fixed batch.
    """
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(item.name for item in inputs)
        raise ArtifactError(
            f"{path}: {len(inputs)} inputs ({names}); models with one image input are supported"
        )
    if inputs[0].type != "tensor(float)":
        raise ArtifactError(f'{path}: input "{inputs[0].name}" is {inputs[0].type}, expected tensor(float)')
    check_batch(path, inputs[0].shape[0], batch_size)


def create_session(
    ort: ModuleType,
    model: Path | bytes,
    request: gpu_ort.Request,
    threads: int,
    optimized: Path | None = None,
    profile: Path | None = None,
) -> Any:
    """An ``InferenceSession`` on the provider of the request's mode.

    Args:
        ort: The module.
        model: File or content.
        request: Mode, and on GPUs its options.
        threads: Inside one inference.
        optimized: Where the optimized graph is written.
        profile: Where the profile is written: how its name begins.

    Raises:
        RuntimeUnavailable: the provider does not load.
        ArtifactError: the file cannot be loaded.
    """
    mode = request.mode
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # what matters is raised; warnings of sessions side by side would flood
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    providers: list[Any] | None = ["CPUExecutionProvider"]
    if mode != "cpu":
        options.add_session_config_entry(_RECORD_ASSIGNMENT, "1")
        providers = gpu_ort.attach(ort, options, request)
    where = "a test graph" if isinstance(model, bytes) else str(model)
    with onnxruntime_errors(where, version()):
        # enable_fallback would print a notice and serve another provider's results
        session = ort.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=providers, enable_fallback=0
        )
    if PROVIDERS[mode] not in session.get_providers():
        raise RuntimeUnavailable(
            f"onnxruntime:{mode}: {PROVIDERS[mode]} is listed but did not load (got "
            f"{', '.join(session.get_providers())}); a driver, CUDA or cuDNN library is missing or too old: "
            f"{gpu_ort.MEND[mode]}"
        )
    return session


def check_assignment(session: Any, mode: str, where: str) -> None:
    """Check that a GPU session left no convolution or matrix product to the CPU.

    Shape arithmetic may stay there. ONNX Runtime before 1.24 cannot tell; its list of providers must do.
    """
    if mode == "cpu" or not hasattr(session, "get_provider_graph_assignment_info"):
        return
    strays = sorted(
        {
            f"{node.op_type} {node.name}".strip()
            for part in session.get_provider_graph_assignment_info()
            if part.ep_name != PROVIDERS[mode]
            for node in part.get_nodes()
            if node.op_type in COMPUTE_OPS
        }
    )
    if strays:
        shown = ", ".join(strays[:3]) + (f" and {len(strays) - 3} more" if len(strays) > 3 else "")
        raise RuntimeUnavailable(
            f"onnxruntime:{mode}: {where}: {PROVIDERS[mode]} does not take {shown}; they would run on the "
            "CPU, and the timing would be of a mixture"
        )


@functools.lru_cache(maxsize=256)
def executed_precision(path: Path, size: int, mtime_ns: int, mode: str) -> str:
    """The precision that convolutions and matrix products run in, read from the graph *after* optimization.

    Only that graph tells: Q/DQ pairs that could not be fused leave float convolutions behind, and FP16
    weights on a CPU without FP16 kernels are cast back. It costs a second session, once per file and only
    where the file holds Q/DQ nodes or another float type than FP32.
    """
    import onnx

    facts = graph_facts(path, size, mtime_ns)
    if not (facts.half or facts.quantized):
        return "f32"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimized.onnx"
        request = gpu_ort.Request(mode=mode)
        create_session(optional.require("onnxruntime"), path, request, threads=1, optimized=target)
        return graph_precision(onnx.load(str(target), load_external_data=False))


def facts_of(path: Path) -> GraphFacts:
    """Of a file, read once for as long as it does not change."""
    stat = path.stat()
    return graph_facts(path, stat.st_size, stat.st_mtime_ns)
