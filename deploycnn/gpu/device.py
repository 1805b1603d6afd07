"""Memory, streams and events of one NVIDIA GPU, behind one small interface.

Two implementations: PyCUDA, and PyTorch's CUDA tensors where PyCUDA is absent. Both work in the device's primary
context, as TensorRT, ONNX Runtime and PyTorch do, so addresses and stream handles may be passed among them.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from deploycnn import optional
from deploycnn.errors import RuntimeUnavailable

if TYPE_CHECKING:
    import numpy.typing as npt

#: What a GPU session's ``+option`` may be, in the order in which they are written.
#: ``graph``: replay a CUDA graph. ``device``: inputs and outputs stay on the device. ``flush-l2``: overwrite the
#: L2 cache before each timed run. ``blocking``: sleep until the GPU is done instead of spinning.
OPTIONS = ("graph", "device", "flush-l2", "blocking")

#: L2 bytes that are assumed where the device does not tell: more than any GPU of 2026 has.
UNKNOWN_L2_BYTES = 256 * 2**20

Sync = Literal["spin", "blocking"]


@dataclass(frozen=True, slots=True)
class Buffer:
    """Device memory.

    Attributes:
        address: Where it begins.
        nbytes: Its size.
        keep: The object that owns it.
    """

    address: int
    nbytes: int
    keep: Any


class Device(ABC):
    """The first GPU that this process sees, in its primary context."""

    #: "pycuda" or "torch".
    name: ClassVar[str]

    @abstractmethod
    def stream(self) -> Any:
        """A new stream that does not synchronize with the default stream implicitly."""

    @abstractmethod
    def handle(self, stream: Any) -> int:
        """The ``cudaStream_t`` of a stream."""

    @abstractmethod
    def synchronize(self, stream: Any) -> None:
        """Wait until all work on ``stream`` is done."""

    @abstractmethod
    def allocate(self, nbytes: int) -> Buffer:
        """Device memory, not initialized.

        Raises:
            RuntimeUnavailable: there is not so much free.
        """

    @abstractmethod
    def pinned(self, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Page-locked host memory, from and to which copies need no staging."""

    @abstractmethod
    def upload(self, buffer: Buffer, host: npt.NDArray[Any], stream: Any) -> None:
        """Enqueue a copy of ``host`` (C-contiguous) to the start of ``buffer``."""

    @abstractmethod
    def download(self, host: npt.NDArray[Any], buffer: Buffer, stream: Any) -> None:
        """Enqueue a copy from the start of ``buffer`` to ``host`` (C-contiguous)."""

    @abstractmethod
    def fill(self, buffer: Buffer, stream: Any) -> None:
        """Enqueue an overwriting of all of ``buffer`` with zeros."""

    @abstractmethod
    def event(self, *, blocking: bool) -> Any:
        """An event with timing; waiting for a ``blocking`` one lets the thread sleep."""

    @abstractmethod
    def record(self, event: Any, stream: Any) -> None:
        """Enqueue ``event`` on ``stream``."""

    @abstractmethod
    def done(self, event: Any) -> bool:
        """Whether the GPU has come to ``event``."""

    @abstractmethod
    def wait(self, event: Any) -> None:
        """Wait until the GPU has come to ``event``."""

    @abstractmethod
    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two events that are done."""

    @abstractmethod
    def capture(self, work: Callable[[], None], stream: Any) -> Callable[[], None]:
        """Capture what ``work`` enqueues on ``stream`` as a CUDA graph, and return the call that launches it there.

        Raises:
            RuntimeUnavailable: something in it cannot be captured.
        """

    @abstractmethod
    def memory_bytes(self) -> tuple[int, int]:
        """Free and total device memory, of all processes."""

    @property
    @abstractmethod
    def l2_bytes(self) -> int:
        """Size of the L2 cache."""


@functools.cache
def open_device(prefer: Literal["pycuda", "torch"] = "pycuda") -> Device:
    """PyCUDA where it is installed, else PyTorch.

    Raises:
        RuntimeUnavailable: no driver or device, or neither package can use it; says why.
    """
    from deploycnn.gpu.pycuda_device import PycudaDevice
    from deploycnn.gpu.torch_device import TorchDevice

    if prefer == "pycuda" and optional.installed("pycuda"):
        return PycudaDevice()
    return TorchDevice()


class StreamClock:
    """Times work on one stream by CUDA events around it.

    The GPU is idle when the first event is recorded (unless the L2 cache is being flushed), so the time includes
    that in which the GPU waits for the host to launch the next kernel, and no waking of the host at the end.
    """

    def __init__(self, device: Device, stream: Any, options: Sequence[str] = ()) -> None:
        self._device, self._stream = device, stream
        self._spin = "blocking" not in options
        self._start = device.event(blocking=False)
        self._end = device.event(blocking=not self._spin)
        # twice the cache, because it is not replaced strictly in order
        self._scratch = device.allocate(2 * device.l2_bytes) if "flush-l2" in options else None

    def time(self, work: Callable[[], object]) -> float:
        """Milliseconds from the start to the end of what ``work`` enqueues; returns when it is complete."""
        device, stream, end = self._device, self._stream, self._end
        if self._scratch is not None:
            device.fill(self._scratch, stream)
        device.record(self._start, stream)
        work()
        device.record(end, stream)
        if self._spin:
            while not device.done(end):
                pass
        else:
            device.wait(end)
        return device.elapsed_ms(self._start, end)


def out_of_memory(wanted_bytes: int, free_bytes: int, total_bytes: int) -> RuntimeUnavailable:
    """The error where an allocation fails."""
    return RuntimeUnavailable(
        f"out of device memory: {wanted_bytes / 2**20:.0f} MiB were asked for, {free_bytes / 2**20:.0f} of "
        f"{total_bytes / 2**20:.0f} MiB are free; choose a smaller batch size, or end other programs on the GPU"
    )
