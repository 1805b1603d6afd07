"""ONNX Runtime on the CPU and on NVIDIA GPUs.

The execution provider that was asked for is verified after loading, twice: it must be among the session's
providers, and (for CUDA) every convolution and matrix product must have been assigned to it. ONNX Runtime
itself merely logs a provider that does not load and goes on with the CPU.

Threads: ``intra_op_num_threads`` is set, ``inter_op`` is 1, execution is sequential. Spinning between the
operators stays on, as it is by default: without it latency with two threads is 1.7 times higher, and that is
not what anyone deploys. Two sessions that spin at once disturb each other, so timing runs them in blocks.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from deploycnn import optional
from deploycnn.errors import ArtifactError, RuntimeUnavailable
from deploycnn.runtimes.base import Availability, Executed, Runtime, Session
from deploycnn.runtimes.common import (
    COMPUTE_OPS,
    check_batch,
    check_file,
    check_images,
    check_request,
    one_line,
    precision_label,
    tiny_onnx,
    unavailable,
)

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np
    import numpy.typing as npt

    from deploycnn.core import Artifact, Format

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"
_CUDA_MEND = (
    'pip uninstall -y onnxruntime && pip install "deploycnn[gpu]"; CUDA and cuDNN must fit that wheel '
    "(deploycnn doctor tells)"
)


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime(Runtime):
    """ONNX files in ONNX Runtime: ``onnxruntime:cpu`` or ``onnxruntime:cuda``.

    On CUDA the inputs and outputs lie in host memory, so that timing includes the copies, and TF32 is off, so
    that an FP32 row is FP32.
    """

    modes: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    accepts: ClassVar[tuple[Format, ...]] = ("onnx",)

    mode: str = "cpu"

    def availability(self) -> Availability:
        """Whether a one-operator graph runs on the provider of this mode."""
        try:
            ort = optional.require("onnxruntime")
            _require_provider(ort, self.mode)
            _check_assignment(_create(ort, tiny_onnx(), self.mode, threads=1), self.mode, "a test graph")
        except (RuntimeUnavailable, ArtifactError) as error:
            mend = _CUDA_MEND if self.mode == "cuda" else 'pip install "deploycnn[cpu]"'
            return unavailable(error, _version(), mend)
        return Availability(ok=True, version=_version())

    def open(self, artifact: Artifact, *, batch_size: int, threads: int) -> Session:
        """Load an ONNX file.

        Raises:
            RuntimeUnavailable: not installed, or the provider does not load or does not take the graph.
            ArtifactError: damaged file, unsupported opset or operator, another fixed batch, several inputs.
        """
        check_request(batch_size, threads)
        path = check_file(artifact, self.accepts, "onnxruntime")
        ort = optional.require("onnxruntime")
        _require_provider(ort, self.mode)
        session = _create(ort, path, self.mode, threads)
        _check_assignment(session, self.mode, str(path))
        inputs = session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(item.name for item in inputs)
            raise ArtifactError(
                f"{path}: {len(inputs)} inputs ({names}); models with one image input are supported"
            )
        if inputs[0].type != "tensor(float)":
            raise ArtifactError(
                f'{path}: input "{inputs[0].name}" is {inputs[0].type}, expected tensor(float)'
            )
        check_batch(path, inputs[0].shape[0], batch_size)
        return _OrtSession(ort, session, path, self.mode)


class _OrtSession(Session):
    def __init__(self, ort: ModuleType, session: Any, path: Path, mode: str) -> None:
        self._mode = mode
        self._ort = ort
        self._session: Any = session
        self._path = path
        self._input = session.get_inputs()[0]
        self._outputs = [item.name for item in session.get_outputs()]

    @functools.cached_property
    def executed(self) -> Executed:  # type: ignore[override]
        """Read when first asked for: telling the precision takes memory and time that no inference takes."""
        stat = self._path.stat()
        return Executed(
            provider=self._session.get_providers()[0],
            precision=_executed_precision(self._path, stat.st_size, stat.st_mtime_ns, self._mode),
            threads=self._session.get_session_options().intra_op_num_threads,
        )

    def run(self, images_NCHW: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        """Outputs in graph order, as float32.

        Raises:
            ArtifactError: the images do not fit the input, or an operator fails on them.
        """
        import numpy as np

        images = check_images(self._path, self._input.shape, images_NCHW)
        with _mapped(self._path):
            outputs = self._session.run(self._outputs, {self._input.name: images})
        return [np.asarray(output, dtype=np.float32) for output in outputs]

    def bind(self, images_NCHW: npt.NDArray[np.float32]) -> Callable[[], None]:
        """A call of the session with inputs and outputs bound to memory that is allocated here, once."""
        images = check_images(self._path, self._input.shape, images_NCHW)
        value = self._ort.OrtValue.ortvalue_from_numpy(images)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self._input.name, value)
        with _mapped(self._path):
            outputs = self._session.run(self._outputs, {self._input.name: images})
        buffers = [self._ort.OrtValue.ortvalue_from_numpy(output) for output in outputs]
        for name, buffer in zip(self._outputs, buffers, strict=True):
            binding.bind_ortvalue_output(name, buffer)
        run = self._session.run_with_iobinding

        def call() -> None:
            run(binding)

        return call

    def close(self) -> None:
        """Free the session and its thread pool."""
        self._session = None


def _version() -> str:
    from importlib import metadata

    for name in ("onnxruntime-gpu", "onnxruntime"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def _require_provider(ort: ModuleType, mode: str) -> None:
    wanted, available = _PROVIDERS[mode], ort.get_available_providers()
    if wanted not in available:
        raise RuntimeUnavailable(
            f"onnxruntime:{mode}: the installed onnxruntime {ort.__version__} has no {wanted} "
            f"(it has {', '.join(available)}); {_CUDA_MEND}"
        )


@contextmanager
def _mapped(path: Path | str) -> Iterator[None]:
    """Turn ONNX Runtime's own exceptions into ArtifactError; anything else passes."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    try:
        yield
    except state.InvalidProtobuf as error:
        raise ArtifactError(
            f"{path}: not an ONNX file, or cut short ({_reason(error)}); copy it again"
        ) from error
    except state.NotImplemented as error:
        raise ArtifactError(
            f"{path}: an operator is not supported by onnxruntime: {_reason(error)}"
        ) from error
    except (
        state.Fail, state.InvalidArgument, state.InvalidGraph, state.NoModel, state.NoSuchFile,
        state.NotFound, state.EPFail, state.RuntimeException,
    ) as error:  # fmt: skip
        raise ArtifactError(
            f"{path}: onnxruntime {_version()} cannot load or run it: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    text = str(error).rpartition(" failed:")[2]
    opset = re.search(
        r"Opset (\d+) is under development.*support for domain (\S+) is till opset (\d+)", text, re.DOTALL
    )
    if opset:
        return f"it is made for opset {opset[1]} of {opset[2]}, known up to {opset[3]}; upgrade or re-export"
    return one_line(text.removeprefix("[ONNXRuntimeError] : "))


def _create(
    ort: ModuleType, model: Path | bytes, mode: str, threads: int, optimized: Path | None = None
) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # what matters is raised; warnings of sessions side by side would flood
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    providers: list[Any] = ["CPUExecutionProvider"]
    if mode == "cuda":
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))
        options.add_session_config_entry(_RECORD_ASSIGNMENT, "1")
    where = "a test graph" if isinstance(model, bytes) else str(model)
    with _mapped(where):
        # enable_fallback would print a notice and serve another provider's results
        session = ort.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=providers, enable_fallback=0
        )
    if _PROVIDERS[mode] not in session.get_providers():
        raise RuntimeUnavailable(
            f"onnxruntime:{mode}: {_PROVIDERS[mode]} is listed but did not load (got "
            f"{', '.join(session.get_providers())}); a driver, CUDA or cuDNN library is missing or too old: "
            f"{_CUDA_MEND}"
        )
    return session


