"""PyTorch, eager and compiled, on the CPU and on NVIDIA GPUs.

PyTorch's thread count is a setting of the process, so a session sets its own before each call if another
session (or anything else) has changed it meanwhile.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from deploycnn import optional
from deploycnn.errors import ArtifactError, RuntimeUnavailable, one_line
from deploycnn.gpu import device as gpu
from deploycnn.runtimes.base import Availability, Executed, Runtime, Session
from deploycnn.runtimes.common import check_file, check_images, check_request, unavailable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from deploycnn.core import Artifact, Format

#: Options that change what is computed; ``gpu.torch_model`` says how.
_FORMATS = ("fp16", "fp32", "channels-last")
#: Runs before a model is timed or captured: cuDNN chooses its algorithms, and its workspace is allocated.
_WARMUP = 3


@dataclass(frozen=True, kw_only=True)
class PyTorch(Runtime):
    """Torch artifacts in PyTorch: ``eager`` and ``compiled`` on the CPU, or on a GPU with ``-cuda`` behind.

    On GPUs timing is by CUDA events and includes the copies of inputs and outputs, unless ``+device`` is asked for;
    ``eager-cuda+graph`` replays the model as a CUDA graph, ``+flush-l2`` empties the L2 cache before each timed run,
    ``+blocking`` sleeps instead of spinning while the GPU works. Convolutions compute in TF32, as PyTorch lets them by
    default, unless ``+fp32`` or ``+fp16`` is asked for; ``+channels-last`` lays images and weights out as NHWC.
    """

    modes: ClassVar[tuple[str, ...]] = ("eager", "compiled", "eager-cuda", "compiled-cuda")
    accepts: ClassVar[tuple[Format, ...]] = ("torch",)

    mode: str = "eager"

    @classmethod
    def options_for(cls, mode: str) -> tuple[str, ...]:
        """Those of GPU sessions, on GPUs; a compiled model launches its kernels by itself, so it takes no graph."""
        if not mode.endswith("cuda"):
            return ()
        timed = tuple(option for option in gpu.OPTIONS if option != "graph" or mode.startswith("eager"))
        return (*timed, *_FORMATS)

    @classmethod
    def device_of(cls, mode: str) -> Literal["cpu", "cuda"]:
        """By the mode's ending."""
        return "cuda" if mode.endswith("cuda") else "cpu"

    def availability(self) -> Availability:
        """Whether a convolution runs on the mode's device; the compiled mode's compiler is looked up only."""
        try:
            torch = optional.require("torch")
            _require(torch, self.mode)
            _try_convolution(torch, self.mode)
        except RuntimeUnavailable as error:
            return unavailable(error, "", "pip install torch")
        return Availability(ok=True, version=torch.__version__)

    def open(self, artifact: Artifact, *, batch_size: int, threads: int) -> Session:
        """Load a torch artifact; in the compiled modes, compile it for this batch size and thread count.

        Raises:
            RuntimeUnavailable: no GPU or no C++ compiler where the mode needs one.
            ArtifactError: damaged, or not compilable to one graph.
        """
        check_request(batch_size, threads)
        check_file(artifact, self.accepts, "pytorch")
        torch = optional.require("torch")
        _require(torch, self.mode)
        from deploycnn.models.artifact import load_model

        device = "cuda:0" if self.mode.endswith("cuda") else "cpu"
        model: Any = load_model(artifact.path).to(device).eval()
        if set(self.options) & set(_FORMATS):
            from deploycnn.gpu.torch_model import Recast

            model = Recast(model, self.options)
        shape = artifact.inputs[0].shape if artifact.inputs else (None, None, None, None)
        # a graph that takes part in autograd, or trains its batch norms, is not what is deployed
        model.requires_grad_(False)
        kind = _CudaSession if device == "cuda:0" else _TorchSession
        session = kind(model, artifact.path, (None, *shape[1:]), device, threads, self.options)
        if self.mode.startswith("compiled"):
            fixed = [axis for axis in shape[1:] if isinstance(axis, int)]
            if len(fixed) != 3:
                raise ArtifactError(
                    f"{artifact.path}: its image size is not stated, so it cannot be compiled ahead"
                )
            session.compile((batch_size, *fixed))
        return session


