"""Optimizers, with weight decay only where it belongs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn


def parameter_groups(
    model: nn.Module, weight_decay: float, *, decay_all: bool = False
) -> list[dict[str, object]]:
    """Split trainable parameters into decayed and not decayed ones.

    Biases and the scales and shifts of normalization layers, all of them vectors, are not decayed: there is
    no overfitting in them to hold back (He et al. 2019, "Bag of Tricks for Image Classification with
    Convolutional Neural Networks", section 3.1). With ``decay_all`` they are, as plain SGD has it.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if decay_all:
        return [{"params": trainable, "weight_decay": weight_decay}]
    decayed = [parameter for parameter in trainable if parameter.ndim > 1]
    plain = [parameter for parameter in trainable if parameter.ndim <= 1]
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build(
    model: nn.Module,
    name: Literal["sgd", "adamw"],
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    decay_all: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer called ``name`` over all trainable parameters of ``model``.

    Args:
        model: Its parameters must already be on the device that trains.
        name: "sgd" (with momentum; Nesterov's where ``nesterov`` and ``momentum`` > 0) or "adamw"
            (Loshchilov & Hutter 2019; ``momentum`` is its beta 1).
        lr: Peak learning rate; the loop sets each step's.
        momentum: In [0, 1).
        nesterov: For SGD only.
        weight_decay: Of matrices and kernels, see :func:`parameter_groups`.
        decay_all: Of vectors too.
    """
    groups = parameter_groups(model, weight_decay, decay_all=decay_all)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0)
    return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999))
