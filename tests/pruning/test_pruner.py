"""Pruning a whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from deploycnn.errors import PassRequirementError
from deploycnn.models.cifar_resnet import CifarResNet, PadShortcut
from deploycnn.models.delta import Delta, apply, difference, tensors
from deploycnn.models.macs import count_macs, count_params
from deploycnn.pruning import importance, pruner
from deploycnn.pruning.costs import macs_by_layer
from deploycnn.pruning.layers import widths
from deploycnn.pruning.pruner import Goal, prune
from tests.pruning import nets

MAGNITUDE = partial(importance.magnitude, power=2)


def cut(model: nn.Module, side: int = 32, **goal: Any) -> Any:
    return prune(model, nets.images(side), MAGNITUDE, Goal(**goal))


@settings(max_examples=40, deadline=None)
@given(
    net=st.sampled_from([nets.Residual, nets.Depthwise, nets.Concat]),
    sizes=st.tuples(st.integers(2, 24), st.integers(2, 40)),
    ratio=st.floats(0.05, 0.9),
    round_to=st.sampled_from([1, 2, 4, 8]),
    scope=st.sampled_from(["layer", "global"]),
)
def test_any_width_and_ratio(
    net: Callable[..., nn.Module], sizes: tuple[int, int], ratio: float, round_to: int, scope: str
) -> None:
    model = nets.lively(net(*sizes))
    before, macs = widths(model), count_macs(model, (3, 8, 8))
    prunable = sizes if net is nets.Residual else (*sizes, 16)
    if max(prunable) <= round_to:
        with pytest.raises(PassRequirementError, match="no smaller multiple"):
            cut(model, 8, pruning_ratio=ratio, round_to=round_to, scope=scope)
        return
    assume(ratio * max(prunable) > round_to)  # else no width may reach a multiple, which is refused
    record = cut(model, 8, pruning_ratio=ratio, round_to=round_to, scope=scope)
    after = widths(model)
    for name, (_, out) in after.items():
        assert out == before[name][1] or out >= round_to
        assert out >= before[name][1] * 0.1 - 1e-9
    assert after["fc"][1] == 5
    assert record["macs_before"] == macs
    assert record["macs_after"] == count_macs(model, (3, 8, 8)) <= macs
    assert record["params_after"] == count_params(model)
    with torch.no_grad():
        assert model(nets.images(8)).shape == (2, 5)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_cifar_resnet_loses_channels_of_its_stream_as_well(scope: str) -> None:
    model = CifarResNet(20)
    record = cut(model, pruning_ratio=0.5, scope=scope)
    assert record["pruning_ratio"] == pytest.approx(0.5, abs=0.01)
    changed = record["widths"]
    assert changed["conv1"]["after"][1] < 16
    assert changed["layer3.0.conv2"]["after"][1] < 64
    for name, now in changed.items():
        assert now["after"][1] % 8 == 0 or name == "linear"
    for shortcut in (m for m in model.modules() if isinstance(m, PadShortcut)):
        assert shortcut.in_channels > 0
    shortcut = model.layer2[0].shortcut
    assert shortcut.in_channels == model.conv1.out_channels
    assert shortcut.out_channels == model.layer2[0].conv2.out_channels
    assert record["protected"] == [
        {"layers": ["linear"], "channels": 10, "reason": "these are the model's outputs"}
    ]


def test_layer_scope_by_hand() -> None:
    model = nets.lively(nets.Residual(width=8, inner=32))
    scores = importance.magnitude(model, pruner.analyse(model, nets.images(8)).groups, power=2)
    kept = np.sort(np.argsort(scores[1])[16:])
    expected = model.conv1.weight.detach().numpy()[kept]
    record = cut(model, 8, pruning_ratio=0.5)
    np.testing.assert_array_equal(model.conv1.weight.detach().numpy(), expected)
    assert record["widths"] == {
        "conv1": {"before": [8, 32], "after": [8, 16]},
        "conv2": {"before": [32, 8], "after": [16, 8]},
    }
    assert record["pruning_ratio"] == 16 / 40
    reason = "no smaller multiple of round_to = 8 within max_ratio = 0.9"
    assert {"layers": ["stem", "conv2"], "channels": 8, "reason": reason} in record["protected"]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("macs_ratio", [0.3, 0.6, 0.9])
def test_macs_goal_is_met(scope: str, macs_ratio: float) -> None:
    model = CifarResNet(20)
    record = cut(model, macs_ratio=macs_ratio, scope=scope)
    assert record["macs_after"] == count_macs(model, (3, 32, 32))
    assert record["macs_ratio"] == record["macs_after"] / record["macs_before"] <= macs_ratio
    if scope == "global":  # a step is 8 channels of one layer
        assert record["macs_ratio"] > macs_ratio - 0.12


def test_finer_widths_meet_a_macs_goal_closely() -> None:
    for scope in ("layer", "global"):
        record = cut(CifarResNet(20), macs_ratio=0.5, scope=scope, round_to=1)
        assert 0.46 < record["macs_ratio"] <= 0.5


def test_macs_out_of_reach_names_the_least() -> None:
    with pytest.raises(PassRequirementError, match=r"macs_ratio: 0.01 is out of reach, the least is 0\.\d+"):
        cut(CifarResNet(8), macs_ratio=0.01)


def test_macs_by_layer_add_up() -> None:
    for net, side in ((nets.Chain, 8), (nets.Depthwise, 9), (nets.Grouped, 8), (lambda: CifarResNet(8), 32)):
        model = net().eval()
        assert sum(macs_by_layer(model, nets.images(side)).values()) == count_macs(model, (3, side, side))


def test_same_seed_same_model() -> None:
    for criterion in (MAGNITUDE, partial(importance.random, seed=5)):
        one, two = (nets.lively(nets.Depthwise(16, 64)) for _ in range(2))
        for model in (one, two):
            prune(model, nets.images(8), criterion, Goal(pruning_ratio=0.5))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_protected_and_named_ratios() -> None:
    model = CifarResNet(14)
    before = widths(model)
    record = cut(
        model,
        pruning_ratio=0.5,
        protect=("conv1", "layer3.0.conv1"),
        ratios={"layer2": 0.25, "layer3.1.conv1": 0.75},
    )
    after = widths(model)
    for name in ("conv1", "layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2", "layer3.0.conv1"):
        assert after[name][1] == before[name][1]
    assert [after[name][1] for name in ("layer1.0.conv1", "layer2.0.conv1", "layer3.1.conv1")] == [8, 24, 16]
    reasons = {kept["reason"] for kept in record["protected"]}
    assert {"protected by the recipe (conv1)", "protected by the recipe (layer3.0.conv1)"} <= reasons


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ({"layer9": 0.5}, 'prune.ratios: the model has no module "layer9"; did you mean "layer'),
        (
            {"linear": 0.5},
            'nothing in "linear" can be pruned: these are the model\'s outputs; remove the name',
        ),
        ({"pool": 0.5}, 'nothing in "pool" can be pruned: it holds no layer that makes channels'),
    ],
)
def test_wrong_names_in_ratios(ratios: dict[str, float], message: str) -> None:
    with pytest.raises(PassRequirementError) as caught:
        cut(CifarResNet(8), pruning_ratio=0.5, ratios=ratios)
    assert message in str(caught.value)


def test_nothing_left_to_prune_says_why() -> None:
    with pytest.raises(
        PassRequirementError, match="no layer can be pruned: these are the model's outputs; protected"
    ):
        cut(CifarResNet(8), pruning_ratio=0.5, protect=("conv1", "layer1", "layer2", "layer3"))
    with pytest.raises(PassRequirementError, match="no smaller multiple of round_to = 64"):
        cut(CifarResNet(8), pruning_ratio=0.5, round_to=64)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 2, 1), nn.Flatten())
    with pytest.raises(PassRequirementError, match="nothing to rank these channels by"):
        prune(model, nets.images(8), importance.bn_scale, Goal(pruning_ratio=0.5))


def test_too_little_to_reach_the_next_width_is_no_silent_success() -> None:
    with pytest.raises(PassRequirementError, match=r"pruning_ratio: 0.05 is too little.* round_to = 8"):
        cut(CifarResNet(8), pruning_ratio=0.05)
    assert cut(CifarResNet(8), pruning_ratio=0.05, scope="global")["pruning_ratio"] > 0


def test_model_that_computes_nan_is_refused() -> None:
    model = CifarResNet(8)
    model.conv1.weight.data[0] = float("nan")
    with pytest.raises(PassRequirementError, match="outputs before pruning hold NaN"):
        cut(model, pruning_ratio=0.5)


def test_wrong_surgery_is_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CifarResNet(8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(pruner, "difference", lambda *_, **__: 0.5)
    with pytest.raises(RuntimeError, match="would break the model"):
        cut(model, pruning_ratio=0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_auxiliary_heads_still_train_after_pruning() -> None:
    model = nets.Auxiliary()
    cut(model, 8, pruning_ratio=0.5)
    main, aux = model.train()(nets.images(8))
    assert main.shape == aux.shape == (2, 5)
    assert model.conv1.out_channels == 8


def test_a_gate_of_halves_computes_what_it_computes_silenced() -> None:
    model = nets.lively(nets.Split("chunk"))
    record = cut(model, 8, pruning_ratio=0.5, round_to=4)
    assert record["widths"]["both"] == {"before": [16, 32], "after": [8, 16]}
    assert record["widths"]["last"]["after"][0] == 8
    assert model(nets.images(8)).shape == (2, 5)


@pytest.mark.parametrize(
    ("net", "attribute", "sizes"),
    [
        (nets.Parts, "sizes", (3, 5, 4)),
        (nets.Hierarchy, "size", 4),
        (lambda: nets.Hierarchy(total=True), "size", 12),
    ],
)
def test_sizes_of_parts_follow(net: Callable[[], nn.Module], attribute: str, sizes: object) -> None:
    model = nets.lively(net())
    cut(model, 8, pruning_ratio=0.5, round_to=1)
    assert getattr(model, attribute) == sizes
    assert model.stem.out_channels == 12
    assert model(nets.images(8)).shape == (2, 5)
    delta = difference(model, net())
    assert delta.attributes[""] == {attribute: sizes}
    again = net()
    apply(Delta.from_json(json.loads(json.dumps(delta.to_json()))), again, tensors(model))
    torch.testing.assert_close(again(nets.images(8)), model(nets.images(8)), rtol=0, atol=0)


def test_model_keeps_no_trace_of_the_tools() -> None:
    model = CifarResNet(8)
    types = {name: type(module) for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    cut(model, pruning_ratio=0.5)
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
