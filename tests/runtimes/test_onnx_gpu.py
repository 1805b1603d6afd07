"""ONNX Runtime's GPU providers, on a fake of them: options, binding, verification, timing."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from deploycnn.core import Artifact, Facts
from deploycnn.errors import ArtifactError, RuntimeUnavailable
from deploycnn.gpu import device as gpu_device
from deploycnn.gpu import ort as gpu_ort
from deploycnn.gpu.pycuda_device import PycudaDevice
from deploycnn.runtimes import onnxruntime as ours
from deploycnn.runtimes.base import create
from deploycnn.runtimes.common import graph_facts
from tests.gpu.fakes import Gpu
from tests.runtimes import fake_ort
from tests.runtimes.fake_engine import IMAGE, expected

ALL = ("TensorrtExecutionProvider", "CUDAExecutionProvider")


def saved(path: Path, kind: int = TensorProto.FLOAT, op: str = "Conv") -> Path:
    weight = helper.make_tensor("w", kind, [1, 3, 1, 1], [1.0] * 3)
    graph = helper.make_graph(
        [helper.make_node(op, ["images", "w"], ["logits"])] if op == "Conv" else
        [helper.make_node(op, ["images", "w"], ["q"]), helper.make_node("Conv", ["q", "w"], ["logits"])],
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", *IMAGE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 4])],
        [weight],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def artifact_of(path: Path) -> Artifact:
    return Artifact(key="k", format="onnx", path=path, inputs=(), outputs=(), parents=(), facts=Facts())


@pytest.fixture
def ort(device: PycudaDevice, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> fake_ort.OnnxRuntime:
    fake = fake_ort.OnnxRuntime(gpu, ALL)
    monkeypatch.setattr(gpu_device, "open_device", lambda: device)
    monkeypatch.setattr(
        ours.optional, "require", lambda name: fake if name == "onnxruntime" else sys.modules[name]
    )
    plugin = types.ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    plugin.get_ep_name = lambda: fake_ort.RTX  # type: ignore[attr-defined]
    plugin.get_library_path = lambda: "plugin.so"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", plugin)
    return fake


def opened(spec: str, path: Path, batch_size: int = 4) -> Any:
    return create(f"onnxruntime:{spec}").open(artifact_of(path), batch_size=batch_size, threads=2)


@pytest.mark.parametrize("mode", ["cuda", "tensorrt", "tensorrt-rtx"])
def test_results_come_through_device_memory(ort: fake_ort.OnnxRuntime, tmp_path: Path, mode: str) -> None:
    session = opened(mode, saved(tmp_path / "m.onnx"))
    for count in (4, 2, 4):
        images = np.random.default_rng(count).standard_normal((count, *IMAGE), dtype=np.float32)
        np.testing.assert_allclose(session.run(images)[0], expected(images), rtol=1e-5)
    assert ort.sessions[-1].provider == gpu_ort.PROVIDERS[mode]
    assert len(ort.sessions[-1].bindings) == 3, "bound anew for another shape only"


@pytest.mark.parametrize(
    ("spec", "taken", "log"),
    [
        ("cuda", 3.75, ["upload", "session", "download"]),
        ("cuda+device", 3.0, ["session"]),
        ("tensorrt+device+flush-l2", 3.0, ["fill", "session"]),
    ],
)
def test_what_is_timed(
    ort: fake_ort.OnnxRuntime, gpu: Gpu, tmp_path: Path, spec: str, taken: float, log: list[str]
) -> None:
    session = opened(spec, saved(tmp_path / "m.onnx"))
    call = session.bind(np.ones((4, *IMAGE), np.float32))
    gpu.log.clear()
    assert call() == taken
    assert gpu.log == log
    executed = session.executed
    assert (executed.clock, executed.device) == ("cuda events", "cuda")
    assert executed.transfers is ("device" not in spec)


def test_the_session_computes_on_the_stream_that_is_timed(ort: fake_ort.OnnxRuntime, tmp_path: Path) -> None:
    session = opened("cuda+graph", saved(tmp_path / "m.onnx"))
    options = ort.sessions[-1].provider_options
    assert options == {
        "device_id": "0", "has_user_compute_stream": "1", "user_compute_stream": str(session._lane.stream.handle),
        "use_tf32": "0", "enable_cuda_graph": "1",
    }  # fmt: skip
    session.bind(np.ones((4, *IMAGE), np.float32))
    assert ort.sessions[-1].runs == 3, "warmed up before its graph is captured"


def test_tensorrt_is_allowed_the_precisions_that_the_graph_has(
    ort: fake_ort.OnnxRuntime, tmp_path: Path
) -> None:
    def options(path: Path) -> dict[str, str]:
        session = opened("tensorrt", path, batch_size=8)
        labels.append(session.executed.precision)
        found: dict[str, str] = ort.sessions[-1].provider_options
        return found

    labels: list[str] = []
    plain = options(saved(tmp_path / "fp32.onnx"))
    half = options(saved(tmp_path / "fp16.onnx", TensorProto.FLOAT16))
    quantized = options(saved(tmp_path / "int8.onnx", op="DequantizeLinear"))
    flags = [(found["trt_fp16_enable"], found["trt_int8_enable"]) for found in (plain, half, quantized)]
    assert flags == [("0", "0"), ("1", "0"), ("0", "1")]
    assert labels == ["tf32", "f16", "int8+tf32"]
    assert {plain[f"trt_profile_{bound}_shapes"] for bound in ("min", "opt", "max")} == {"images:8x3x2x2"}
    folder = Path(plain["trt_engine_cache_path"])
    assert folder.is_dir()
    assert folder.parent.stat().st_mode & 0o077 == 0, "engines are code: nobody else may put one there"


def test_rtx_comes_as_a_plug_in(ort: fake_ort.OnnxRuntime, tmp_path: Path) -> None:
    opened("tensorrt-rtx+graph", saved(tmp_path / "m.onnx"))
    assert ort.registered == {fake_ort.RTX: "plugin.so"}
    options = ort.sessions[-1].provider_options
    assert options["enable_cuda_graph"] == "1"
    assert options["nv_profile_opt_shapes"] == "images:4x3x2x2"
    ort.serves = False
    with pytest.raises(RuntimeUnavailable, match="finds no GPU that it serves"):
        opened("tensorrt-rtx", saved(tmp_path / "m.onnx"))


def test_a_plug_in_that_does_not_load_is_said(
    ort: fake_ort.OnnxRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys.modules["onnxruntime_ep_nv_tensorrt_rtx"], "get_library_path", lambda: "broken.so"
    )
    found = create("onnxruntime:tensorrt-rtx").availability()
    assert not found.ok
    assert "libcudart.so.13: cannot open" in found.why
    assert "deploycnn[onnxruntime-rtx]" in found.mend


def test_a_provider_that_does_not_load_is_never_the_cpu(ort: fake_ort.OnnxRuntime, tmp_path: Path) -> None:
    ort.loads = False
    with pytest.raises(
        RuntimeUnavailable, match=r"TensorrtExecutionProvider is listed but did not load.*libnvinfer"
    ):
        opened("tensorrt", saved(tmp_path / "m.onnx"))
    ort.providers = ()
    with pytest.raises(RuntimeUnavailable, match="has no TensorrtExecutionProvider"):
        opened("tensorrt", saved(tmp_path / "m.onnx"))
    assert not create("onnxruntime:tensorrt").availability().ok


def test_products_that_the_provider_does_not_take_are_named(
    ort: fake_ort.OnnxRuntime, tmp_path: Path
) -> None:
    ort.stray = "MatMul"
    with pytest.raises(RuntimeUnavailable, match="TensorrtExecutionProvider does not take MatMul MatMul_0"):
        opened("tensorrt", saved(tmp_path / "m.onnx"))
    ort.stray = "Shape"
    opened("tensorrt", saved(tmp_path / "m.onnx"))


def test_outputs_of_unknown_shape_or_type_are_refused(ort: fake_ort.OnnxRuntime, tmp_path: Path) -> None:
    session = opened("cuda", saved(tmp_path / "m.onnx"))
    ort.output_shape = ["N", "classes"]
    with pytest.raises(ArtifactError, match='shape of output "logits"'):
        session.run(np.ones((4, *IMAGE), np.float32))
    ort.output_shape, ort.output_type = ["N", 4], "tensor(int64)"
    with pytest.raises(ArtifactError, match=r'"logits" is tensor\(int64\)'):
        session.run(np.ones((4, *IMAGE), np.float32))


def test_a_graph_whose_size_is_dynamic_has_no_profile(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    onnx.save(model, path)
    stat = path.stat()
    assert graph_facts(path, stat.st_size, stat.st_mtime_ns).profile(4) is None


def test_the_fake_has_only_names_that_onnxruntime_has() -> None:
    def public(cls: type) -> set[str]:
        return {name for name in vars(cls) if not name.startswith("_")}

    real = onnxruntime
    assert public(fake_ort.OnnxRuntime) <= set(dir(real))
    assert public(fake_ort.Session) <= set(dir(real.InferenceSession))
    assert public(fake_ort.Binding) <= set(dir(real.IOBinding))
    assert public(fake_ort.SessionOptions) <= set(dir(real.SessionOptions))
    assert public(fake_ort.RunOptions) <= set(dir(real.RunOptions))
