from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploycnn.errors import ArtifactError, RuntimeUnavailable
from deploycnn.profiling import memory_child
from deploycnn.profiling.memory import peak_memory, peak_memory_bytes
from deploycnn.profiling.memory_child import resident_bytes
from tests.runtimes import graphs

pytest.importorskip("onnxruntime")

MEGA = 2**20


def write_heavy(path: Path, megabytes: int) -> Path:
    """One matrix product with this much weight."""
    width = megabytes * MEGA // 4 // (3 * 16 * 16)
    weight = np.ones((3 * 16 * 16, width), dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
        ],
        "heavy",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", width])],
        [numpy_helper.from_array(weight, "weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_the_peak_holds_the_weights_and_not_this_process(tmp_path: Path) -> None:
    light = graphs.artifact(graphs.write(tmp_path / "light.onnx"))
    heavy = graphs.artifact(write_heavy(tmp_path / "heavy.onnx", 64))
    before = peak_memory_bytes(light, "onnxruntime:cpu", batch_size=1)
    ballast = np.ones(300 * MEGA // 8)  # a child started from a large process must not inherit its peak
    after = peak_memory_bytes(light, "onnxruntime:cpu", batch_size=1)
    assert ballast.sum() > 0
    assert before < 40 * MEGA
    assert after < 40 * MEGA
    use = peak_memory(heavy, "onnxruntime:cpu", batch_size=1)
    assert 64 * MEGA <= use.peak_bytes < 4 * 64 * MEGA + 40 * MEGA
    assert use.baseline_bytes > 10 * MEGA


def test_errors_of_the_child_are_errors_here(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_text("not a model")
    with pytest.raises(ArtifactError, match="not an ONNX file"):
        peak_memory_bytes(graphs.artifact(broken), "onnxruntime:cpu", batch_size=1)
    sizeless = graphs.artifact(broken, shape=(None, 3, None, None))
    with pytest.raises(ArtifactError, match="image size is not stated"):
        peak_memory_bytes(sizeless, "onnxruntime:cpu", batch_size=1)


def test_a_child_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    path = graphs.write(tmp_path / "model.onnx")
    with pytest.raises(RuntimeUnavailable, match="no result within"):
        peak_memory(graphs.artifact(path), "onnxruntime:cpu", batch_size=1, timeout_s=0.01)


def test_proc_status_is_in_kilobytes() -> None:
    assert resident_bytes("Name:\tx\nVmHWM:\t    1024 kB\nVmRSS:\t 512 kB\n", "VmHWM") == MEGA
    with pytest.raises(ValueError, match="VmRSS"):
        resident_bytes("Name:\tx\n", "VmRSS")


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux only")
def test_what_was_used_and_freed_before_is_forgotten() -> None:
    code = (
        "from deploycnn.profiling.memory_child import peak, settle\n"
        "ballast = bytearray(b'x') * (200 * 2**20)\n"
        "del ballast\n"
        "before = settle()\n"
        "model = bytearray(b'x') * (50 * 2**20)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50 * MEGA <= int(done.stdout) < 60 * MEGA


@pytest.mark.parametrize(("after_loading", "after_running", "peak"), [(600, 500, 500), (300, 500, 700)])
def test_on_a_gpu_the_peak_is_what_left_the_free_memory(
    monkeypatch: pytest.MonkeyPatch, after_loading: int, after_running: int, peak: int
) -> None:
    """Loading may take more than running does: an engine's file and its weights, for a while."""
    steps: list[str] = []

    class Runtime:
        mode = "gpu"

        def device_of(self, mode: str) -> str:
            return "cuda"

        def availability(self) -> None:
            steps.append("context")

        def open(self, artifact: object, *, batch_size: int, threads: int) -> Runtime:
            steps.append("open")
            return self

        def bind(self, images: object) -> Callable[[], None]:
            return lambda: steps.append("run")

    free = {"context": 1000, "open": after_loading, "run": after_running}
    monkeypatch.setattr("deploycnn.runtimes.base.create", lambda _: Runtime())
    monkeypatch.setattr(memory_child, "_free_device_bytes", lambda: free[steps[-1]])
    request = {"format": "onnx", "path": "x.onnx", "shape": [2, 3, 4, 4], "spec": "fake:gpu", "threads": 1}
    assert memory_child.measure(request)["device_bytes"] == peak
