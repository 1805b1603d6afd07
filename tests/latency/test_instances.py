"""Graphs at other widths, against pruned modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import nn

from deploycnn.graph.export import export_onnx
from deploycnn.graph.model import save_onnx
from deploycnn.latency.deployed import deployed
from deploycnn.latency.instances import FixedWidthsError, narrowed
from deploycnn.latency.layers import layer_sums
from deploycnn.latency.measure import Bench
from deploycnn.models.cifar_resnet import CifarResNet
from deploycnn.models.small_mobilenet import SmallMobileNetV2
from deploycnn.profiling.stopwatch import RuntimeStopwatch
from deploycnn.pruning import importance
from deploycnn.pruning.allocation import ladders
from deploycnn.pruning.latency_problem import draw
from deploycnn.pruning.structure import analyse
from deploycnn.pruning.surgery import channels_at, randomized, remove
from tests.pruning import nets


@pytest.mark.parametrize(
    "build",
    [
        lambda: CifarResNet(8),
        lambda: SmallMobileNetV2(width=0.25),
        lambda: nn.Sequential(nets.Parts()),
        nets.Hierarchy,
        lambda: nn.Sequential(nets.TwoSplits([12, 12], [8, 16])),
        lambda: nets.Chunks(16, 4),
    ],
)
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
    widths = channels_at(model, cuts)
    dense = export_onnx(model, (3, 32, 32), opset=18)
    before = dense.SerializeToString()
    graph = narrowed(dense, cuts, widths)
    others = [
        deployed(graph, precision, target)
        for precision, target in (
            ("int8", "onnxruntime-cpu"),
            ("fp16", "tensorrt"),
            ("int8_fp16", "tensorrt"),
        )
    ]
    remove(model, cuts)
    expected = model(images).detach().numpy()
    actual = _run(graph, images)
    assert dense.SerializeToString() == before
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()
    for precision, other in zip(("int8", "fp16", "int8_fp16"), others, strict=True):
        assert _run(other, images).shape == expected.shape
        kinds = {tensor.data_type for tensor in other.graph.initializer if len(tensor.dims) == 4}
        assert (TensorProto.INT8 in kinds) == precision.startswith("int8")
        assert (TensorProto.FLOAT16 in {tensor.data_type for tensor in other.graph.initializer}) == (
            precision.endswith("fp16")
        )


class Viewed(nn.Module):
    """Averages over the image by a reshape that names the channels once it is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 16, 3)
        self.head = nn.Linear(16, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(images).relu()).relu()
        return self.head(x.view(x.size(0), x.size(1), -1).mean(2))


class Unused:
    """No stopwatch: nothing is timed."""

    runtime = "onnxruntime:cpu"


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_graph_that_names_widths_is_exported_anew(precision: str) -> None:
    torch.manual_seed(0)
    model, images = Viewed().eval(), torch.randn(2, 3, 32, 32)
    bench = Bench(
        model=model,
        images=images,
        stopwatch=Unused(),
        precision=precision,
        batch_size=1,
        threads=1,
        target="onnxruntime-cpu",
    )
    removed = np.array([1, 5, 6])
    cuts = {("second", "out"): removed, ("head", "in"): removed}
    with pytest.raises(FixedWidthsError):
        narrowed(export_onnx(model, (3, 32, 32), opset=18), cuts, dict.fromkeys(cuts, (16,)))
    actual = _run(bench.at(cuts), images)
    assert model.second.out_channels == 16
    remove(model, cuts)
    if precision == "fp32":
        expected = model(images).detach().numpy()
        assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()
    else:
        anew = deployed(export_onnx(model, (3, 32, 32), opset=18), precision, "onnxruntime-cpu")
        np.testing.assert_array_equal(actual, _run(anew, images))


class LayerScale(nn.Module):
    """ConvNeXt's: constants scale what a block adds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(16, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        wide = self.first(images)
        return wide + self.second(wide) * self.scale


@pytest.mark.parametrize(
    ("model", "nodes"),
    [
        # AlexNet and VGG
        (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(7200, 64), nn.ReLU(), nn.Linear(64, 4)),
            {"0": "0/Conv", "2": "2/Gemm", "4": "4/Gemm"},
        ),
        (LayerScale(), {"first": "first/Conv", "second": "second/Conv"}),
    ],
)
def test_layers_that_something_is_fused_into_have_their_times(
    model: nn.Module, nodes: dict[str, str], tmp_path: Path
) -> None:
    graph = tmp_path / "model.onnx"
    save_onnx(export_onnx(model.eval(), (3, 32, 32), opset=18), graph)
    stopwatch = RuntimeStopwatch(runtime="onnxruntime:cpu", image_shape=(3, 32, 32))
    times = stopwatch.layer_ms(graph, batch_size=1, threads=1)
    sums = layer_sums(list(nodes), times)
    assert all(ms > 0 for ms in sums.values())
    assert set(nodes.values()) <= times.keys()


def _run(graph: object, images: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(),  # type: ignore[attr-defined]
        providers=["CPUExecutionProvider"],
    )
    return session.run(None, {"images": images.numpy()})[0]
