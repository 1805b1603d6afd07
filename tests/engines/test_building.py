"""Engines built here, and every way in which a build is refused."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from deploycnn.engines import audit, building, checks, device, failures, layers
from deploycnn.engines.flavour import Flavour
from deploycnn.engines.log import Log
from deploycnn.engines.settings import BuildSettings
from deploycnn.errors import ArtifactError, PassRequirementError, RuntimeUnavailable
from deploycnn.graph.fp16 import convert_fp16
from tests.engines import graphs

pytestmark = pytest.mark.usefixtures("rtx")


@pytest.mark.parametrize(
    ("proto", "precision"),
    [
        (graphs.net(), "fp32"),
        (graphs.net(dtype="float16"), "fp16"),
        (convert_fp16(graphs.net(), half="bf16")[0], "bf16"),
        (graphs.quantized(), "int8"),
    ],
    ids=["fp32", "fp16", "bf16", "int8"],
)
def test_the_engine_computes_in_the_precision_of_the_graph(
    proto: onnx.ModelProto, precision: str, tmp_path: Path, rtx: Flavour
) -> None:
    built = graphs.build(proto, tmp_path)
    assert len(built.plan) > 1000
    assert built.record.onnx_sha256 == hashlib.sha256((tmp_path / "model.onnx").read_bytes()).hexdigest()
    assert (built.record.flavour, built.record.version) == ("tensorrt-rtx", rtx.version)
    told = built.log.layer_information()
    assert told is not None
    result = audit.audit(layers.parse(told), audit.asked_of(proto))
    assert not result.unmatched
    assert result.shares == {precision: pytest.approx(1.0)}
    assert result.as_asked == 1.0


def test_half_precision_engines_hold_smaller_weights(tmp_path: Path) -> None:
    full = graphs.build(graphs.net(), tmp_path / "a")
    half = graphs.build(graphs.net(dtype="float16"), tmp_path / "b")
    weights = (16 * 8 + 16 * 16) * 9 * 4
    assert len(full.plan) - len(half.plan) > weights // 4


def test_chosen_compute_capabilities_are_recorded_and_built(tmp_path: Path, rtx: Flavour) -> None:
    assert {"8.0", "8.6", "8.9", "12.0"} <= set(rtx.capabilities)
    one = graphs.build(graphs.net(), tmp_path, compute_capabilities=("8.9",))
    two = graphs.build(graphs.net(), tmp_path, compute_capabilities=("8.6", "12.0"))
    assert two.record.compute_capabilities == ("8.6", "12.0")
    assert len(two.plan) > len(one.plan)


def test_an_unknown_compute_capability_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match=r'does not know "8.7".*8.6'):
        graphs.build(graphs.net(), tmp_path, compute_capabilities=("8.7",))


def test_a_fixed_batch_is_the_engines_batch(tmp_path: Path) -> None:
    assert graphs.build(graphs.net(shape=(4, 8, 12, 12)), tmp_path).record.batch == (4, 4, 4)
    assert graphs.build(graphs.net(), tmp_path, batch=(2, 3, 5)).record.batch == (2, 3, 5)


def test_progress_grows_to_its_end_and_the_log_is_kept(tmp_path: Path, rtx: Flavour) -> None:
    seen: list[float] = []
    log = Log()
    building.build(
        graphs.saved(graphs.net(), tmp_path),
        rtx,
        BuildSettings(),
        gpu=None,
        progress=lambda done, total, _="": seen.append(done / total),
        log=log,
    )
    assert seen == sorted(seen)
    assert 0 <= seen[0] < 0.2
    assert 0.8 < seen[-1] <= 1
    assert "conv2" in log.text()
    assert log.errors() == [] or all("CUDA" in text or "Thread context" in text for text in log.errors())


@pytest.mark.parametrize("at", [0, 40])
def test_interrupting_stops_the_build(at: int, tmp_path: Path, rtx: Flavour) -> None:
    """A real Ctrl-C, in the first moment and in the middle; the builder hears of it at its next step."""
    log, steps = Log(), []

    def progress(done: float, total: float, message: str = "") -> None:
        steps.append(message)
        if len(steps) == at + 1:
            os.kill(os.getpid(), signal.SIGINT)
            # The builder's thread: such a small net would be built before a busy machine runs the waiting one.
            time.sleep(1.0)

    # Shells start background jobs, and with them tests, with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            building.build(
                graphs.saved(graphs.net(), tmp_path),
                rtx,
                BuildSettings(),
                gpu=None,
                progress=progress,
                log=log,
            )
    finally:
        signal.signal(signal.SIGINT, before)
    assert not any(thread.name == "build_engine" for thread in threading.enumerate())
    assert failures.was_cancelled(log)
    assert graphs.build(graphs.net(), tmp_path).plan  # and the next build works


def test_out_of_workspace_names_the_layer_and_the_setting(tmp_path: Path) -> None:
    with pytest.raises(PassRequirementError, match=r"out of workspace at layer .*conv1.*workspace_mib"):
        graphs.build(graphs.net(), tmp_path, workspace_bytes=1024)


def test_every_unsupported_node_is_listed(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Foo", ["images"], ["a"], name="foo1", domain="foreign"),
        helper.make_node("Det", ["a"], ["b"], name="det1"),
        helper.make_node("Bar", ["b"], ["logits"], name="bar1", domain="foreign"),
    ]
    with pytest.raises(PassRequirementError) as caught:
        graphs.build(graphs.model(nodes, {}), tmp_path)
    message = str(caught.value)
    assert all(name in message for name in ('"foo1" (Foo)', '"det1" (Det)', '"bar1" (Bar)', "3 nodes"))
    assert "\n" not in message


@pytest.mark.parametrize(
    ("proto", "node", "problem"),
    [
        (graphs.quantized(zero=np.int8(3)), "images_Q", "zero point"),
        (graphs.quantized(zero=np.uint8(128)), "images_Q", "zero point"),
        (graphs.quantized(zero=np.uint8(0)), "images_Q", "uint8"),
        (graphs.quantized(bias=True), "bias_DQ", "int32 bias"),
    ],
    ids=["shifted int8", "shifted uint8", "uint8", "integer bias"],
)
def test_quantization_that_tensorrt_does_not_take_is_refused(
    proto: onnx.ModelProto, node: str, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(PassRequirementError, match=rf'"{node}".*{problem}.*target: tensorrt'):
        graphs.build(proto, tmp_path)


def test_what_we_refuse_the_library_refuses_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our check is not stricter than TensorRT's, and where it misses something the parser names the node."""
    monkeypatch.setattr(checks, "check_quantization", lambda *_: None)
    for proto in (graphs.quantized(zero=np.int8(3)), graphs.quantized(bias=True)):
        with pytest.raises(PassRequirementError, match="does not take"):
            graphs.build(proto, tmp_path)


