"""The PyCUDA device on a fake driver: what is enqueued, in which order, and what is timed."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from deploycnn.errors import RuntimeUnavailable
from deploycnn.gpu import graphs
from deploycnn.gpu.device import StreamClock
from deploycnn.gpu.pycuda_device import PycudaDevice
from deploycnn.gpu.torch_device import TorchDevice
from tests.gpu import fakes


def test_copies_are_enqueued_and_come_back_whole(device: PycudaDevice) -> None:
    stream = device.stream()
    host, back = device.pinned((2, 3), np.float32), device.pinned((2, 3), np.float32)
    host[:] = np.arange(6).reshape(2, 3)
    back[:] = -1
    buffer = device.allocate(host.nbytes)
    device.upload(buffer, host, stream)
    device.download(back, buffer, stream)
    assert (back == -1).all(), "nothing has run yet"
    device.synchronize(stream)
    assert (back == host).all()
    assert stream.flags == 1, "the default stream would serialize streams that are meant to run side by side"


def test_memory_that_is_not_there_is_an_error_that_says_how_much_is(
    device: PycudaDevice, gpu: fakes.Gpu
) -> None:
    keep = device.allocate(gpu.total - 2**20)
    with pytest.raises(
        RuntimeUnavailable, match="2 MiB were asked for, 1 of 1024 MiB are free; choose a smaller batch"
    ):
        device.allocate(2 * 2**20)
    assert device.memory_bytes() == (2**20, 2**30)
    del keep
    assert device.memory_bytes() == (2**30, 2**30)


def test_the_clock_takes_the_devices_time_of_the_work_alone(device: PycudaDevice, gpu: fakes.Gpu) -> None:
    stream = device.stream()
    host, buffer = device.pinned((4,), np.float32), device.allocate(16)
    clock = StreamClock(device, stream)
    device.upload(buffer, host, stream)  # before the clock starts: not its time
    taken = clock.time(lambda: device.download(host, buffer, stream))
    assert taken == 0.25
    assert not stream.queue, "it returns when the work is complete"


@pytest.mark.parametrize(("options", "polls", "waits"), [((), True, 0), (("blocking",), False, 1)])
def test_waiting_spins_or_sleeps_as_asked(
    device: PycudaDevice, options: tuple[str, ...], polls: bool, waits: int
) -> None:
    stream = device.stream()
    buffer, host = device.allocate(16), device.pinned((4,), np.float32)
    clock = StreamClock(device, stream, options)
    clock.time(lambda: device.upload(buffer, host, stream))
    assert bool(clock._end.polls) == polls
    assert clock._end.waits == waits
    assert clock._end.flags == (1 if waits else 0), "an event that is not blocking would spin in synchronize"


def test_flushing_the_cache_is_not_timed_and_overwrites_more_than_the_cache(
    device: PycudaDevice, gpu: fakes.Gpu
) -> None:
    stream = device.stream()
    buffer, host = device.allocate(16), device.pinned((4,), np.float32)
    clock = StreamClock(device, stream, ("flush-l2",))
    assert clock.time(lambda: device.upload(buffer, host, stream)) == 0.5
    assert gpu.log == ["fill", "upload"]
    assert clock._scratch is not None
    assert clock._scratch.nbytes == 2 * 4096


def test_a_graph_replays_what_was_captured_and_is_freed(
    device: PycudaDevice, gpu: fakes.Gpu, driver: fakes.DriverLibrary
) -> None:
    stream = device.stream()
    host, back = device.pinned((4,), np.float32), device.pinned((4,), np.float32)
    buffer = device.allocate(host.nbytes)

    def work() -> None:
        device.upload(buffer, host, stream)
        device.download(back, buffer, stream)

    replay = device.capture(work, stream)
    assert gpu.log == [], "capturing runs nothing"
    for value in (3, 4):
        host[:] = value
        replay()
        device.synchronize(stream)
        assert (back == value).all()
    assert len(driver.alive) == 2
    del replay
    assert not driver.alive


@pytest.mark.parametrize(
    ("fail", "message"),
    [("begin", "cannot be begun"), ("end", "cannot be captured"), ("instantiate", "cannot be instantiated")],
)
def test_what_cannot_be_captured_is_said_and_nothing_leaks(gpu: fakes.Gpu, fail: str, message: str) -> None:
    library = fakes.DriverLibrary(gpu, fail)
    stream = fakes.Stream(gpu)
    with pytest.raises(RuntimeUnavailable, match=f"{message}.*STREAM_CAPTURE_UNSUPPORTED.*without \\+graph"):
        graphs.capture(lambda: None, stream.handle, library)
    assert not library.alive


def test_an_error_in_the_work_ends_the_capture(gpu: fakes.Gpu) -> None:
    library = fakes.DriverLibrary(gpu)
    stream = fakes.Stream(gpu)

    def work() -> None:
        raise RuntimeUnavailable("no")

    with pytest.raises(RuntimeUnavailable, match="^no$"):
        graphs.capture(work, stream.handle, library)
    assert gpu.capturing is None
    assert not library.alive


def test_the_drivers_functions_are_called_by_names_that_it_has() -> None:
    """Of ``cuda-bindings``, which is generated from NVIDIA's headers; the C names carry version suffixes."""
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    for name in ("BeginCapture", "EndCapture"):
        assert hasattr(driver, f"cuStream{name}")
    for name in ("Instantiate", "Launch", "ExecDestroy", "Destroy"):
        assert hasattr(driver, f"cuGraph{name}")
    assert graphs._THREAD_LOCAL == driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    assert ctypes.sizeof(ctypes.c_ulonglong) == 8


def test_torch_without_a_gpu_says_what_it_is_built_for() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeUnavailable, match=r"PyTorch .* finds no usable GPU; check `nvidia-smi`"):
        TorchDevice()