def _check_assignment(session: Any, mode: str, where: str) -> None:
    """Check that a GPU session left no convolution or matrix product to the CPU.

    Shape arithmetic may stay there. ONNX Runtime before 1.24 cannot tell; its list of providers must do.
    """
    if mode == "cpu" or not hasattr(session, "get_provider_graph_assignment_info"):
        return
    strays = sorted(
        {
            f"{node.op_type} {node.name}".strip()
            for part in session.get_provider_graph_assignment_info()
            if part.ep_name != _PROVIDERS[mode]
            for node in part.get_nodes()
            if node.op_type in COMPUTE_OPS
        }
    )
    if strays:
        shown = ", ".join(strays[:3]) + (f" and {len(strays) - 3} more" if len(strays) > 3 else "")
        raise RuntimeUnavailable(
            f"onnxruntime:{mode}: {where}: {_PROVIDERS[mode]} does not take {shown}; they would run on the "
            "CPU, and the timing would be of a mixture"
        )


@functools.lru_cache(maxsize=256)
def _executed_precision(path: Path, size: int, mtime_ns: int, mode: str) -> str:  # noqa: ARG001 - cache key
    """The precision that convolutions and matrix products run in, read from the graph *after* optimization.

    Only that graph tells: Q/DQ pairs that could not be fused leave float convolutions behind, and FP16
    weights on a CPU without FP16 kernels are cast back. It costs a second session, once per file and only
    where the file holds Q/DQ nodes or another float type than FP32.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    plain = not kinds & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.INT8}
    if plain and not any(node.op_type in {"QuantizeLinear", "DequantizeLinear"} for node in model.graph.node):
        return "f32"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimized.onnx"
        _create(optional.require("onnxruntime"), path, mode, threads=1, optimized=target)
        return graph_precision(onnx.load(str(target), load_external_data=False))


def graph_precision(model: Any) -> str:
    """The precision of the convolutions and matrix products in an (optimized) ONNX model."""
    import onnx

    floats = {
        onnx.TensorProto.FLOAT: "f32",
        onnx.TensorProto.FLOAT16: "f16",
        onnx.TensorProto.BFLOAT16: "bf16",
    }
    weights = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    made_by = {output: node for node in model.graph.node for output in node.output}
    found = []
    for node in model.graph.node:
        if node.op_type not in COMPUTE_OPS:
            continue
        if node.op_type.startswith("Q") or node.op_type.endswith("Integer"):
            found.append("int8")
            continue
        source = made_by.get(node.input[1])
        kind = weights.get(node.input[1])
        if source is not None and source.op_type == "Cast":
            kind = next(item.i for item in source.attribute if item.name == "to")
        # a weight that is dequantized or computed on the fly is f32 in all graphs that ONNX Runtime makes
        found.append(floats.get(kind, "f32") if kind is not None else "f32")
    return precision_label(found, ["f32"])
