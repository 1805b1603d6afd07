"""What removing a channel means for each kind of layer.

A layer has two sides: ``"out"`` are the channels that it makes, ``"in"`` those that it reads. Layers that
treat each channel alone (batch normalization, depthwise convolution, PReLU, the padding shortcut) have one
side, called ``"out"``. Every function below acts on all parameters of the layer that belong to a channel of
one side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from deploycnn.models.cifar_resnet import PadShortcut

Side = Literal["out", "in"]

# The common bases of all convolutions and of all batch normalizations have no public names.
CONVOLUTIONS = nn.modules.conv._ConvNd  # noqa: SLF001
BATCH_NORMS = nn.modules.batchnorm._BatchNorm  # noqa: SLF001

#: How forward passes fail on shapes that do not fit, whatever somebody else's model says about them.
RUN_ERRORS = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)

#: Layers from which channels can be removed without changing what the other channels compute.
SUPPORTED = (CONVOLUTIONS, nn.Linear, BATCH_NORMS, nn.PReLU, PadShortcut)

#: Layers whose "out" side is made from all channels of their "in" side.
MIXING = (CONVOLUTIONS, nn.Linear)


def is_depthwise(layer: nn.Module) -> bool:
    """Whether ``layer`` is a convolution with one filter per channel."""
    return isinstance(layer, CONVOLUTIONS) and 1 < layer.groups == layer.in_channels == layer.out_channels


def is_grouped(layer: nn.Module) -> bool:
    """Whether ``layer`` is a convolution in groups, but not depthwise."""
    return isinstance(layer, CONVOLUTIONS) and layer.groups > 1 and not is_depthwise(layer)


def groups_of(layer: nn.Module) -> int:
    """Number of groups of a convolution; 1 for other layers."""
    return int(layer.groups) if isinstance(layer, CONVOLUTIONS) else 1


def is_producer(layer: nn.Module) -> bool:
    """Whether ``layer`` makes new channels out of all that it reads."""
    return isinstance(layer, MIXING) and not is_depthwise(layer)


def width(layer: nn.Module, side: Side) -> int:
    """Number of channels on a side of a supported layer."""
    if isinstance(layer, CONVOLUTIONS):
        return int(layer.out_channels if side == "out" else layer.in_channels)
    if isinstance(layer, nn.Linear):
        return layer.out_features if side == "out" else layer.in_features
    if isinstance(layer, BATCH_NORMS):
        return int(layer.num_features)
    if isinstance(layer, nn.PReLU):
        return layer.num_parameters
    if isinstance(layer, PadShortcut):
        return layer.out_channels
    raise TypeError(f"no channels known of {type(layer).__name__}")


def widths(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(in, out) channels of every convolution and linear layer, by name."""
    return {
        name: (width(layer, "in"), width(layer, "out"))
        for name, layer in model.named_modules()
        if isinstance(layer, MIXING)
    }


def changed_widths(
    before: Mapping[str, tuple[int, int]], model: nn.Module
) -> dict[str, dict[str, list[int]]]:
    """Widths of ``model``'s layers that were others ``before``: name -> {"before", "after"}, each [in, out]."""
    return {
        name: {"before": list(before[name]), "after": list(now)}
        for name, now in widths(model).items()
        if now != before[name]
    }


def run_watched(
    model: nn.Module, images: Tensor, note: Callable[[str, nn.Module, Tensor, Tensor], None]
) -> None:
    """Run ``model`` once and tell ``note`` the name, module, input and output of each convolution and linear layer.

    Args:
        model: In evaluation mode.
        images: (N, C, H, W).
        note: Called in the order in which layers run, each time that they do.
    """
    hooks = [
        layer.register_forward_hook(
            lambda layer, inputs, output, name=name: note(name, layer, inputs[0], output)
        )
        for name, layer in model.named_modules()
        if isinstance(layer, MIXING)
    ]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()


