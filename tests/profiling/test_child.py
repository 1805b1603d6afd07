"""Processes of their own: their answers, their errors, and what they are started with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from deploycnn.errors import ArtifactError, RuntimeUnavailable
from deploycnn.profiling.child import _read, ask


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that answers with its environment, or fails as it is asked to."""
    (tmp_path / "some_child.py").write_text(
        "import os\n"
        "from deploycnn.errors import ArtifactError\n"
        "from deploycnn.profiling.child import serve\n"
        "def answer(request):\n"
        "    print('chatter')\n"
        "    if request.get('fail'):\n"
        "        raise ArtifactError(request['fail'])\n"
        "    return {'given': request, 'blocking': os.environ.get('CUDA_LAUNCH_BLOCKING')}\n"
        "serve(answer)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "some_child"


def test_requests_and_variables_arrive(child: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    assert ask(child, {"a": [1, None]}, "x") == {"given": {"a": [1, None]}, "blocking": None}
    assert ask(child, {}, "x", environ={"CUDA_LAUNCH_BLOCKING": "1"})["blocking"] == "1"


def test_errors_of_the_child_are_raised_here(child: str) -> None:
    with pytest.raises(ArtifactError, match="not an ONNX file"):
        ask(child, {"fail": "not an ONNX file"}, "x")


def test_answers_are_read_from_the_last_line() -> None:
    assert _read(0, f"chatter\n{json.dumps({'answer': {'ms': 7}})}\n", "", "x") == {"ms": 7}
    error = {"error": {"type": "RuntimeUnavailable", "message": "no device"}}
    with pytest.raises(RuntimeUnavailable, match="no device"):
        _read(0, json.dumps(error), "", "x")
    with pytest.raises(ArtifactError, match="killed by signal 9"):
        _read(-9, "", "", "x")
    with pytest.raises(RuntimeError, match="Traceback of ours"):
        _read(1, "half a line", "Traceback of ours", "x")


def test_importing_it_loads_no_runtime() -> None:
    import subprocess

    code = "import sys, deploycnn.profiling.child; assert not {'torch', 'onnx', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
