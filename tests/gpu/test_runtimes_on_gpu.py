"""ONNX Runtime, PyTorch, devices, NVML and whole runs on a real GPU: `pytest -m gpu`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import deploycnn
from deploycnn.core import Artifact, Facts, TensorSpec
from deploycnn.engines.device import Gpu
from deploycnn.engines.flavour import Flavour
from deploycnn.errors import RuntimeUnavailable
from deploycnn.gpu import nvml
from deploycnn.gpu.device import Device
from deploycnn.gpu.ort import PROVIDERS
from deploycnn.gpu.pycuda_device import PycudaDevice
from deploycnn.runtimes.base import Session, create
from deploycnn.runtimes.common import COMPUTE_OPS
from tests.engines import graphs
from tests.gpu import device_checks, on_gpu
from tests.gpu.on_gpu import TOLERANCE, assert_close, expected, images


@pytest.mark.parametrize("check", device_checks.ALL, ids=lambda check: check.__name__)
def test_the_fake_device_does_what_a_real_one_must(
    check: Callable[[Device], None], device: PycudaDevice
) -> None:
    check(device)


@pytest.mark.parametrize("check", device_checks.ALL, ids=lambda check: check.__name__)
def test_devices(check: Callable[[Device], None], real_device: Device) -> None:
    check(real_device)


def opened(spec: str, artifact: Artifact, batch_size: int = 3) -> Session:
    runtime = create(spec)
    found = runtime.availability()
    if not found.ok:
        pytest.skip(f"{spec}: {found.why}; {found.mend}")
    return runtime.open(artifact, batch_size=batch_size, threads=1)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("mode", ["cuda", "tensorrt", "tensorrt-rtx"])
def test_onnxruntime_computes_on_the_provider_that_was_asked_for(
    mode: str, precision: str, here: Gpu, tmp_path: Path
) -> None:
    path = graphs.saved(on_gpu.graph(precision), tmp_path)
    session: Any = opened(f"onnxruntime:{mode}", on_gpu.artifact_of(path))
    assert session.executed.provider == PROVIDERS[mode]
    if hasattr(session._session, "get_provider_graph_assignment_info"):
        assigned = {
            node.op_type: part.ep_name
            for part in session._session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        }
        computing = {name for op, name in assigned.items() if op in COMPUTE_OPS}
        assert computing <= {PROVIDERS[mode]}
        assert PROVIDERS[mode] in assigned.values()
    given = images(3)
    # TensorRT's providers may round float32 to TF32
    tolerance = max(TOLERANCE[precision], TOLERANCE["tf32"] if mode != "cuda" else 0)
    assert_close(session.run(given)[0], expected(on_gpu.reference_graph(precision), given), tolerance)
    session.close()


@pytest.mark.gpu
@pytest.mark.parametrize("options", ["", "+device", "+graph", "+graph+device", "+flush-l2", "+blocking"])
@pytest.mark.parametrize("mode", ["cuda", "tensorrt", "tensorrt-rtx"])
def test_onnxruntime_binds_device_memory(mode: str, options: str, here: Gpu, tmp_path: Path) -> None:
    path = graphs.saved(graphs.net(), tmp_path)
    session: Any = opened(f"onnxruntime:{mode}{options}", on_gpu.artifact_of(path))
    given = images(3)
    call = session.bind(given)
    taken = [call() for _ in range(4)]
    assert all(value is not None and math.isfinite(value) and value > 0 for value in taken)
    assert session.executed.transfers is ("device" not in options)
    lane = session._lane
    if "device" in options:
        lane._device.download(lane.host_outputs[0], lane._buffers[1], lane.stream)
        lane.synchronize()
    assert_close(lane.host_outputs[0], expected(graphs.net(), given), TOLERANCE["tf32"])


@pytest.mark.gpu
def test_an_operator_that_only_the_cpu_has_is_not_timed_as_cuda(here: Gpu, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["images"], ["q", "s", "z"], name="quantize"),
        helper.make_node("ConvInteger", ["q", "w", "z"], ["c"], name="integers"),
        helper.make_node("Cast", ["c"], ["logits"], name="cast", to=TensorProto.FLOAT),
    ]
    proto = graphs.model(nodes, {"w": graphs.rng().integers(-9, 9, (4, 8, 3, 3)).astype(np.int8)})
    with pytest.raises(
        RuntimeUnavailable, match="does not take ConvInteger integers; they would run on the CPU"
    ):
        opened("onnxruntime:cuda", on_gpu.artifact_of(graphs.saved(proto, tmp_path)))


TORCH = {
    "eager-cuda": ("tf32", 1e-2),
    "eager-cuda+fp32": ("f32", 1e-4),
    "eager-cuda+fp16+channels-last": ("f16", 2e-2),
    "eager-cuda+graph+device": ("tf32", 1e-2),
    "eager-cuda+graph+fp16+channels-last": ("f16", 2e-2),
    "compiled-cuda": ("tf32", 1e-2),
    "compiled-cuda+device+fp16+channels-last": ("f16", 2e-2),
}


@pytest.mark.gpu
@pytest.mark.parametrize("spec", TORCH)
def test_pytorch_in_each_format(spec: str, here: Gpu, tmp_path: Path) -> None:
    import torch

    from deploycnn.models.artifact import architecture, build_base, save_model

    described = architecture("zoo", {"name": "resnet20"}, 10)
    model = build_base(described).eval()
    save_model(model, tmp_path, described)
    given = np.random.default_rng(0).standard_normal((3, 3, 32, 32), dtype=np.float32)
    with torch.no_grad():
        wanted = model.double()(torch.from_numpy(given).double()).numpy()
    shape = TensorSpec(name="images", dtype="float32", shape=(None, 3, 32, 32))
    made = Artifact(key="k", format="torch", path=tmp_path / "model.safetensors", inputs=(shape,), outputs=(),
                    parents=(), facts=Facts())  # fmt: skip
    session = opened(f"pytorch:{spec}", made)
    precision, tolerance = TORCH[spec]
    if here.capability >= (8, 0) or precision != "tf32":
        assert session.executed.precision == precision
    assert_close(session.run(given)[0], wanted, tolerance)
    taken = session.bind(given)()
    assert taken is not None
    assert taken > 0
    assert_close(session.run(given)[0], wanted, tolerance)
    session.close()


@pytest.mark.gpu
def test_tf32_is_each_sessions_own(here: Gpu, tmp_path: Path) -> None:
    """It is a setting of the process: sessions side by side set theirs before each run."""
    import torch

    from deploycnn.models.artifact import architecture, build_base, save_model

    described = architecture("zoo", {"name": "lenet5"}, 10)
    save_model(build_base(described), tmp_path, described)
    shape = TensorSpec(name="images", dtype="float32", shape=(None, 3, 32, 32))
    made = Artifact(key="k", format="torch", path=tmp_path / "model.safetensors", inputs=(shape,), outputs=(),
                    parents=(), facts=Facts())  # fmt: skip
    given = np.zeros((3, 3, 32, 32), np.float32)
    free, strict = opened("pytorch:eager-cuda", made), opened("pytorch:eager-cuda+fp32", made)
    for session, allowed in ((free, True), (strict, False), (free, True)):
        session.bind(given)()
        assert torch.backends.cudnn.allow_tf32 is allowed


@pytest.mark.gpu
def test_nvml_tells_of_this_gpu(here: Gpu) -> None:
    pytest.importorskip("pynvml", reason='nvidia-ml-py is not installed; pip install "deploycnn[gpu]"')
    watch = nvml.watch()
    assert watch is not None, "NVML does not answer"
    reading = watch.read()
    assert reading.sm_clock_mhz is None or 0 < reading.sm_clock_mhz < 10_000
    assert reading.temperature_c is None or 0 < reading.temperature_c < 150
    assert reading.power_w is None or 0 < reading.power_w < 5_000
    state = watch.state()
    assert state.name == here.name
    assert state.driver
    assert nvml.GpuState.from_json(state.to_json()) == state


def test_a_recipe_is_compressed_measured_and_reported(real_trt: Flavour, here: Gpu, tmp_path: Path) -> None:
    mode = on_gpu.MODES[real_trt.name]
    build = {"build_engine": {"max_batch": 64}}
    recipe = {
        "name": "lenet5",
        "source": {"zoo": "lenet5"},
        "data": "digits",
        "preprocessing": {"size": 32},
        "target": real_trt.name,
        "variants": {
            "fp32": ["export", build],
            "fp16": ["export", {"fp16": {"relative_tolerance": 1.0}}, build],
            "int8": ["export", {"int8": {"calibration_images": 16, "rules": "tensorrt"}}, build],
        },
        "profile": {
            "runtimes": [f"tensorrt:{mode}", f"tensorrt:{mode}+graph+device"],
            "batch_sizes": [1, 8],
            "threads": [1],
            "budget_s": 0.2,
            "memory": False,
        },
    }
    run = deploycnn.compress(recipe, out=tmp_path / "run")
    assert run.problems == ()
    rows = run.report["measurements"]
    assert len(rows) == 3 * 2 * 2
    assert {row["status"] for row in rows} == {"measured"}
    top1 = {row["variant"]: row["top1"] for row in rows}
    assert abs(top1["fp16"] - top1["fp32"]) < 0.05


@pytest.mark.gpu
@pytest.mark.slow
def test_the_benchmark_gives_a_whole_table(
    here: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.test_gpu_benchmark import load

    for name in ("gpu_plan", "gpu_results"):
        load(name, monkeypatch)
    script = load("gpu", monkeypatch)
    arguments = ["--nets", "resnet20", "--precisions", "fp16", "--batch-sizes", "1", "--budget", "0.1",
                 "--rebuilds", "2", "--out", str(tmp_path)]  # fmt: skip
    assert script.main(arguments) == 0, "every row has its figures or its reason"
    assert "no reason was recorded" not in capsys.readouterr().out
