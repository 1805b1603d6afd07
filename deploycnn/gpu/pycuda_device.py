"""``Device`` by PyCUDA. CUDA graphs are captured through the driver, as PyCUDA has no call for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from deploycnn import optional
from deploycnn.errors import RuntimeUnavailable
from deploycnn.gpu import graphs
from deploycnn.gpu.device import UNKNOWN_L2_BYTES, Buffer, Device, out_of_memory

if TYPE_CHECKING:
    import numpy.typing as npt

#: ``CU_STREAM_NON_BLOCKING``; PyCUDA has no name for it.
_NON_BLOCKING = 1


class PycudaDevice(Device):
    """The primary context through PyCUDA; it is popped again when the process ends."""

    name: ClassVar[str] = "pycuda"

    def __init__(self) -> None:
        """Make the primary context current.

        Raises:
            RuntimeUnavailable: PyCUDA does not load, or there is no driver or device.
        """
        self._cuda: Any = optional.require("pycuda.driver")
        try:
            self._primary = optional.require("pycuda.autoprimaryctx")
        except self._cuda.Error as error:
            raise RuntimeUnavailable(
                f"PyCUDA cannot open the GPU ({error}); check `nvidia-smi` (deploycnn doctor)"
            ) from error

    def stream(self) -> Any:  # noqa: D102 - described by Device
        return self._cuda.Stream(_NON_BLOCKING)

    def handle(self, stream: Any) -> int:  # noqa: D102
        return int(stream.handle)

    def synchronize(self, stream: Any) -> None:  # noqa: D102
        stream.synchronize()

    def allocate(self, nbytes: int) -> Buffer:  # noqa: D102
        try:
            memory = self._cuda.mem_alloc(nbytes)
        except self._cuda.MemoryError as error:
            raise out_of_memory(nbytes, *self.memory_bytes()) from error
        return Buffer(int(memory), nbytes, memory)

    def pinned(self, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:  # noqa: D102
        array: npt.NDArray[Any] = self._cuda.pagelocked_empty(tuple(shape), dtype)
        return array

    def upload(self, buffer: Buffer, host: npt.NDArray[Any], stream: Any) -> None:  # noqa: D102
        self._cuda.memcpy_htod_async(buffer.address, host, stream)

    def download(self, host: npt.NDArray[Any], buffer: Buffer, stream: Any) -> None:  # noqa: D102
        self._cuda.memcpy_dtoh_async(host, buffer.address, stream)

    def fill(self, buffer: Buffer, stream: Any) -> None:  # noqa: D102
        self._cuda.memset_d8_async(buffer.address, 0, buffer.nbytes, stream)

    def event(self, *, blocking: bool) -> Any:  # noqa: D102
        flags = self._cuda.event_flags
        return self._cuda.Event(flags.BLOCKING_SYNC if blocking else flags.DEFAULT)

    def record(self, event: Any, stream: Any) -> None:  # noqa: D102
        event.record(stream)

    def done(self, event: Any) -> bool:  # noqa: D102
        return bool(event.query())

    def wait(self, event: Any) -> None:  # noqa: D102
        event.synchronize()

    def elapsed_ms(self, start: Any, end: Any) -> float:  # noqa: D102
        return float(start.time_till(end))

    def capture(self, work: Callable[[], None], stream: Any) -> Callable[[], None]:  # noqa: D102
        return graphs.capture(work, self.handle(stream))

    def memory_bytes(self) -> tuple[int, int]:  # noqa: D102
        free, total = self._cuda.mem_get_info()
        return int(free), int(total)

    @property
    def l2_bytes(self) -> int:  # noqa: D102
        found = self._primary.device.get_attribute(self._cuda.device_attribute.L2_CACHE_SIZE)
        return int(found) or UNKNOWN_L2_BYTES
