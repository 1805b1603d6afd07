"""Engines that run, with each TensorRT that is there: `pytest -m gpu` on a host with an NVIDIA GPU.

By default the same tests run with TensorRT-RTX building for real and a simulated GPU. The reference is onnxruntime on
the CPU. Nothing here asserts on time.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from deploycnn.cli import main
from deploycnn.engines import building
from deploycnn.engines.auditing import audit_engine
from deploycnn.engines.device import Gpu
from deploycnn.engines.flavour import Flavour
from deploycnn.engines.settings import BuildSettings
from deploycnn.errors import ArtifactError
from deploycnn.gpu import device as gpu_device
from deploycnn.gpu.device import Device
from deploycnn.graph.fp16 import convert_fp16
from tests.engines import graphs
from tests.gpu import on_gpu
from tests.gpu.on_gpu import TOLERANCE, assert_close, expected, images, opened
from tests.gpu.simulated import Simulated


@pytest.mark.parametrize("precision", TOLERANCE)
def test_an_engine_answers_what_onnxruntime_does(
    precision: str, trt: Flavour, here: Gpu, tmp_path: Path
) -> None:
    if precision == "bf16" and isinstance(trt, Simulated):
        pytest.skip("onnxruntime, which stands for the GPU here, has no BF16 convolution on CPUs")
    made = on_gpu.engine(on_gpu.graph(precision), tmp_path, trt, here, tf32=precision == "tf32")
    session = opened(made, trt)
    given = images(5)
    assert_close(
        session.run(given)[0], expected(on_gpu.reference_graph(precision), given), TOLERANCE[precision]
    )
    session.close()


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8_fp16"])
def test_the_audit_says_that_it_runs_as_asked(
    precision: str, trt: Flavour, here: Gpu, tmp_path: Path
) -> None:
    proto = on_gpu.graph(precision)
    made = on_gpu.engine(proto, tmp_path, trt, here)
    given = images(2)
    session = opened(made, trt)
    times = session.layer_times(given, runs=5)
    assert all(math.isfinite(value) and value >= 0 for value in times.values())
    session.close()
    (tmp_path / "times.json").write_text(json.dumps(times))
    audited = audit_engine(made.path, onnx=tmp_path / "model.onnx", times=tmp_path / "times.json")
    assert audited.source == "inspector"
    assert not audited.audit.unmatched
    main = precision.partition("_")[0]
    if not (trt.is_rtx and main == "int8"):  # TensorRT-RTX may leave INT8 convolutions in float
        assert audited.audit.shares[main] > 0.5
    assert audited.audit.total_ms is not None
    assert audited.audit.total_ms > 0
    assert "cost" in audited.audit.census()
    timed = [row for row in audited.audit.rows if row.macs]
    assert timed
    assert all(row.time_ms is not None for row in timed), "the profiler's names are the inspector's"


def test_the_audit_measures_by_itself(
    trt: Flavour, here: Gpu, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = on_gpu.engine(graphs.net(), tmp_path, trt, here)
    onnx_file = str(tmp_path / "model.onnx")
    assert main(["audit", str(made.path), "--onnx", onnx_file, "--measure", "2", "--json"]) == 0
    printed = capsys.readouterr().out
    content = json.loads(printed[printed.index("{") :])
    assert content["metrics"]["time_ms"] > 0
    assert main(["audit", str(made.path), "--onnx", onnx_file, "--measure", "64"]) == 2
    assert "outside the engine's profile" in capsys.readouterr().err


def test_mixed_precision_runs_both(trt: Flavour, here: Gpu, tmp_path: Path) -> None:
    proto, _ = convert_fp16(graphs.net(), keep_ops=("conv2",))
    made = on_gpu.engine(proto, tmp_path, trt, here)
    given = images(3)
    assert_close(opened(made, trt).run(given)[0], expected(graphs.net(), given), TOLERANCE["fp16"])
    audited = audit_engine(made.path, onnx=tmp_path / "model.onnx")
    assert {item.asked for item in audited.audit.rows if item.macs} == {"fp16", "fp32"}


def test_batches_within_the_profile_run_and_others_are_refused(
    trt: Flavour, here: Gpu, tmp_path: Path
) -> None:
    made = on_gpu.engine(graphs.net(), tmp_path, trt, here, batch=(2, 3, 6))
    session = opened(made, trt)
    for count in (2, 6, 3, 5):
        given = images(count, seed=count)
        assert_close(session.run(given)[0], expected(graphs.net(), given), TOLERANCE["fp32"])
    for count in (1, 7):
        with pytest.raises(ArtifactError, match=r"outside the engine's profile \(2 x 8 x 12 x 12 to 6 x"):
            session.run(images(count))
    assert_close(session.run(images(4))[0], expected(graphs.net(), images(4)), TOLERANCE["fp32"])
    with pytest.raises(ArtifactError, match="outside"):
        opened(made, trt, batch_size=7)


@pytest.mark.parametrize(
    "options", [(), ("device",), ("graph",), ("graph", "device"), ("flush-l2",), ("blocking",)]
)
def test_bound_calls_are_timed_by_events_and_leave_the_right_outputs(
    options: tuple[str, ...], trt: Flavour, here: Gpu, tmp_path: Path
) -> None:
    made = on_gpu.engine(graphs.net(), tmp_path, trt, here)
    session = opened(made, trt, *options)
    given = images(4)
    call = session.bind(given)
    taken = [call() for _ in range(5)]
    assert all(value is not None and math.isfinite(value) and value > 0 for value in taken)
    executed = session.executed
    assert (executed.clock, executed.device) == ("cuda events", "cuda")
    assert executed.transfers is ("device" not in options)
    lane = session._lanes[-1]
    if "device" in options:  # what the timed runs left on the device
        lane._device.download(lane.host_outputs[0], lane._buffers[1], lane.stream)
        lane.synchronize()
    assert_close(lane.host_outputs[0], expected(graphs.net(), given), TOLERANCE["fp32"])
    session.close()


def test_a_graph_replays_on_new_inputs(trt: Flavour, here: Gpu, tmp_path: Path) -> None:
    session = opened(on_gpu.engine(graphs.net(), tmp_path, trt, here), trt, "graph")
    call = session.bind(images(4))
    for seed in (1, 2):
        given = images(4, seed=seed)
        session._lanes[-1].set_input(given)
        call()
        wanted = expected(graphs.net(), given)
        assert_close(session._lanes[-1].host_outputs[0], wanted, TOLERANCE["fp32"])


def test_flushing_overwrites_more_than_the_cache(trt: Flavour, here: Gpu) -> None:
    opened_device = gpu_device.open_device()
    clock = gpu_device.StreamClock(opened_device, opened_device.stream(), ("flush-l2",))
    assert clock._scratch is not None
    assert clock._scratch.nbytes >= 2 * opened_device.l2_bytes > 0


def test_contexts_on_streams_of_their_own_do_not_disturb_each_other(
    trt: Flavour, here: Gpu, tmp_path: Path
) -> None:
    session = opened(on_gpu.engine(graphs.net(), tmp_path, trt, here), trt)
    call = session.concurrent(images(4), 3)
    lanes = session._lanes[-3:]
    batches = [images(4, seed=seed) for seed in range(3)]
    for lane, given in zip(lanes, batches, strict=True):
        lane.set_input(given)
    for _ in range(3):
        call()
    assert len({lane._handle for lane in lanes}) == 3
    for lane, given in zip(lanes, batches, strict=True):
        assert_close(lane.host_outputs[0], expected(graphs.net(), given), TOLERANCE["fp32"])
    other = images(2, seed=9)
    assert_close(session.run(other)[0], expected(graphs.net(), other), TOLERANCE["fp32"])


@pytest.mark.parametrize("side_stream", [False, True])
def test_torch_tensors_are_read_and_written_where_they_lie(
    side_stream: bool, real_trt: Flavour, here: Gpu, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip(f"PyTorch {torch.__version__} finds no CUDA device")
    session = opened(on_gpu.engine(graphs.net(), tmp_path, real_trt, here), real_trt)
    given = images(4)
    tensor = torch.from_numpy(given).cuda()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream() if side_stream else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        [output] = session.run_tensor(tensor)
    stream.synchronize()
    context = session._own_lane().context
    assert context.get_tensor_address("images") == tensor.data_ptr(), "nothing was copied"
    assert context.get_tensor_address("logits") == output.data_ptr()
    assert output.is_cuda
    assert_close(output.cpu().numpy(), expected(graphs.net(), given), TOLERANCE["fp32"])
    # and the session's own buffers serve again
    assert_close(session.run(given)[0], output.cpu().numpy(), TOLERANCE["fp32"])
    with pytest.raises(ArtifactError, match="not contiguous"):
        session.run_tensor(tensor.transpose(2, 3))
    with pytest.raises(ArtifactError, match="float32"):
        session.run_tensor(tensor.half())


def test_buffers_of_either_package_serve(
    real_trt: Flavour, here: Gpu, real_device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_device, "open_device", lambda *_: real_device)
    for options in ((), ("graph",)):
        session = opened(on_gpu.engine(graphs.net(), tmp_path, real_trt, here), real_trt, *options)
        assert real_device.name in session.executed.provider
        given = images(3)
        assert session.bind(given)() is not None
        assert_close(session.run(given)[0], expected(graphs.net(), given), TOLERANCE["fp32"])
        session.close()


def test_a_weight_stripped_engine_gets_its_weights_when_it_is_opened(
    real_trt: Flavour, here: Gpu, tmp_path: Path
) -> None:
    full = on_gpu.engine(graphs.net(), tmp_path / "full", real_trt, here)
    made = on_gpu.engine(graphs.net(), tmp_path / "stripped", real_trt, here, weight_stripped=True)
    assert made.path.stat().st_size < full.path.stat().st_size
    given = images(3)
    assert_close(opened(made, real_trt).run(given)[0], expected(graphs.net(), given), TOLERANCE["fp32"])
    made.path.with_name("model.onnx").unlink()
    with pytest.raises(ArtifactError, match="holds no weights"):
        opened(made, real_trt)


def test_a_refittable_engine_takes_other_weights(real_trt: Flavour, here: Gpu, tmp_path: Path) -> None:
    import onnx

    made = on_gpu.engine(graphs.net(), tmp_path / "a", real_trt, here, refittable=True)
    other = graphs.net()
    for tensor in other.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(0.5 * values[::-1].copy(), tensor.name))
    loaded = real_trt.deserialize(made.path.read_bytes(), what="model.engine")
    real_trt.refit(loaded, other.SerializeToString(), what="model.engine")
    from deploycnn.runtimes.tensorrt import EngineSession

    session = EngineSession(real_trt, loaded, made.path, ())
    given = images(2)
    assert_close(session.run(given)[0], expected(other, given), TOLERANCE["fp32"])


def test_timings_are_reused_by_the_next_build(plain_trt: Flavour, here: Gpu, tmp_path: Path) -> None:
    path = graphs.saved(graphs.net(), tmp_path)
    first = building.build(path, plain_trt, BuildSettings(), gpu=here)
    assert first.timing_cache
    second = building.build(path, plain_trt, BuildSettings(), gpu=here, timing_cache=first.timing_cache)
    assert second.timing_cache
    assert len(second.timing_cache) == len(first.timing_cache), "no kernel was timed that was known already"
    third = building.build(path, plain_trt, BuildSettings(), gpu=here, timing_cache=b"of another world")
    assert third.plan


def test_kernels_that_rtx_compiled_are_kept_within_the_process(
    real_rtx: Flavour, here: Gpu, tmp_path: Path
) -> None:
    from deploycnn.runtimes import tensorrt

    rtx = real_rtx
    made = on_gpu.engine(graphs.net(), tmp_path, rtx, here)
    given = images(2)
    for _ in range(2):
        session = opened(made, rtx)
        session.bind(given)()
        assert_close(session.run(given)[0], expected(graphs.net(), given), TOLERANCE["fp32"])
        session.close()
    kept = [content for (path, _), content in tensorrt._RUNTIME_CACHES.items() if path == str(made.path)]
    assert kept
    assert all(kept)


@pytest.mark.parametrize(
    "settings", [{"version_compatible": True}, {"hardware_compatibility": "ampere_plus"}]
)
def test_engines_for_more_than_this_place_run_in_this_one_too(
    settings: dict[str, object], plain_trt: Flavour, here: Gpu, tmp_path: Path
) -> None:
    if "hardware_compatibility" in settings and here.capability < (8, 0):
        pytest.skip(f"{here.name} is older than Ampere")
    made = on_gpu.engine(graphs.net(), tmp_path, plain_trt, here, **settings)
    given = images(2)
    assert_close(opened(made, plain_trt).run(given)[0], expected(graphs.net(), given), TOLERANCE["fp32"])


def test_sparse_weights_compute_the_same(trt: Flavour, here: Gpu, tmp_path: Path) -> None:
    import onnx

    proto = graphs.net(dtype="float16")
    for tensor in proto.graph.initializer:
        if tensor.name == "w2":
            weight = onnx.numpy_helper.to_array(tensor).copy()
            weight[:, 1::2] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(weight, "w2"))
    dense = opened(on_gpu.engine(proto, tmp_path / "a", trt, here), trt)
    sparse = opened(on_gpu.engine(proto, tmp_path / "b", trt, here, sparse_weights=True), trt)
    given = images(3)
    assert_close(sparse.run(given)[0], dense.run(given)[0], TOLERANCE["fp16"])
