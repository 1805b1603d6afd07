"""Group norm, Fisher, HRank and CHIP against their definitions, in float64 NumPy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from deploycnn.errors import PassRequirementError
from deploycnn.pruning import feature_maps, fisher, importance
from tests.pruning import nets
from tests.pruning.test_importance import batches, groups_of, made, read, weights

Array = npt.NDArray[np.float64]


def test_group_norm_is_one_norm_over_all_coupled_layers() -> None:
    model = nets.lively(nets.Residual())
    w = weights(model)
    expected = np.sqrt(
        made(w["stem.weight"], 2)
        + w["bn.weight"] ** 2
        + w["bn.bias"] ** 2
        + read(w["conv1.weight"], 2)
        + made(w["conv2.weight"], 2)
        + w["bn2.weight"] ** 2
        + w["bn2.bias"] ** 2
        + read(w["fc.weight"], 2)
    )
    (score,) = importance.group_norm(model, [groups_of(model)["stem"]])
    np.testing.assert_allclose(score, expected, rtol=1e-12)


def single_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Array]:
    """Gradients of each image's loss by vectorized automatic differentiation, (N, ...) by name."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, parameters, (image[None],))
        return functional.cross_entropy(logits, label[None])

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    return {name: value.numpy() for name, value in found.items()}


def test_fisher_is_half_the_squared_parameters_times_their_mean_squared_gradients() -> None:
    model = nets.lively(nets.Residual()).double()
    data = batches(2)
    parts = [single_gradients(model, *batch) for batch in data]
    w = weights(model)
    terms = {
        name: w[name] ** 2 * np.mean(np.concatenate([part[name] for part in parts]) ** 2, axis=0) / 2
        for name in parts[0]
    }
    inner = (
        made(terms["conv1.weight"], 1)
        + terms["bn1.weight"]
        + terms["bn1.bias"]
        + read(terms["conv2.weight"], 1)
    )
    seen: list[int] = []
    (score,) = fisher.fisher(model, [groups_of(model)["conv1"]], batches=data, progress=seen.append)
    np.testing.assert_allclose(score, inner, rtol=1e-10)
    assert seen == [4, 8]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_group_fisher_adds_the_readers_of_an_image_before_squaring() -> None:
    model = nets.lively(nets.Residual()).double()
    data = batches(2)
    step, expected = 1e-5, np.zeros(8)
    for images, labels in data:
        for image, label in zip(images, labels, strict=True):
            for channel in range(8):
                losses = []
                for scale in (1 + step, 1 - step):
                    scaled = copy.deepcopy(model)
                    with torch.no_grad():
                        scaled.conv1.weight[:, channel] *= scale
                        scaled.fc.weight[:, channel] *= scale
                        losses.append(functional.cross_entropy(scaled(image[None]), label[None]).item())
                expected[channel] += ((losses[0] - losses[1]) / (2 * step)) ** 2
    (score,) = fisher.group_fisher(model, [groups_of(model)["stem"]], batches=data)
    np.testing.assert_allclose(score, expected / 8, rtol=1e-3, atol=1e-12)


def stream_and_end(model: Any, images: Tensor) -> tuple[Array, Array]:
    """The maps that conv1 and conv2 of the residual net read."""
    with torch.no_grad():
        stream = torch.relu(model.bn(model.stem(images)))
        inner = torch.relu(model.bn1(model.conv1(stream)))
    return stream.double().numpy(), inner.double().numpy()


def nuclear_drop(maps: Array) -> Array:
    rows = maps.reshape(len(maps), -1)
    whole = np.linalg.norm(rows, "nuc")
    drops = []
    for channel in range(len(rows)):
        without = rows.copy()
        without[channel] = 0
        drops.append(whole - np.linalg.norm(without, "nuc"))
    return np.array(drops)


def map_ranks(maps: Array) -> Array:
    return np.linalg.matrix_rank(maps.astype(np.float32)).astype(float)


@pytest.mark.parametrize(
    ("criterion", "reference"), [(feature_maps.hrank, map_ranks), (feature_maps.chip, nuclear_drop)]
)
def test_feature_map_measures_average_over_images(
    criterion: Callable[..., list[importance.Scores]], reference: Callable[[Array], Array]
) -> None:
    model = nets.lively(nets.Residual())
    model.stem.weight.data[2] = 0  # a map of equal pixels: rank 1 at most
    model.bn.bias.data[3] = -100.0  # a map of zeros: rank 0, and nobody misses it
    data = [(images.float(), labels) for images, labels in batches(2)]
    groups = groups_of(model)
    got = criterion(model, [groups["stem"], groups["conv1"]], batches=data)
    maps = [stream_and_end(model, images) for images, _ in data]
    for score, place in zip(got, (0, 1), strict=True):
        expected = np.mean([reference(image) for part in maps for image in part[place]], axis=0)
        np.testing.assert_allclose(score, expected, rtol=1e-4, atol=1e-4)
    assert got[0] is not None
    assert got[0][3] == got[0].min() == pytest.approx(0, abs=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


def test_chip_of_more_channels_than_pixels_uses_the_small_matrix() -> None:
    maps = np.random.default_rng(0).normal(size=(2, 12, 2, 3))
    found = feature_maps.independence(torch.from_numpy(maps)).numpy()
    np.testing.assert_allclose(found, [nuclear_drop(image) for image in maps], rtol=1e-8)


def test_chip_ranks_a_copied_channel_below_its_independent_neighbours() -> None:
    maps = np.random.default_rng(1).normal(size=(1, 5, 4, 4))
    maps[0, 3] = maps[0, 1]
    (found,) = feature_maps.independence(torch.from_numpy(maps)).numpy()
    assert set(np.argsort(found)[:2]) == {1, 3}


def test_channels_that_only_a_classifier_reads_are_seen_where_they_are_made() -> None:
    model = nets.lively(nets.Chain())
    images = nets.images(8, count=4)
    group = groups_of(model)["conv2"]
    (score,) = feature_maps.hrank(model, [group], batches=[(images, torch.zeros(4, dtype=torch.long))])
    with torch.no_grad():
        made_maps = model.conv2(torch.relu(model.bn1(model.conv1(images))))
        after = model.act(made_maps)
    expected = np.mean([map_ranks(made_maps.numpy()), map_ranks(after.numpy())], axis=0).mean(axis=0)
    np.testing.assert_allclose(score, expected)


def test_one_pixel_maps_still_rank_by_how_often_they_are_alive() -> None:
    model = nets.lively(nets.Chain())
    images = nets.images(8, count=6)
    (score,) = feature_maps.hrank(
        model, [groups_of(model)["fc1"]], batches=[(images, torch.zeros(6, dtype=torch.long))]
    )
    with torch.no_grad():
        features = model.pool(model.act(model.conv2(torch.relu(model.bn1(model.conv1(images))))))
        hidden = torch.relu(model.fc1(torch.flatten(features, 1)))
    np.testing.assert_allclose(score, (hidden > 0).double().mean(0).numpy())


@pytest.mark.parametrize(
    ("criterion", "name"),
    [
        (fisher.fisher, "fisher"),
        (fisher.group_fisher, "group_fisher"),
        (feature_maps.hrank, "hrank"),
        (feature_maps.chip, "chip"),
    ],
)
def test_no_image_is_no_importance(criterion: Callable[..., object], name: str) -> None:
    model = nets.Residual()
    with pytest.raises(PassRequirementError, match=f"{name} needs images.*training split has none"):
        criterion(model, list(groups_of(model).values()), batches=[])
