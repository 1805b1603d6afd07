"""ONNX Runtime's execution providers for NVIDIA GPUs: their options, and inputs and outputs bound on the device.

Names and meanings: onnxruntime.ai, "CUDA Execution Provider" and "TensorRT Execution Provider"; for TensorRT-RTX the
provider options of the plug-in ``onnxruntime-ep-nv-tensorrt-rtx`` (NVIDIA/TensorRT-RTX-EP-ABI).
"""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycnn import optional
from deploycnn.errors import ArtifactError, RuntimeUnavailable
from deploycnn.gpu.lane import Lane

if TYPE_CHECKING:
    from types import ModuleType

    from deploycnn.gpu.device import Device

#: Mode of the runtime -> the provider that it stands for.
PROVIDERS: Mapping[str, str] = {
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}

_GPU_WHEEL = 'pip uninstall -y onnxruntime && pip install "deploycnn[gpu]"'
#: How to mend a provider that does not load.
MEND: Mapping[str, str] = {
    "cuda": f"{_GPU_WHEEL}; CUDA and cuDNN must fit that wheel (deploycnn doctor tells)",
    "tensorrt": f"{_GPU_WHEEL}; its TensorRT provider needs the libraries of TensorRT 10 (libnvinfer.so.10)",
    "tensorrt-rtx": 'pip install "deploycnn[onnxruntime-rtx]" (the provider is a plug-in of onnxruntime 1.24 or newer)',
}

#: Element types of inputs and outputs, as ONNX Runtime names them -> NumPy's names.
DTYPES: Mapping[str, str] = {"tensor(float)": "float32", "tensor(float16)": "float16"}

#: Run option: return once the work is enqueued.
ASYNCHRONOUS = "disable_synchronize_execution_providers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a session is made for.

    Attributes:
        mode: A key of ``PROVIDERS``.
        options: ``+options`` of the runtime.
        stream: Handle on which the provider is to compute; ``None`` for one of its own.
        profile: Input's name and full shape, which TensorRT builds its engine for; ``None`` where not known.
        float16: Whether the graph computes in float16 (somewhere).
        int8: Whether the graph is quantized.
    """

    mode: str
    options: Sequence[str] = ()
    stream: int | None = None
    profile: tuple[str, tuple[int, ...]] | None = None
    float16: bool = False
    int8: bool = False


def provider_options(request: Request) -> dict[str, str]:
    """The provider's options for a request.

    TF32 is off on the CUDA provider, so that an FP32 row is FP32; TensorRT's provider has no such option. TensorRT
    computes in what the graph holds: its reduced precisions are allowed only where the graph has them.
    """
    graph = "1" if "graph" in request.options else "0"
    found = {"device_id": "0"}
    if request.stream is not None:
        found |= {"has_user_compute_stream": "1", "user_compute_stream": str(request.stream)}
    if request.mode == "cuda":
        return {**found, "use_tf32": "0", "enable_cuda_graph": graph}
    prefix = "nv" if request.mode == "tensorrt-rtx" else "trt"
    if request.profile is not None:
        name, shape = request.profile
        text = f"{name}:{'x'.join(map(str, shape))}"
        found |= {f"{prefix}_profile_{bound}_shapes": text for bound in ("min", "opt", "max")}
    if request.mode == "tensorrt-rtx":
        return {**found, "enable_cuda_graph": graph, "nv_runtime_cache_path": _cache("rtx")}
    return {
        **found,
        "trt_cuda_graph_enable": graph,
        "trt_fp16_enable": "1" if request.float16 else "0",
        "trt_int8_enable": "1" if request.int8 else "0",
        # sessions are opened anew for every round of timing: the engine is built for the first one only
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": _cache("trt"),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": _cache("trt"),
    }


@functools.cache
def _holder() -> tempfile.TemporaryDirectory[str]:
    """Engines are executable code: they are kept in a folder that only this process's user reads, and not for long."""
    return tempfile.TemporaryDirectory(prefix="deploycnn-ort-")


def _cache(kind: str) -> str:
    folder = Path(_holder().name) / kind
    folder.mkdir(exist_ok=True)
    return str(folder)


def require_provider(ort: ModuleType, mode: str) -> None:
    """Check that this onnxruntime has the provider; the plug-in of TensorRT-RTX is registered.

    Raises:
        RuntimeUnavailable: it has not; says what it has.
    """
    if mode == "tensorrt-rtx":
        rtx_devices(ort)
        return
    _load_libraries(ort, mode)
    available = ort.get_available_providers()
    if PROVIDERS[mode] not in available:
        raise RuntimeUnavailable(
            f"onnxruntime:{mode}: the installed onnxruntime {ort.__version__} has no {PROVIDERS[mode]} "
            f"(it has {', '.join(available)}); {MEND[mode]}"
        )


