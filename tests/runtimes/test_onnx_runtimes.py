"""ONNX Runtime and OpenVINO: the same files, the same promises."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from deploycnn.errors import ArtifactError, RuntimeUnavailable, one_line
from deploycnn.runtimes import openvino as ours_openvino
from deploycnn.runtimes.base import create
from deploycnn.runtimes.common import precision_label
from deploycnn.runtimes.onnxruntime_sessions import check_assignment
from tests.runtimes import graphs

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

BOTH = pytest.mark.parametrize("spec", ["onnxruntime:cpu", "openvino:f32"])


def has_bf16() -> bool:
    return create("openvino:bf16").availability().ok


@BOTH
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_outputs_are_what_the_graph_computes(
    spec: str, batch_size: int, threads: int, tmp_path: Path
) -> None:
    path = graphs.write(tmp_path / "model.onnx")
    images = graphs.images(batch_size)
    session = create(spec).open(graphs.artifact(path), batch_size=batch_size, threads=threads)
    (logits,) = session.run(images)
    np.testing.assert_allclose(logits, graphs.reference(images), rtol=1e-4, atol=1e-5)
    assert logits.dtype == np.float32
    assert session.executed.threads == threads
    assert session.executed.precision == "f32"
    assert session.executed.provider.startswith("CPU")
    session.close()


@BOTH
def test_sessions_live_side_by_side_and_do_not_share_outputs(spec: str, tmp_path: Path) -> None:
    path = graphs.write(tmp_path / "model.onnx")
    runtime = create(spec)
    first = runtime.open(graphs.artifact(path), batch_size=2, threads=1)
    second = runtime.open(graphs.artifact(path), batch_size=2, threads=2)
    one, two = graphs.images(2, seed=1), graphs.images(2, seed=2)
    kept = first.run(one)[0]
    calls = [first.bind(one), second.bind(two), first.bind(two)]
    for call in calls * 2:
        call()
    np.testing.assert_allclose(kept, graphs.reference(one), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(second.run(two)[0], graphs.reference(two), rtol=1e-4, atol=1e-5)
    first.close()
    np.testing.assert_allclose(second.run(one)[0], graphs.reference(one), rtol=1e-4, atol=1e-5)
    second.close()


@BOTH
def test_a_bound_call_outlives_the_array_it_was_given(spec: str, tmp_path: Path) -> None:
    path = graphs.write(tmp_path / "model.onnx")
    session = create(spec).open(graphs.artifact(path), batch_size=1, threads=1)
    read_only = graphs.images(1)
    read_only.flags.writeable = False
    call = session.bind(read_only)
    del read_only
    for _ in range(3):
        call()
    images = graphs.images(1)
    np.testing.assert_allclose(session.run(images)[0], graphs.reference(images), rtol=1e-4, atol=1e-5)
    session.close()


@BOTH
def test_weights_listed_as_inputs_are_no_inputs(spec: str, tmp_path: Path) -> None:
    path = graphs.write(tmp_path / "old.onnx", opset=9, initializers_as_inputs=True)
    session = create(spec).open(graphs.artifact(path), batch_size=1, threads=1)
    images = graphs.images(1)
    np.testing.assert_allclose(session.run(images)[0], graphs.reference(images), rtol=1e-4, atol=1e-5)


@BOTH
def test_a_quantized_model_runs_in_integers_and_says_so(spec: str, tmp_path: Path) -> None:
    path = graphs.write_qdq(tmp_path / "int8.onnx")
    session = create(spec).open(graphs.artifact(path), batch_size=4, threads=1)
    assert session.executed.precision == "int8+f32"
    images = graphs.images(4)
    error = np.abs(session.run(images)[0] - graphs.reference(images)).max()
    assert 0 < error < 0.05


def test_openvino_computes_in_bf16_only_when_asked(tmp_path: Path) -> None:
    if not has_bf16():
        pytest.skip("this CPU has no bf16")
    path = graphs.write(tmp_path / "model.onnx", layers=4)
    images = graphs.images(4)
    errors = {}
    for mode in ("f32", "bf16"):
        session = create(f"openvino:{mode}").open(graphs.artifact(path), batch_size=4, threads=1)
        assert session.executed.precision == mode
        errors[mode] = np.abs(session.run(images)[0] - graphs.reference(images, 4)).max()
    assert errors["f32"] < 1e-4 < errors["bf16"]


def test_a_cpu_without_bf16_is_no_bf16_runtime() -> None:
    def get_property(device: str, name: str) -> Any:
        return {"OPTIMIZATION_CAPABILITIES": ["FP32", "INT8"], "FULL_DEVICE_NAME": "Old CPU"}[name]

    core = SimpleNamespace(get_property=get_property)
    ours_openvino._require_precision(core, "f32")
    with pytest.raises(RuntimeUnavailable, match=r"Old CPU.*use openvino:f32"):
        ours_openvino._require_precision(core, "bf16")


def compiled_as(hint: str, *layers: tuple[str, str]) -> Any:
    """A compiled model whose layers (type, precision) run as told."""

    def value(text: str) -> Any:
        return SimpleNamespace(astype=lambda _: text)

    operations = [
        SimpleNamespace(
            get_rt_info=lambda kind=kind, ran=ran: {"layerType": value(kind), "runtimePrecision": value(ran)}
        )
        for kind, ran in layers
    ]
    return SimpleNamespace(
        get_property=lambda _: SimpleNamespace(get_type_name=lambda: hint),
        get_runtime_model=lambda: SimpleNamespace(get_ordered_ops=lambda: operations),
    )


def test_openvino_running_in_another_precision_than_asked_is_refused() -> None:
    path = Path("m.onnx")
    fine = compiled_as("f32", ("Convolution", "f32"), ("Eltwise", "bf16"))
    assert ours_openvino._executed_precision(fine, "f32", path) == "f32"
    for bad in (compiled_as("bf16", ("Convolution", "bf16")), compiled_as("f32", ("Convolution", "bf16"))):
        with pytest.raises(RuntimeUnavailable, match="asked for f32, but it was compiled to bf16"):
            ours_openvino._executed_precision(bad, "f32", path)


@BOTH
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("truncated", "not an ONNX file, or cut short"),
        ("text", "not an ONNX file, or cut short"),
        ("empty", "empty"),
        ("absent", "no such file"),
        ("operator", "Nope"),
        ("domain", "Foo"),
    ],
)
def test_bad_files_are_named_with_the_reason(spec: str, fault: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / f"{fault}.onnx"
    if fault == "truncated":
        path.write_bytes(graphs.write(tmp_path / "whole.onnx").read_bytes()[:700])
    elif fault == "text":
        path.write_text("hello")
    elif fault == "empty":
        path.touch()
    elif fault in {"operator", "domain"}:
        graphs.write(path, extra=("Nope", "") if fault == "operator" else ("Foo", "my.ops"))
    with pytest.raises(ArtifactError, match=says) as caught:
        create(spec).open(graphs.artifact(path), batch_size=1, threads=1)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_opset_from_the_future_is_named(tmp_path: Path) -> None:
    path = graphs.write(tmp_path / "future.onnx", opset=99)
    with pytest.raises(ArtifactError, match=r"made for opset 99 .* known up to \d+"):
        create("onnxruntime:cpu").open(graphs.artifact(path), batch_size=1, threads=1)


@BOTH
def test_a_fixed_batch_is_said_and_served(spec: str, tmp_path: Path) -> None:
    path = graphs.write(tmp_path / "fixed.onnx", batch=2)
    runtime = create(spec)
    with pytest.raises(ArtifactError, match="fixed batch of 2, but batches of 5"):
        runtime.open(graphs.artifact(path), batch_size=5, threads=1)
    images = graphs.images(2)
    session = runtime.open(graphs.artifact(path), batch_size=2, threads=1)
    np.testing.assert_allclose(session.run(images)[0], graphs.reference(images), rtol=1e-4, atol=1e-5)


@BOTH
def test_images_that_do_not_fit_are_refused_with_both_shapes(spec: str, tmp_path: Path) -> None:
    path = graphs.write(tmp_path / "model.onnx")
    session = create(spec).open(graphs.artifact(path), batch_size=1, threads=1)
    for wrong in (np.zeros((1, 1, 16, 16), np.float32), np.zeros((3, 16, 16), np.float32)):
        shape = " x ".join(map(str, wrong.shape))
        with pytest.raises(ArtifactError, match=f"x 3 x 16 x 16, but the images are {shape}"):
            session.run(wrong)
        with pytest.raises(ArtifactError, match="the images are"):
            session.bind(wrong)


@BOTH
def test_models_that_are_no_image_classifiers_are_refused(spec: str, tmp_path: Path) -> None:
    two = graphs.write(tmp_path / "two.onnx", images=2)
    with pytest.raises(ArtifactError, match=r"2 inputs \(images, more\)"):
        create(spec).open(graphs.artifact(two), batch_size=1, threads=1)
    half = graphs.write(tmp_path / "half.onnx", dtype=TensorProto.FLOAT16)
    with pytest.raises(ArtifactError, match="expected"):
        create(spec).open(graphs.artifact(half), batch_size=1, threads=1)


@BOTH
def test_requests_that_mean_nothing_are_refused(spec: str, tmp_path: Path) -> None:
    path = graphs.write(tmp_path / "model.onnx")
    with pytest.raises(RuntimeUnavailable, match="threads is 0"):
        create(spec).open(graphs.artifact(path), batch_size=1, threads=0)
    with pytest.raises(RuntimeUnavailable, match="batch_size is 0"):
        create(spec).open(graphs.artifact(path), batch_size=0, threads=1)
    with pytest.raises(ArtifactError, match="opens onnx files, this is torch"):
        create(spec).open(graphs.artifact(path, "torch"), batch_size=1, threads=1)


def session_with(providers: list[str], assignment: list[tuple[str, str]]) -> Any:
    """A session of these providers, whose nodes (provider, operator) were assigned so."""
    parts = [
        SimpleNamespace(ep_name=name, get_nodes=lambda op=op: [SimpleNamespace(op_type=op, name="node")])
        for name, op in assignment
    ]
    return SimpleNamespace(get_providers=lambda: providers, get_provider_graph_assignment_info=lambda: parts)


CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def test_cuda_is_never_served_by_the_cpu_where_it_is_not_built_in(tmp_path: Path) -> None:
    import onnxruntime

    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    path = graphs.write(tmp_path / "model.onnx")
    runtime = create("onnxruntime:cuda")
    with pytest.raises(RuntimeUnavailable, match="has no CUDAExecutionProvider"):
        runtime.open(graphs.artifact(path), batch_size=1, threads=1)
    found = runtime.availability()
    assert not found.ok
    assert "CUDAExecutionProvider" in found.why
    assert "deploycnn[gpu]" in found.mend


def test_a_provider_that_is_listed_but_does_not_load_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ONNX Runtime does when a CUDA library is missing: it logs, and gives a CPU session."""
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: session_with([CPU], []))
    found = create("onnxruntime:cuda").availability()
    assert not found.ok
    assert "listed but did not load" in found.why


