"""The process that ``deploycnn.profiling.memory`` starts."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import sys
from pathlib import Path
from typing import Any

from deploycnn.profiling.child import serve

_STATUS = Path("/proc/self/status")


def resident_bytes(status: str, field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) from the text of /proc/self/status, in kB there (proc(5))."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise ValueError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


def settle() -> int:
    """Give back what imports left free, forget the peak so far, and return the resident bytes.

    ``ru_maxrss`` would not do on Linux: it cannot be reset, and a child inherits the peak of the process that
    started it.
    """
    gc.collect()
    if not _STATUS.exists():
        return peak()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # not permitted: then peaks of imports count, which errs upwards
        Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes(_STATUS.read_text(), "VmRSS")


def peak() -> int:
    """Peak resident bytes since ``settle``; outside Linux, since the start."""
    if _STATUS.exists():
        return resident_bytes(_STATUS.read_text(), "VmHWM")
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def measure(request: dict[str, Any]) -> dict[str, int]:
    """Load and run as the request says."""
    import numpy as np

    from deploycnn.core import Artifact, Facts, TensorSpec
    from deploycnn.runtimes.base import create

    shape = tuple(request["shape"])
    artifact = Artifact(
        key="",
        format=request["format"],
        path=Path(request["path"]),
        inputs=(TensorSpec(name="images", dtype="float32", shape=(None, *shape[1:])),),
        outputs=(),
        parents=(),
        facts=Facts(),
    )
    runtime = create(request["spec"])
    runtime.availability()  # imports the runtime and loads its plug-ins
    if request["format"] == "torch":
        import deploycnn.models.artifact  # noqa: F401 - counts as the runtime's, not as the model's
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    free = _free_device_bytes if runtime.device_of(runtime.mode) == "cuda" else None
    before = free() if free else 0
    baseline = settle()
    session = runtime.open(artifact, batch_size=shape[0], threads=request["threads"])
    opened = free() if free else 0
    call = session.bind(images)
    call()
    found = {"peak_bytes": max(0, peak() - baseline), "baseline_bytes": baseline}
    if free:
        # runtimes keep what they allocated, so what is taken now is the peak, unless loading took more
        found["device_bytes"] = max(0, before - min(opened, free()))
    return found


def _free_device_bytes() -> int:
    from deploycnn.gpu.device import open_device

    return open_device().memory_bytes()[0]


def main() -> None:
    """Answer the request on stdin."""
    serve(measure)


if __name__ == "__main__":
    main()
