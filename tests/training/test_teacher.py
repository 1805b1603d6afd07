from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from deploycnn.models import zoo
from deploycnn.training import teacher
from tests.training.support import make_context

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = zoo.build("resnet20", num_classes=10)
        model(IMAGES)  # batch norms that are not the identity
    return model.eval().requires_grad_(False)


class Picky(nn.Module):
    """Has a path that depends on the images, which no exporter can follow."""

    def forward(self, images: Tensor) -> Tensor:
        means = images.mean((2, 3))
        return means if means.sum() > 0 else -means


def test_the_graph_answers_as_the_module_does_for_any_batch_and_layout(tmp_path: Path) -> None:
    module = net()
    ctx = make_context(tmp_path, None)
    found = teacher.answering(module, IMAGES, views=10**6, name="big", ctx=ctx)
    assert isinstance(found, teacher.GraphTeacher)
    for images in (IMAGES[:1], IMAGES[:5].to(memory_format=torch.channels_last), IMAGES[::3]):
        logits = found(images)
        np.testing.assert_allclose(logits.numpy(), module(images).numpy(), rtol=1e-4, atol=1e-4)
        assert logits.dtype == torch.float32
        assert not logits.requires_grad
    assert not list(found.parameters())


def test_a_short_training_does_not_wait_for_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "export_onnx", lambda *_, **__: pytest.fail("exported"))
    module = net()
    # ResNet-20 takes 41 million multiply-accumulates for an image.
    assert (
        teacher.answering(module, IMAGES, views=40_000, name="big", ctx=make_context(tmp_path, None))
        is module
    )


def test_what_cannot_be_exported_is_computed_by_pytorch_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "_WORTH", 0.0)
    module = Picky().eval()
    ctx = make_context(tmp_path, None)
    with caplog.at_level("WARNING"):
        assert teacher.answering(module, IMAGES, views=10**9, name="picky", ctx=ctx) is module
    assert "the teacher picky is computed by PyTorch, which is slower: export:" in caplog.text


def test_a_graph_that_computes_something_else_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporting = teacher.export_onnx

    def damaged(*arguments: object, **options: object) -> onnx.ModelProto:
        graph = exporting(*arguments, **options)  # type: ignore[arg-type]
        bias = next(item for item in graph.graph.initializer if item.dims == [10])
        content = onnx.numpy_helper.to_array(bias) + np.float32(0.5)
        bias.CopyFrom(onnx.numpy_helper.from_array(content, bias.name))
        return graph

    monkeypatch.setattr(teacher, "export_onnx", damaged)
    module = net()
    with caplog.at_level("WARNING"):
        assert (
            teacher.answering(module, IMAGES, views=10**6, name="big", ctx=make_context(tmp_path, None))
            is module
        )
    assert "its ONNX graph differs by 0.5" in caplog.text
