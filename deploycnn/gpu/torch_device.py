"""``Device`` by PyTorch's CUDA tensors, streams, events and graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from deploycnn import optional
from deploycnn.errors import RuntimeUnavailable
from deploycnn.gpu.device import UNKNOWN_L2_BYTES, Buffer, Device, out_of_memory

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class TorchDevice(Device):
    """``cuda:0`` of PyTorch."""

    name: ClassVar[str] = "torch"

    def __init__(self) -> None:
        """Look for the device.

        Raises:
            RuntimeUnavailable: this PyTorch finds no CUDA device.
        """
        self._torch: Any = optional.require("torch")
        if not self._torch.cuda.is_available():
            built = self._torch.version.cuda
            raise RuntimeUnavailable(
                f"PyTorch {self._torch.__version__} ({f'built for CUDA {built}' if built else 'a CPU-only build'}) "
                "finds no usable GPU; check `nvidia-smi` and that the driver is new enough (deploycnn doctor)"
            )

    def stream(self) -> Any:  # noqa: D102 - described by Device
        return self._torch.cuda.Stream()

    def handle(self, stream: Any) -> int:  # noqa: D102
        return int(stream.cuda_stream)

    def synchronize(self, stream: Any) -> None:  # noqa: D102
        stream.synchronize()

    def allocate(self, nbytes: int) -> Buffer:  # noqa: D102
        try:
            memory = self._torch.empty(nbytes, dtype=self._torch.uint8, device="cuda:0")
        except self._torch.cuda.OutOfMemoryError as error:
            raise out_of_memory(nbytes, *self.memory_bytes()) from error
        return Buffer(int(memory.data_ptr()), nbytes, memory)

    def pinned(self, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:  # noqa: D102
        import numpy as np

        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = self._torch.empty(size, dtype=self._torch.uint8, pin_memory=True)
        array: npt.NDArray[Any] = memory.numpy().view(dtype).reshape(tuple(shape))
        return array

    def upload(self, buffer: Buffer, host: npt.NDArray[Any], stream: Any) -> None:  # noqa: D102
        source = self._bytes(host)
        with self._torch.cuda.stream(stream):
            buffer.keep[: source.numel()].copy_(source, non_blocking=True)

    def download(self, host: npt.NDArray[Any], buffer: Buffer, stream: Any) -> None:  # noqa: D102
        target = self._bytes(host)
        with self._torch.cuda.stream(stream):
            target.copy_(buffer.keep[: target.numel()], non_blocking=True)

    def _bytes(self, host: npt.NDArray[Any]) -> Any:
        import numpy as np

        flat: npt.NDArray[np.uint8] = host.reshape(-1).view(np.uint8)
        return self._torch.from_numpy(flat)

    def fill(self, buffer: Buffer, stream: Any) -> None:  # noqa: D102
        with self._torch.cuda.stream(stream):
            buffer.keep.zero_()

    def event(self, *, blocking: bool) -> Any:  # noqa: D102
        return self._torch.cuda.Event(enable_timing=True, blocking=blocking)

    def record(self, event: Any, stream: Any) -> None:  # noqa: D102
        event.record(stream)

    def done(self, event: Any) -> bool:  # noqa: D102
        return bool(event.query())

    def wait(self, event: Any) -> None:  # noqa: D102
        event.synchronize()

    def elapsed_ms(self, start: Any, end: Any) -> float:  # noqa: D102
        return float(start.elapsed_time(end))

    def capture(self, work: Callable[[], None], stream: Any) -> Callable[[], None]:  # noqa: D102
        cuda = self._torch.cuda
        graph = cuda.CUDAGraph()
        try:
            # thread_local: what other threads do meanwhile does not void the capture
            with cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            raise RuntimeUnavailable(
                f"this model cannot be captured as a CUDA graph ({' '.join(str(error).split())[:200]}); "
                "measure it without +graph"
            ) from error

        def replay() -> None:
            with cuda.stream(stream):
                graph.replay()

        return replay

    def memory_bytes(self) -> tuple[int, int]:  # noqa: D102
        free, total = self._torch.cuda.mem_get_info()
        return int(free), int(total)

    @property
    def l2_bytes(self) -> int:  # noqa: D102
        found = getattr(self._torch.cuda.get_device_properties(0), "L2_cache_size", 0)
        return int(found) or UNKNOWN_L2_BYTES
