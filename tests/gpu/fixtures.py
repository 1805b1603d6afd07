"""A fake GPU behind PyCUDA."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from deploycnn.gpu import graphs
from deploycnn.gpu.pycuda_device import PycudaDevice
from tests.gpu import fakes


@pytest.fixture
def gpu() -> fakes.Gpu:
    return fakes.Gpu()


@pytest.fixture
def driver(gpu: fakes.Gpu) -> fakes.DriverLibrary:
    return fakes.DriverLibrary(gpu)


@pytest.fixture
def device(
    gpu: fakes.Gpu, driver: fakes.DriverLibrary, monkeypatch: pytest.MonkeyPatch
) -> Iterator[PycudaDevice]:
    import types

    package = types.ModuleType("pycuda")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", fakes.pycuda_driver(gpu))
    monkeypatch.setitem(sys.modules, "pycuda.autoprimaryctx", fakes.autoprimaryctx())
    monkeypatch.setattr(graphs, "driver", lambda: driver)
    yield PycudaDevice()
    fakes.Stream.known.clear()
