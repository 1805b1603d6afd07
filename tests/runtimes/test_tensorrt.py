"""The TensorRT runner on a fake GPU: results, order of work, profiles, graphs, streams, timing."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploycnn.core import Artifact, Facts
from deploycnn.engines import device as engines_device
from deploycnn.engines import flavour as flavours
from deploycnn.engines import vouch
from deploycnn.engines.device import Gpu as Described
from deploycnn.engines.settings import EngineRecord
from deploycnn.errors import ArtifactError, RecipeError, RuntimeUnavailable
from deploycnn.gpu import device as gpu_device
from deploycnn.gpu import lane
from deploycnn.gpu.pycuda_device import PycudaDevice
from deploycnn.runtimes import tensorrt
from deploycnn.runtimes.base import create, parse_spec
from deploycnn.runtimes.tensorrt import EngineSession
from tests.engines.test_names import RTX, TENSORRT, names_of
from tests.gpu.fakes import DriverLibrary, Gpu
from tests.runtimes.fake_engine import IMAGE, Context, Engine, Flavour, expected

RNG = np.random.default_rng(0)


def images(count: int) -> np.ndarray:
    return RNG.standard_normal((count, *IMAGE), dtype=np.float32)


@pytest.fixture
def engine_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.engine"
    path.write_bytes(b"plan")
    return path


@pytest.fixture
def open_session(device: PycudaDevice, gpu: Gpu, engine_file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_device, "open_device", lambda: device)
    monkeypatch.setattr(tensorrt, "_RUNTIME_CACHES", {})

    def opened(*options: str, flavour: Flavour | None = None, engine: Engine | None = None) -> EngineSession:
        return EngineSession(flavour or Flavour(), engine or Engine(gpu), engine_file, options)  # type: ignore[arg-type]

    return opened


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_results_are_the_engines_at_every_batch_size(open_session, gpu: Gpu, dtype: str) -> None:
    session = open_session(engine=Engine(gpu, dtype))
    for count in (1, 8, 3, 16):
        given = images(count)
        [found] = session.run(given)
        assert found.dtype == np.float32
        assert found.shape == (count, 4)
        np.testing.assert_allclose(
            found, expected(given), rtol=2e-2 if dtype == "float16" else 1e-5, atol=2e-2
        )
    assert len(session._engine.contexts) == 1, "one context serves all calls"


def test_results_are_the_callers_own(open_session) -> None:
    session = open_session()
    one, two = images(2), images(2)
    [first] = session.run(one)
    session.run(two)
    np.testing.assert_allclose(first, expected(one), rtol=1e-5)


def test_an_input_outside_every_profile_names_them(open_session) -> None:
    session = open_session()
    with pytest.raises(
        ArtifactError,
        match=r"an input of 9 x 3 x 2 x 2 is outside the engine's profile \(1 x 3 x 2 x 2 to 8 x 3 x 2 x 2 or 16 x "
        r"3 x 2 x 2 to 16 x 3 x 2 x 2\); choose a batch size",
    ):
        session.run(images(9))
    with pytest.raises(ArtifactError, match="outside"):
        session.check_batch(17)
    assert session.check_batch(8) == 0
    assert session.check_batch(16) == 1
    with pytest.raises(ArtifactError, match=r"the input is N x 3 x 2 x 2, but the images are 1 x 3 x 4 x 4"):
        session.run(np.zeros((1, 3, 4, 4), np.float32))


def test_the_bound_call_times_copies_and_engine_by_the_devices_clock(open_session, gpu: Gpu) -> None:
    session = open_session()
    call = session.bind(images(4))
    gpu.log.clear()
    assert call() == 0.5 + 2.0 + 0.25
    assert gpu.log == ["upload", "engine", "download"]


def test_on_the_device_only_the_engine_is_timed(open_session, gpu: Gpu) -> None:
    session = open_session("device")
    call = session.bind(images(4))
    gpu.log.clear()
    assert call() == 2.0
    assert gpu.log == ["engine"]


def test_flushing_comes_before_the_timed_run(open_session, gpu: Gpu) -> None:
    call = open_session("device", "flush-l2").bind(images(1))
    gpu.log.clear()
    assert call() == 2.0
    assert gpu.log == ["fill", "engine"]


@pytest.mark.parametrize(("options", "work"), [(("graph",), 2.75), (("graph", "device"), 2.0)])
def test_a_graph_replays_without_enqueuing(
    open_session,
    gpu: Gpu,
    driver: DriverLibrary,
    options: tuple[str, ...],
    work: float,
) -> None:
    session = open_session(*options)
    call = session.bind(images(4))
    context = session._engine.contexts[-1]
    assert context.ran == 1, "one run before the capture, for kernels that are loaded lazily"
    context.fails = True  # whatever is enqueued from now on fails
    assert [call(), call()] == [work, work]
    assert context.ran == 3
    assert len(driver.graphs) == 1


def test_rtx_captures_graphs_itself_and_keeps_its_compiled_kernels(
    open_session, driver: DriverLibrary
) -> None:
    flavour = Flavour(is_rtx=True)
    session = open_session("graph", flavour=flavour)
    assert session.bind(images(2))() == 2.75
    assert flavour.caches == [(b"", True)]
    assert not driver.graphs
    again = open_session(flavour=flavour)
    again.run(images(2))
    assert flavour.caches[1:] == [(b"kernels", False)]


def test_bound_calls_and_runs_do_not_disturb_each_other(open_session) -> None:
    session = open_session()
    bound = [images(2), images(5)]
    calls = [session.bind(batch) for batch in bound]
    for call, batch in zip(calls, bound, strict=True):
        other = images(3)
        np.testing.assert_allclose(session.run(other)[0], expected(other), rtol=1e-5)
        call()
        del batch
    assert len({context.addresses["images"] for context in session._engine.contexts}) == 3


def test_streams_run_side_by_side_on_contexts_of_their_own(open_session, gpu: Gpu) -> None:
    session = open_session("device")
    call = session.concurrent(images(4), 3)
    before = [context.ran for context in session._engine.contexts]
    call()
    assert [context.ran for context in session._engine.contexts] == [count + 1 for count in before]
    assert len(before) == 3
    assert len({context.addresses["logits"] for context in session._engine.contexts}) == 3


def test_times_of_layers_come_from_a_context_of_their_own(open_session) -> None:
    session = open_session()
    session.run(images(2))
    assert session.layer_times(images(4), runs=2) == {"sum": 1.5, "scale": 0.5}
    assert session._engine.contexts[0].profiler is None
    assert session._lanes == [session._lane], "the context with the profiler serves nothing else"


def test_what_the_engine_cannot_do_is_an_error(open_session, gpu: Gpu) -> None:
    with pytest.raises(ArtifactError, match=r"2 inputs \(images, more1\)"):
        open_session(engine=Engine(gpu, inputs=2))
    with pytest.raises(ArtifactError, match='"images" is int8; export with inputs and outputs in float32'):
        open_session(engine=Engine(gpu, "int8"))
    with pytest.raises(ArtifactError, match='shape of output "logits" depends on the data'):
        open_session(engine=Engine(gpu, data_dependent=True)).run(images(1))
    session = open_session()
    session.run(images(1))
    session._engine.contexts[0].fails = True
    with pytest.raises(ArtifactError, match="fails at running it"):
        session.run(images(1))


def test_device_memory_that_does_not_suffice_names_the_batch_size(open_session, gpu: Gpu) -> None:
    gpu.total = 600
    session = open_session()
    with pytest.raises(RuntimeUnavailable, match="out of device memory.*choose a smaller batch size"):
        session.run(images(16))
    [found] = session.run(images(2))
    assert found.shape == (2, 4)


def test_torch_tensors_are_used_where_they_lie(open_session) -> None:
    import torch

    with pytest.raises(
        ArtifactError, match=r"a contiguous torch\.float32 tensor on the GPU is needed, got .* on cpu"
    ):
        open_session().run_tensor(torch.zeros(1, *IMAGE))


@pytest.mark.parametrize(
    ("spec", "mode"),
    [
        ("tensorrt", "trt"),
        ("tensorrt:rtx", "rtx"),
        ("tensorrt:trt+device+graph", "trt+graph+device"),
        ("tensorrt:rtx+blocking+flush-l2+trust", "rtx+flush-l2+blocking+trust"),
        ("tensorrt:trt+graph+graph", "trt+graph"),
        ("tensorrt:+graph", "trt+graph"),
    ],
)
def test_specs(spec: str, mode: str) -> None:
    assert parse_spec(spec) == ("tensorrt", mode)
    runtime = create(spec)
    assert "+".join([runtime.mode, *runtime.options]) == mode


@pytest.mark.parametrize(
    ("spec", "message"),
    [("tensorrt:trt+grpah", 'unknown option "grpah" of tensorrt:trt; did you mean "graph"'),
     ("onnxruntime:cpu+graph", 'unknown option "graph" of onnxruntime:cpu; None are known'),
     ("tensorrt:cuda", 'unknown mode "cuda"')],
)  # fmt: skip
def test_unknown_options(spec: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_spec(spec)


@pytest.mark.parametrize("version", [*TENSORRT, RTX])
def test_every_member_of_the_context_that_is_used_exists_in_each_flavour(version: str) -> None:
    known = names_of(version)["IExecutionContext"]
    assert set(lane.USED) <= known
    assert {name for name in vars(Context) if not name.startswith("_")} <= known, (
        "the fake has only real names"
    )
    used = {
        node.attr
        for module in (tensorrt, lane)
        for node in ast.walk(ast.parse(Path(module.__file__).read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert used & known <= {*lane.USED, "name", "profiler"}, "a member that USED does not list"


H100 = Described(name="NVIDIA H100 80GB HBM3", capability=(9, 0), driver_cuda="13.0")
RECORD = EngineRecord(
    flavour="tensorrt", version="11.4.0.106", gpu=H100.name, capability="9.0", compute_capabilities=(),
    hardware_compatibility="none", version_compatible=False, weight_stripped=False, batch=(1, 4, 8), onnx_sha256="",
)  # fmt: skip


def artifact_of(path: Path) -> Artifact:
    return Artifact(key="k", format="engine", path=path, inputs=(), outputs=(), parents=(), facts=Facts())


def manifest(path: Path, record: EngineRecord = RECORD, **changed: Any) -> None:
    content = {
        "files": {path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}},
        "facts": {"record": {"engine": dataclasses.replace(record, **changed).to_json()}},
    }
    path.with_name("manifest.json").write_text(json.dumps(content))


class Loading(Flavour):
    """Loads any plan, and says what it was given."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.loaded: list[tuple[bytes, bool]] = []
        self.refitted: list[bytes] = []

    def deserialize(self, plan: bytes, *, what: str, host_code_allowed: bool = False) -> Engine:
        self.loaded.append((plan, host_code_allowed))
        return Engine(self.gpu)

    def refit(self, engine: Engine, onnx_model: bytes, *, what: str) -> None:
        self.refitted.append(onnx_model)

    def runtime(self) -> None: ...