def test_dynamic_image_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PassRequirementError, match='input "images".*other than the batch'):
        graphs.build(graphs.net(shape=("N", 8, "H", "W")), tmp_path)


@pytest.mark.parametrize("batch", [(0, 1, 1), (4, 2, 8), (1, 9, 8)])
def test_batches_must_grow(batch: tuple[int, int, int], tmp_path: Path) -> None:
    with pytest.raises(PassRequirementError, match="must grow"):
        graphs.build(graphs.net(), tmp_path, batch=batch)


def test_rtx_has_no_version_or_hardware_compatibility(tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match="version_compatible.*own version only"):
        graphs.build(graphs.net(), tmp_path, version_compatible=True)
    with pytest.raises(RuntimeUnavailable, match="hardware_compatibility.*compute_capabilities"):
        graphs.build(graphs.net(), tmp_path, hardware_compatibility="ampere_plus")


@pytest.mark.skipif(device.current_gpu() is not None, reason="there is a GPU")
@pytest.mark.parametrize("option", ["weight_stripped", "refittable"])
def test_refittable_rtx_engines_need_a_gpu_and_say_so(
    option: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeUnavailable, match=rf"needs a GPU to build with {option}"):
        graphs.build(graphs.net(), tmp_path, **{option: True})
    assert not capfd.readouterr().err  # the library was not started: it would have said its own


