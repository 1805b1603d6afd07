"""A pruned model exports, and its graph computes what it computes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from deploycnn.errors import ParityError, PassRequirementError
from deploycnn.graph.export import export_onnx
from deploycnn.models.artifact import architecture, save_model
from deploycnn.models.cifar_resnet import CifarResNet
from deploycnn.pruning import verification
from deploycnn.pruning.pruner import Goal, prune
from deploycnn.pruning.verification import check_exported
from tests.pruning import nets
from tests.pruning.test_pruner import MAGNITUDE

LOG = logging.getLogger("deploycnn.test")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[nn.Module, Path]:
    """A pruned model, and the folder of the dense one."""
    torch.manual_seed(0)
    model = nets.lively(CifarResNet(20))
    save_model(model, tmp_path, architecture("zoo", {"name": "resnet20", "in_channels": 3}, 10))
    prune(model, nets.images(32), MAGNITUDE, Goal(pruning_ratio=0.5))
    return model, tmp_path


def test_the_graph_of_a_pruned_model_computes_the_same(pair: tuple[nn.Module, Path]) -> None:
    found = check_exported(pair[0], nets.images(32), pair[1], threads=1, log=LOG)
    assert found is not None
    assert 0 < found["max_rel_error"] < 1e-4


def test_a_graph_that_computes_something_else_is_refused(
    pair: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = pair
    other = export_onnx(nets.lively(CifarResNet(20), seed=1), (3, 32, 32), opset=18)
    monkeypatch.setattr(verification, "export_onnx", lambda *_, **__: other)
    with pytest.raises(ParityError, match="prune: the pruned model's ONNX graph differs"):
        check_exported(model, nets.images(32), folder, threads=1, log=LOG)


@pytest.mark.parametrize("before", [True, False])
def test_what_cannot_be_exported_is_told_apart_by_the_dense_model(
    pair: tuple[nn.Module, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    before: bool,
) -> None:
    model, folder = pair
    monkeypatch.setattr(verification, "load_model", lambda _: nets.lively(CifarResNet(20)))

    def refuses(exported: nn.Module, *_: object, **__: object) -> None:
        if exported is model or not before:
            raise PassRequirementError("no such operator")

    monkeypatch.setattr(verification, "export_onnx", refuses)
    if before:
        with pytest.raises(RuntimeError, match="can no longer be exported"):
            check_exported(model, nets.images(32), folder, threads=1, log=LOG)
    else:
        assert check_exported(model, nets.images(32), folder, threads=1, log=LOG) is None
        assert "as the model had none before pruning: no such operator" in caplog.text
