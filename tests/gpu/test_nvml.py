"""What NVML told, and what is made of it."""

from __future__ import annotations

import pynvml
import pytest

from deploycnn.gpu import drivers, nvml
from tests.gpu.fakes import Nvml


def watched(fake: Nvml) -> nvml.Watch:
    found = nvml.watch(nvml=fake)
    assert found is not None
    return found


def test_ranges_over_all_readings() -> None:
    watch = watched(Nvml(step=10))
    watch.read()
    state = watch.state()
    assert state.sm_clock_mhz == (1970, 1980)
    assert state.memory_clock_mhz == (2619, 2619)
    assert state.temperature_c == (61, 61)
    assert state.power_w == (301.5, 301.5)
    assert (state.name, state.driver) == ("NVIDIA Fake", "580.65.06")
    assert state.words is None
    assert nvml.GpuState.from_json(state.to_json()) == state


def test_throttling_is_said_though_it_ended_before_the_last_reading() -> None:
    fake = Nvml(reasons=pynvml.nvmlClocksEventReasonSwThermalSlowdown | pynvml.nvmlClocksEventReasonGpuIdle)
    watch = watched(fake)
    watch.read()
    fake.reasons = 0
    state = watch.state()
    assert state.reasons == ("thermal slowdown",)
    assert state.words == "the GPU's clocks were held down (thermal slowdown)"


def test_clocks_that_the_user_set_are_no_doubt() -> None:
    state = watched(Nvml(reasons=pynvml.nvmlClocksEventReasonApplicationsClocksSetting)).state()
    assert state.reasons == ("clocks set by the user",)
    assert state.words is None


def test_a_clock_that_varies_is_said() -> None:
    watch = watched(Nvml(step=200))
    watch.read()
    assert watch.state().words == "the GPU's clock varied from 1780 to 1980 MHz"


def test_what_a_gpu_does_not_tell_is_none() -> None:
    state = watched(Nvml(silent=("power", "clock", "reasons"))).state()
    assert state.power_w is None
    assert state.sm_clock_mhz is None
    assert state.words is None
    assert nvml.GpuState.from_json(state.to_json()) == state


def test_without_nvml_there_is_no_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nvml.watch(nvml=Nvml(silent=("init",))) is None
    assert nvml.watch(nvml=Nvml(silent=("handle",))) is None
    monkeypatch.setattr(nvml, "_pynvml", lambda: (_ for _ in ()).throw(ImportError("no pynvml")))
    assert nvml.watch() is None


@pytest.mark.parametrize(
    ("visible", "asked"), [("", 0), ("3,1", 3), ("GPU-8a7b,GPU-1", "GPU-8a7b"), ("MIG-1-2", "MIG-1-2")]
)
def test_the_gpu_is_the_first_that_cuda_sees(
    monkeypatch: pytest.MonkeyPatch, visible: str, asked: int | str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    fake = Nvml()
    watched(fake)
    assert fake.asked == [asked]


def test_every_name_that_is_used_is_nvmls() -> None:
    names = [name for name in vars(Nvml) if name.startswith(("nvml", "NVML"))]
    assert len(names) > 10
    for name in [*names, *(f"nvmlClocksEventReason{name}" for name in nvml.REASONS)]:
        assert hasattr(pynvml, name), name


@pytest.mark.parametrize(
    ("driver", "cuda", "old"),
    [("579.99", "13.0", True), ("580.65.06", "13.2", False), ("550.54", "12.8", False), ("520.61", "12.0", True),
     ("610.1", "11.8", False), ("1.0", "99.0", False), ("", "13.0", False), ("550.1", "", False)],
)  # fmt: skip
def test_drivers_too_old_for_a_cuda(driver: str, cuda: str, old: bool) -> None:
    assert drivers.too_old(driver, cuda) is old