def test_sparse_weights_need_the_pattern(tmp_path: Path) -> None:
    with pytest.raises(PassRequirementError, match=r"no weight .* 2:4"):
        graphs.build(graphs.net(), tmp_path, sparse_weights=True)
    proto = graphs.net()
    for tensor in proto.graph.initializer:
        if tensor.name == "w2":
            weight = onnx.numpy_helper.to_array(tensor).copy()
            weight[:, 1::2] = 0  # two of each four input channels
            tensor.CopyFrom(onnx.numpy_helper.from_array(weight, "w2"))
    assert checks.sparse_weights(proto) == 1
    assert graphs.build(proto, tmp_path, sparse_weights=True).plan


def test_a_damaged_file_is_refused(tmp_path: Path, rtx: Flavour) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model at all")
    with pytest.raises(ArtifactError, match="model.onnx"):
        building.build(path, rtx, BuildSettings(), gpu=None)


def test_an_old_opset_is_refused(tmp_path: Path) -> None:
    proto = graphs.net()
    proto.opset_import[0].version = 7
    with pytest.raises(PassRequirementError, match="opset 7 is too old"):
        graphs.build(proto, tmp_path)


@pytest.mark.parametrize(
    ("said", "kind", "expected"),
    [
        ("OutOfMemory (Requested size was 99 bytes.)", ArtifactError, 'at layer "conv9".*max_batch'),
        ("no tactics to implement the operation within workspace limit", PassRequirementError, "workspace.*raise"),
        ("(cudaError 35: CUDA driver version is insufficient)", RuntimeUnavailable, "driver"),
        ("Cannot compile operation 'linear/Gemm' for Turing", PassRequirementError, "compute_capabilities"),
        ("something else", PassRequirementError, 'at layer "conv9": something else'),
    ],
)  # fmt: skip
def test_build_errors_are_mapped(said: str, kind: type[Exception], expected: str, rtx: Flavour) -> None:
    log = Log()
    log.add(4, "=============== Computing costs for {ForeignNode[conv9]}")
    log.add(1, said)
    error = failures.build_error(log, "model.onnx", rtx, BuildSettings())
    assert type(error) is kind
    with pytest.raises(kind, match=expected):
        raise error


@pytest.mark.parametrize(
    ("said", "kind", "expected"),
    [
        ("(cudaError 100: no CUDA-capable device is detected)", RuntimeUnavailable, "no GPU"),
        ("Serialization assertion failed. Version tag does not match", ArtifactError, "another version"),
        ("The engine is of another compute capability: expecting 8.6, got 9.0", ArtifactError, "another GPU"),
        ("Serialization assertion magicTag failed", ArtifactError, "damaged"),
    ],
)  # fmt: skip
def test_loading_errors_are_mapped(said: str, kind: type[Exception], expected: str, rtx: Flavour) -> None:
    log = Log()
    log.add(1, said)
    with pytest.raises(kind, match=expected):
        raise failures.loading_error(log, "x.engine", rtx)


@pytest.mark.skipif(device.current_gpu() is not None, reason="there is a GPU")
def test_loading_without_a_gpu_says_so(tmp_path: Path, rtx: Flavour) -> None:
    plan = graphs.build(graphs.net(), tmp_path).plan
    with pytest.raises(RuntimeUnavailable, match="no GPU that tensorrt-rtx"):
        rtx.deserialize(plan, what="x.engine")


def test_asked_types_of_a_half_graph_are_fp16() -> None:
    assert {item.precision for item in audit.asked_of(graphs.net(dtype="float16"))} == {"fp16"}
    asked = {item.node: item for item in audit.asked_of(graphs.net())}
    assert asked["conv1"].macs == 12 * 12 * 16 * 8 * 9
    assert asked["fc"].macs == 16 * 5
