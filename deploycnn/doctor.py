"""What works on this machine, what does not, why, and how to mend it.

Every judgement is a function of what was found, so that each fault can be planted in a test.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deploycnn import environment, probe, registry
from deploycnn.environment import Nvidia
from deploycnn.gpu import drivers, nvml

Status = Literal["ok", "warning", "error"]

MIN_PYTHON = (3, 11)
#: Free disk space below which a run is likely to fail, and below which it may.
DISK_ERROR_BYTES, DISK_WARNING_BYTES = 200 * 2**20, 2 * 2**30
#: Load per CPU above which timing is disturbed.
BUSY_LOAD = 0.3

#: Packages without a runtime class of their own: module -> (what for, how to install).
MODULES: Mapping[str, tuple[str, str]] = {
    "tensorrt": ("TensorRT engines", 'pip install "deploycnn[tensorrt]"'),
    "tensorrt_rtx_bindings": ("TensorRT-RTX engines", 'pip install "deploycnn[tensorrt-rtx]"'),
    "pycuda.driver": (
        "buffers for GPU runtimes; PyTorch's serve without it",
        'pip install "deploycnn[pycuda]" (compiles: needs a C++ compiler and the CUDA toolkit)',
    ),
    "pynvml": ("clocks, temperature and power of GPUs in reports", 'pip install "deploycnn[gpu]"'),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        name: What was looked at.
        status: "error" is broken, "warning" is missing or doubtful.
        what: What was found.
        why: Why that is so; empty where it is fine.
        mend: What to do about it; empty where there is nothing to do.
    """

    name: str
    status: Status
    what: str
    why: str = ""
    mend: str = ""


def diagnose() -> list[Finding]:
    """Look at everything. Takes some seconds: each runtime is loaded and runs a tiny model."""
    nvidia = environment.nvidia_smi()
    findings = [
        check_python(sys.version_info[:3]),
        *check_onnxruntime_wheels(
            probe.installed_version("onnxruntime"), probe.installed_version("onnxruntime-gpu")
        ),
        *check_gpu(nvidia, probe.device_nodes()),
        *check_driver(nvidia, probe.built_for()),
        *check_nvml(nvidia, probe.installed_version("nvidia-ml-py"), nvml.watch),
    ]
    gpu_wheel = bool(probe.installed_version("onnxruntime-gpu"))
    for name in registry.names("runtime"):
        modes = registry.get("runtime", name).modes
        answers = probe.probe_runtime(name, modes)
        findings += [check_runtime(f"{name}:{mode}", answers[mode], nvidia, gpu_wheel) for mode in modes]
    findings += [check_module(name, probe.probe_module(name), nvidia) for name in MODULES]
    findings += [
        check_disk(Path.cwd(), shutil.disk_usage(Path.cwd()).free),
        *check_cpus(os.cpu_count() or 1, environment.available_cpus(), probe.cgroup_cpus()),
        check_load(os.getloadavg()[0] if hasattr(os, "getloadavg") else None, environment.available_cpus()),
    ]
    return findings


def check_python(found: Sequence[int]) -> Finding:
    """Whether Python is new enough."""
    what = ".".join(map(str, found))
    if tuple(found[:2]) < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        return Finding(
            name="python",
            status="error",
            what=what,
            why=f"deploycnn needs Python {wanted} or newer",
            mend=f"make the virtual environment with python{wanted} or newer",
        )
    return Finding(name="python", status="ok", what=what)


def check_onnxruntime_wheels(cpu: str, gpu: str) -> Iterator[Finding]:
    """Whether both wheels are installed: they unpack to the same folder and break each other."""
    name = "onnxruntime wheels"
    if cpu and gpu:
        yield Finding(
            name=name,
            status="error",
            what=f"onnxruntime {cpu} and onnxruntime-gpu {gpu} are both installed",
            why="they install the same module over each other, so that what loads is a mixture",
            mend="pip uninstall -y onnxruntime onnxruntime-gpu && "
            'pip install "deploycnn[gpu]" (or "deploycnn[cpu]")',
        )
    elif not (cpu or gpu):
        yield Finding(
            name=name,
            status="warning",
            what="not installed",
            why="neither onnxruntime nor onnxruntime-gpu is there, and export is checked with it",
            mend='pip install "deploycnn[cpu]" (or "deploycnn[gpu]")',
        )


def check_gpu(nvidia: Nvidia | None, device_nodes: bool) -> Iterator[Finding]:
    """Whether there is a GPU, and its driver answers."""
    if nvidia is not None:
        serves = f", serves CUDA up to {nvidia.cuda}" if nvidia.cuda else ""
        what = f"{' + '.join(nvidia.gpus)}; driver {nvidia.driver}{serves}"
        yield Finding(name="gpu", status="ok", what=what)
    elif device_nodes:
        yield Finding(
            name="gpu",
            status="error",
            what="an NVIDIA device is there, but nvidia-smi does not answer",
            why="the driver is not loaded, does not match the kernel, or the container was not given it",
            mend="reboot after a driver update; start containers with --gpus all",
        )
    else:
        yield Finding(name="gpu", status="ok", what="no NVIDIA GPU: GPU runtimes are not expected to work")


