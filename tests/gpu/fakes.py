"""A GPU in Python: memory is bytearrays, streams are queues that run when waited for, time is a counter.

The modules have the names of ``pycuda.driver``, of ``torch.cuda``, of ``pynvml`` and of the driver's C functions that
the package uses, and no others; a call of a wrong name fails. Work is *enqueued*: a result that is read without
waiting for the stream is missing.
"""

from __future__ import annotations

import ctypes
import functools
import types
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt


class Gpu:
    """What a driver knows: allocations by address, a clock in milliseconds, the stream being captured."""

    def __init__(self, total: int = 2**30) -> None:
        self.total = total
        self.memory: dict[int, bytearray] = {}
        self.next_address = 0x7000
        self.now_ms = 0.0
        self.capturing: list[Callable[[], None]] | None = None
        self.log: list[str] = []

    @property
    def free(self) -> int:
        return self.total - sum(map(len, self.memory.values()))

    def allocate(self, nbytes: int) -> int:
        address = self.next_address
        self.next_address += nbytes + 256
        self.memory[address] = bytearray(b"\xee" * nbytes)
        return address

    def at(self, address: int) -> tuple[bytearray, int]:
        for start, block in self.memory.items():
            if start <= address < start + len(block):
                return block, address - start
        raise AssertionError(f"no allocation at {address:#x}: an address of freed or foreign memory")

    def write(self, address: int, data: bytes) -> None:
        block, offset = self.at(address)
        assert offset + len(data) <= len(block), "written beyond the allocation"
        block[offset : offset + len(data)] = data

    def read(self, address: int, nbytes: int) -> bytes:
        block, offset = self.at(address)
        assert offset + nbytes <= len(block), "read beyond the allocation"
        return bytes(block[offset : offset + nbytes])

    def enqueue(self, stream: Stream, work: Callable[[], None], what: str, ms: float = 0.0) -> None:
        def step() -> None:
            self.now_ms += ms
            self.log.append(what)
            work()

        if self.capturing is not None:
            self.capturing.append(step)
        else:
            stream.queue.append(step)


class Stream:
    """``pycuda.driver.Stream``; its handle is looked up by ``Streams``."""

    known: ClassVar[dict[int, Stream]] = {}

    def __init__(self, gpu: Gpu, flags: int = 0) -> None:
        self.gpu, self.flags = gpu, flags
        self.queue: list[Callable[[], None]] = []
        self.handle = 0x100 + len(Stream.known)
        Stream.known[self.handle] = self

    def synchronize(self) -> None:
        while self.queue:
            self.queue.pop(0)()


class Event:
    """``pycuda.driver.Event``."""

    def __init__(self, gpu: Gpu, flags: int = 0) -> None:
        self.gpu, self.flags = gpu, flags
        self.at_ms: float | None = None
        self.stream: Stream | None = None
        self.polls = self.waits = 0

    def record(self, stream: Stream) -> Event:
        self.stream, self.at_ms = stream, None

        def reached() -> None:
            self.at_ms = self.gpu.now_ms

        stream.queue.append(reached)
        return self

    def query(self) -> bool:
        self.polls += 1
        assert self.stream is not None
        if self.stream.queue:
            self.stream.queue.pop(0)()
        return self.at_ms is not None

    def synchronize(self) -> Event:
        self.waits += 1
        assert self.stream is not None
        self.stream.synchronize()
        return self

    def time_till(self, other: Event) -> float:
        assert self.at_ms is not None, "the first event is not done"
        assert other.at_ms is not None, "the last event is not done"
        return other.at_ms - self.at_ms


def pycuda_driver(gpu: Gpu) -> types.ModuleType:
    """``pycuda.driver`` of this GPU (PyCUDA 2026.1)."""
    cuda = types.ModuleType("pycuda.driver")

    class Error(Exception): ...

    class MemoryError(Error): ...  # noqa: A001 - PyCUDA's name

    class Allocation:
        def __init__(self, nbytes: int) -> None:
            self.address = gpu.allocate(nbytes)

        def __int__(self) -> int:
            return self.address

        def __del__(self) -> None:
            gpu.memory.pop(self.address, None)

    def mem_alloc(nbytes: int) -> Allocation:
        if nbytes > gpu.free:
            raise MemoryError("cuMemAlloc failed: out of memory")
        return Allocation(nbytes)

    def htod(dest: int, src: npt.NDArray[Any], stream: Stream) -> None:
        assert src.flags.c_contiguous
        gpu.enqueue(stream, lambda: gpu.write(dest, src.tobytes()), "upload", ms=0.5)

    def dtoh(dest: npt.NDArray[Any], src: int, stream: Stream) -> None:
        assert dest.flags.c_contiguous
        flat = dest.reshape(-1).view(np.uint8)

        def copy() -> None:
            flat[:] = np.frombuffer(gpu.read(src, flat.size), np.uint8)

        gpu.enqueue(stream, copy, "download", ms=0.25)

    def memset(dest: int, data: int, size: int, stream: Stream) -> None:
        gpu.enqueue(stream, lambda: gpu.write(dest, bytes([data]) * size), "fill", ms=7.0)

    cuda.Error, cuda.MemoryError = Error, MemoryError
    cuda.Stream = functools.partial(Stream, gpu)
    cuda.Event = functools.partial(Event, gpu)
    cuda.event_flags = types.SimpleNamespace(DEFAULT=0, BLOCKING_SYNC=1)
    cuda.device_attribute = types.SimpleNamespace(L2_CACHE_SIZE=38)
    cuda.mem_alloc = mem_alloc
    cuda.mem_get_info = lambda: (gpu.free, gpu.total)
    cuda.pagelocked_empty = np.empty
    cuda.memcpy_htod_async, cuda.memcpy_dtoh_async, cuda.memset_d8_async = htod, dtoh, memset
    return cuda


