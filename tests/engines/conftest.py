"""Engines are built for real, by TensorRT-RTX: it needs no GPU for that."""

from __future__ import annotations

import pytest

from deploycnn.engines.flavour import Flavour


@pytest.fixture(scope="session")
def rtx() -> Flavour:
    pytest.importorskip("tensorrt_rtx_bindings", reason='needs pip install "deploycnn[tensorrt-rtx]"')
    from deploycnn.engines import flavour

    return flavour.find("tensorrt-rtx")
