"""Importance by second order: what the loss gains when channels go, from the gradients of single images.

Near a minimum the first-order term vanishes and the Hessian is close to the Fisher matrix, whose diagonal is the mean
square of the gradients. It has to be taken image by image: the gradient of a batch is a mean already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from torch import Tensor, nn
from torch.nn import functional

from deploycnn.errors import PassRequirementError
from deploycnn.pruning.groups import ChannelGroup
from deploycnn.pruning.importance import Scores, by_root, channel_sums, checked, chosen, first_order


def fisher(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    *,
    batches: Iterable[tuple[Tensor, Tensor]],
    progress: Callable[[int], None] = lambda _: None,
) -> list[Scores]:
    """``1/2 * sum(w ** 2 * mean((dL/dw) ** 2))`` over all parameters of a channel, biases included.

    LeCun, Denker & Solla, "Optimal Brain Damage" (NeurIPS 1989), with the diagonal of the empirical
    Fisher matrix for that of the Hessian. The diagonal takes parameters as independent; compare
    :func:`group_fisher`.

    Args:
        model: In evaluation mode; its gradients are cleared.
        groups: What to score.
        batches: (images (N, C, H, W), class indices (N,)) on the model's device, of the training split.
        progress: Called with the number of images seen.
    """
    layers = dict(model.named_modules())
    squares: dict[Tensor, Tensor] = {}
    images_seen = 0
    for count in _single_gradients(model, batches, progress):
        images_seen = count
        for parameter in model.parameters():
            if parameter.grad is not None:
                square = parameter.grad.detach().double() ** 2
                squares[parameter] = squares[parameter].add_(square) if parameter in squares else square
    _check_seen(images_seen, "fisher")

    def second_order(parameter: Tensor) -> Tensor | None:
        if parameter not in squares:
            return None
        return (parameter.detach().double() ** 2 * squares[parameter]).cpu()

    found: list[Scores] = []
    for group in groups:
        total, held = np.zeros(group.width), False
        for member in group.members:
            change = channel_sums(layers[member.layer], member.side, second_order)
            if change is not None:
                held = True
                total += by_root(chosen(change, member), member, group.width)
        found.append(checked(total / (2 * images_seen), group) if held else None)
    return found


def group_fisher(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    *,
    batches: Iterable[tuple[Tensor, Tensor]],
    progress: Callable[[int], None] = lambda _: None,
) -> list[Scores]:
    """``mean((dL/dm) ** 2)`` for a mask m that scales a channel wherever it is read.

    Liu et al., "Group Fisher Pruning for Practical Network Compression" (ICML 2021): the readers' terms
    of one image are added before they are squared, so what they share is counted. The paper's division by the memory
    that a channel takes is left out.

    Args:
        model: In evaluation mode; its gradients are cleared.
        groups: What to score.
        batches: As for :func:`fisher`.
        progress: Called with the number of images seen.
    """
    layers = dict(model.named_modules())
    totals = [np.zeros(group.width) for group in groups]
    readers = [[m for m in group.members if m.side == "in"] for group in groups]
    images_seen = 0
    for count in _single_gradients(model, batches, progress):
        images_seen = count
        for index, (group, members) in enumerate(zip(groups, readers, strict=True)):
            change = np.zeros(group.width)
            for member in members:
                # Scaling what a layer reads is scaling the weights that read it.
                part = first_order(layers[member.layer], member)
                if part is not None:
                    change += by_root(part, member, group.width)
            totals[index] += change**2
    _check_seen(images_seen, "group_fisher")
    return [
        checked(total / images_seen, group) if members else None
        for total, group, members in zip(totals, groups, readers, strict=True)
    ]


def _single_gradients(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], progress: Callable[[int], None]
) -> Iterator[int]:
    """After each image, with its gradients in the parameters: the number of images so far."""
    seen = 0
    for images, labels in batches:
        for image, label in zip(images, labels, strict=True):
            model.zero_grad(set_to_none=True)
            functional.cross_entropy(model(image[None]), label[None]).backward()
            seen += 1
            yield seen
        progress(seen)
    model.zero_grad(set_to_none=True)


def _check_seen(seen: int, name: str) -> None:
    if not seen:
        raise PassRequirementError(f"prune.importance: {name} needs images, but the training split has none")