def by_channel(layer: nn.Module, side: Side, values: Tensor) -> Tensor:
    """``values``, shaped like ``layer.weight``, with a row for each channel of ``side``."""
    if isinstance(layer, nn.Linear):
        return values if side == "out" else values.t()
    if not isinstance(layer, CONVOLUTIONS):
        return values.view(-1, 1)
    # A convolution's weight is (out, in / groups, ...); a transposed one's is (in, out / groups, ...).
    if (side == "out") != layer.transposed:
        return values.flatten(1)
    split = values.reshape(layer.groups, values.shape[0] // layer.groups, values.shape[1], -1)
    return split.transpose(1, 2).reshape(width(layer, side), -1)


def zero_channels(layer: nn.Module, side: Side, channels: Sequence[int]) -> None:
    """Make ``channels`` of a side compute nothing: what they make is zero, what they read is ignored.

    Tensors are replaced, not written into.
    """
    if isinstance(layer, MIXING):
        names = ("weight", "bias") if side == "out" else ("weight",)
    elif isinstance(layer, BATCH_NORMS):
        # Without an affine part it is the statistics that must map the zero input to a zero output.
        names = ("weight", "bias") if layer.affine else ("running_mean",)
    else:
        return
    for name in names:
        before: Tensor | None = getattr(layer, name)
        if before is not None:
            keep = torch.ones(width(layer, side), dtype=before.dtype, device=before.device)
            keep[torch.as_tensor(channels, dtype=torch.long)] = 0
            factors = _like_weight(layer, side, keep) if before.dim() > 1 else keep
            after = before.detach() * factors
            setattr(layer, name, nn.Parameter(after) if isinstance(before, nn.Parameter) else after)


def _like_weight(layer: nn.Module, side: Side, keep: Tensor) -> Tensor:
    """One factor per channel, shaped to be multiplied with the layer's weight."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    tail = (1,) * (weight.dim() - 2)
    if isinstance(layer, nn.Linear) or not layer.transposed:
        if side == "out":
            return keep.reshape(-1, 1, *tail)
    elif side == "in":
        return keep.reshape(-1, 1, *tail)
    groups = groups_of(layer)
    rows = keep.reshape(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
    return rows.reshape(weight.shape[0], weight.shape[1], *tail)


def remove_channels(layer: nn.Module, side: Side, channels: Sequence[int]) -> None:
    """Remove ``channels`` of a side from the layer's parameters and attributes, in place."""
    removed = sorted(int(channel) for channel in channels)
    if isinstance(layer, PadShortcut):
        _remove_from_padding(layer, removed)
    elif is_depthwise(layer):
        tp.prune_depthwise_conv_out_channels(layer, removed)
    elif isinstance(layer, CONVOLUTIONS) and layer.transposed and layer.groups > 1:
        _remove_from_transposed_groups(layer, side, removed)
    elif isinstance(layer, CONVOLUTIONS):
        (tp.prune_conv_out_channels if side == "out" else tp.prune_conv_in_channels)(layer, removed)
    elif isinstance(layer, nn.Linear):
        (tp.prune_linear_out_channels if side == "out" else tp.prune_linear_in_channels)(layer, removed)
    elif isinstance(layer, BATCH_NORMS):
        tp.prune_batchnorm_out_channels(layer, removed)
    elif isinstance(layer, nn.PReLU):
        tp.prune_prelu_out_channels(layer, removed)
    else:
        raise TypeError(f"no channels known of {type(layer).__name__}")


def _remove_from_transposed_groups(layer: nn.Module, side: Side, removed: Sequence[int]) -> None:
    """As Torch-Pruning 1.6.1 takes the sides of grouped transposed convolutions for one another.

    Each group loses the same of its channels; the weight is (in, out / groups, ...).
    """
    count = width(layer, side)
    kept = torch.as_tensor([channel for channel in range(count) if channel not in removed])
    weight, bias = layer.weight.detach(), layer.bias  # type: ignore[operator] # a convolution
    if side == "in":
        layer.weight, layer.in_channels = nn.Parameter(weight[kept]), len(kept)  # type: ignore[assignment]
        return
    layer.weight = nn.Parameter(weight[:, kept[kept < count // groups_of(layer)]])
    layer.out_channels = len(kept)  # type: ignore[assignment] # as above
    if isinstance(bias, Tensor):
        layer.bias = nn.Parameter(bias.detach()[kept])


def _remove_from_padding(layer: PadShortcut, removed: Sequence[int]) -> None:
    """Output channels are removed together with the input channels that they carry."""
    first, end = layer.channels_before, layer.channels_before + layer.in_channels
    layer.channels_before -= sum(channel < first for channel in removed)
    layer.in_channels -= sum(first <= channel < end for channel in removed)
    layer.channels_after -= sum(channel >= end for channel in removed)
