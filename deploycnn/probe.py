"""Find out what is installed and whether it works, in processes that may die of it.

A library that crashes on loading must not take the caller with it, so runtimes and modules are tried by
``python -m deploycnn.probe``, whose last line is the answer.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def probe_runtime(name: str, modes: Sequence[str], timeout_s: float = 180.0) -> dict[str, dict[str, Any]]:
    """Try all modes of a runtime in one process; if it dies, each mode in one of its own."""
    answer, died = _child(["runtime", name, *modes], timeout_s)
    if answer is not None:
        return {str(mode): dict(found) for mode, found in answer.items()}
    if len(modes) > 1:
        return {mode: probe_runtime(name, [mode], timeout_s)[mode] for mode in modes}
    mend = f"reinstall {name}"
    return {modes[0]: {"ok": False, "version": "", "why": f"trying it {died}", "mend": mend}}


def probe_module(name: str, timeout_s: float = 60.0) -> dict[str, Any]:
    """Import a module in a process of its own."""
    try:
        found = importlib.util.find_spec(name.partition(".")[0]) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        return {"ok": False, "installed": False, "version": "", "why": ""}
    answer, died = _child(["module", name], timeout_s)
    failed = {"ok": False, "version": "", "why": f"importing it {died}"}
    return {"installed": True, **(failed if answer is None else answer)}


def _child(arguments: Sequence[str], timeout_s: float) -> tuple[dict[str, Any] | None, str]:
    """The answer of ``main`` in a new process, or ``None`` and how the process ended."""
    package_parent = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [package_parent, inherited]))}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "deploycnn.probe", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=environ,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"took longer than {timeout_s:.0f} s"
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return dict(json.loads(lines[-1])), ""
    if done.returncode < 0:
        return None, f"killed the process (signal {-done.returncode})"
    said = done.stderr.strip().splitlines()
    return None, f"ended the process with code {done.returncode}" + (f": {said[-1]}" if said else "")


def cgroup_cpus(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPUs' worth of time that a container may use (cgroup v2 ``cpu.max``); ``None``: no limit."""
    try:
        quota, period = (root / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def installed_version(distribution: str) -> str:
    """Version of an installed distribution; empty if it is not."""
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def torch_cuda() -> str:
    """CUDA that PyTorch is built for, read without importing it."""
    return _assigned("torch", "version.py", "cuda")


def onnxruntime_cuda() -> str:
    """CUDA that onnxruntime-gpu is built for, read without importing it."""
    return _assigned("onnxruntime", "capi/build_and_package_info.py", "cuda_version")


def built_for() -> dict[str, str]:
    """Package -> the CUDA version that it is built for; empty where it is not installed or does not tell."""
    found = {"torch": torch_cuda(), "onnxruntime-gpu": onnxruntime_cuda()}
    for name in ("tensorrt", "tensorrt-rtx"):
        majors = [
            major for major in ("13", "12", "11")
            if installed_version(f"{name}-cu{major}-libs") or installed_version(f"{name}-cu{major}")
        ]  # fmt: skip
        found[name] = majors[0] if majors else ""
    return found


def _assigned(package: str, file: str, name: str) -> str:
    found = importlib.util.find_spec(package)
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / file
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            match = re.search(rf"^{name}\b[^=\n]*=\s*['\"](\d[\d.]*)", text, re.MULTILINE)
            return match[1] if match else ""
    return ""


def device_nodes() -> bool:
    """Whether the kernel shows an NVIDIA device."""
    return Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia").exists()


def _try_runtime(name: str, modes: Sequence[str]) -> dict[str, Any]:
    from dataclasses import asdict

    from deploycnn.runtimes.base import create

    return {mode: asdict(create(f"{name}:{mode}").availability()) for mode in modes}


def _try_module(name: str) -> dict[str, Any]:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # whatever a foreign module raises is the finding
        return {"ok": False, "version": "", "why": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    version = getattr(module, "__version__", getattr(sys.modules.get(name.partition(".")[0]), "VERSION", ""))
    if isinstance(version, tuple):
        version = ".".join(map(str, version))
    return {"ok": True, "version": str(version), "why": ""}


def main(arguments: Sequence[str]) -> None:
    """Try a runtime (``runtime NAME MODE...``) or a module (``module NAME``); the last line is the answer."""
    kind, name, *modes = arguments
    answer = _try_runtime(name, modes) if kind == "runtime" else _try_module(name)
    sys.stdout.write(f"\n{json.dumps(answer)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
