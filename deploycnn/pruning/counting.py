"""Count the training steps of a model in the model itself, so that a checkpoint holds the count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

_STEP = "pruning_step"


@contextmanager
def counted(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Inside, a buffer of ``model`` counts its runs in training mode; yields what reads the count.

    Before the first run it is 0, and during the first run already 1.
    """
    model.register_buffer(_STEP, torch.zeros((), dtype=torch.int64))

    def before(module: nn.Module, inputs: object) -> None:
        del inputs
        if module.training:
            module.get_buffer(_STEP).add_(1)

    handle = model.register_forward_pre_hook(before)
    try:
        yield lambda: int(model.get_buffer(_STEP))
    finally:
        handle.remove()
        delattr(model, _STEP)
