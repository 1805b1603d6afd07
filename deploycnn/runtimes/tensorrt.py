"""TensorRT and TensorRT-RTX engines on an NVIDIA GPU.

An engine is executable code, so ``vouch.check_engine`` decides first whether it may be loaded. Its inputs and outputs
lie in device memory (by PyCUDA, or PyTorch where PyCUDA is absent); host memory is page-locked. Bound calls are timed
by CUDA events on the session's own stream: with the copies to and from the device, and without them as ``+device``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from deploycnn.errors import ArtifactError, RuntimeUnavailable
from deploycnn.gpu import device as gpu
from deploycnn.gpu.lane import EngineLane, dims
from deploycnn.runtimes.base import Availability, Executed, Runtime, Session
from deploycnn.runtimes.common import check_file, check_images, check_request, unavailable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from deploycnn.core import Artifact, Format
    from deploycnn.engines.flavour import Flavour, Name
    from deploycnn.engines.settings import EngineRecord

_FLAVOURS: Mapping[str, Name] = {"trt": "tensorrt", "rtx": "tensorrt-rtx"}
#: Element types of inputs and outputs that NumPy has too.
_DTYPES = ("float32", "float16")
#: Kernels that TensorRT-RTX compiled for an engine in this process, so that opening it again does not compile anew.
_RUNTIME_CACHES: dict[tuple[str, int], bytes] = {}


@dataclass(frozen=True, kw_only=True)
class TensorRT(Runtime):
    """Engines in TensorRT (``tensorrt:trt``) or TensorRT-RTX (``tensorrt:rtx``).

    Options, each behind a plus sign: ``graph`` replays a CUDA graph, ``device`` leaves inputs and outputs on the
    device, ``flush-l2`` empties the L2 cache before each timed run, ``blocking`` sleeps instead of spinning while the
    GPU works, ``trust`` loads an engine that no manifest vouches for.
    """

    modes: ClassVar[tuple[str, ...]] = ("trt", "rtx")
    accepts: ClassVar[tuple[Format, ...]] = ("engine",)

    mode: str = "trt"

    @classmethod
    def options_for(cls, mode: str) -> tuple[str, ...]:  # noqa: ARG003
        """All options serve both flavours."""
        return (*gpu.OPTIONS, "trust")

    @classmethod
    def device_of(cls, mode: str) -> Literal["cpu", "cuda"]:  # noqa: ARG003
        """Always the GPU."""
        return "cuda"

    @property
    def flavour(self) -> Name:
        """Which TensorRT this is."""
        return _FLAVOURS[self.mode]

    def availability(self) -> Availability:
        """Whether the library loads, and device memory can be had; an engine is not built for it."""
        from deploycnn.engines import device as engines_device
        from deploycnn.engines import flavour

        version = ""
        try:
            found = flavour.find(self.flavour)
            version = found.version
            engines_device.require_gpu()
            gpu.open_device().allocate(1)
            found.runtime()
        except RuntimeUnavailable as error:
            return unavailable(error, version, f'pip install "deploycnn[{self.flavour}]"')
        return Availability(ok=True, version=version)

    def open(self, artifact: Artifact, *, batch_size: int, threads: int) -> EngineSession:
        """Load an engine that may be loaded here. ``threads`` has no meaning on the GPU.

        Raises:
            RuntimeUnavailable: no TensorRT of this flavour, no GPU, or not enough device memory.
            ArtifactError: not vouched for, tampered with, made elsewhere, or ``batch_size`` is outside its profile.
        """
        from deploycnn.engines import device as engines_device
        from deploycnn.engines import flavour, vouch

        check_request(batch_size, threads)
        path = check_file(artifact, self.accepts, "tensorrt")
        found = flavour.find(self.flavour)
        engines_device.require_gpu()
        record = vouch.check_engine(path, found, trust="trust" in self.options)
        engine = found.deserialize(
            path.read_bytes(),
            what=str(path),
            host_code_allowed=record is not None and record.version_compatible,
        )
        _refit(found, engine, path, record)
        session = EngineSession(found, engine, path, self.options, artifact.facts.precision)
        try:
            session.check_batch(batch_size)
        except ArtifactError:
            session.close()
            raise
        return session


def forget_kernels(path: Path) -> None:
    """Drop what was compiled for an engine that is opened no more."""
    for key in [key for key in _RUNTIME_CACHES if key[0] == str(path)]:
        del _RUNTIME_CACHES[key]


def _refit(flavour: Flavour, engine: Any, path: Path, record: EngineRecord | None) -> None:
    """Put the weights into an engine that was built without them, from the ``model.onnx`` beside it."""
    import hashlib

    if record is None or not record.weight_stripped:
        return
    source = path.with_name("model.onnx")
    if not source.is_file():
        raise ArtifactError(
            f"{path}: holds no weights, and {source.name} with them is not beside it; copy it there"
        )
    content = source.read_bytes()
    if hashlib.sha256(content).hexdigest() != record.onnx_sha256:
        raise ArtifactError(f"{source}: is not the file that {path.name} was built from; copy that one")
    flavour.refit(engine, content, what=str(path))


class EngineSession(Session):
    """A loaded engine. What is documented by ``Session`` runs on one lane; ``concurrent`` makes more."""

    def __init__(
        self, flavour: Flavour, engine: Any, path: Path, options: Sequence[str], precision: str = ""
    ) -> None:
        """Take over ``engine``.

        Raises:
            ArtifactError: it has other than one input, or element types that NumPy has not.
        """
        self._flavour, self._engine, self._path, self._options = flavour, engine, path, tuple(options)
        self._device = gpu.open_device()
        self._precision = precision
        tensors = flavour.io_tensors(engine)
        inputs = [tensor for tensor in tensors if tensor.is_input]
        self.outputs = [tensor for tensor in tensors if not tensor.is_input]
        if len(inputs) != 1:
            names = ", ".join(tensor.name for tensor in inputs)
            raise ArtifactError(
                f"{path}: {len(inputs)} inputs ({names}); engines with one image input are supported"
            )
        for tensor in tensors:
            if tensor.dtype not in _DTYPES:
                raise ArtifactError(
                    f'{path}: "{tensor.name}" is {tensor.dtype}; export with inputs and outputs in float32'
                )
        self.input = inputs[0]
        self._lane: EngineLane | None = None
        # kept until the session is closed: a captured graph knows addresses, but owns no memory
        self._lanes: list[EngineLane] = []

    @functools.cached_property
    def executed(self) -> Executed:  # type: ignore[override]
        """Read when first asked for: the inspector writes down every layer."""
        return Executed(
            provider=f"{self._flavour.name} {self._flavour.version} ({self._device.name})",
            precision=self._precision,
            threads=1,
            device="cuda",
            clock="cuda events",
            transfers="device" not in self._options,
        )

    def check_batch(self, batch_size: int) -> int:
        """The optimization profile that serves ``batch_size``.

        Raises:
            ArtifactError: none does; says which batches the engine was built for.
        """
        return self._profile((batch_size, *(max(axis, 1) for axis in self.input.shape[1:])), axes=1)

    def _profile(self, shape: Sequence[int], axes: int | None = None) -> int:
        """The first profile that ``shape`` fits, in its first ``axes`` axes."""
        for index, (least, _, most) in enumerate(self.input.profiles):
            if len(shape) != len(least):
                continue
            bounds = list(zip(shape, least, most, strict=True))[:axes]
            if all(low <= size <= high for size, low, high in bounds):
                return index
        ranges = " or ".join(f"{dims(least)} to {dims(most)}" for least, _, most in self.input.profiles)
        raise ArtifactError(
            f"{self._path}: an input of {dims(shape)} is outside the engine's profile ({ranges}); "
            "choose a batch size within it, or build the engine with a profile that holds it"
        )

    def lane(self) -> EngineLane:
        """A new execution context with a stream and buffers of its own; it runs beside the others."""
        key = (str(self._path), self._path.stat().st_mtime_ns)
        context, read_cache = self._flavour.context(
            self._engine,
            runtime_cache=_RUNTIME_CACHES.get(key, b""),
            cuda_graphs=self._flavour.is_rtx and "graph" in self._options,
        )

        def keep_cache() -> None:
            content = read_cache()
            if content is not None:
                _RUNTIME_CACHES[key] = content

        self._lanes.append(
            EngineLane(context, (self.input, self.outputs), self._device, self._path, keep_cache)
        )
        return self._lanes[-1]

    def _own_lane(self) -> EngineLane:
        if self._lane is None:
            self._lane = self.lane()
        return self._lane

    def run(self, images_NCHW: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        """Outputs in the engine's order, as float32.

        Raises:
            ArtifactError: the images are outside the profile, or the engine fails on them.
            RuntimeUnavailable: not enough device memory for them.
        """
        images = check_images(self._path, self.input.shape, images_NCHW)
        lane = self._own_lane()
        lane.prepare(images.shape, self._profile(images.shape))
        return lane.run(images)

    def bind(self, images_NCHW: npt.NDArray[np.float32]) -> Callable[[], float | None]:
        """A call that returns the milliseconds of one batch by CUDA events, on a lane of its own."""
        lane = self.lane()
        work = self._work(lane, images_NCHW)
        clock = gpu.StreamClock(self._device, lane.stream, self._options)
        return lambda: clock.time(work)

    def _work(self, lane: EngineLane, images_NCHW: npt.NDArray[np.float32]) -> Callable[[], None]:
        """What is enqueued for one batch, once it has run a first time (lazy kernels are loaded by then)."""
        images = check_images(self._path, self.input.shape, images_NCHW)
        lane.prepare(images.shape, self._profile(images.shape))
        lane.run(images)
        lane.keep_cache()
        work = lane.execute if "device" in self._options else lane.with_transfers
        if "graph" in self._options and not self._flavour.is_rtx:
            # TensorRT-RTX captures by itself: its kernels may be exchanged for better ones while it runs
            return self._device.capture(work, lane.stream)
        return work

    def concurrent(self, images_NCHW: npt.NDArray[np.float32], streams: int) -> Callable[[], None]:
        """A call that runs ``streams`` batches side by side, each on a context and stream of its own.

        It returns when all are complete; divide the images by the caller's clock for the throughput.
        """
        lanes = [self.lane() for _ in range(streams)]
        works = [self._work(lane, images_NCHW) for lane in lanes]

        def call() -> None:
            for work in works:
                work()
            for lane in lanes:
                lane.synchronize()

        return call

    def inspect(self) -> str:
        """TensorRT's account of the layers, for ``engines.layers.parse``."""
        return self._flavour.inspect(self._engine)

    def layer_times(self, images_NCHW: npt.NDArray[np.float32], *, runs: int = 20) -> dict[str, float]:
        """Layer name -> milliseconds for these images, by TensorRT's profiler."""
        from deploycnn.engines.layer_times import layer_times

        images = check_images(self._path, self.input.shape, images_NCHW)
        lane = self.lane()
        lane.prepare(images.shape, self._profile(images.shape))
        lane.run(images)
        lane.keep_cache()
        try:
            return layer_times(self._flavour, lane.context, lambda: lane.run(images), runs=runs)
        finally:
            self._lanes.remove(lane)  # a profiler slows down whatever runs with it

    def run_tensor(self, images_NCHW: torch.Tensor) -> list[torch.Tensor]:
        """Outputs for images that lie on the GPU already; nothing is copied and nothing is waited for.

        Args:
            images_NCHW: Contiguous, on the engine's device, in the input's element type. It must stay alive until
                PyTorch's current stream, on which the engine is enqueued, is done with it.

        Raises:
            ArtifactError: another device, element type or shape, or not contiguous.
        """
        import torch

        wanted = getattr(torch, self.input.dtype)
        given = images_NCHW
        if not given.is_cuda or given.dtype != wanted or not given.is_contiguous():
            raise ArtifactError(
                f"{self._path}: a contiguous {wanted} tensor on the GPU is needed, got {given.dtype} on "
                f"{given.device}{'' if given.is_contiguous() else ', not contiguous'}; use .contiguous().to(...)"
            )
        lane = self._own_lane()
        stream = torch.cuda.current_stream().cuda_stream
        shapes = lane.shapes(tuple(given.shape), self._profile(tuple(given.shape)), stream)
        outputs = [
            torch.empty(shapes[tensor.name], dtype=getattr(torch, tensor.dtype), device=given.device)
            for tensor in self.outputs
        ]
        lane.execute_at([given.data_ptr(), *(output.data_ptr() for output in outputs)], stream)
        return outputs

    def close(self) -> None:
        """Free contexts and the engine."""
        if self._lane is not None:
            self._lane.keep_cache()
        self._lanes.clear()
        self._lane = self._engine = None
