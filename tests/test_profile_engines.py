"""Engines that `profile` is given."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from deploycnn import profile_engines
from deploycnn.cli import main
from deploycnn.engines import device
from deploycnn.errors import ArtifactError, RuntimeUnavailable
from tests.engines.test_vouch import AHEAD, BUILT, engine


def test_runtimes_are_those_that_made_the_engines(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
    engine(first, BUILT, bundle=True)
    engine(second, AHEAD, bundle=True)
    paths = [first, second / "model.engine"]
    assert profile_engines.runtimes(paths, (), trust=False) == ("tensorrt:trt", "tensorrt:rtx")
    assert profile_engines.runtimes(paths, ("onnxruntime:cpu",), trust=True) == ("onnxruntime:cpu",)
    assert profile_engines.runtimes([Path("model.onnx")], (), trust=False) == ()


def test_trust_reaches_the_runtimes(tmp_path: Path) -> None:
    stray = tmp_path / "found.engine"
    stray.write_bytes(b"plan")
    asked = ("tensorrt:rtx+graph", "tensorrt:trt+trust", "openvino:f32")
    assert profile_engines.runtimes([stray], asked, trust=True) == (
        "tensorrt:rtx+graph+trust",
        "tensorrt:trt+trust",
        "openvino:f32",
    )


def test_a_bundle_tells_what_it_holds(tmp_path: Path) -> None:
    path = engine(tmp_path, AHEAD, bundle=True)
    described = json.loads((tmp_path / "deploy.json").read_text())
    described |= {
        "inputs": [{"name": "images", "dtype": "float32", "shape": [None, 3, 8, 8]}],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": [None, 10]}],
        "classes": ["a", "b"],
    }
    (tmp_path / "deploy.json").write_text(json.dumps(described))
    artifact = profile_engines.bring(tmp_path, "mine", trust=False).artifact
    assert artifact is not None
    assert artifact.key == hashlib.sha256(path.read_bytes()).hexdigest()
    assert artifact.inputs[0].shape == (None, 3, 8, 8)
    assert artifact.facts.classes == ("a", "b")
    assert artifact.path == path


@pytest.mark.parametrize(
    "inputs", [3, [{"name": "images"}], [{"name": "images", "dtype": "float32", "shape": 4}]]
)
def test_a_bundle_that_tells_no_inputs_is_refused(inputs: object, tmp_path: Path) -> None:
    engine(tmp_path, AHEAD, bundle=True)
    described = json.loads((tmp_path / "deploy.json").read_text()) | {"inputs": inputs, "outputs": []}
    (tmp_path / "deploy.json").write_text(json.dumps(described))
    with pytest.raises(ArtifactError, match=r"deploy\.json: does not tell inputs, outputs and classes"):
        profile_engines.bring(tmp_path, "mine", trust=False)


def test_a_tampered_engine_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine(tmp_path, AHEAD, bundle=True).write_bytes(b"other")
    with pytest.raises(ArtifactError, match="changed since it was made"):
        profile_engines.require_loadable(tmp_path, trust=True)
    assert main(["profile", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "changed since it was made" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_stray_engine_needs_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stray = tmp_path / "found.engine"
    stray.write_bytes(b"plan")
    assert main(["profile", str(stray), "--out", str(tmp_path / "run")]) == 2
    assert "--trust-engine" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(device.current_gpu() is not None, reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stray = tmp_path / "found.engine"
    stray.write_bytes(b"plan")
    assert main(["profile", str(stray), "--trust-engine", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: tensorrt:")
    assert error.count("\n") == 1
    with pytest.raises(RuntimeUnavailable):
        profile_engines.bring(stray, "stray", trust=True)
