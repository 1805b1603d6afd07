"""Channels of single layers, against loops over the definition."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from deploycnn.models.cifar_resnet import PadShortcut
from deploycnn.pruning.layers import by_channel, is_depthwise, remove_channels, width, zero_channels

CONVOLUTIONS = [
    nn.Conv2d(6, 8, 3),
    nn.Conv2d(6, 8, (1, 3), groups=2, bias=False),
    nn.ConvTranspose2d(6, 8, 3),
    nn.ConvTranspose2d(6, 8, 2, groups=2),
    nn.Conv1d(4, 6, 3),
]


def used_by(layer: nn.Module, side: str, channel: int) -> torch.Tensor:
    """Which weights touch a channel, by asking the layer: an output or input that only they can change."""
    touched = torch.zeros_like(layer.weight)
    groups, ins, outs = layer.groups, layer.in_channels, layer.out_channels
    for out, inp in itertools.product(range(outs), range(ins)):
        if out // (outs // groups) != inp // (ins // groups) or channel != (out if side == "out" else inp):
            continue
        if layer.transposed:
            touched[inp, out % (outs // groups)] = 1
        else:
            touched[out, inp % (ins // groups)] = 1
    return touched


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_by_channel_gathers_what_belongs_to_a_channel(layer: nn.Module, side: str) -> None:
    values = torch.randn_like(layer.weight)
    rows = by_channel(layer, side, values)
    assert len(rows) == width(layer, side)
    for channel, row in enumerate(rows):
        belongs = values[used_by(layer, side, channel) == 1]
        assert torch.equal(row.sort().values, belongs.sort().values)


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_zero_channels_silences_outputs_and_ignores_inputs(layer: nn.Module) -> None:
    spatial = (7,) * (layer.weight.dim() - 2)
    inputs = torch.randn(2, layer.in_channels, *spatial)
    silenced = copy.deepcopy(layer)
    before = layer.weight.clone()
    zero_channels(silenced, "out", [1, 4])
    zero_channels(silenced, "in", [2])
    changed = inputs.clone()
    changed[:, 2] = 99.0
    expected = layer(
        torch.where(torch.arange(layer.in_channels).reshape(1, -1, *(1,) * len(spatial)) == 2, 0, inputs)
    )
    expected[:, [1, 4]] = 0
    torch.testing.assert_close(silenced(changed), expected)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_remove_channels_keeps_what_the_others_compute(layer: nn.Module) -> None:
    groups = layer.groups
    out = [o + g * (layer.out_channels // groups) for g in range(groups) for o in (0,)]
    inp = [i + g * (layer.in_channels // groups) for g in range(groups) for i in (1,)]
    pruned = copy.deepcopy(layer)
    remove_channels(pruned, "out", out)
    remove_channels(pruned, "in", inp)
    spatial = (7,) * (layer.weight.dim() - 2)
    inputs = torch.randn(2, layer.in_channels, *spatial)
    inputs[:, inp] = 0
    kept_in = [i for i in range(layer.in_channels) if i not in inp]
    kept_out = [o for o in range(layer.out_channels) if o not in out]
    torch.testing.assert_close(pruned(inputs[:, kept_in]), layer(inputs)[:, kept_out])
    assert (pruned.in_channels, pruned.out_channels) == (len(kept_in), len(kept_out))


def test_depthwise_prelu_norm_and_linear_lose_their_channels() -> None:
    inputs = torch.randn(2, 6, 5, 5)
    kept = [0, 2, 3, 5]
    norm = nn.BatchNorm2d(6, affine=False).eval()
    norm.running_mean.uniform_(-1, 1)
    prelu = nn.PReLU(6)
    prelu.weight.data.uniform_(0, 1)
    for layer in (nn.Conv2d(6, 6, 3, groups=6), prelu, norm, nn.BatchNorm2d(6).eval()):
        expected = layer(inputs)[:, kept]
        remove_channels(layer, "out", [4, 1])
        torch.testing.assert_close(layer(inputs[:, kept]), expected)
        assert width(layer, "out") == 4
    linear = nn.Linear(6, 3)
    expected = linear(torch.nn.functional.pad(inputs[:, :4, 0, 0], (0, 2)))[:, [0, 2]]
    remove_channels(linear, "in", [4, 5])
    remove_channels(linear, "out", [1])
    torch.testing.assert_close(linear(inputs[:, :4, 0, 0]), expected)


def test_padding_shortcut_loses_zeros_and_channels_alike() -> None:
    shortcut = PadShortcut(4, 2, 3, stride=2)
    inputs = torch.randn(1, 4, 6, 6)
    removed = [0, 3, 4, 8]  # a zero before, input channels 1 and 2, a zero after
    expected = np.delete(shortcut(inputs).numpy(), removed, axis=1)
    remove_channels(shortcut, "out", removed)
    np.testing.assert_array_equal(shortcut(inputs[:, [0, 3]]).numpy(), expected)
    assert (shortcut.channels_before, shortcut.in_channels, shortcut.channels_after) == (1, 2, 2)


def test_only_one_filter_per_channel_is_depthwise() -> None:
    assert is_depthwise(nn.Conv2d(8, 8, 3, groups=8))
    assert not is_depthwise(nn.Conv2d(8, 16, 3, groups=8))
    assert not is_depthwise(nn.Conv2d(1, 1, 3))
    with pytest.raises(TypeError, match="LayerNorm"):
        width(nn.LayerNorm(8), "out")
