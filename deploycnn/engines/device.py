"""The GPU of this machine as the CUDA driver tells it: no package is needed, no context is made."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

from deploycnn.errors import RuntimeUnavailable

#: ``CUdevice_attribute`` of the CUDA driver API.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76

_LIBRARIES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A CUDA device.

    Attributes:
        name: "NVIDIA H100 80GB HBM3".
        capability: Compute capability (9, 0).
        driver_cuda: The newest CUDA version that the driver serves, "13.0".
    """

    name: str
    capability: tuple[int, int]
    driver_cuda: str

    @property
    def sm(self) -> str:
        """As compilers write it: sm_90 for (9, 0)."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


def current_gpu() -> Gpu | None:
    """The first device that this process sees; ``None`` without a driver or device."""
    try:
        return require_gpu()
    except RuntimeUnavailable:
        return None


def require_gpu() -> Gpu:
    """The first device that this process sees.

    Raises:
        RuntimeUnavailable: no driver is installed, it does not answer, or it sees no device.
    """
    driver = _driver()
    if driver is None:
        raise RuntimeUnavailable(
            "no NVIDIA driver on this machine (libcuda is missing); run on a GPU host, in a container with --gpus all"
        )
    _check(driver.cuInit(0), "cuInit")
    count, device = ctypes.c_int(), ctypes.c_int()
    _check(driver.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    if count.value == 0:
        raise RuntimeUnavailable("the NVIDIA driver sees no GPU; check CUDA_VISIBLE_DEVICES")
    _check(driver.cuDeviceGet(ctypes.byref(device), 0), "cuDeviceGet")
    name, version = ctypes.create_string_buffer(256), ctypes.c_int()
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(driver.cuDeviceGetName(name, len(name), device), "cuDeviceGetName")
    _check(driver.cuDriverGetVersion(ctypes.byref(version)), "cuDriverGetVersion")
    for value, attribute in ((major, _CAPABILITY_MAJOR), (minor, _CAPABILITY_MINOR)):
        _check(driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device), "cuDeviceGetAttribute")
    return Gpu(
        name=name.value.decode(errors="replace"),
        capability=(major.value, minor.value),
        driver_cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


@functools.cache
def _driver() -> ctypes.CDLL | None:
    for library in _LIBRARIES:
        try:
            return ctypes.CDLL(library)
        except OSError:
            continue
    return None


def _check(code: int, call: str) -> None:
    if code:
        raise RuntimeUnavailable(
            f"the NVIDIA driver answers {call} with error {code}; check `nvidia-smi`, and that the driver is loaded"
        )