class _TorchSession(Session):
    def __init__(
        self,
        model: torch.nn.Module,
        path: Path,
        shape: tuple[int | None, ...],
        device: str,
        threads: int,
        options: tuple[str, ...] = (),
    ) -> None:
        import torch

        self._model: Any = model
        self._path = path
        self._shape = shape
        self._device = device
        self._threads = threads
        self._options = options
        self._pin_process()
        self.executed = Executed(provider=device, precision="f32", threads=torch.get_num_threads())

    def _pin_process(self) -> None:
        """Set what is a setting of the process, as this session wants it."""
        import torch

        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)

    def compile(self, shape: tuple[int, ...]) -> None:
        """Replace the model by its compiled form for inputs of ``shape``; compiled now, not when timed.

        Compiled code is cached per code object, and after eight recompilations of one object PyTorch silently
        goes on in eager mode. Sessions are re-created more often than that, so each gets a code object of its
        own; ``fullgraph`` turns the remaining ways of running partly in eager mode into errors.

        Raises:
            ArtifactError: it cannot be compiled to one graph.
        """
        import torch
        from torch._dynamo.exc import TorchDynamoException

        model = self._model

        def call(images: torch.Tensor) -> Any:
            return model(images)

        # made outside inference mode, as the images are: the other kind of tensor would be compiled for again
        example = torch.zeros(shape, device=self._device)
        own = types.FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)
        self._model = torch.compile(own, fullgraph=True, dynamic=False)
        try:
            with torch.inference_mode():
                self._model(example)
        except TorchDynamoException as error:
            raise ArtifactError(
                f"{self._path}: torch.compile cannot compile it to one graph ({one_line(error, 200)}); "
                "use pytorch:eager"
            ) from error

    def run(self, images_NCHW: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        """Outputs in the model's order, as float32.

        Raises:
            ArtifactError: the images do not fit the input.
        """
        import torch

        self._pin_process()
        images = torch.tensor(check_images(self._path, self._shape, images_NCHW), device=self._device)
        with torch.inference_mode():
            try:
                outputs = _tensors(self._model(images))
            except RuntimeError as error:
                given = " x ".join(map(str, images_NCHW.shape))
                raise ArtifactError(f"{self._path}: fails on images of {given}: {one_line(error)}") from error
        return [output.float().cpu().numpy() for output in outputs]

    def bind(self, images_NCHW: npt.NDArray[np.float32]) -> Callable[[], float | None]:
        """A forward pass in inference mode on a tensor made here."""
        import torch

        images = torch.tensor(check_images(self._path, self._shape, images_NCHW))
        model, pin = self._model, self._pin_process

        def call() -> None:
            pin()
            with torch.inference_mode():
                model(images)

        return call

    def close(self) -> None:
        """Free the model."""
        self._model = None


class _CudaSession(_TorchSession):
    """On ``cuda:0``: bound calls work on tensors that stay where they are, on a stream of their own."""

    def __init__(
        self,
        model: torch.nn.Module,
        path: Path,
        shape: tuple[int | None, ...],
        device: str,
        threads: int,
        options: tuple[str, ...] = (),
    ) -> None:
        super().__init__(model, path, shape, device, threads, options)
        self.executed = replace(
            self.executed,
            precision=_precision(options),
            device="cuda",
            clock="cuda events",
            transfers="device" not in options,
        )
        self._kept: list[Any] = []

    def _pin_process(self) -> None:
        """TF32 in cuDNN is a setting of the process too."""
        import torch

        super()._pin_process()
        wanted = "fp32" not in self._options
        if torch.backends.cudnn.allow_tf32 != wanted:
            torch.backends.cudnn.allow_tf32 = wanted

    def bind(self, images_NCHW: npt.NDArray[np.float32]) -> Callable[[], float | None]:
        """A call that returns the milliseconds of one batch by CUDA events.

        Raises:
            RuntimeUnavailable: with ``+graph``, something in the model cannot be captured.
        """
        import torch

        self._pin_process()
        device = gpu.open_device("torch")
        stream = device.stream()
        # made outside inference mode, as the example was that a compiled model was compiled for
        source = torch.tensor(check_images(self._path, self._shape, images_NCHW)).pin_memory()
        images = source.to(self._device)
        torch.cuda.synchronize()  # the copy is on another stream than the model
        model = self._model
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(_WARMUP):
                first = _tensors(model(images))
        stream.synchronize()
        hosts = [torch.empty(output.shape, dtype=output.dtype, pin_memory=True) for output in first]

        def execute() -> None:
            with torch.inference_mode(), torch.cuda.stream(stream):
                model(images)

        def with_transfers() -> None:
            with torch.inference_mode(), torch.cuda.stream(stream):
                images.copy_(source, non_blocking=True)
                for host, output in zip(hosts, _tensors(model(images)), strict=True):
                    host.copy_(output, non_blocking=True)

        work = execute if "device" in self._options else with_transfers
        launch = device.capture(work, stream) if "graph" in self._options else work
        clock, pin = gpu.StreamClock(device, stream, self._options), self._pin_process
        # a graph owns no memory: what it was captured on lives as long as the session
        self._kept.append((images, source, hosts))

        def call() -> float:
            pin()
            return clock.time(launch)

        return call


def _tensors(output: Any) -> list[torch.Tensor]:
    """All tensors of a model's output, in order, through lists, tuples and dicts."""
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in _tensors(value)]
    if isinstance(output, Sequence):
        return [tensor for value in output for tensor in _tensors(value)]
    return [output]


