"""deploycnn: your CNN, your data, your hardware, your accuracy budget in; the fastest deployable artifact out.

``compress``, ``export``, ``profile`` and ``inspect`` are the command line's verbs as functions. They are
loaded on first use, so that ``import deploycnn`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from deploycnn.api import Run, compress, export, inspect, profile
    from deploycnn.errors import DeployCNNError
    from deploycnn.recipe import Recipe

__all__ = ["DeployCNNError", "Recipe", "Run", "__version__", "compress", "export", "inspect", "profile"]

_HOME = {
    "DeployCNNError": "deploycnn.errors",
    "Recipe": "deploycnn.recipe",
    "Run": "deploycnn.api",
    "compress": "deploycnn.api",
    "export": "deploycnn.api",
    "inspect": "deploycnn.api",
    "profile": "deploycnn.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
