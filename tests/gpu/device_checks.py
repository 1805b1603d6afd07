"""What every ``Device`` must do, fake or real: run on the fake by default, and on PyCUDA and PyTorch where a GPU is."""

from __future__ import annotations

import numpy as np
import pytest

from deploycnn.errors import RuntimeUnavailable
from deploycnn.gpu.device import Device, StreamClock


def copies(device: Device) -> None:
    stream = device.stream()
    host, back = device.pinned((3, 5), np.float32), device.pinned((3, 5), np.float32)
    host[...] = np.arange(15).reshape(3, 5)
    back[...] = -1
    buffer = device.allocate(host.nbytes)
    device.upload(buffer, host, stream)
    device.download(back, buffer, stream)
    device.synchronize(stream)
    np.testing.assert_array_equal(back, host)
    device.fill(buffer, stream)
    device.download(back, buffer, stream)
    device.synchronize(stream)
    np.testing.assert_array_equal(back, np.zeros((3, 5)))


def clocks(device: Device) -> None:
    stream = device.stream()
    host, buffer = device.pinned((256,), np.float32), device.allocate(1024)
    host[...] = 7
    back = device.pinned((256,), np.float32)
    for options in ((), ("blocking",), ("flush-l2",)):
        back[...] = 0
        clock = StreamClock(device, stream, options)

        def work() -> None:
            device.upload(buffer, host, stream)
            device.download(back, buffer, stream)

        taken = clock.time(work)
        assert np.isfinite(taken)
        assert taken > 0
        assert (back == 7).all(), "it returns when the work is complete"


def captures(device: Device) -> None:
    stream = device.stream()
    host, back = device.pinned((4,), np.float32), device.pinned((4,), np.float32)
    buffer = device.allocate(host.nbytes)

    def work() -> None:
        device.upload(buffer, host, stream)
        device.download(back, buffer, stream)

    work()
    device.synchronize(stream)
    replay = device.capture(work, stream)
    for value in (3, 4):
        host[...] = value
        replay()
        device.synchronize(stream)
        assert (back == value).all()


def memory(device: Device) -> None:
    free, total = device.memory_bytes()
    assert 0 < free <= total
    assert device.l2_bytes > 1024
    with pytest.raises(RuntimeUnavailable, match=r"out of device memory: .* were asked for, .* are free"):
        device.allocate(4 * total)
    assert device.allocate(1024).nbytes == 1024, "and it goes on"


ALL = (copies, clocks, captures, memory)
