"""What the tests of passes that change a model's structure share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

_RELOAD = """
import sys, numpy, torch
torch.set_num_threads(1)
from deploycnn.models.artifact import load_model
model = load_model(sys.argv[1])
with torch.no_grad():
    logits = model(torch.from_numpy(numpy.load(sys.argv[2])))
numpy.save(sys.argv[3], logits.numpy())
"""

#: Path of a torch artifact and images (N, C, H, W) -> logits (N, K).
FreshLogits = Callable[[Path, torch.Tensor], npt.NDArray[np.float32]]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The bits of a sum depend on how many threads share it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unexported(monkeypatch: pytest.MonkeyPatch) -> None:
    """`prune` does not compare with the ONNX graph, which takes most of its time on small models."""
    monkeypatch.setattr("deploycnn.pruning.verification.check_exported", lambda *_, **__: None)


@pytest.fixture
def fresh_logits(tmp_path: Path) -> FreshLogits:
    """What a fresh process with one thread computes with a stored model."""

    def computed(artifact: Path, images: torch.Tensor) -> npt.NDArray[np.float32]:
        np.save(tmp_path / "images.npy", images.numpy())
        arguments = [artifact, tmp_path / "images.npy", tmp_path / "logits.npy"]
        subprocess.run([sys.executable, "-c", _RELOAD, *map(str, arguments)], check=True)
        logits: npt.NDArray[np.float32] = np.load(tmp_path / "logits.npy")
        return logits

    return computed
