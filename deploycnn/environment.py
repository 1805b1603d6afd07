"""The machine that a measurement or an engine belongs to."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from deploycnn.core import Json
from deploycnn.engines.names import DISTRIBUTIONS as TENSORRT
from deploycnn.errors import ArtifactError

#: Instruction sets that decide how fast a CNN runs, by their names in /proc/cpuinfo (x86 and Arm).
ISA_FLAGS = (
    "avx", "avx2", "f16c", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip

#: Distributions of each package, in order of preference; several provide the same module.
DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "openvino": ("openvino",),
    "torch": ("torch",),
    "tensorrt": TENSORRT["tensorrt"],
    "tensorrt-rtx": TENSORRT["tensorrt-rtx"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvidia:
    """What ``nvidia-smi`` tells.

    Attributes:
        gpus: Names, in device order.
        driver: Version of the kernel driver.
        cuda: The newest CUDA that this driver serves, "13.0"; empty if it does not tell.
    """

    gpus: tuple[str, ...]
    driver: str
    cuda: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Hardware and software that latency depends on. Empty strings: not there, or not known.

    Attributes:
        cpu: Model name.
        isa: Those of ``ISA_FLAGS`` that it has.
        cores: Physical cores.
        threads: CPUs that this process may use.
        memory_bytes: Installed (or granted by the hypervisor).
        gpu: Names, joined by " + ".
        driver: NVIDIA's.
        cuda: The newest that the driver serves.
        tensorrt: Versions of TensorRT and TensorRT-RTX, joined by " + ".
        onnxruntime: "(gpu)" behind it tells the wheel.
        openvino: Version.
        torch: Version, with its CUDA.
        os: System and kernel.
        python: Version.
        power: Frequency governor and supply, where readable.
    """

    cpu: str
    isa: tuple[str, ...]
    cores: int
    threads: int
    memory_bytes: int
    gpu: str
    driver: str
    cuda: str
    tensorrt: str
    onnxruntime: str
    openvino: str
    torch: str
    os: str
    python: str
    power: str

    @property
    def fingerprint(self) -> str:
        """sha256 hex of what decides whether measurements and engines may be reused.

        Kernel, Python, memory and power state are recorded but left out: they change from boot to boot, or
        with the charger, and would throw away what is still valid.
        """
        left_out = {"memory_bytes", "os", "python", "power"}
        identity = {key: value for key, value in self.to_json().items() if key not in left_out}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Json]:
        """As plain values."""
        return {**dataclasses.asdict(self), "isa": list(self.isa)}

    @classmethod
    def from_json(cls, value: Json, where: str = "environment") -> Environment:
        """Read what ``to_json`` gave.

        Raises:
            ArtifactError: a key is missing, unknown or ill-typed.
        """
        if not isinstance(value, Mapping):
            raise ArtifactError(f"{where}: expected a JSON object, found {type(value).__name__}")
        known = {item.name: item.type for item in dataclasses.fields(cls)}
        if set(value) != set(known):
            wrong = ", ".join(sorted(set(value) ^ set(known)))
            raise ArtifactError(f"{where}: missing or unknown: {wrong}; it was written by another version")
        kinds: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "tuple[str, ...]": (list, tuple)}
        for name, kind in known.items():
            if not isinstance(value[name], kinds[str(kind)]):
                raise ArtifactError(f"{where}: {name} is {value[name]!r}, expected {kind}")
        return cls(**{**value, "isa": tuple(value["isa"])})


def detect() -> Environment:
    """This machine. Imports no runtime: versions come from the installed distributions' metadata."""
    cpuinfo = _read(Path("/proc/cpuinfo"))
    cpu, isa = parse_cpuinfo(cpuinfo)
    nvidia = nvidia_smi()
    return Environment(
        cpu=cpu or platform.processor() or platform.machine(),
        isa=isa,
        cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        threads=available_cpus(),
        memory_bytes=psutil.virtual_memory().total,
        gpu=" + ".join(nvidia.gpus) if nvidia else "",
        driver=nvidia.driver if nvidia else "",
        cuda=nvidia.cuda if nvidia else "",
        tensorrt=" + ".join(filter(None, [version("tensorrt"), version("tensorrt-rtx")])),
        onnxruntime=version("onnxruntime"),
        openvino=version("openvino"),
        torch=version("torch"),
        os=platform.platform(),
        python=platform.python_version(),
        power=_power(),
    )


def available_cpus() -> int:
    """CPUs that this process may use (affinity and cpusets respected)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Model name and instruction sets of the first CPU in /proc/cpuinfo; Arm has no name there."""
    first = text.partition("\n\n")[0]
    fields = {}
    for line in first.splitlines():
        key, _, value = line.partition(":")
        fields[key.strip().lower()] = value.strip()
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    return fields.get("model name", ""), tuple(flag for flag in ISA_FLAGS if flag in flags)


def version(package: str, find: Callable[[str], str] = metadata.version) -> str:
    """Installed version of a package that several distributions may provide; empty if none is."""
    for name in DISTRIBUTIONS[package]:
        try:
            found = find(name)
        except metadata.PackageNotFoundError:
            continue
        note = " (gpu)" if name.endswith("-gpu") else " (rtx)" if "rtx" in name else ""
        return f"{found}{note}"
    return ""


@functools.cache
def nvidia_smi() -> Nvidia | None:
    """GPUs and driver; ``None`` without a driver, or where it does not answer."""
    query = _run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    return parse_nvidia_smi(query, _run(["nvidia-smi"])) if query else None


def parse_nvidia_smi(query: str, banner: str) -> Nvidia | None:
    """Read ``nvidia-smi --query-gpu=name,driver_version --format=csv,noheader``, and plain ``nvidia-smi``."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(query.splitlines()) if len(row) == 2]
    if not rows:
        return None
    cuda = re.search(r"CUDA Version:\s*(\d+\.\d+)", banner)
    return Nvidia(gpus=tuple(row[0] for row in rows), driver=rows[0][1], cuda=cuda[1] if cuda else "")


def _run(command: Iterable[str]) -> str:
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _power() -> str:
    parts = [_read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")).strip()]
    if hasattr(psutil, "sensors_battery"):
        with contextlib.suppress(OSError):
            battery = psutil.sensors_battery()
            if battery is not None:
                parts.append("on mains" if battery.power_plugged else "on battery")
    return ", ".join(filter(None, parts))
