"""What else the machine did while something was timed: other programs, other guests, the GPU's clocks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploycnn.core import Json
from deploycnn.gpu.nvml import GpuState, Watch

#: Shares of the machine's CPU time above which a measurement carries a warning.
OTHER_LIMIT = 0.10
STEAL_LIMIT = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """Shares of the machine's CPU time during a measurement, in [0, 1]; ``None`` where nothing tells.

    Attributes:
        other_ratio: Used by other processes.
        steal_ratio: Taken by the hypervisor for other guests.
        load_before: Runnable processes (one-minute average) when the measurement began.
        wall_s: How long it took.
        gpu: Its clocks, temperature and power, where something ran on it and NVML tells.
    """

    other_ratio: float | None
    steal_ratio: float | None
    load_before: float | None
    wall_s: float
    gpu: GpuState | None = None

    @property
    def words(self) -> str | None:
        """What makes the measurement less trustworthy, or ``None``."""
        found = []
        if self.other_ratio is not None and self.other_ratio > OTHER_LIMIT:
            found.append(f"other programs used {self.other_ratio:.0%} of the CPUs' time")
        if self.steal_ratio is not None and self.steal_ratio > STEAL_LIMIT:
            found.append(f"the hypervisor took {self.steal_ratio:.0%} of the CPUs' time away")
        if self.gpu is not None and self.gpu.words:
            found.append(self.gpu.words)
        return " and ".join(found) + " meanwhile" if found else None

    def to_json(self) -> Json:
        """As plain values."""
        return {
            "other_ratio": self.other_ratio,
            "steal_ratio": self.steal_ratio,
            "load_before": self.load_before,
            "wall_s": self.wall_s,
            "gpu": self.gpu and self.gpu.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Disturbance:
        """Read what ``to_json`` gave; an unknown key is a ``TypeError``."""
        gpu = value.get("gpu")
        return cls(**{**value, "gpu": GpuState.from_json(gpu) if gpu else None})


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuTimes:
    """Seconds since boot, summed over all CPUs (``total_s`` includes idle), and of this process."""

    total_s: float
    busy_s: float
    steal_s: float
    own_s: float


def parse_cpu_times(stat: str, own_s: float, ticks_per_s: int) -> CpuTimes | None:
    """Read the first line of ``/proc/stat`` (proc(5)): user nice system idle iowait irq softirq steal ..."""
    fields = stat.partition("\n")[0].split()
    if len(fields) < 9 or fields[0] != "cpu":
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = (
        int(value) / ticks_per_s for value in fields[1:9]
    )
    busy = user + nice + system + irq + softirq
    return CpuTimes(total_s=busy + idle + iowait + steal, busy_s=busy, steal_s=steal, own_s=own_s)


def read_cpu_times() -> CpuTimes | None:
    """The times now; ``None`` on systems without ``/proc/stat``."""
    try:
        stat = Path("/proc/stat").read_text(encoding="ascii")
    except OSError:
        return None
    return parse_cpu_times(stat, time.process_time(), os.sysconf("SC_CLK_TCK"))


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # not on Windows; not obtainable
        return None


class Meter:
    """Started when made; ``stop`` tells what happened since."""

    def __init__(
        self,
        read: Callable[[], CpuTimes | None] = read_cpu_times,
        load: Callable[[], float | None] = _load,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._read = read
        self._clock = clock
        self._before = read()
        self._load = load()
        self._started = clock()
        self._gpu: Watch | None = None

    def watch_gpu(self, gpu: Watch | None) -> None:
        """Record the GPU too, at every ``sample`` from now on; ``None``: nothing tells of it."""
        self._gpu = gpu
        self.sample()

    def sample(self) -> None:
        """Read the GPU; called between blocks, never inside a timed run."""
        if self._gpu is not None:
            self._gpu.read()

    def stop(self) -> Disturbance:
        """Shares since the meter was made."""
        wall = self._clock() - self._started
        after, before = self._read(), self._before
        gpu = self._gpu.state() if self._gpu is not None else None
        if after is None or before is None or after.total_s <= before.total_s:
            return Disturbance(
                other_ratio=None, steal_ratio=None, load_before=self._load, wall_s=wall, gpu=gpu
            )
        total = after.total_s - before.total_s
        other = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
        return Disturbance(
            # the kernel counts in ticks of 10 ms, so the difference of two counts may come out below zero
            other_ratio=min(1.0, max(0.0, other / total)),
            steal_ratio=min(1.0, max(0.0, (after.steal_s - before.steal_s) / total)),
            load_before=self._load,
            wall_s=wall,
            gpu=gpu,
        )
