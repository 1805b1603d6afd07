"""Each fault is planted, and the finding must name it and a mend."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from deploycnn import doctor, probe
from deploycnn.doctor import Finding
from deploycnn.environment import Nvidia

GPU = Nvidia(gpus=("NVIDIA L4",), driver="550.54", cuda="12.4")
WORKS = {"ok": True, "version": "1.2", "why": "", "mend": ""}


def only(findings: object) -> Finding:
    found = list(findings)  # type: ignore[call-overload]
    assert len(found) == 1
    result: Finding = found[0]
    return result


def test_an_old_python_is_an_error() -> None:
    assert doctor.check_python((3, 11, 0)).status == "ok"
    old = doctor.check_python((3, 10, 9))
    assert (old.status, old.what) == ("error", "3.10.9")
    assert "python3.11" in old.mend


def test_both_onnxruntime_wheels_are_an_error() -> None:
    both = only(doctor.check_onnxruntime_wheels("1.20", "1.21"))
    assert both.status == "error"
    assert "1.20" in both.what
    assert "1.21" in both.what
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in both.mend


def test_no_onnxruntime_is_a_warning_and_one_is_fine() -> None:
    assert only(doctor.check_onnxruntime_wheels("", "")).status == "warning"
    assert list(doctor.check_onnxruntime_wheels("1.20", "")) == []
    assert list(doctor.check_onnxruntime_wheels("", "1.20")) == []


def test_a_driver_that_does_not_answer_is_an_error() -> None:
    assert only(doctor.check_gpu(None, device_nodes=True)).status == "error"
    assert only(doctor.check_gpu(None, device_nodes=False)).status == "ok"
    assert "550.54" in only(doctor.check_gpu(GPU, device_nodes=True)).what


@pytest.mark.parametrize(
    ("torch_cuda", "ort_cuda", "named"),
    [
        ("13.2", "", ["driver for torch"]),
        ("", "13.0", ["driver for onnxruntime-gpu"]),
        ("13.2", "13.0", ["driver for torch", "driver for onnxruntime-gpu"]),
        ("12.8", "12.8", []),  # newer minor versions are served within one major version
        ("11.8", "", []),
    ],
)
def test_a_driver_too_old_for_a_package_is_an_error(torch_cuda: str, ort_cuda: str, named: list[str]) -> None:
    findings = list(doctor.check_driver(GPU, {"torch": torch_cuda, "onnxruntime-gpu": ort_cuda}))
    assert [finding.name for finding in findings] == named
    assert all(finding.status == "error" and "550.54" in finding.what for finding in findings)


def test_without_a_driver_nothing_is_said_of_its_age() -> None:
    assert list(doctor.check_driver(None, {"torch": "13.2"})) == []


@pytest.mark.parametrize(("driver", "built", "least"), [("570.1", "13", "580"), ("520.1", "12.4", "525")])
def test_a_driver_that_does_not_tell_its_cuda_is_judged_by_nvidias_table(
    driver: str, built: str, least: str
) -> None:
    silent = Nvidia(gpus=("NVIDIA L4",), driver=driver, cuda="")
    finding = only(doctor.check_driver(silent, {"tensorrt": built}))
    assert finding.why == f"CUDA {built.partition('.')[0]} needs driver {least} or newer"
    assert finding.mend == "upgrade the NVIDIA driver"
    assert not list(doctor.check_driver(dataclasses.replace(silent, driver="600.1"), {"tensorrt": built}))


def test_nvml_that_does_not_answer_is_said_where_there_is_a_gpu() -> None:
    assert only(doctor.check_nvml(GPU, "13.0", object)).status == "ok"
    silent = only(doctor.check_nvml(GPU, "13.0", lambda: None))
    assert (silent.status, "NVIDIA_DRIVER_CAPABILITIES" in silent.mend) == ("warning", True)
    assert not list(doctor.check_nvml(None, "13.0", lambda: None))
    assert not list(doctor.check_nvml(GPU, "", lambda: None))


def test_a_runtime_that_works_is_ok() -> None:
    assert doctor.check_runtime("openvino:f32", WORKS, None, gpu_wheel=False).status == "ok"


@pytest.mark.parametrize(
    ("spec", "why", "nvidia", "wheel", "status"),
    [
        ("openvino:f32", "openvino is not installed", None, False, "warning"),
        ("openvino:f32", "openvino is installed but does not load (libtbb.so)", None, False, "error"),
        ("openvino:bf16", "openvino:bf16: this CPU (X) has no bf16 instructions", None, False, "warning"),
        ("onnxruntime:cuda", "onnxruntime:cuda: has no CUDAExecutionProvider", None, False, "warning"),
        ("onnxruntime:cuda", "onnxruntime:cuda: has no CUDAExecutionProvider", GPU, False, "warning"),
        ("onnxruntime:cuda", "CUDAExecutionProvider is listed but did not load", GPU, True, "error"),
        ("pytorch:eager-cuda", "finds no usable CUDA device", None, False, "warning"),
        ("pytorch:eager-cuda", "finds no usable CUDA device", GPU, False, "error"),
        ("tensorrt:trt", "no NVIDIA driver on this machine", None, False, "warning"),
        ("tensorrt:rtx", "out of device memory", GPU, False, "error"),
        ("onnxruntime:tensorrt", "has no TensorrtExecutionProvider", GPU, False, "warning"),
        ("onnxruntime:tensorrt", "libnvinfer.so.10 is missing", GPU, True, "error"),
        ("pytorch:compiled", "torch.compile needs a C++ compiler", None, False, "error"),
    ],
)
def test_missing_is_a_warning_and_broken_an_error(
    spec: str, why: str, nvidia: Nvidia | None, wheel: bool, status: str
) -> None:
    answer = {"ok": False, "version": "", "why": why, "mend": "do this"}
    finding = doctor.check_runtime(spec, answer, nvidia, wheel)
    assert finding.status == status
    assert not finding.why.startswith(spec)
    on_gpu = "cuda" in spec or "tensorrt" in spec
    assert finding.mend == ("" if on_gpu and nvidia is None else "do this")


def test_a_module_that_crashes_on_import_is_an_error_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "crashing.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    (tmp_path / "failing.py").write_text("raise OSError('libcuda.so.1: cannot open')\n")
    (tmp_path / "fine.py").write_text("__version__ = '4.2'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        doctor, "MODULES", dict.fromkeys(("crashing", "failing", "fine", "absent_module"), ("test", "pip"))
    )
    crashing = doctor.check_module("crashing", probe.probe_module("crashing"), None)
    assert crashing.status == "error"
    assert "signal 11" in crashing.why
    failing = doctor.check_module("failing", probe.probe_module("failing"), GPU)
    assert failing.status == "error"
    assert "libcuda.so.1" in failing.why
    no_driver = doctor.check_module("failing", probe.probe_module("failing"), None)
    assert no_driver.status == "warning", "there is no driver, so nothing is broken"
    fine = doctor.check_module("fine", probe.probe_module("fine"), None)
    assert (fine.status, fine.what) == ("ok", "4.2 loads (test)")
    absent = doctor.check_module("absent_module", probe.probe_module("absent_module"), None)
    assert (absent.status, absent.mend) == ("warning", "pip")


def test_a_module_that_hangs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hanging.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    assert "took longer than 2 s" in probe.probe_module("hanging", timeout_s=2.0)["why"]


def test_a_runtime_that_dies_is_tried_mode_by_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    def child(arguments: list[str], timeout_s: float) -> tuple[dict[str, object] | None, str]:
        modes = arguments[2:]
        if "bad" in modes:
            return None, "killed the process (signal 11)"
        return dict.fromkeys(modes, WORKS), ""

    monkeypatch.setattr(probe, "_child", child)
    found = probe.probe_runtime("some", ["good", "bad"])
    assert found["good"]["ok"] is True
    assert found["bad"]["ok"] is False
    assert "signal 11" in str(found["bad"]["why"])


def test_a_runtime_is_really_tried() -> None:
    assert probe.probe_runtime("onnxruntime", ["cpu"])["cpu"]["ok"] is True


def test_little_disk_space_is_told() -> None:
    status = [doctor.check_disk(Path(), free).status for free in (100 * 2**20, 2**30, 50 * 2**30)]
    assert status == ["error", "warning", "ok"]


def test_a_container_with_less_time_than_cpus_is_told(tmp_path: Path) -> None:
    assert only(doctor.check_cpus(8, 8, 1.5)).status == "warning"
    assert only(doctor.check_cpus(8, 8, None)).status == "ok"
    assert "4 usable of 8" in only(doctor.check_cpus(8, 4, 4.0)).what
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert probe.cgroup_cpus(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert probe.cgroup_cpus(tmp_path) is None
    assert probe.cgroup_cpus(tmp_path / "nowhere") is None


def test_a_busy_machine_is_told() -> None:
    assert doctor.check_load(3.0, 4).status == "warning"
    assert doctor.check_load(0.2, 4).status == "ok"
    assert doctor.check_load(None, 4).status == "ok"


def test_built_versions_are_read_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "fakelib" / "capi"
    package.mkdir(parents=True)
    (tmp_path / "fakelib" / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "info.py").write_text(
        "from typing import Optional\ncuda: Optional[str] = '12.8'\nother = '1'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert probe._assigned("fakelib", "capi/info.py", "cuda") == "12.8"
    assert probe._assigned("fakelib", "capi/info.py", "absent") == ""
    assert probe._assigned("no_such_package", "x.py", "cuda") == ""
    assert "fakelib" not in sys.modules