def check_driver(nvidia: Nvidia | None, built_for: Mapping[str, str]) -> Iterator[Finding]:
    """Whether the driver is new enough for the CUDA that the installed packages are built for.

    A driver serves all minor versions of its major version, and all older major ones (NVIDIA, "CUDA
    compatibility").

    Args:
        nvidia: The driver.
        built_for: Package -> CUDA version; empty where it is not installed or does not tell.
    """
    if nvidia is None:
        return
    for package, cuda in built_for.items():
        if not cuda:
            continue
        old = _major(cuda) > _major(nvidia.cuda) if nvidia.cuda else drivers.too_old(nvidia.driver, cuda)
        if old:
            least = drivers.needed(cuda)
            yield Finding(
                name=f"driver for {package}",
                status="error",
                what=f"{package} is built for CUDA {cuda}, driver {nvidia.driver} serves {nvidia.cuda or 'less'}",
                why=f"CUDA {_major(cuda)} needs "
                + (f"driver {least} or newer" if least else "a newer driver"),
                mend="upgrade the NVIDIA driver"
                + (f", or install {package} built for CUDA {_major(nvidia.cuda)}" if nvidia.cuda else ""),
            )


def check_nvml(
    nvidia: Nvidia | None, installed: str, watch: Callable[[], object | None]
) -> Iterator[Finding]:
    """Whether clocks and temperature can be recorded where there is a GPU."""
    if nvidia is None or not installed:
        return  # that the package is missing is said with the other modules
    if watch() is not None:
        yield Finding(name="nvml", status="ok", what="tells clocks, temperature and power of the GPU")
    else:
        yield Finding(
            name="nvml",
            status="warning",
            what="does not answer",
            why="libnvidia-ml is missing or not permitted, so throttling would go unnoticed",
            mend="give the container the `utility` capability (NVIDIA_DRIVER_CAPABILITIES=compute,utility)",
        )


def check_runtime(spec: str, answer: Mapping[str, Any], nvidia: Nvidia | None, gpu_wheel: bool) -> Finding:
    """Judge what a runtime's mode answered when it was tried.

    What is not there is a warning; what is there and does not work is an error. A GPU mode is there if a
    GPU is, and for ONNX Runtime also the GPU wheel.
    """
    version = f"{answer['version']} " if answer.get("version") else ""
    if answer["ok"]:
        return Finding(name=spec, status="ok", what=f"{version}works")
    why = str(answer["why"]).removeprefix(f"{spec}: ")
    absent = "is not installed" in why or "no bf16 instructions" in why
    name, _, mode = spec.partition(":")
    on_gpu = registry.get("runtime", name).device_of(mode) == "cuda"
    if on_gpu:
        absent = absent or nvidia is None or (spec.startswith("onnxruntime") and not gpu_wheel)
    return Finding(
        name=spec,
        status="warning" if absent else "error",
        what=f"{version}not usable",
        why=why,
        mend="" if on_gpu and nvidia is None else str(answer["mend"]),
    )


def check_module(name: str, answer: Mapping[str, Any], nvidia: Nvidia | None) -> Finding:
    """Judge what importing a module in a process of its own gave."""
    purpose, install = MODULES[name]
    if answer["ok"]:
        return Finding(name=name, status="ok", what=f"{answer['version']} loads ({purpose})".strip())
    if not answer["installed"]:
        return Finding(name=name, status="warning", what=f"not installed ({purpose})", mend=install)
    return Finding(
        name=name,
        # without a driver, a module that needs its library cannot load, and nothing is broken
        status="warning" if nvidia is None and "libcuda" in str(answer["why"]) else "error",
        what="installed, but does not load",
        why=str(answer["why"]),
        mend=f"check the NVIDIA driver and CUDA libraries, or reinstall: {install}",
    )


def check_disk(folder: Path, free_bytes: int) -> Finding:
    """Whether there is room for artifacts."""
    what = f"{free_bytes / 2**30:.1f} GiB free in {folder}"
    if free_bytes >= DISK_WARNING_BYTES:
        return Finding(name="disk", status="ok", what=what)
    status: Status = "error" if free_bytes < DISK_ERROR_BYTES else "warning"
    return Finding(
        name="disk",
        status=status,
        what=what,
        why="a run keeps every intermediate model and its checkpoints",
        mend="free some space, or choose another folder for the run",
    )


def check_cpus(installed: int, usable: int, quota: float | None) -> Iterator[Finding]:
    """Whether this process may use the CPUs that it sees."""
    if quota is not None and quota < usable:
        yield Finding(
            name="cpus",
            status="warning",
            what=f"{usable} CPUs are visible, but the container may use the time of {quota:g}",
            why="runs with more threads are stopped in the middle by the scheduler, and latencies scatter",
            mend="measure with fewer threads, or pin the container with --cpuset-cpus instead of --cpus",
        )
    else:
        bound = "" if usable == installed else f" of {installed} (affinity)"
        yield Finding(name="cpus", status="ok", what=f"{usable} usable{bound}")


def check_load(load: float | None, cpus: int) -> Finding:
    """Whether other programs would disturb timing."""
    if load is None:
        return Finding(name="load", status="ok", what="not known on this system")
    what = f"{load:.1f} on {cpus} CPUs"
    if load / cpus <= BUSY_LOAD:
        return Finding(name="load", status="ok", what=what)
    return Finding(
        name="load",
        status="warning",
        what=what,
        why="other programs are running; latencies measured now scatter more",
        mend="stop them before measuring, or raise profile.budget_s",
    )


def _major(version: str) -> int:
    return int(version.partition(".")[0])
