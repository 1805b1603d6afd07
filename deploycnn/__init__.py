"""deploycnn: your CNN, your data, your hardware, your accuracy budget in; the fastest deployable artifact out.

``compress``, ``export``, ``profile`` and ``inspect`` are the command line's verbs as functions. They are
loaded on first use, so that ``import deploycnn`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from deploycnn.api import Run, compress, export
    from deploycnn.errors import DeployCNNError
    from deploycnn.models.inspection import inspect_model as inspect
    from deploycnn.profile_models import profile
    from deploycnn.quantization.lint import lint_model as lint
    from deploycnn.recipe import Recipe

__all__ = [
    "DeployCNNError",
    "Recipe",
    "Run",
    "__version__",
    "compress",
    "export",
    "inspect",
    "lint",
    "profile",
]

#: Public name -> where it lives.
_HOME = {
    "DeployCNNError": "deploycnn.errors:DeployCNNError",
    "Recipe": "deploycnn.recipe:Recipe",
    "Run": "deploycnn.api:Run",
    "compress": "deploycnn.api:compress",
    "export": "deploycnn.api:export",
    "inspect": "deploycnn.models.inspection:inspect_model",
    "lint": "deploycnn.quantization.lint:lint_model",
    "profile": "deploycnn.profile_models:profile",
}


if not TYPE_CHECKING:  # or a type checker takes any misspelt name for something that exists

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, _, attribute = _HOME[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
