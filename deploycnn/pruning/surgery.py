"""Remove channels, and prove that what is left computes what it should.

The proof: a channel that makes zeros and whose readers ignore it contributes nothing, so a model with such
channels set to zero must compute exactly what it computes without them. This holds whatever lies between the
layers, and fails where a dependency was missed or channels were matched wrongly.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from deploycnn.pruning.groups import ChannelGroup, IntArray
from deploycnn.pruning.layers import (
    BATCH_NORMS,
    MIXING,
    RUN_ERRORS,
    Side,
    remove_channels,
    width,
    zero_channels,
)
from deploycnn.pruning.splits import Split
from deploycnn.pruning.tracing import forward

#: (layer, side), or (module, how it splits channels) -> its channels to remove.
Removals = Mapping[tuple[str, Side | Split], IntArray]

#: Largest difference to the masked model, relative to its largest output, in float64.
TOLERANCE = 1e-7


def removals(chosen: Sequence[tuple[ChannelGroup, IntArray]]) -> Removals:
    """What each layer loses when each group loses the given channels of its own."""
    found: dict[tuple[str, Side | Split], list[IntArray]] = {}

    def note(name: str, side: Side | Split, channels: IntArray) -> None:
        if len(channels):
            found.setdefault((name, side), []).append(channels)

    for group, roots in chosen:
        for member in group.members:
            note(member.layer, member.side, member.channels[np.isin(member.roots, roots)])
        for parting in group.partings:
            note(parting.module, parting.split, parting.channels[np.isin(parting.roots, roots)])
    return {place: np.unique(np.concatenate(hits)) for place, hits in found.items()}


def channels_at(model: nn.Module, cuts: Removals) -> dict[tuple[str, Side | Split], tuple[int, ...]]:
    """Number of channels at each place that loses some, before it does: of a layer, or of each part of a split."""
    return {
        (name, side): tuple(side.sizes(module)) if isinstance(side, Split) else (width(module, side),)
        for name, side in cuts
        for module in (model.get_submodule(name),)
    }


def remove(model: nn.Module, cuts: Removals) -> None:
    """Remove channels in place."""
    for (name, side), channels in cuts.items():
        module = model.get_submodule(name)
        if isinstance(side, Split):
            side.remove(module, channels)
        else:
            remove_channels(module, side, channels.tolist())


def silence(model: nn.Module, cuts: Removals) -> None:
    """Set channels to zero in place, where they are made and where they are read."""
    for (layer, side), channels in cuts.items():
        if not isinstance(side, Split):
            zero_channels(model.get_submodule(layer), side, channels.tolist())


def difference(
    model: nn.Module, cuts: Removals, images: Tensor, *, training_heads: bool = False
) -> float | str:
    """How far the model without channels is from the model with these channels silenced.

    Args:
        model: Left as it is. In float64, so that rounding does not hide or feign a difference.
        cuts: What to remove.
        images: (N, C, H, W), float64.
        training_heads: Compare outputs that are computed in training mode only as well.

    Returns:
        The largest difference relative to the largest output, or how the model without these channels fails.
    """
    silenced = sharing(model)
    silence(silenced, cuts)
    with torch.no_grad():
        expected = forward(silenced, images, training_heads=training_heads)
    del silenced
    pruned = sharing(model)
    try:
        remove(pruned, cuts)
        with torch.no_grad():
            actual = forward(pruned, images, training_heads=training_heads)
    except RUN_ERRORS as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return _largest(expected, actual)


def sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares all tensors: surgery replaces tensors, it never writes into them."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _largest(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float | str:
    if [tuple(tensor.shape) for tensor in expected] != [tuple(tensor.shape) for tensor in actual]:
        return "the outputs' shapes change"
    worst = 0.0
    for want, got in zip(expected, actual, strict=True):
        if not bool(torch.isfinite(want).all() and torch.isfinite(got).all()):
            return "the outputs are not finite"
        scale = max(float(want.abs().max()), 1e-30)
        worst = max(worst, float((want - got).abs().max()) / scale)
    return worst


def randomized(model: nn.Module, images: Tensor, seed: int) -> nn.Module:
    """A float64 copy with random weights in which every channel matters and no output vanishes or explodes.

    Real weights may hide a wrong surgery: a batch normalization initialized to zero silences a whole branch.
    """
    generator = torch.Generator().manual_seed(seed)
    twin = copy.deepcopy(model).double().requires_grad_(True)
    norms = [layer for layer in twin.modules() if isinstance(layer, BATCH_NORMS)]
    with torch.no_grad():
        for layer in twin.modules():
            if isinstance(layer, MIXING):
                fan_in = layer.weight[0].numel()
                layer.weight.normal_(0.0, (2.0 / fan_in) ** 0.5, generator=generator)
                if layer.bias is not None:
                    layer.bias.normal_(0.0, 0.1, generator=generator)
        for norm in norms:
            if norm.affine:
                norm.weight.uniform_(0.5, 1.5, generator=generator)
                norm.bias.normal_(0.0, 0.2, generator=generator)
        _set_statistics(twin, norms, images.double())
    return twin


def _set_statistics(model: nn.Module, norms: Sequence[nn.Module], images: Tensor) -> None:
    """Give batch normalizations the statistics of ``images``."""
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0  # type: ignore[assignment] # an attribute of the class, not a submodule
    try:
        model(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
