"""Re-estimation of batch-norm statistics."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def reestimate(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace running means and variances by their plain averages over ``batches`` (N, C, H, W).

    Surgery on channels leaves statistics that belong to the old activations; this alone regains much of
    the accuracy before a single gradient step (Li et al. 2020, "EagleEye"). Everything but the batch norms
    runs in evaluation mode. Batches should be drawn across classes and be of like size, since each counts
    the same; batches of one image are left out, their variance being undefined.

    Returns:
        How many batch-norm layers were re-estimated; with 0 nothing was run.
    """
    modules = list(model.modules())
    layers = [module for module in modules if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not layers:
        return 0
    was_training = {module: module.training for module in modules}
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
        layer.train()
    try:
        with torch.no_grad():
            for images_NCHW in batches:
                if len(images_NCHW) > 1:
                    model(images_NCHW)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, training in was_training.items():
            module.training = training
    return len(layers)
