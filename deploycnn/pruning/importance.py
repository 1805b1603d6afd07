"""How much each channel of a group matters.

A channel's parameters lie in several layers: the filters that make it, the affine part of a normalization,
the weights that read it. Every criterion gives one number per channel and member (a side of a layer), and a
channel's score is the mean over the members that hold it.

Torch-Pruning has such criteria as well. In 1.6.1 its magnitude leaves out depthwise convolutions, and its
Taylor importance leaves out batch normalization and lets terms of one channel with opposite signs add up
instead of cancelling; so they are computed here, over its groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.nn import functional

from deploycnn.errors import PassRequirementError
from deploycnn.pruning.groups import ChannelGroup, Member
from deploycnn.pruning.layers import BATCH_NORMS, MIXING, Side, by_channel

#: One score per channel of a group, shape (group.width,), higher is more important; ``None`` where the
#: criterion has nothing to go by.
Scores = npt.NDArray[np.float64] | None

#: Model and groups -> scores of each group.
Criterion = Callable[[nn.Module, Sequence[ChannelGroup]], list[Scores]]


#: Layers of which a channel with small weights is small. A PReLU's slope, for one, says nothing of that.
SCALING = (*MIXING, BATCH_NORMS)


def magnitude(model: nn.Module, groups: Sequence[ChannelGroup], *, power: int) -> list[Scores]:
    """Sum of ``|w| ** power`` over a channel's weights, as a mean over the layers that hold it.

    Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017), over all coupled layers. Biases do not count, the
    scale of an affine normalization does.
    """
    return _mean_over_members(model, groups, lambda weight: weight**power, kinds=SCALING)


def group_norm(model: nn.Module, groups: Sequence[ChannelGroup]) -> list[Scores]:
    """The L2 norm of all parameters that fall with a channel, in whichever layers, biases and shifts included.

    Fang et al., "DepGraph" (CVPR 2023), section 3.3: a channel is worth as much as all that is coupled to it, so the
    norm is taken once over the whole group and not layer by layer.
    """
    layers: Mapping[str, nn.Module] = dict(model.named_modules())
    found: list[Scores] = []
    for group in groups:
        total, held = np.zeros(group.width), False
        for member in group.members:
            squares = channel_sums(
                layers[member.layer], member.side, lambda p: p.detach().double().cpu() ** 2
            )
            if squares is not None:
                held = True
                total += by_root(chosen(squares, member), member, group.width)
        found.append(checked(np.sqrt(total), group) if held else None)
    return found


def bn_scale(model: nn.Module, groups: Sequence[ChannelGroup]) -> list[Scores]:
    """``|gamma|`` of a channel's batch normalizations (Liu et al., "Network Slimming", ICCV 2017)."""
    return _mean_over_members(model, groups, lambda weight: weight, kinds=(BATCH_NORMS,))


def random(model: nn.Module, groups: Sequence[ChannelGroup], *, seed: int) -> list[Scores]:  # noqa: ARG001 - a Criterion
    """Uniform numbers in [0, 1): the control that a real criterion has to beat."""
    return [np.random.default_rng([seed, index]).random(group.width) for index, group in enumerate(groups)]


def taylor(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    *,
    batches: Iterable[tuple[Tensor, Tensor]],
    progress: Callable[[int], None] = lambda _: None,
) -> list[Scores]:
    """How much the loss changes, to first order, when a channel is removed.

    For each batch the change is ``|sum(w * dL/dw)|`` over a channel's parameters in one layer, biases
    included (Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, with the
    absolute value for the square). Taking it batch by batch matters: over the whole training set the gradient
    of a trained model is nearly zero.

    Args:
        model: In evaluation mode; its gradients are cleared.
        groups: What to score.
        batches: (images (N, C, H, W), class indices (N,)) on the model's device, of the training split.
        progress: Called with the number of images seen.
    """
    totals: list[npt.NDArray[np.float64]] = [np.zeros(group.width) for group in groups]
    holders = [np.zeros(group.width) for group in groups]
    layers = dict(model.named_modules())
    seen = 0
    for images, labels in batches:
        model.zero_grad(set_to_none=True)
        functional.cross_entropy(model(images), labels, reduction="sum").backward()
        for index, group in enumerate(groups):
            for member in group.members:
                change = first_order(layers[member.layer], member)
                if change is not None:
                    sums = by_root(change, member, group.width)
                    totals[index] += np.abs(sums)
                    if not seen:
                        holders[index][np.unique(member.roots)] += 1
        seen += len(images)
        progress(seen)
    model.zero_grad(set_to_none=True)
    if not seen:
        raise PassRequirementError("prune.importance: taylor needs images, but the training split has none")
    return [
        checked(total / (np.maximum(held, 1) * seen), group) if held.any() else None
        for total, held, group in zip(totals, holders, groups, strict=True)
    ]


