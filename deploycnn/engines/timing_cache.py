"""Timings of kernels, kept between builds: they hold for one GPU and one version of the library."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from deploycnn.engines.device import Gpu
from deploycnn.engines.flavour import Flavour


def folder() -> Path:
    """``$XDG_CACHE_HOME/deploycnn/timing`` or ``~/.cache/deploycnn/timing``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "deploycnn" / "timing"


def path(flavour: Flavour, gpu: Gpu | None) -> Path | None:
    """The file of this GPU, driver and version; ``None`` for TensorRT-RTX, which times nothing when it builds."""
    if flavour.is_rtx or gpu is None:
        return None
    identity = "\n".join((flavour.name, flavour.version, gpu.name, gpu.sm, gpu.driver_cuda))
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return folder() / f"{flavour.name}-{flavour.version}-{gpu.sm}-{digest}.cache"
