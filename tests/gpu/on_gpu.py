"""What tests share that need an NVIDIA GPU: what is here, engines with their manifests, references on the CPU."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from deploycnn.core import Artifact, Facts
from deploycnn.engines import building, device, flavour, vouch
from deploycnn.engines.device import Gpu
from deploycnn.engines.flavour import Flavour, Name
from deploycnn.engines.settings import BuildSettings
from deploycnn.errors import ArtifactError, RuntimeUnavailable
from deploycnn.gpu import device as gpu_device
from deploycnn.graph.fp16 import convert_fp16
from deploycnn.runtimes.base import create
from deploycnn.runtimes.tensorrt import EngineSession
from tests.engines import graphs
from tests.gpu import simulated

MODES = {"tensorrt": "trt", "tensorrt-rtx": "rtx"}
#: Largest error as a share of the largest output, by precision: a few of its rounding steps.
TOLERANCE = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 1e-2, "bf16": 5e-2, "int8": 1e-3, "int8_fp16": 1e-2}


def graph(precision: str) -> onnx.ModelProto:
    """The graph that an engine of this precision is built from."""
    if precision in ("fp32", "tf32"):
        return graphs.net()
    if precision == "int8":
        return graphs.quantized()
    if precision == "int8_fp16":
        return convert_fp16(graphs.quantized())[0]
    return convert_fp16(graphs.net(), half="bf16" if precision == "bf16" else "fp16")[0]


def reference_graph(precision: str) -> onnx.ModelProto:
    """The same in float32 between its Q/DQ nodes."""
    return graphs.quantized() if precision.startswith("int8") else graphs.net()


def images(count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Values a fifth of a step beside those that ``graphs.quantized`` rounds to, so that rounding has no ties."""
    steps = np.random.default_rng(seed).integers(-100, 101, (count, 8, 12, 12))
    return ((steps + 0.2) * 0.05).astype(np.float32)


def expected(proto: onnx.ModelProto, given: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """onnxruntime on the CPU, each operator by itself."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: npt.NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: given})[0]
    return found


def assert_close(found: Any, wanted: Any, tolerance: float) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * float(np.abs(wanted).max()))


def artifact_of(path: Path, precision: str = "") -> Artifact:
    kind: Any = "engine" if path.suffix == ".engine" else "onnx"
    return Artifact(
        key="k", format=kind, path=path, inputs=(), outputs=(), parents=(), facts=Facts(precision=precision)
    )


def engine(
    proto: onnx.ModelProto, folder: Path, found: Flavour, here: Gpu | None, **settings: Any
) -> Artifact:
    """Build an engine and vouch for it; the graph lies beside it."""
    source = graphs.saved(proto, folder)
    built = building.build(source, found, BuildSettings(**settings), gpu=here)
    path = folder / "model.engine"
    path.write_bytes(built.plan)
    content = {
        "files": {path.name: {"sha256": hashlib.sha256(built.plan).hexdigest()}},
        "facts": {"record": {"engine": built.record.to_json()}},
    }
    path.with_name("manifest.json").write_text(json.dumps(content))
    return artifact_of(path)


def opened(made: Artifact, found: Flavour, *options: str, batch_size: int = 2) -> EngineSession:
    spec = "+".join([f"tensorrt:{MODES[found.name]}", *options])
    session = create(spec).open(made, batch_size=batch_size, threads=1)
    assert isinstance(session, EngineSession)
    return session


def real() -> Gpu:
    """The GPU; without one the test is skipped and says why."""
    try:
        return device.require_gpu()
    except RuntimeUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def here() -> Gpu:
    """The GPU that tests run on: the real one, or behind ``trt`` the one that it simulates."""
    return real()


def require(name: Name, folder: Path) -> Flavour:
    """The flavour, or a skip that says why it cannot be tested here."""
    gpu = real()
    try:
        found = flavour.find(name)
        gpu_device.open_device()
    except RuntimeUnavailable as error:
        pytest.skip(str(error))
    capability = f"{gpu.capability[0]}.{gpu.capability[1]}"
    if found.is_rtx and capability not in found.capabilities:
        plan = engine(graphs.net(), folder, found, gpu).path.read_bytes()
        try:
            found.deserialize(plan, what="an engine for Ampere and newer")
        except (ArtifactError, RuntimeUnavailable) as error:
            pytest.skip(f"{name} {found.version} does not list compute capability {capability}: {error}")
    return found


def simulate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Flavour:
    """TensorRT-RTX on the fake GPU; see ``simulated``."""
    rtx = request.getfixturevalue("rtx")
    fake, taken = request.getfixturevalue("gpu"), request.getfixturevalue("device")
    fake.total = 2**26
    found = simulated.Simulated(rtx, fake)
    found.watch(monkeypatch)
    monkeypatch.setattr(flavour, "find", lambda _: found)
    monkeypatch.setattr(device, "require_gpu", lambda: simulated.HERE)
    monkeypatch.setattr(vouch, "current_gpu", lambda: simulated.HERE)
    monkeypatch.setattr(gpu_device, "open_device", lambda *_: taken)
    return found


_REAL = [pytest.param(name, marks=pytest.mark.gpu) for name in MODES]


@pytest.fixture(params=["simulated", *_REAL])
def trt(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flavour:
    """Each flavour that is installed and serves this GPU; without one, a simulated GPU."""
    if request.param == "simulated":
        return simulate(request, monkeypatch)
    return require(request.param, tmp_path / "probe")


@pytest.fixture(params=_REAL)
def real_trt(request: pytest.FixtureRequest, tmp_path: Path) -> Flavour:
    """Each flavour on the real GPU, for what cannot be simulated."""
    return require(request.param, tmp_path / "probe")


@pytest.fixture(params=_REAL[:1])
def plain_trt(request: pytest.FixtureRequest, tmp_path: Path) -> Flavour:
    """TensorRT 10 or 11 on the real GPU, for what TensorRT-RTX does not have."""
    return require(request.param, tmp_path / "probe")


@pytest.fixture(params=_REAL[1:])
def real_rtx(request: pytest.FixtureRequest, tmp_path: Path) -> Flavour:
    """TensorRT-RTX on the real GPU."""
    return require(request.param, tmp_path / "probe")


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.gpu) for name in ("pycuda", "torch")])
def real_device(request: pytest.FixtureRequest) -> Iterator[gpu_device.Device]:
    """The real GPU through either package."""
    real()
    from deploycnn import optional

    if request.param == "pycuda" and not optional.installed("pycuda"):
        pytest.skip('PyCUDA is not installed; pip install "deploycnn[pycuda]" (it needs the CUDA toolkit)')
    try:
        yield gpu_device.open_device(request.param)
    except RuntimeUnavailable as error:
        pytest.skip(str(error))