def test_a_convolution_left_to_the_cpu_is_an_error_and_shape_arithmetic_is_not() -> None:
    fine = session_with([CUDA, CPU], [(CUDA, "Conv"), (CPU, "Shape"), (CPU, "Gather")])
    check_assignment(fine, "cuda", "m.onnx")
    mixed = session_with([CUDA, CPU], [(CUDA, "Conv"), (CPU, "ConvInteger")])
    with pytest.raises(RuntimeUnavailable, match="does not take ConvInteger node"):
        check_assignment(mixed, "cuda", "m.onnx")
    old = SimpleNamespace(get_providers=lambda: [CUDA, CPU])
    check_assignment(old, "cuda", "m.onnx")


def test_available_runtimes_say_their_version() -> None:
    for spec in ("onnxruntime:cpu", "openvino:f32"):
        found = create(spec).availability()
        assert found.ok
        assert found.version


def test_precision_labels() -> None:
    assert precision_label(["f32", "f32"]) == "f32"
    assert precision_label(["int8", "int8"], ["f32"]) == "int8+f32"
    assert precision_label(["int8", "bf16"], ["bf16"]) == "int8+bf16"
    assert precision_label([], ["f32"]) == "f32"


def test_foreign_messages_become_one_line() -> None:
    text = "Exception from src/inference/core.cpp:84:\nCheck 'false' failed at src/x.cpp:151:\nNo such op\n\n"
    assert one_line(text) == "No such op"
    assert one_line("x" * 500).endswith("...")
    assert len(one_line("x" * 500)) == 300
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt", "something is said in any case"
