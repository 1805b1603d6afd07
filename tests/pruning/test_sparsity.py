"""Masks, the cubic schedule, zeros that stay, and reordered channels."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploycnn.core import Artifact, Facts
from deploycnn.errors import PassRequirementError
from deploycnn.models.cifar_resnet import CifarResNet
from deploycnn.pruning import permutation, sparse_forecast, sparsity, zeros
from deploycnn.pruning.structure import analyse
from tests.pruning import nets


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return sparsity.weighty(model, ())


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.01, 0.99), scope=st.sampled_from(["layer", "global"]), seed=st.integers(0, 99))
def test_masks_drop_exactly_the_smallest(share: float, scope: sparsity.Scope, seed: int) -> None:
    model = nets.lively(nets.Residual(), seed)
    layers = layers_of(model)
    masks = sparsity.magnitude_masks(layers, share, scope)
    flat = {name: layer.weight.detach().abs().numpy().ravel() for name, layer in layers.items()}
    pools = [np.concatenate(list(flat.values()))] if scope == "global" else list(flat.values())
    kept = {name: mask.numpy().ravel() for name, mask in masks.items()}
    chosen = [np.concatenate(list(kept.values()))] if scope == "global" else list(kept.values())
    for pool, mask in zip(pools, chosen, strict=True):
        count = round(share * len(pool))
        assert (~mask).sum() == count
        if 0 < count < len(pool):
            assert pool[~mask].max() <= pool[mask].min()


def test_equal_weights_do_not_drop_more_than_asked() -> None:
    layer = nn.Linear(10, 10)
    nn.init.constant_(layer.weight, 0.5)
    masks = sparsity.magnitude_masks({"layer": layer}, 0.3, "layer")
    assert int((~masks["layer"]).sum()) == 30


def test_two_four_keeps_the_two_largest_of_each_four_inputs() -> None:
    weight = torch.randn(6, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    mask = sparsity.two_four_mask(weight).numpy()
    sizes = np.abs(weight.numpy())
    for out, block, row, column in itertools.product(range(6), range(2), range(3), range(3)):
        four = slice(4 * block, 4 * block + 4)
        kept = set(np.flatnonzero(mask[out, four, row, column]))
        assert kept == set(np.argsort(sizes[out, four, row, column])[2:])
    assert sparsity.two_four_mask(torch.zeros(3, 4)).sum() == 6  # ties


def test_what_cannot_be_two_four_says_why() -> None:
    assert sparsity.why_not_two_four(nn.Conv2d(8, 4, 3)) is None
    assert sparsity.why_not_two_four(nn.Linear(8, 3)) is None
    assert "no multiple of 4" in str(sparsity.why_not_two_four(nn.Conv2d(3, 8, 3)))
    assert "in groups" in str(sparsity.why_not_two_four(nn.Conv2d(8, 8, 3, groups=2)))
    assert "transposed" in str(sparsity.why_not_two_four(nn.ConvTranspose2d(8, 8, 3)))


def test_cubic_schedule_by_hand() -> None:
    assert [sparsity.cubic(step, 4, 0.0, 0.8) for step in (0, 1, 2, 4, 9)] == pytest.approx(
        [0.0, 0.8 * (1 - 0.75**3), 0.8 * (1 - 0.125), 0.8, 0.8]
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    model.train()
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        optimizer.zero_grad()
        images = torch.randn(4, 3, 8, 8, generator=generator)
        nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_zeros_stay_zero_in_training_and_other_weights_move(kind: str) -> None:
    model = nets.lively(nets.Residual())
    layers = layers_of(model)
    sparsity.apply(layers, sparsity.magnitude_masks(layers, 0.5, "global"))
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    held = zeros.keep_zeros(model, tuple(layers))
    assert held == sum(int((weight == 0).sum()) for weight in before.values())
    optimizer = (
        torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
        if kind == "sgd"
        else torch.optim.AdamW(model.parameters(), 0.01)
    )
    train(model, optimizer, 4)
    for name, layer in layers.items():
        was_zero = before[name] == 0
        assert torch.equal(layer.weight == 0, was_zero), name
        assert bool((layer.weight[~was_zero] != before[name][~was_zero]).all()), name


def test_only_zeros_that_were_meant_are_held() -> None:
    model = nets.lively(nets.Residual())
    model.conv1.weight.data[:, 0] = 0
    zeros.keep_zeros(model, ("conv2", "gone"))
    train(model, torch.optim.SGD(model.parameters(), 0.1), 1)
    assert bool((model.conv1.weight[:, 0] != 0).any())


def test_the_lineage_says_which_zeros_are_meant() -> None:
    def artifact(**record: object) -> Artifact:
        return Artifact(
            key="k", format="torch", path=Path("x"), inputs=(), outputs=(), parents=(), facts=Facts(record=record)
        )  # fmt: skip

    assert zeros.meant([artifact(), artifact(training={})]) == ()
    assert zeros.meant([artifact(sparsity={"layers": ["a", "b"]}), artifact(training={})]) == ("a", "b")


def test_gradual_sparsity_follows_the_schedule_and_ends_exactly() -> None:
    model = nets.lively(nets.Residual())
    names = tuple(layers_of(model))
    layers = layers_of(model)
    total = sum(layer.weight.numel() for layer in layers.values())
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    seen: list[float] = []
    with sparsity.gradually(model, names, sparsity=0.8, scope="global", steps=8):
        for step in range(12):
            train(model, optimizer, 1)
            model(nets.images())  # what validation sees has its zeros too
            seen.append(sparsity.zeros_ratio(layers))
            assert seen[-1] == pytest.approx(sparsity.cubic(step, 8, 0, 0.8), abs=1.5 / total)
        zero = {name: layer.weight == 0 for name, layer in layers.items()}
    assert seen == sorted(seen)
    assert sparsity.zeros_ratio(layers) == round(0.8 * total) / total
    assert all(torch.equal(layers[name].weight == 0, zero[name]) for name in names)
    assert not dict(model.named_buffers()).keys() & {"pruning_step", "conv1.pruning_mask"}
    assert not model._forward_pre_hooks


def test_gradual_sparsity_continues_from_a_checkpoint() -> None:
    def run(interrupted: bool) -> dict[str, torch.Tensor]:
        model = nets.lively(nets.Residual())
        names, state = tuple(layers_of(model)), None
        for part in (3, 4):
            with sparsity.gradually(model, names, sparsity=0.7, scope="layer", steps=6):
                if state is not None:
                    model.load_state_dict(state)
                optimizer = torch.optim.SGD(model.parameters(), 0.02)
                train(model, optimizer, part)
                if not interrupted:
                    optimizer = torch.optim.SGD(model.parameters(), 0.02)
                    train(model, optimizer, 4)
                    break
                state = {name: value.clone() for name, value in model.state_dict().items()}
            if interrupted:
                model = nets.lively(nets.Residual(), seed=part) if part == 3 else model
        return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}

    whole, resumed = run(interrupted=False), run(interrupted=True)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_search_finds_the_optimum_of_eight_columns() -> None:
    rows = np.random.default_rng(3).normal(size=(5, 8)).astype(np.float32)
    best = max(
        permutation.kept_magnitude(rows[:, [*four, *sorted(set(range(8)) - set(four))]])
        for four in itertools.combinations(range(8), 4)
    )
    found = permutation.search(rows)
    assert sorted(found) == list(range(8))
    assert permutation.kept_magnitude(rows[:, found]) == pytest.approx(best, rel=1e-6)


def test_search_separates_columns_that_fight_for_two_places() -> None:
    # Four strong columns in one stripe: two of them would be lost.
    strong = np.full((16, 32), 0.01, dtype=np.float32)
    strong[:, :4] = 1
    found = permutation.search(strong)
    assert permutation.kept_magnitude(strong[:, found]) > 1.9 * permutation.kept_magnitude(strong)


@pytest.mark.parametrize(
    ("net", "side"),
    [
        (lambda: nets.Residual(16, 32), 8),
        (lambda: nets.Depthwise(16, 32), 8),
        (nets.Concat, 8),
        (nets.Chain, 8),
        (lambda: CifarResNet(8), 32),
        (nets.Grouped, 8),
    ],
)
def test_reordered_channels_compute_the_same_and_lose_less(net: type[nn.Module], side: int) -> None:
    model = nets.lively(net()).double()
    images = nets.images(side).double()
    expected = model(images).detach()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    layers = {n: m for n, m in layers_of(model).items() if sparsity.why_not_two_four(m) is None}

    def kept() -> float:
        return sum(
            float((m.weight.detach().abs() * sparsity.two_four_mask(m.weight)).sum()) for m in layers.values()
        )

    before = kept()
    found = [
        permutation.permute_group(model, group, layers) for group in analyse(model, images.float()).groups
    ]
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)
    gains = [pair[1] - pair[0] for pair in found if pair is not None]
    assert kept() - before == pytest.approx(sum(gains), rel=1e-4)
    assert bool(gains) == (net is not nets.Grouped)  # channels of groups stay in their order
    assert min(gains, default=1) > 0
    moved = {name: sorted(value.flatten().tolist()) for name, value in model.state_dict().items()}
    assert moved == {name: sorted(value.flatten().tolist()) for name, value in weights.items()}


def test_only_layers_that_will_be_two_four_have_a_say_in_the_order() -> None:
    model = nets.lively(nets.Residual(16, 32))
    (inner,) = [group for group in analyse(model, nets.images()).groups if group.name == "conv1"]
    readers = {member.layer for member in inner.members if member.side == "in"}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    others = layers_of(model).keys() - readers
    assert permutation.permute_group(model, inner, others) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert permutation.permute_group(model, inner, readers) is not None


def test_forecast_by_gpu_and_shape() -> None:
    layers = {
        "stem": nn.Conv2d(3, 64, 7),
        "narrow": nn.Conv2d(64, 64, 3),
        "wide": nn.Conv2d(64, 256, 3),
        "deep": nn.Conv2d(256, 256, 1),
        "depthwise": nn.Conv2d(512, 512, 3, groups=512),
    }
    macs = {"stem": 10, "narrow": 20, "wide": 40, "deep": 20, "depthwise": 10}
    found = sparse_forecast.forecast(layers, macs, 100, "A100")
    assert {name for name, reason in found.reasons.items() if reason is None} == {"wide", "deep"}
    assert found.macs_ratio == 0.6
    assert found.bound == pytest.approx(1 / 0.7)
    assert "at most 1.43 times" in found.sentence()
    for old in ("T4", "7.5"):
        none = sparse_forecast.forecast(layers, macs, 100, old)
        assert (none.macs_ratio, none.bound) == (0, 1)
        assert "no sparse tensor cores" in none.sentence()
    with pytest.raises(
        PassRequirementError, match='sparse.gpu: unknown GPU "RTX 309"; .* did you mean "RTX 3090"'
    ):
        sparse_forecast.forecast(layers, macs, 100, "RTX 309")
