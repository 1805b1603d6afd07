"""A model without some channels computes what it computed while these were silent."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from deploycnn.models.cifar_resnet import CifarResNet, PadShortcut
from deploycnn.pruning.groups import ChannelGroup, IntArray
from deploycnn.pruning.layers import MIXING
from deploycnn.pruning.structure import analyse
from deploycnn.pruning.surgery import TOLERANCE, difference, randomized, removals, remove, silence
from tests.pruning import nets

NETS = [
    nets.Chain,
    nets.Residual,
    nets.Concat,
    nets.Depthwise,
    nets.Grouped,
    nets.Shuffle,
    nets.Awkward,
    nets.Parts,
    nets.Hierarchy,
    lambda: nets.Hierarchy(total=True),
    lambda: CifarResNet(14),
]


def half(group: ChannelGroup) -> IntArray:
    """Every second atom of each unit."""
    return np.concatenate([unit.atoms[::2].ravel() for unit in group.units])


def mute_producers(model: nn.Module, group: ChannelGroup, roots: IntArray) -> None:
    """Zero what makes the channels, and leave alone what reads them."""
    with torch.no_grad():
        for member in group.members:
            layer = model.get_submodule(member.layer)
            if member.side == "in" or isinstance(layer, PadShortcut | nn.PReLU):
                continue
            channels = member.channels[np.isin(member.roots, roots)]
            if isinstance(layer, nn.ConvTranspose2d):
                size = layer.out_channels // layer.groups
                for channel in channels:
                    rows = slice(*(layer.in_channels // layer.groups * (channel // size + i) for i in (0, 1)))
                    layer.weight[rows, channel % size] = 0
            else:
                layer.weight[channels] = 0
            if layer.bias is not None:
                layer.bias[channels] = 0


@pytest.mark.parametrize("net", NETS)
def test_pruned_model_computes_what_the_muted_one_does(net: Callable[[], nn.Module]) -> None:
    model = nets.lively(net())
    images = nets.images(16)
    structure = analyse(model, images)
    losses = [(group, half(group)) for group in structure.groups]
    for group, roots in losses:
        mute_producers(model, group, roots)
    with torch.no_grad():
        expected = model(images)
        remove(model, removals(losses))
        actual = model(images)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert expected.std() > 0


@pytest.mark.parametrize("net", NETS)
def test_attributes_say_what_the_weights_are(net: Callable[[], nn.Module]) -> None:
    model = net()
    structure = analyse(model, nets.images(16))
    remove(model, removals([(group, half(group)) for group in structure.groups]))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.shape[:2] == (layer.out_channels, layer.in_channels // layer.groups)
        elif isinstance(layer, nn.ConvTranspose2d):
            assert layer.weight.shape[:2] == (layer.in_channels, layer.out_channels // layer.groups)
        elif isinstance(layer, nn.Linear):
            assert layer.weight.shape == (layer.out_features, layer.in_features)
        elif isinstance(layer, nn.BatchNorm2d):
            assert len(layer.weight) == len(layer.bias) == len(layer.running_mean) == layer.num_features
        if isinstance(layer, MIXING):
            assert layer.weight.requires_grad
            assert layer.weight.is_leaf
            assert layer.bias is None or len(layer.bias) in (len(layer.weight), layer.weight.shape[1] * 2)
    # Training goes on: a gradient reaches every parameter.
    model.train()(nets.images(16)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_wrong_match_of_channels_is_found() -> None:
    model = randomized(nets.Residual(), nets.images(), 0)
    group = analyse(model, nets.images()).groups[0]
    images = nets.images().double()
    right = removals([(group, np.array([0, 3]))])
    assert difference(model, right, images) <= TOLERANCE
    for index in range(len(group.members)):
        members = list(group.members)
        members[index] = dataclasses.replace(members[index], roots=np.roll(members[index].roots, 1))
        wrong = dataclasses.replace(group, members=tuple(members))
        found = difference(model, removals([(wrong, np.array([0, 3]))]), images)
        assert isinstance(found, float)
        assert found > 1e-3, members[index].layer


def test_a_missed_dependency_is_found() -> None:
    model = randomized(nets.Residual(), nets.images(), 0)
    group = analyse(model, nets.images()).groups[0]
    for index, member in enumerate(group.members):
        members = group.members[:index] + group.members[index + 1 :]
        cuts = removals([(dataclasses.replace(group, members=members), np.array([0, 3]))])
        found = difference(model, cuts, nets.images().double())
        assert isinstance(found, str), member.layer
        assert "\n" not in found


def test_silencing_and_trying_leave_the_model_alone() -> None:
    model = randomized(nets.Depthwise(), nets.images(), 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    structure = analyse(model, nets.images())
    cuts = removals([(group, half(group)) for group in structure.groups])
    difference(model, cuts, nets.images().double())
    twin = copy.deepcopy(model)
    silence(twin, cuts)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in twin.state_dict().items())


def test_randomized_twin_is_alive_in_every_channel() -> None:
    model = CifarResNet(20)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.zeros_(layer.weight)
    twin = randomized(model, nets.images(32), 0)
    outputs = twin(nets.images(32).double()).detach()
    assert 1e-3 < float(outputs.std()) < 1e3
    norms = [layer for layer in twin.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert all(float(norm.weight.detach().min()) >= 0.5 for norm in norms)
    assert all(norm.momentum == 0.1 for norm in norms)
    again = randomized(model, nets.images(32), 0)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), again.parameters(), strict=True))
