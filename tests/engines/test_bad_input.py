"""What users may get wrong with engines, by the commands that they give: one line, exit code 2, nothing half-made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from onnx import helper

from deploycnn.cli import main
from deploycnn.engines import device, failures, flavour
from deploycnn.engines.log import Log
from deploycnn.errors import RuntimeUnavailable
from tests.engines import graphs

pytestmark = pytest.mark.usefixtures("rtx")


def export(proto: onnx.ModelProto, folder: Path, **options: Any) -> int:
    """`deploycnn export` of a graph with one engine."""
    described = onnx.shape_inference.infer_shapes(proto)
    output = described.graph.output[0]
    if not output.type.tensor_type.HasField("shape"):  # behind operators that ONNX does not know
        output.CopyFrom(helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ("N", 8, 12, 12)))
    recipe = {
        "source": {"onnx": str(graphs.saved(described, folder, "net.onnx"))},
        "target": "tensorrt-rtx",
        "variants": {"engine": [{"build_engine": options}]},
    }
    path = folder / "engine.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return main(["export", str(path), "--out", str(folder / "run")])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that begins with ``error:``."""
    said = capsys.readouterr().err
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    return lines[0]


def broken() -> onnx.ModelProto:
    """Three operators that no TensorRT has."""
    nodes = [
        helper.make_node("Foo", ["images"], ["a"], name="foo1", domain="foreign"),
        helper.make_node("Foo", ["a"], ["b"], name="foo2", domain="foreign"),
        helper.make_node("Bar", ["b"], ["logits"], name="bar1", domain="foreign"),
    ]
    return graphs.model(nodes, {})


@pytest.mark.parametrize(
    ("proto", "options", "told"),
    [
        (broken(), {}, ('"foo1" (Foo)', '"foo2" (Foo)', '"bar1" (Bar)', "3 nodes")),
        (graphs.quantized(zero=np.int8(3)), {}, ('"images_Q"', "asymmetric", "target: tensorrt")),
        (graphs.quantized(zero=np.uint8(128)), {}, ('"images_Q"', "asymmetric", "target: tensorrt")),
        (graphs.net(), {"workspace_mib": 1, "max_batch": 4096, "opt_batch": 4096}, ("workspace", "conv")),
        (graphs.net(), {"compute_capabilities": ["8.7"]}, ("8.7", "8.6")),
        (graphs.net(), {"version_compatible": True}, ("version_compatible", "leave it out")),
        (graphs.net(), {"min_batch": 9, "max_batch": 8}, ("min_batch 9", "must grow")),
    ],
    ids=["operators", "zero point", "uint8", "workspace", "capability", "compatibility", "batches"],
)
def test_what_gives_no_engine_is_one_line_and_leaves_none(
    proto: onnx.ModelProto, options: dict[str, Any], told: tuple[str, ...], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert export(proto, tmp_path, **options) == 2
    error = error_of(capsys)
    for words in told:
        assert words in error
    assert not list((tmp_path / "run").rglob("*.engine"))
    assert not (tmp_path / "run" / "deploy").exists()


@pytest.fixture
def bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert export(graphs.net(), tmp_path) == 0
    capsys.readouterr()
    return tmp_path / "run" / "deploy" / "engine"


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [("version", "1.0.0", "built by tensorrt-rtx 1.0.0"), ("flavour", "tensorrt", "an engine of tensorrt"),
     ("compute_capabilities", ["7.5"], "built for compute capability 7.5")],
)  # fmt: skip
def test_an_engine_from_elsewhere_says_from_where(
    bundle: Path, field: str, value: object, told: str, rtx: flavour.Flavour
) -> None:
    from deploycnn.engines import vouch
    from deploycnn.errors import ArtifactError

    path = bundle / "deploy.json"
    content = json.loads(path.read_text())
    content["engine"][field] = value
    path.write_text(json.dumps(content))
    gpu = device.Gpu(name="NVIDIA Fake", capability=(8, 9), driver_cuda="13.0")
    with pytest.raises(ArtifactError, match=told):
        vouch.check_engine(bundle / "model.engine", rtx, gpu=gpu)


@pytest.mark.parametrize("verb", ["audit", "profile"])
def test_a_tampered_engine_is_refused_by_every_verb(
    verb: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = bundle / "model.engine"
    plan = bytearray(engine.read_bytes())
    plan[len(plan) // 2] ^= 1
    engine.write_bytes(plan)
    more = ["--out", str(tmp_path / "profiled")] if verb == "profile" else []
    assert main([verb, str(bundle), *more]) == 2
    assert "changed since it was made" in error_of(capsys)
    assert not (tmp_path / "profiled").exists()


@pytest.mark.skipif(device.current_gpu() is not None, reason="there is a GPU")
def test_without_a_gpu_an_engine_is_not_measured_and_the_line_says_why(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", str(bundle), "--out", str(tmp_path / "profiled")]) == 2
    assert "no NVIDIA driver on this machine" in error_of(capsys)
    assert not (tmp_path / "profiled" / "report.json").exists()


def test_a_driver_that_is_too_old_is_named(rtx: flavour.Flavour) -> None:
    log = Log()
    log.add(
        1,
        "Unable to initialize CUDA (cudaError 35: CUDA driver version is insufficient for CUDA runtime version)",
    )
    for error in (
        failures.loading_error(log, "x.engine", rtx),
        failures.build_error(log, "x.onnx", rtx, building_settings()),
    ):
        assert isinstance(error, RuntimeUnavailable)
        assert "driver" in str(error)
        assert "\n" not in str(error)


def building_settings() -> Any:
    from deploycnn.engines.settings import BuildSettings

    return BuildSettings()


def test_out_of_device_memory_names_the_layer_and_the_settings(rtx: flavour.Flavour) -> None:
    log = Log()
    log.add(4, "=============== Computing costs for {ForeignNode[layer4.2.conv3]}")
    log.add(
        1, "[virtualMemoryBuffer.cpp::resize::154] Error Code 2: OutOfMemory (Requested size was 9 bytes.)"
    )
    for error in (
        failures.build_error(log, "x.onnx", rtx, building_settings()),
        failures.loading_error(log, "x.engine", rtx),
    ):
        for words in ("out of device memory", '"layer4.2.conv3"', "max_batch", "workspace_mib"):
            assert words in str(error)