@functools.cache
def _load_libraries(ort: ModuleType, mode: str) -> None:
    """Load CUDA, cuDNN and TensorRT where they lie in wheels, which the dynamic linker does not search.

    A library that is missing is told by the provider, when it does not load.
    """
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls()
    if mode == "tensorrt" and optional.installed("tensorrt"):
        with contextlib.suppress(RuntimeUnavailable):
            optional.require("tensorrt")


@functools.cache
def _register_rtx(ort: ModuleType) -> str:
    plugin = optional.require("onnxruntime_ep_nv_tensorrt_rtx")
    name: str = plugin.get_ep_name()
    try:
        ort.register_execution_provider_library(name, plugin.get_library_path())
    except Exception as error:  # onnxruntime raises what the loader said, in exceptions of several kinds
        said = " ".join(str(error).split())[:200]
        raise RuntimeUnavailable(
            f"onnxruntime:tensorrt-rtx: the plug-in does not load ({said}); {MEND['tensorrt-rtx']}"
        ) from error
    return name


def rtx_devices(ort: ModuleType) -> list[Any]:
    """The GPUs that the plug-in of TensorRT-RTX serves.

    Raises:
        RuntimeUnavailable: it is not installed, does not load, or serves none here.
    """
    if not hasattr(ort, "register_execution_provider_library"):
        raise RuntimeUnavailable(
            f"onnxruntime:tensorrt-rtx: onnxruntime {ort.__version__} takes no plug-ins; {MEND['tensorrt-rtx']}"
        )
    name = _register_rtx(ort)
    devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise RuntimeUnavailable(
            "onnxruntime:tensorrt-rtx: the plug-in finds no GPU that it serves (compute capability 8.6, 8.9, 12.0 or "
            "newer, and a driver for its CUDA); use onnxruntime:cuda"
        )
    return devices[:1]


def attach(ort: ModuleType, session_options: Any, request: Request) -> list[Any] | None:
    """Choose the provider: ``providers`` for ``InferenceSession``, or ``None`` where the options hold it already."""
    options = provider_options(request)
    if request.mode == "tensorrt-rtx":
        session_options.add_provider_for_devices(rtx_devices(ort), options)
        return None
    return [(PROVIDERS[request.mode], options), "CPUExecutionProvider"]


class OrtLane(Lane):
    """Inputs and outputs of a session bound to buffers on the device, on the stream that the session computes on."""

    def __init__(self, ort: ModuleType, device: Device, path: Path) -> None:
        """Make the stream; the session is made for it afterwards, and given to ``take``."""
        super().__init__(device)
        self._path = path
        self._run_options = ort.RunOptions()
        self._run_options.add_run_config_entry(ASYNCHRONOUS, "1")
        self._session: Any = None
        self._binding: Any = None
        self._shape: tuple[int, ...] | None = None

    @property
    def handle(self) -> int:
        """Of the stream, for ``Request.stream``."""
        return self._handle

    def take(self, session: Any) -> None:
        """The session whose inputs and outputs are bound."""
        self._session = session

    def prepare(self, shape: tuple[int, ...]) -> None:
        """Allocate and bind buffers for inputs of ``shape``, unless they are there.

        Raises:
            ArtifactError: an output's shape is not stated in the graph, or its element type is not served.
        """
        import numpy as np

        if self._shape == shape:
            return
        self._shape = None
        source, outputs = self._session.get_inputs()[0], self._session.get_outputs()
        tensors = [(shape, self._dtype(source))]
        tensors += [(self._output_shape(output, shape[0]), self._dtype(output)) for output in outputs]
        self._allocate(tensors)
        binding = self._session.io_binding()
        for item, (size, dtype), buffer in zip([source, *outputs], tensors, self._buffers, strict=True):
            bind = binding.bind_input if item is source else binding.bind_output
            bind(item.name, "cuda", 0, np.dtype(dtype).type, list(size), buffer.address)
        self._binding, self._shape = binding, shape

    def _dtype(self, item: Any) -> str:
        if item.type not in DTYPES:
            raise ArtifactError(
                f'{self._path}: "{item.name}" is {item.type}; export with inputs and outputs in float32'
            )
        return DTYPES[item.type]

    def _output_shape(self, output: Any, batch_size: int) -> tuple[int, ...]:
        """The first axis is the batch; the others must be stated."""
        first, *rest = output.shape or [None]
        if not all(isinstance(axis, int) and axis > 0 for axis in rest):
            raise ArtifactError(
                f'{self._path}: the shape of output "{output.name}" ({output.shape}) is not stated in the graph, so no '
                "memory can be bound for it; run ONNX shape inference on the model (the export pass does)"
            )
        return (first if isinstance(first, int) and first > 0 else batch_size, *rest)

    def execute(self) -> None:
        """Enqueue the session's run."""
        self._session.run_with_iobinding(self._binding, self._run_options)

    def close(self) -> None:
        """Free the session and the bindings."""
        self._session = self._binding = self._shape = None
