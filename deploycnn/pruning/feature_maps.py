"""Importance by what a channel shows: the rank and the independence of its feature maps.

A channel is looked at where other layers read it, behind normalization and activation. Where no reader sees a map
larger than one pixel (a classifier behind the global pooling), the layers that make it are looked at. Maps are measured
batch by batch and not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from deploycnn.errors import PassRequirementError
from deploycnn.pruning.groups import ChannelGroup, Member
from deploycnn.pruning.importance import Scores, checked

#: Maps (N, M, H, W) of M channels -> one number for each image and channel, shape (N, M).
Measure = Callable[[Tensor], Tensor]

#: Numbers in the matrices that are decomposed at once: 64 MiB of float64.
_AT_ONCE = 8 << 20


def hrank(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    *,
    batches: Iterable[tuple[Tensor, Tensor]],
    progress: Callable[[int], None] = lambda _: None,
) -> list[Scores]:
    """Mean rank of a channel's feature maps: Lin et al., "HRank" (CVPR 2020).

    Args:
        model: In evaluation mode.
        groups: What to score.
        batches: (images (N, C, H, W), class indices (N,)) on the model's device, of the training split.
        progress: Called with the number of images seen.
    """
    return _measured(model, groups, batches, progress, ranks, "hrank")


def chip(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    *,
    batches: Iterable[tuple[Tensor, Tensor]],
    progress: Callable[[int], None] = lambda _: None,
) -> list[Scores]:
    """Mean channel independence: Sui et al., "CHIP: CHannel Independence-based Pruning" (NeurIPS 2021).

    How much the nuclear norm of all maps of a place, one row per channel, loses with one channel's row. A channel
    that others can replace loses little. Arguments as for :func:`hrank`.
    """
    return _measured(model, groups, batches, progress, independence, "chip")


def ranks(maps_NMHW: Tensor) -> Tensor:
    """Numerical rank of each map, shape (N, M), as NumPy and PyTorch count it by default."""
    found: Tensor = torch.linalg.matrix_rank(maps_NMHW.float())
    return found.double()


def independence(maps_NMHW: Tensor) -> Tensor:
    """``|A|_* - |A without row i|_*`` for the (M, H * W) matrix A of each image, shape (N, M)."""
    return torch.stack([_independence(rows) for rows in maps_NMHW.double().flatten(2)])


def _independence(rows_MP: Tensor) -> Tensor:
    """Of one image. The nuclear norm is the sum of the roots of a Gram matrix's eigenvalues."""
    channels, pixels = rows_MP.shape
    size = min(channels, pixels)
    at_once = max(1, _AT_ONCE // size**2)
    gram = rows_MP @ rows_MP.T if channels <= pixels else rows_MP.T @ rows_MP
    whole = _nuclear(gram[None])
    parts = []
    for start in range(0, channels, at_once):
        index = torch.arange(start, min(start + at_once, channels), device=rows_MP.device)
        if channels <= pixels:
            without = gram.repeat(len(index), 1, 1)
            position = torch.arange(len(index), device=rows_MP.device)
            without[position, index, :] = 0
            without[position, :, index] = 0
        else:
            removed = rows_MP[index]
            without = gram - removed[:, :, None] * removed[:, None, :]
        parts.append(whole - _nuclear(without))
    return torch.cat(parts)


def _nuclear(gram: Tensor) -> Tensor:
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram)
    return eigenvalues.clamp_min(0).sqrt().sum(dim=-1)


class _Watch:
    """Sums of a measure over images and places, for each channel of a group."""

    def __init__(self, group: ChannelGroup) -> None:
        self.total, self.count = np.zeros(group.width), np.zeros(group.width)

    def add(self, maps: Tensor, member: Member, measure: Measure) -> None:
        values = measure(_maps_of(maps.detach(), member)).sum(dim=0).cpu().numpy()
        roots = np.unique(member.roots)
        self.total[roots] += values
        self.count[roots] += len(maps)


def _maps_of(maps: Tensor, member: Member) -> Tensor:
    """The maps of a member's channels, (N, M, H, W), in the order of the group's channels."""
    order = np.argsort(member.roots, kind="stable")
    picked = maps[:, torch.as_tensor(member.channels[order], device=maps.device)]
    if maps.dim() == 4:
        return picked
    # A linear layer reads flattened maps: the pixels of a channel are inputs of their own.
    return picked.reshape(len(maps), len(np.unique(member.roots)), -1, 1)


def _measured(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Iterable[tuple[Tensor, Tensor]],
    progress: Callable[[int], None],
    measure: Measure,
    name: str,
) -> list[Scores]:
    watches = [_Watch(group) for group in groups]
    seen = 0
    with torch.no_grad(), ExitStack() as watching:
        for images, _ in batches:
            if not seen:
                pixels = _pixels(model, groups, images[:1])
                places = [
                    (watch, member)
                    for watch, group in zip(watches, groups, strict=True)
                    for member in _places(group, pixels)
                ]
                watching.enter_context(_observed(model, places, measure))
            model(images)
            seen += len(images)
            progress(seen)
    if not seen:
        raise PassRequirementError(f"prune.importance: {name} needs images, but the training split has none")
    return [
        checked(watch.total / watch.count, group) if watch.count.all() else None
        for watch, group in zip(watches, groups, strict=True)
    ]


def _places(group: ChannelGroup, pixels: dict[tuple[str, str], int]) -> list[Member]:
    """Where a group's channels are looked at: readers of maps, else makers of maps, else readers of pixels."""
    seen = [member for member in group.members if (member.layer, member.side) in pixels]
    readers = [member for member in seen if member.side == "in"]
    for candidates in (readers, [member for member in seen if member.side == "out"]):
        spatial = [member for member in candidates if pixels[member.layer, member.side] > 1]
        covered = {int(root) for member in spatial for root in member.roots}
        if len(covered) == group.width:
            return spatial
    return readers


def _pixels(model: nn.Module, groups: Sequence[ChannelGroup], image: Tensor) -> dict[tuple[str, str], int]:
    """Pixels of a channel on each side of each member that runs."""
    found: dict[tuple[str, str], int] = {}
    handles = []
    for layer in {member.layer for group in groups for member in group.members}:

        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, layer: str = layer) -> None:
            del module
            for side, value in (("in", inputs[0]), ("out", output)):
                if value.dim() in (2, 4):
                    found[layer, side] = value[0, 0].numel()

        handles.append(model.get_submodule(layer).register_forward_hook(note))
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def _observed(model: nn.Module, places: Sequence[tuple[_Watch, Member]], measure: Measure) -> Iterator[None]:
    """Inside, all places are measured whenever the model runs."""
    handles = []
    for watch, member in places:

        def look(
            module: nn.Module,
            inputs: tuple[Tensor, ...],
            output: Tensor,
            watch: _Watch = watch,
            member: Member = member,
        ) -> None:
            del module
            watch.add(inputs[0] if member.side == "in" else output, member, measure)

        handles.append(model.get_submodule(member.layer).register_forward_hook(look))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
