"""Penalties that make channels small before they are cut, so that cutting them costs little.

Both act on what a channel is in all layers of its coupled group, as pruning finds it: parameters that would fall
together shrink together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from deploycnn.pruning.groups import ChannelGroup
from deploycnn.pruning.importance import channel_sums
from deploycnn.training.losses import Loss
from deploycnn.training.view import View

Method = Literal["group_lasso", "growing"]

#: Added under the root, so that the gradient of a channel that is all zeros is zero and no NaN.
_LEAST_SQUARE = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Regularized(Loss):
    """A loss and a penalty on top of it.

    Attributes:
        loss: Of the outputs.
        penalty: Of the model's parameters, a scalar; called once a step.
    """

    loss: Loss
    penalty: Callable[[], Tensor]

    def __call__(self, logits_NK: Tensor, view: View) -> Tensor:
        """The loss of a batch, a scalar."""
        return self.loss(logits_NK, view) + self.penalty()


def squares(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Sum of squares of all parameters that fall with each channel, shape (group.width,), differentiable."""
    device = next(model.parameters()).device
    total = torch.zeros(group.width, device=device)
    for member in group.members:
        values = channel_sums(model.get_submodule(member.layer), member.side, lambda p: p.float() ** 2)
        if values is None:
            continue
        picked = values[torch.as_tensor(member.channels, device=device)]
        total = total.index_add(0, torch.as_tensor(member.roots, device=device), picked)
    return total


def group_lasso(model: nn.Module, groups: Sequence[ChannelGroup], strength: float) -> Tensor:
    """``strength * sum(norm of a channel)``: Wen et al., "Learning Structured Sparsity" (NeurIPS 2016).

    Its pull does not fade as a channel gets small, so channels reach zero instead of all getting smaller.
    """
    norms = [(squares(model, group) + _LEAST_SQUARE).sqrt().sum() for group in groups]
    return strength * torch.stack(norms).sum()


def growing(
    model: nn.Module, groups: Sequence[ChannelGroup], chosen: Sequence[Tensor], strength: float
) -> Tensor:
    """``strength / 2 * sum(w ** 2)`` over the parameters of chosen channels.

    Wang et al., "Neural Pruning via Growing Regularization" (ICLR 2021): the strength grows step by step, and only
    channels that will be cut feel it.

    Args:
        model: In training.
        groups: Of its channels.
        chosen: For each group 1.0 for channels that will be cut, 0.0 for others, shape (group.width,).
        strength: Now.
    """
    parts = [
        (squares(model, group) * mask.to(next(model.parameters()).device)).sum()
        for group, mask in zip(groups, chosen, strict=True)
    ]
    return strength / 2 * torch.stack(parts).sum()


def smallest(model: nn.Module, groups: Sequence[ChannelGroup], ratio: float) -> list[Tensor]:
    """1.0 for the ``ratio`` share of each group's channels with the smallest norm, for :func:`growing`."""
    masks = []
    for group in groups:
        order = np.argsort(squares(model, group).detach().cpu().numpy(), kind="stable")
        mask = torch.zeros(group.width)
        mask[torch.from_numpy(order[: round(ratio * group.width)].copy())] = 1.0
        masks.append(mask)
    return masks


def share_small(model: nn.Module, group: ChannelGroup, threshold: float = 0.1) -> float:
    """Share of a group's channels whose norm is below ``threshold`` times the group's largest."""
    norms = squares(model, group).detach().sqrt()
    return float((norms < threshold * norms.max()).float().mean())
