"""Import a heavy or optional package, or say clearly how to get it."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from deploycnn.errors import RuntimeUnavailable

#: Module name -> the extra of this package that installs it.
EXTRAS = {
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "timm": "timm",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "tensorrt_rtx_bindings": "tensorrt-rtx",
    "pycuda": "pycuda",
    "onnxruntime_ep_nv_tensorrt_rtx": "onnxruntime-rtx",
    "pynvml": "gpu",
}


def require(module: str) -> ModuleType:
    """Import ``module``.

    Raises:
        RuntimeUnavailable: it is not installed, or it is installed and does not load; says how to mend it.
    """
    extra = EXTRAS.get(module.partition(".")[0])
    mend = f'pip install "deploycnn[{extra}]"' if extra else f"pip install {module}"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            raise RuntimeUnavailable(f"{module} is not installed; {mend}") from error
        raise RuntimeUnavailable(f"{module} is installed but needs {error.name}; {mend}") from error
    except (ImportError, OSError) as error:
        raise RuntimeUnavailable(
            f"{module} is installed but does not load ({error}); reinstall: {mend}"
        ) from error


def installed(module: str) -> bool:
    """Whether ``module`` can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
