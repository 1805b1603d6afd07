"""Timings of kernels, kept between builds: they hold for one GPU and one version of the library."""

from __future__ import annotations

import hashlib
from pathlib import Path

from deploycnn import cache
from deploycnn.engines.device import Gpu
from deploycnn.engines.flavour import Flavour


def folder() -> Path:
    """Where they lie."""
    return cache.folder() / "timing"


def path(flavour: Flavour, gpu: Gpu | None) -> Path | None:
    """The file of this GPU, driver and version; ``None`` for TensorRT-RTX, which times nothing when it builds."""
    if flavour.is_rtx or gpu is None:
        return None
    identity = "\n".join((flavour.name, flavour.version, gpu.name, gpu.sm, gpu.driver_cuda))
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return folder() / f"{flavour.name}-{flavour.version}-{gpu.sm}-{digest}.cache"