def _precision(options: Sequence[str]) -> str:
    """Of convolutions on the GPU at hand."""
    import torch

    from deploycnn.gpu.torch_model import precision

    return precision(options, torch.cuda.get_device_capability(0))


def _require(torch: types.ModuleType, mode: str) -> None:
    if mode.endswith("cuda") and not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a CPU-only build"
        raise RuntimeUnavailable(
            f"pytorch:{mode}: PyTorch {torch.__version__} ({built}) finds no usable CUDA device; "
            "check `nvidia-smi` and that the driver is new enough, or use another mode"
        )
    if mode == "compiled":
        missing = missing_for_compile(os.environ)
        if missing:
            raise RuntimeUnavailable(
                f"pytorch:compiled: torch.compile needs {missing} here; install it "
                "(Debian, Ubuntu: apt install g++ python3-dev) or use pytorch:eager"
            )


def _try_convolution(torch: types.ModuleType, mode: str) -> None:
    device = "cuda:0" if mode.endswith("cuda") else "cpu"
    try:
        with torch.inference_mode():
            torch.nn.functional.conv2d(
                torch.ones(1, 1, 2, 2, device=device), torch.ones(1, 1, 1, 1, device=device)
            ).cpu()
    except RuntimeError as error:
        raise RuntimeUnavailable(
            f"pytorch:{mode}: a convolution on {device} fails ({one_line(error, 200)}); "
            "check the driver, CUDA and cuDNN (deploycnn doctor)"
        ) from error


def missing_for_compile(environ: Mapping[str, str]) -> str | None:
    """What torch.compile's CPU backend lacks here, a C++ compiler or Python's headers; else ``None``."""
    compiler = environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if shutil.which(compiler, path=environ.get("PATH")) is None:
        return f'a C++ compiler ("{compiler}" is not found)'
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return f"Python's headers ({sysconfig.get_path('include')}/Python.h is not there)"
    return None
