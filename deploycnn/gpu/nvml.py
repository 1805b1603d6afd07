"""Clocks, temperature, power and throttling of a GPU, read through NVML (``nvidia-ml-py``)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploycnn.core import Json

#: Why clocks are held down, by the end of NVML's constant (``nvmlClocksEventReason...``), and whether it is a
#: sign of a measurement that another day would not repeat.
REASONS: Mapping[str, tuple[str, bool]] = {
    "ApplicationsClocksSetting": ("clocks set by the user", False),
    "SwPowerCap": ("power cap", True),
    "HwSlowdown": ("hardware slowdown", True),
    "SyncBoost": ("sync boost", False),
    "SwThermalSlowdown": ("thermal slowdown", True),
    "HwThermalSlowdown": ("hardware thermal slowdown", True),
    "HwPowerBrakeSlowdown": ("external power brake", True),
    "DisplayClockSetting": ("display clocks", False),
}

#: Share by which the SM clock may vary between blocks before it is said.
CLOCK_SPREAD = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A GPU at one moment; ``None`` where it does not tell.

    Attributes:
        sm_clock_mhz: Of the multiprocessors.
        memory_clock_mhz: Of the memory.
        temperature_c: Of the chip.
        power_w: Of the board.
        reasons: Those of ``REASONS`` that hold the clocks down now.
    """

    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuState:
    """A GPU during a measurement: ranges over the readings between its blocks."""

    name: str
    driver: str
    sm_clock_mhz: tuple[int, int] | None
    memory_clock_mhz: tuple[int, int] | None
    temperature_c: tuple[int, int] | None
    power_w: tuple[float, float] | None
    reasons: tuple[str, ...]

    @property
    def words(self) -> str | None:
        """What makes the measurement less trustworthy, or ``None``."""
        found = [words for words, doubtful in REASONS.values() if doubtful and words in self.reasons]
        said = [f"the GPU's clocks were held down ({', '.join(found)})"] if found else []
        if self.sm_clock_mhz is not None:
            low, high = self.sm_clock_mhz
            if low < (1 - CLOCK_SPREAD) * high:
                said.append(f"the GPU's clock varied from {low} to {high} MHz")
        return " and ".join(said) or None

    def to_json(self) -> Json:
        """As plain values."""
        return {
            "name": self.name,
            "driver": self.driver,
            "sm_clock_mhz": _list(self.sm_clock_mhz),
            "memory_clock_mhz": _list(self.memory_clock_mhz),
            "temperature_c": _list(self.temperature_c),
            "power_w": _list(self.power_w),
            "reasons": list(self.reasons),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> GpuState:
        """Read what ``to_json`` gave; a missing key is a ``KeyError``."""
        ranges = ("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "power_w")
        return cls(
            name=value["name"],
            driver=value["driver"],
            reasons=tuple(value["reasons"]),
            **{key: tuple(value[key]) if value[key] is not None else None for key in ranges},
        )


class Watch:
    """Reads one GPU when asked, and sums up what it read."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._readings: list[Reading] = []

    def read(self) -> Reading:
        """The GPU now; kept for ``state``. Takes about a millisecond, so it is never called inside a timed run."""
        nvml, handle = self._nvml, self._handle
        power_mw = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        reading = Reading(
            sm_clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            memory_clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
            temperature_c=self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            power_w=None if power_mw is None else power_mw / 1000,
            reasons=self._reasons(),
        )
        self._readings.append(reading)
        return reading

    def _ask(self, function: Any, *arguments: Any) -> Any:
        """The answer, or ``None`` where this GPU or driver has none."""
        try:
            return function(*arguments)
        except self._nvml.NVMLError:
            return None

    def _reasons(self) -> tuple[str, ...]:
        mask = self._ask(self._nvml.nvmlDeviceGetCurrentClocksEventReasons, self._handle) or 0
        return tuple(
            words
            for name, (words, _) in REASONS.items()
            if mask & getattr(self._nvml, f"nvmlClocksEventReason{name}")
        )

    def state(self) -> GpuState:
        """All readings so far in short; reads once more."""
        self.read()
        found = {reason for reading in self._readings for reason in reading.reasons}
        return GpuState(
            name=str(self._ask(self._nvml.nvmlDeviceGetName, self._handle) or ""),
            driver=str(self._ask(self._nvml.nvmlSystemGetDriverVersion) or ""),
            sm_clock_mhz=_range([reading.sm_clock_mhz for reading in self._readings]),
            memory_clock_mhz=_range([reading.memory_clock_mhz for reading in self._readings]),
            temperature_c=_range([reading.temperature_c for reading in self._readings]),
            power_w=_range([reading.power_w for reading in self._readings]),
            reasons=tuple(words for words, _ in REASONS.values() if words in found),
        )


def watch(pci_bus_id: str | None = None, nvml: Any = None) -> Watch | None:
    """A watch of the GPU at this PCI address, else of the first one that this process sees.

    Returns:
        ``None`` where NVML or its package is absent, or it knows no such GPU: then nothing is recorded.
    """
    try:
        nvml = nvml or _pynvml()
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        if pci_bus_id is not None:
            return Watch(nvml, nvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id))
        return Watch(nvml, _first_visible(nvml, os.environ.get("CUDA_VISIBLE_DEVICES", "")))
    except nvml.NVMLError:
        return None


def _pynvml() -> Any:
    import pynvml

    return pynvml


def _first_visible(nvml: Any, visible: str) -> Any:
    """CUDA_VISIBLE_DEVICES names devices by index or UUID; NVML numbers by PCI address whatever it says."""
    first = visible.partition(",")[0].strip()
    if first.startswith(("GPU-", "MIG-")):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    return nvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdecimal() else 0)


def _range(values: Sequence[Any]) -> Any:
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else None


def _list(value: Sequence[Any] | None) -> list[Any] | None:
    return list(value) if value is not None else None
