from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deploycnn.core import Artifact
from deploycnn.errors import ArtifactError, RecipeError, RuntimeUnavailable
from deploycnn.runtimes import pytorch as ours
from deploycnn.runtimes.base import create, parse_spec, untimed
from tests.runtimes import graphs


class Net(torch.nn.Module):
    """Dropout and batch norm, which compute otherwise when training, and two outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.drop = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(4, 5)

    def forward(self, images: torch.Tensor) -> dict[str, Any]:
        features = torch.relu(self.norm(self.conv(images))).mean((2, 3))
        return {"logits": self.head(self.drop(features)), "rest": [features]}


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    torch.manual_seed(0)
    net = Net()
    monkeypatch.setattr("deploycnn.models.artifact.load_model", lambda _: net)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"stands for weights")
    return graphs.artifact(path, "torch")


@pytest.fixture(autouse=True)
def keep_threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def expected(images: np.ndarray) -> np.ndarray:
    torch.manual_seed(0)
    with torch.no_grad():
        return Net().double().eval()(torch.from_numpy(images).double())["logits"].numpy()  # type: ignore[no-any-return]


def test_eager_computes_the_model_in_evaluation_mode(artifact: Artifact) -> None:
    images = graphs.images(3)
    session = create("pytorch:eager").open(artifact, batch_size=3, threads=1)
    logits, features = session.run(images)
    np.testing.assert_allclose(logits, expected(images), rtol=1e-4, atol=1e-6)
    assert features.shape == (3, 4)
    assert (session.executed.provider, session.executed.precision, session.executed.threads) == (
        "cpu",
        "f32",
        1,
    )
    session.bind(images)()


def test_a_stored_artifact_is_opened(tmp_path: Path) -> None:
    from deploycnn.models.artifact import architecture, build_base, save_model

    described = architecture("zoo", {"name": "lenet5"}, 10)
    model = build_base(described).eval()
    save_model(model, tmp_path, described)
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    stored = graphs.artifact(tmp_path / "model.safetensors", "torch", (None, 3, 32, 32))
    session = create("pytorch:eager").open(stored, batch_size=2, threads=1)
    with torch.no_grad():
        wanted = model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(session.run(images)[0], wanted, rtol=1e-5, atol=1e-6)


def test_each_session_keeps_its_own_thread_count(artifact: Artifact) -> None:
    runtime = create("pytorch:eager")
    one = runtime.open(artifact, batch_size=1, threads=1)
    two = runtime.open(artifact, batch_size=1, threads=2)
    images = graphs.images(1)
    call_one, call_two = one.bind(images), two.bind(images)
    seen = []
    for call in (call_one, call_two, call_one):
        call()
        seen.append(torch.get_num_threads())
    assert seen == [1, 2, 1]
    two.run(images)
    assert torch.get_num_threads() == 2


def test_bad_requests_are_refused(artifact: Artifact, tmp_path: Path) -> None:
    runtime = create("pytorch:eager")
    with pytest.raises(ArtifactError, match="opens torch files, this is onnx"):
        runtime.open(graphs.artifact(tmp_path / "x.onnx"), batch_size=1, threads=1)
    with pytest.raises(RuntimeUnavailable, match="threads is 0"):
        runtime.open(artifact, batch_size=1, threads=0)
    session = runtime.open(artifact, batch_size=1, threads=1)
    with pytest.raises(ArtifactError, match="N x 3 x 16 x 16, but the images are 1 x 1 x 16 x 16"):
        session.run(np.zeros((1, 1, 16, 16), np.float32))


def test_cuda_is_never_served_by_the_cpu(artifact: Artifact) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    runtime = create("pytorch:eager-cuda")
    assert not runtime.availability().ok
    with pytest.raises(RuntimeUnavailable, match="finds no usable CUDA device"):
        runtime.open(artifact, batch_size=1, threads=1)


def test_eager_is_available() -> None:
    found = create("pytorch:eager").availability()
    assert found.ok
    assert found.version == torch.__version__


def test_without_a_compiler_compiled_is_unavailable_and_says_so(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "not found" in str(ours.missing_for_compile({"PATH": str(tmp_path)}))
    assert "my-cc" in str(ours.missing_for_compile({"PATH": str(tmp_path), "CXX": "my-cc"}))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found = create("pytorch:compiled").availability()
    assert not found.ok
    assert "C++ compiler" in found.why
    assert "g++" in found.mend


def test_python_headers_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "my-cc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / name))
    environ = {"PATH": str(tmp_path), "CXX": "my-cc"}
    assert "Python.h" in str(ours.missing_for_compile(environ))
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    assert ours.missing_for_compile(environ) is None


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of what it probes on this host
def test_compiled_sessions_stay_compiled_however_many_are_opened(artifact: Artifact) -> None:
    """PyTorch falls back to eager after eight recompilations of one code object, without a word."""
    if ours.missing_for_compile(os.environ):
        pytest.skip("no compiler here")
    from torch._dynamo.utils import counters

    counters.clear()
    images = graphs.images(2)
    sessions = [create("pytorch:compiled").open(artifact, batch_size=2, threads=1) for _ in range(10)]
    for session in sessions:
        np.testing.assert_allclose(session.run(images)[0], expected(images), rtol=1e-4, atol=1e-5)
        session.bind(images)()
    assert counters["stats"]["unique_graphs"] == len(sessions)
    assert not counters["graph_break"]


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_does_not_compile_to_one_graph_is_refused(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ours.missing_for_compile(os.environ):
        pytest.skip("no compiler here")

    class Breaks(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return images.mean((2, 3))

    monkeypatch.setattr("deploycnn.models.artifact.load_model", lambda _: Breaks())
    with pytest.raises(ArtifactError, match=r"one graph .*use pytorch:eager"):
        create("pytorch:compiled").open(artifact, batch_size=2, threads=1)


@pytest.mark.parametrize(
    ("spec", "mode"),
    [("pytorch:eager-cuda+fp16+graph", "eager-cuda+graph+fp16"),
     ("pytorch:compiled-cuda+channels-last+device", "compiled-cuda+device+channels-last")],
)  # fmt: skip
def test_formats_are_options_of_the_modes_on_gpus(spec: str, mode: str) -> None:
    assert parse_spec(spec) == ("pytorch", mode)
    with pytest.raises(RecipeError, match='unknown option "fp16" of pytorch:eager'):
        parse_spec("pytorch:eager+fp16")


def test_options_of_timing_are_no_part_of_what_is_computed() -> None:
    assert (
        untimed("pytorch:eager-cuda+graph+device+flush-l2+blocking+fp16") == "pytorch:eager-cuda+graph+fp16"
    )
    assert untimed("onnxruntime:cpu") == "onnxruntime:cpu"