def first_order(layer: nn.Module, member: Member) -> npt.NDArray[np.float64] | None:
    """``sum(w * dL/dw)`` over the parameters of each of a member's channels, shape (M,); ``None`` without gradients."""

    def products(parameter: Tensor) -> Tensor | None:
        grad = parameter.grad
        return None if grad is None else (parameter.detach().double() * grad.double()).cpu()

    change = channel_sums(layer, member.side, products)
    return None if change is None else chosen(change, member)


def channel_sums(layer: nn.Module, side: Side, value: Callable[[Tensor], Tensor | None]) -> Tensor | None:
    """Add up a value of the parameters that fall with each channel of a side.

    Biases and shifts fall with the channels that a layer makes.

    Args:
        layer: Any.
        side: Of it.
        value: Of a parameter, in its shape; ``None`` where it does not count.

    Returns:
        Shape (channels of the side,); ``None`` where the layer's weight does not count or does not scale channels.
    """
    weight = layer._parameters.get("weight")  # noqa: SLF001 - None where the layer has none
    values = value(weight) if weight is not None and isinstance(layer, SCALING) else None
    if values is None:
        return None
    sums = by_channel(layer, side, values).sum(dim=1)
    bias = layer._parameters.get("bias")  # noqa: SLF001 - as above
    shifts = value(bias) if side == "out" and bias is not None else None
    return sums if shifts is None else sums + shifts


def _mean_over_members(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    value: Callable[[Tensor], Tensor],
    *,
    kinds: tuple[type[nn.Module], ...],
) -> list[Scores]:
    layers: Mapping[str, nn.Module] = dict(model.named_modules())
    found: list[Scores] = []
    for group in groups:
        total, held = np.zeros(group.width), np.zeros(group.width)
        for member in group.members:
            layer = layers[member.layer]
            weight = layer._parameters.get("weight")  # noqa: SLF001 - as above
            if weight is None or not isinstance(layer, kinds):
                continue
            sums = by_channel(layer, member.side, value(weight.detach().double().abs().cpu())).sum(dim=1)
            total += by_root(chosen(sums, member), member, group.width)
            held[np.unique(member.roots)] += 1
        # A channel that no member holds could not be compared with the rest.
        found.append(checked(total / held, group) if held.all() else None)
    return found


def chosen(values: Tensor, member: Member) -> npt.NDArray[np.float64]:
    """The values of a member's channels, of one for each channel of its side."""
    picked: npt.NDArray[np.float64] = values.numpy()[member.channels]
    return picked


def by_root(values: npt.NDArray[np.float64], member: Member, size: int) -> npt.NDArray[np.float64]:
    """Sum what belongs to the same channel of the group."""
    sums = np.zeros(size)
    np.add.at(sums, member.roots, values)
    return sums


def checked(scores: npt.NDArray[np.float64], group: ChannelGroup) -> npt.NDArray[np.float64]:
    """``scores``, which must be finite.

    Raises:
        PassRequirementError: they are not.
    """
    if not np.isfinite(scores).all():
        raise PassRequirementError(
            f'prune.importance: the importance of the channels of "{group.name}" is not finite; '
            "the model's weights or gradients hold NaN or infinity: train it again"
        )
    return scores