@pytest.fixture
def loading(open_session: Any, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Loading:
    found = Loading(gpu)
    monkeypatch.setattr(flavours, "find", lambda _: found)
    monkeypatch.setattr(engines_device, "require_gpu", lambda: H100)
    monkeypatch.setattr(vouch, "current_gpu", lambda: H100)
    return found


def test_an_engine_that_is_vouched_for_is_opened(loading: Loading, engine_file: Path) -> None:
    manifest(engine_file, version_compatible=True)
    session = create("tensorrt:trt").open(artifact_of(engine_file), batch_size=8, threads=1)
    given = images(8)
    np.testing.assert_allclose(session.run(given)[0], expected(given), rtol=1e-5)
    assert loading.loaded == [(b"plan", True)]
    session.close()


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"flavour": "tensorrt-rtx"}, "an engine of tensorrt-rtx"), ({"version": "10.16.1.11"}, "built by tensorrt 10.16"),
     ({"gpu": "NVIDIA L4", "capability": "8.9"}, "built for NVIDIA L4")],
)  # fmt: skip
def test_engines_from_elsewhere_are_not_loaded(
    loading: Loading, engine_file: Path, changed: dict[str, str], message: str
) -> None:
    manifest(engine_file, **changed)
    with pytest.raises(ArtifactError, match=message):
        create("tensorrt:trt").open(artifact_of(engine_file), batch_size=8, threads=1)
    assert not loading.loaded, "an engine is code: it must not be loaded before it is checked"


