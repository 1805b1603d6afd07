"""Graphs at other widths, against pruned modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from deploycnn.graph.export import export_onnx
from deploycnn.latency.instances import check, narrowed
from deploycnn.latency.quantized import quantized
from deploycnn.models.cifar_resnet import CifarResNet
from deploycnn.models.small_mobilenet import SmallMobileNetV2
from deploycnn.pruning import importance
from deploycnn.pruning.allocation import ladders
from deploycnn.pruning.latency_problem import draw
from deploycnn.pruning.layers import width
from deploycnn.pruning.structure import analyse
from deploycnn.pruning.surgery import randomized, remove


@pytest.mark.parametrize("build", [lambda: CifarResNet(8), lambda: SmallMobileNetV2(width=0.25)])
def test_a_narrowed_graph_computes_what_the_pruned_module_does(build: type, tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    model: nn.Module = randomized(build().eval(), images, 0).float().requires_grad_(False)
    groups = analyse(model, images).groups
    found = ladders(
        groups,
        importance.random(model, groups, seed=0),
        round_to=2,
        max_ratio=0.8,
        ratios=[None] * len(groups),
    )
    cuts = draw(groups, found, np.random.default_rng(0))
    widths = {place: width(model.get_submodule(place[0]), place[1]) for place in cuts}
    dense = export_onnx(model, (3, 32, 32), opset=18)
    before = dense.SerializeToString()
    graph = narrowed(dense, cuts, widths)
    check(graph)
    integers = narrowed(quantized(dense, (3, 32, 32), "onnxruntime-cpu", 1), cuts, widths)
    remove(model, cuts)
    expected = model(images).detach().numpy()
    actual = _run(graph, images)
    assert dense.SerializeToString() == before
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()
    assert _run(integers, images).shape == expected.shape


def _run(graph: object, images: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(),  # type: ignore[attr-defined]
        providers=["CPUExecutionProvider"],
    )
    return session.run(None, {"images": images.numpy()})[0]
