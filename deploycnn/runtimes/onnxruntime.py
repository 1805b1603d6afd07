"""ONNX Runtime on the CPU and on NVIDIA GPUs.

The execution provider that was asked for is verified after loading, twice: it must be among the session's
providers, and (on GPUs) every convolution and matrix product must have been assigned to it. ONNX Runtime
itself merely logs a provider that does not load and goes on with the CPU.

On GPUs, inputs and outputs are bound in device memory (``gpu.ort.OrtLane``), page-locked memory is copied to and from
it on the stream on which the session computes, and CUDA events on that stream take the time.

Threads: ``intra_op_num_threads`` is set, ``inter_op`` is 1, execution is sequential. Spinning between the
operators stays on, as it is by default: without it latency with two threads is 1.7 times higher, and that is
not what anyone deploys. Two sessions that spin at once disturb each other, so timing runs them in blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from deploycnn import optional
from deploycnn.errors import ArtifactError, RuntimeUnavailable
from deploycnn.gpu import device as gpu
from deploycnn.gpu import ort as gpu_ort
from deploycnn.graph.onnxruntime_errors import onnxruntime_errors
from deploycnn.runtimes.base import Availability, Executed, Runtime, Session
from deploycnn.runtimes.common import (
    check_file,
    check_images,
    check_request,
    precision_label,
    tiny_onnx,
    unavailable,
)
from deploycnn.runtimes.onnxruntime_sessions import (
    PROVIDERS,
    check_assignment,
    check_input,
    create_session,
    executed_precision,
    facts_of,
    version,
)

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np
    import numpy.typing as npt

    from deploycnn.core import Artifact, Format

#: Runs before a provider has captured its graph: the CUDA provider counts some for its allocators to settle.
_GRAPH_WARMUP = 3


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime(Runtime):
    """ONNX files in ONNX Runtime: ``onnxruntime:cpu``, ``:cuda``, ``:tensorrt`` or ``:tensorrt-rtx``.

    On GPUs timing includes the copies to and from the device, unless ``+device`` is asked for; ``+graph`` lets the
    provider replay a CUDA graph, ``+flush-l2`` empties the L2 cache before each timed run, ``+blocking`` sleeps
    instead of spinning while the GPU works. TF32 is off on ``cuda``, so that an FP32 row is FP32.
    """

    modes: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "tensorrt", "tensorrt-rtx")
    accepts: ClassVar[tuple[Format, ...]] = ("onnx",)

    mode: str = "cpu"

    @classmethod
    def options_for(cls, mode: str) -> tuple[str, ...]:
        """Those of GPU sessions, on GPUs."""
        return () if mode == "cpu" else gpu.OPTIONS

    @classmethod
    def device_of(cls, mode: str) -> Literal["cpu", "cuda"]:
        """Where the provider computes."""
        return "cpu" if mode == "cpu" else "cuda"

    def availability(self) -> Availability:
        """Whether a one-operator graph runs on the provider of this mode."""
        try:
            ort = optional.require("onnxruntime")
            if self.mode != "cpu":
                gpu_ort.require_provider(ort, self.mode)
            request = gpu_ort.Request(mode=self.mode)
            check_assignment(create_session(ort, tiny_onnx(), request, threads=1), self.mode, "a test graph")
        except (RuntimeUnavailable, ArtifactError) as error:
            return unavailable(error, version(), gpu_ort.MEND.get(self.mode, 'pip install "deploycnn[cpu]"'))
        return Availability(ok=True, version=version())

    def open(self, artifact: Artifact, *, batch_size: int, threads: int) -> Session:
        """Load an ONNX file.

        Raises:
            RuntimeUnavailable: not installed, or the provider does not load or does not take the graph.
            ArtifactError: damaged file, unsupported opset or operator, another fixed batch, several inputs.
        """
        check_request(batch_size, threads)
        path = check_file(artifact, self.accepts, "onnxruntime")
        ort = optional.require("onnxruntime")
        if self.mode != "cpu":
            return self._open_on_gpu(ort, path, batch_size, threads)
        session = create_session(ort, path, gpu_ort.Request(mode=self.mode), threads)
        check_input(session, path, batch_size)
        return _OrtSession(ort, session, path, self.mode)

    def _open_on_gpu(self, ort: ModuleType, path: Path, batch_size: int, threads: int) -> Session:
        gpu_ort.require_provider(ort, self.mode)
        lane = gpu_ort.OrtLane(ort, gpu.open_device(), path)
        facts = facts_of(path)
        request = gpu_ort.Request(
            mode=self.mode,
            options=self.options,
            stream=lane.handle,
            profile=facts.profile(batch_size),
            float16=facts.half,
            int8=facts.quantized,
        )
        session = create_session(ort, path, request, threads)
        check_assignment(session, self.mode, str(path))
        check_input(session, path, batch_size)
        lane.take(session)
        return _GpuSession(ort, session, path, lane, request)


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
            precision=executed_precision(self._path, stat.st_size, stat.st_mtime_ns, self._mode),
            threads=self._session.get_session_options().intra_op_num_threads,
        )

    def run(self, images_NCHW: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        """Outputs in graph order, as float32.

        Raises:
            ArtifactError: the images do not fit the input, or an operator fails on them.
        """
        import numpy as np

        images = check_images(self._path, self._input.shape, images_NCHW)
        with onnxruntime_errors(self._path, version()):
            outputs = self._session.run(self._outputs, {self._input.name: images})
        return [np.asarray(output, dtype=np.float32) for output in outputs]

    def bind(self, images_NCHW: npt.NDArray[np.float32]) -> Callable[[], float | None]:
        """A call of the session with inputs and outputs bound to memory that is allocated here, once."""
        images = check_images(self._path, self._input.shape, images_NCHW)
        value = self._ort.OrtValue.ortvalue_from_numpy(images)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self._input.name, value)
        with onnxruntime_errors(self._path, version()):
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


class _GpuSession(_OrtSession):
    def __init__(
        self, ort: ModuleType, session: Any, path: Path, lane: gpu_ort.OrtLane, request: gpu_ort.Request
    ) -> None:
        super().__init__(ort, session, path, request.mode)
        self._lane, self._options = lane, request.options

    @functools.cached_property
    def executed(self) -> Executed:  # type: ignore[override]
        """As the graph holds it, once every product was seen to be the provider's; TensorRT may round to TF32."""
        if self._mode == "cuda":
            stat = self._path.stat()
            precision = executed_precision(self._path, stat.st_size, stat.st_mtime_ns, "cuda")
        else:
            facts = facts_of(self._path)
            rest = "f16" if facts.half else "tf32"
            precision = precision_label(["int8" if facts.quantized else rest], [rest])
        return Executed(
            provider=PROVIDERS[self._mode],
            precision=precision,
            threads=self._session.get_session_options().intra_op_num_threads,
            device="cuda",
            clock="cuda events",
            transfers="device" not in self._options,
        )

    def _prepared(self, images_NCHW: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        images = check_images(self._path, self._input.shape, images_NCHW)
        self._lane.prepare(images.shape)
        return images

    def run(self, images_NCHW: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        """Outputs in graph order, as float32.

        Raises:
            ArtifactError: the images do not fit the input, or an operator fails on them.
            RuntimeUnavailable: there is not enough device memory for them.
        """
        images = self._prepared(images_NCHW)
        with onnxruntime_errors(self._path, version()):
            return self._lane.run(images)

    def bind(self, images_NCHW: npt.NDArray[np.float32]) -> Callable[[], float | None]:
        """A call that returns the milliseconds of one batch by CUDA events. A session binds one batch at a time."""
        images = self._prepared(images_NCHW)
        lane = self._lane
        with onnxruntime_errors(self._path, version()):
            for _ in range(_GRAPH_WARMUP if "graph" in self._options else 1):
                lane.run(images)
        clock = gpu.StreamClock(gpu.open_device(), lane.stream, self._options)
        work = lane.execute if "device" in self._options else lane.with_transfers
        return lambda: clock.time(work)

    def close(self) -> None:
        """Free the session, its bindings and its buffers."""
        super().close()
        self._lane.close()