def test_a_tampered_engine_is_not_loaded(loading: Loading, engine_file: Path) -> None:
    manifest(engine_file)
    engine_file.write_bytes(b"evil")
    with pytest.raises(ArtifactError, match="changed since it was made"):
        create("tensorrt:trt+trust").open(artifact_of(engine_file), batch_size=8, threads=1)
    assert not loading.loaded


def test_an_engine_without_a_manifest_needs_the_flag(loading: Loading, engine_file: Path) -> None:
    with pytest.raises(ArtifactError, match="no manifest beside it vouches"):
        create("tensorrt:trt").open(artifact_of(engine_file), batch_size=8, threads=1)
    assert not loading.loaded
    create("tensorrt:trt+trust").open(artifact_of(engine_file), batch_size=8, threads=1)
    assert loading.loaded == [(b"plan", False)]


def test_a_batch_outside_the_profile_is_refused_when_it_is_opened(
    loading: Loading, engine_file: Path
) -> None:
    manifest(engine_file)
    with pytest.raises(ArtifactError, match="an input of 64 x 3 x 2 x 2 is outside"):
        create("tensorrt:trt").open(artifact_of(engine_file), batch_size=64, threads=1)


def test_a_weight_stripped_engine_gets_the_weights_it_was_built_from(
    loading: Loading, engine_file: Path
) -> None:
    manifest(engine_file, weight_stripped=True, onnx_sha256=hashlib.sha256(b"onnx").hexdigest())
    opened = create("tensorrt:trt")
    with pytest.raises(ArtifactError, match=r"holds no weights, and model\.onnx with them is not beside it"):
        opened.open(artifact_of(engine_file), batch_size=1, threads=1)
    engine_file.with_name("model.onnx").write_bytes(b"other")
    with pytest.raises(ArtifactError, match="is not the file that"):
        opened.open(artifact_of(engine_file), batch_size=1, threads=1)
    engine_file.with_name("model.onnx").write_bytes(b"onnx")
    opened.open(artifact_of(engine_file), batch_size=1, threads=1)
    assert loading.refitted == [b"onnx"]


def test_availability(loading: Loading, monkeypatch: pytest.MonkeyPatch) -> None:
    found = create("tensorrt:trt").availability()
    assert (found.ok, found.version) == (True, "11.4.0.106")

    def none() -> None:
        raise RuntimeUnavailable("no NVIDIA driver on this machine; run on a GPU host")

    monkeypatch.setattr(engines_device, "require_gpu", none)
    absent = create("tensorrt:trt").availability()
    assert (absent.ok, absent.why, absent.mend) == (
        False,
        "no NVIDIA driver on this machine",
        "run on a GPU host",
    )