def autoprimaryctx() -> types.ModuleType:
    """``pycuda.autoprimaryctx``: its device has an L2 cache of 4 KiB."""
    module = types.ModuleType("pycuda.autoprimaryctx")
    module.device = types.SimpleNamespace(get_attribute=lambda attribute: {38: 4096}[attribute])
    return module


class DriverLibrary:
    """The functions of ``libcuda`` that capture graphs, with their C arguments."""

    def __init__(self, gpu: Gpu, fail: str = "") -> None:
        self.gpu, self.fail = gpu, fail
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.alive: set[int] = set()

    def _code(self, name: str) -> int:
        return 900 if name == self.fail else 0

    def cuStreamBeginCapture_v2(self, stream: ctypes.c_void_p, mode: ctypes.c_int) -> int:
        assert stream.value in Stream.known
        assert mode.value == 1
        self.gpu.capturing = []
        return self._code("begin")

    def cuStreamEndCapture(self, stream: ctypes.c_void_p, graph: Any) -> int:
        steps, self.gpu.capturing = self.gpu.capturing or [], None
        if self._code("end"):
            return 900
        graph._obj.value = 0x500 + len(self.graphs)
        self.graphs[graph._obj.value] = steps
        self.alive.add(graph._obj.value)
        return 0

    def cuGraphInstantiateWithFlags(
        self, executable: Any, graph: ctypes.c_void_p, flags: ctypes.c_ulonglong
    ) -> int:
        assert flags.value == 0
        executable._obj.value = (graph.value or 0) + 0x1000
        if not self._code("instantiate"):
            self.alive.add(executable._obj.value)
        return self._code("instantiate")

    def cuGraphLaunch(self, executable: ctypes.c_void_p, stream: ctypes.c_void_p) -> int:
        assert executable.value in self.alive
        Stream.known[stream.value or 0].queue.extend(self.graphs[executable.value - 0x1000])
        return self._code("launch")

    def cuGraphExecDestroy(self, executable: ctypes.c_void_p) -> int:
        self.alive.remove(executable.value or 0)
        return 0

    def cuGraphDestroy(self, graph: ctypes.c_void_p) -> int:
        self.alive.remove(graph.value or 0)
        return 0

    def cuGetErrorName(self, code: ctypes.c_int, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" if code.value == 900 else None
        return 0


class Nvml(types.ModuleType):
    """``pynvml``: one GPU whose clock falls by ``step`` MHz at every reading."""

    class NVMLError(Exception): ...

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(
        self, *, clock: int = 1980, step: int = 0, reasons: int = 0, silent: tuple[str, ...] = ()
    ) -> None:
        super().__init__("pynvml")
        self.clock, self.step, self.reasons, self.silent = clock, step, reasons, silent
        self.asked: list[Any] = []
        import pynvml

        for name in dir(pynvml):
            if name.startswith("nvmlClocksEventReason"):
                setattr(self, name, getattr(pynvml, name))

    def _say(self, name: str, value: Any) -> Any:
        if name in self.silent:
            raise self.NVMLError(name)
        return value

    def nvmlInit(self) -> None:
        self._say("init", None)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        self.asked.append(index)
        return self._say("handle", "gpu")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:
        self.asked.append(uuid)
        return "gpu"

    def nvmlDeviceGetHandleByPciBusId(self, address: str) -> Any:
        self.asked.append(address)
        return "gpu"

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int:
        return self._say("power", 301_500)

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: int) -> int:
        if kind == self.NVML_CLOCK_MEM:
            return 2619
        self.clock -= self.step
        return self._say("clock", self.clock + self.step)

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int:
        return self._say("temperature", 61)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: Any) -> int:
        return self._say("reasons", self.reasons)

    def nvmlDeviceGetName(self, handle: Any) -> str:
        return "NVIDIA Fake"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"
