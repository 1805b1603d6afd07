"""Each criterion against its definition, in float64 NumPy or by finite differences, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional

from deploycnn.errors import PassRequirementError
from deploycnn.models.cifar_resnet import CifarResNet
from deploycnn.pruning import importance
from deploycnn.pruning.groups import ChannelGroup
from deploycnn.pruning.structure import analyse
from tests.pruning import nets

Array = npt.NDArray[np.float64]


def groups_of(model: nn.Module, side: int = 8) -> dict[str, ChannelGroup]:
    return {group.name: group for group in analyse(model, nets.images(side)).groups}


def weights(model: nn.Module) -> dict[str, Array]:
    return {name: value.detach().double().numpy() for name, value in model.state_dict().items()}


def made(weight: Array, power: int) -> Array:
    """Sum over everything but the output channel."""
    return (np.abs(weight) ** power).reshape(len(weight), -1).sum(1)


def read(weight: Array, power: int) -> Array:
    """Sum over everything but the input channel."""
    return made(np.swapaxes(weight, 0, 1), power)


@pytest.mark.parametrize("power", [1, 2])
def test_magnitude_of_a_coupled_stream(power: int) -> None:
    model = nets.lively(nets.Residual())
    w = weights(model)
    stream = np.mean(
        [
            made(w["stem.weight"], power),
            np.abs(w["bn.weight"]) ** power,
            read(w["conv1.weight"], power),
            made(w["conv2.weight"], power),
            np.abs(w["bn2.weight"]) ** power,
            read(w["fc.weight"], power),
        ],
        axis=0,
    )
    inner = np.mean(
        [made(w["conv1.weight"], power), np.abs(w["bn1.weight"]) ** power, read(w["conv2.weight"], power)],
        axis=0,
    )
    groups = groups_of(model)
    scores = importance.magnitude(model, [groups["stem"], groups["conv1"]], power=power)
    np.testing.assert_allclose(scores[0], stream, rtol=1e-12)
    np.testing.assert_allclose(scores[1], inner, rtol=1e-12)


def test_magnitude_of_flattened_and_depthwise_channels() -> None:
    chain, mobile = nets.lively(nets.Chain()), nets.lively(nets.Depthwise())
    w = weights(chain)
    per_channel = (w["fc1.weight"] ** 2).reshape(16, 16, 4).sum((0, 2))  # hidden, channel, pixels
    # A PReLU's slope says nothing of how large its channel is.
    expected = np.mean([made(w["conv2.weight"], 2), per_channel], axis=0)
    (score,) = importance.magnitude(chain, [groups_of(chain)["conv2"]], power=2)
    np.testing.assert_allclose(score, expected, rtol=1e-12)

    w = weights(mobile)
    expected = np.mean(
        [
            made(w["expand.weight"], 1),
            np.abs(w["bn1.weight"]),
            made(w["depthwise.weight"], 1),
            np.abs(w["bn2.weight"]),
            read(w["squeeze.weight"], 1),
            made(w["excite.weight"], 1),
            read(w["project.weight"], 1),
        ],
        axis=0,
    )
    (score,) = importance.magnitude(mobile, [groups_of(mobile)["expand"]], power=1)
    np.testing.assert_allclose(score, expected, rtol=1e-12)


def test_magnitude_of_a_padded_stream_counts_who_holds_each_channel() -> None:
    model = nets.lively(CifarResNet(8))
    w = weights(model)
    stream = next(group for group in groups_of(model, 32).values() if len(group.units) == 3)
    (score,) = importance.magnitude(model, [stream], power=2)
    total, held = np.zeros(64), np.zeros(64)
    # Option-A padding: stage 1's 16 channels are 8 .. 23 of stage 2, whose 32 are 16 .. 47 of stage 3.
    for first, last, outs, norms, ins in (
        (24, 40, ["conv1", "layer1.0.conv2"], ["bn1", "layer1.0.bn2"], ["layer1.0.conv1", "layer2.0.conv1"]),
        (16, 48, ["layer2.0.conv2"], ["layer2.0.bn2"], ["layer3.0.conv1"]),
        (0, 64, ["layer3.0.conv2"], ["layer3.0.bn2"], ["linear"]),
    ):
        for values in (
            *(made(w[f"{name}.weight"], 2) for name in outs),
            *(w[f"{name}.weight"] ** 2 for name in norms),
            *(read(w[f"{name}.weight"], 2) for name in ins),
        ):
            total[first:last] += values
            held[first:last] += 1
    np.testing.assert_allclose(score, total / held, rtol=1e-12)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("name", ["stem", "conv1"])
def test_magnitude_agrees_with_torch_pruning_where_there_is_no_depthwise_layer(name: str, power: int) -> None:
    model = nets.lively(nets.Residual())
    graph = tp.DependencyGraph().build_dependency(model, nets.images())
    layer = model.get_submodule(name)
    group = graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(layer.out_channels)))
    theirs = tp.importance.GroupMagnitudeImportance(p=power, normalizer=None)(group)
    (ours,) = importance.magnitude(model, [groups_of(model)[name]], power=power)
    np.testing.assert_allclose(ours, theirs.double().numpy(), rtol=1e-5)


def test_bn_scale_is_the_mean_of_the_scales() -> None:
    model = nets.lively(nets.Residual())
    model.bn.weight.data[2] *= -1
    w = weights(model)
    groups = groups_of(model)
    stream, inner = importance.bn_scale(model, [groups["stem"], groups["conv1"]])
    np.testing.assert_allclose(stream, (np.abs(w["bn.weight"]) + np.abs(w["bn2.weight"])) / 2, rtol=1e-12)
    np.testing.assert_allclose(inner, np.abs(w["bn1.weight"]), rtol=1e-12)


def test_bn_scale_says_nothing_where_there_is_no_normalization() -> None:
    model = nets.Chain()
    groups = groups_of(model)
    scores = importance.bn_scale(model, [groups["conv1"], groups["conv2"], groups["fc1"]])
    assert [score is None for score in scores] == [False, True, True]


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(functional.cross_entropy(model(images), labels, reduction="sum"))


def by_finite_differences(
    model: nn.Module, batch: tuple[Tensor, Tensor], layer: str, side: str, index: Sequence[int]
) -> float:
    """|d loss / d s| at s = 1, where s scales all parameters of some channels of one side of a layer."""
    step, losses = 1e-5, []
    for scale in (1 + step, 1 - step):
        scaled = copy.deepcopy(model)
        target = scaled.get_submodule(layer)
        with torch.no_grad():
            if side == "in":
                target.weight[:, index] *= scale
            else:
                target.weight[index] *= scale
                if target.bias is not None:
                    target.bias[index] *= scale
        losses.append(loss_of(scaled, *batch))
    return abs(losses[0] - losses[1]) / (2 * step)


def batches(count: int, classes: int = 5, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    labels = torch.Generator().manual_seed(1)
    return [
        (nets.images(8, seed=seed, count=size).double(), torch.randint(classes, (size,), generator=labels))
        for seed in range(count)
    ]


@pytest.mark.parametrize(
    ("net", "name", "places"),
    [
        (
            nets.Residual,
            "stem",
            [("stem", "out"), ("bn", "out"), ("conv1", "in"), ("conv2", "out"), ("bn2", "out"), ("fc", "in")],
        ),
        (
            nets.Depthwise,
            "expand",
            [
                ("expand", "out"),
                ("bn1", "out"),
                ("depthwise", "out"),
                ("bn2", "out"),
                ("squeeze", "in"),
                ("excite", "out"),
                ("project", "in"),
            ],
        ),
        (nets.Chain, "conv1", [("conv1", "out"), ("bn1", "out"), ("conv2", "in")]),
    ],
)
def test_taylor_is_the_first_order_change_of_the_loss(
    net: type[nn.Module], name: str, places: list[tuple[str, str]]
) -> None:
    model = nets.lively(net()).double()
    data = batches(2)
    group = groups_of(model)[name]
    (score,) = importance.taylor(model, [group], batches=data)
    expected = np.mean(
        [
            [sum(by_finite_differences(model, b, layer, side, [c]) for b in data) for c in range(group.width)]
            for layer, side in places
        ],
        axis=0,
    )
    np.testing.assert_allclose(score, expected / 8, rtol=1e-4, atol=1e-7)


def test_taylor_of_a_flattened_channel_takes_its_pixels_together() -> None:
    model = nets.lively(nets.Chain()).double()
    data = batches(1)
    (score,) = importance.taylor(model, [groups_of(model)["conv2"]], batches=data)
    expected = np.mean(
        [
            [by_finite_differences(model, data[0], "conv2", "out", [c]) for c in range(16)],
            [by_finite_differences(model, data[0], "fc1", "in", range(4 * c, 4 * c + 4)) for c in range(16)],
        ],
        axis=0,
    )
    np.testing.assert_allclose(score, expected / 4, rtol=1e-4, atol=1e-7)


def test_taylor_ranks_a_channel_that_nothing_reads_last() -> None:
    model = nets.lively(nets.Residual())
    model.conv2.weight.data[:, 5] = 0
    data = [(images.float(), labels) for images, labels in batches(2)]
    seen: list[int] = []
    (score,) = importance.taylor(model, [groups_of(model)["conv1"]], batches=data, progress=seen.append)
    assert score.argmin() == 5
    assert score[5] == 0
    assert seen == [4, 8]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_taylor_needs_images() -> None:
    model = nets.Residual()
    with pytest.raises(PassRequirementError, match="training split has none"):
        importance.taylor(model, list(groups_of(model).values()), batches=[])


def test_random_depends_on_the_seed_alone() -> None:
    model = nets.Residual()
    groups = list(groups_of(model).values())
    one, same, other = (importance.random(model, groups, seed=seed) for seed in (3, 3, 4))
    assert [len(score) for score in one] == [group.width for group in groups]
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not np.array_equal(one[0], other[0])
    assert not np.array_equal(one[0], one[1][: len(one[0])])


def test_damaged_weights_are_refused() -> None:
    model = nets.Residual()
    groups = groups_of(model)
    model.conv1.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(PassRequirementError, match='channels of "stem" is not finite'):
        importance.magnitude(model, [groups["stem"]], power=2)
