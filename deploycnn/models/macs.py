"""Parameters and multiply-accumulates (MACs) of torch models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_params(model: nn.Module) -> int:
    """Trained parameters; each shared one counts once, batch-norm statistics do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-accumulates for one image, of convolutions, matrix products and attention.

    Biases, normalization, activations and pooling are left out, as in the published figures. Counted from the
    operators that really run, whatever the model's Python code does.

    Args:
        model: Any model with one image input; its mode and weights stay as they are.
        input_shape: (C, H, W).
    """
    return run_counted(model, input_shape)[1]


def run_counted(model: nn.Module, input_shape: Sequence[int]) -> tuple[object, int]:
    """Run one black image through ``model`` in eval mode; return what it returns, and the MACs.

    Args:
        model: As in :func:`count_macs`.
        input_shape: (C, H, W).
    """
    reference = next(model.parameters(), torch.zeros(()))
    image = torch.zeros((1, *input_shape), dtype=reference.dtype, device=reference.device)
    # Two for each multiply-accumulate.
    counter = FlopCounterMode(display=False)
    with evaluating(model), without_fused_attention(), torch.no_grad(), counter:
        output: object = model(image)
    return output, int(counter.get_total_flops()) // 2


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def without_fused_attention() -> Iterator[None]:
    """PyTorch's fused attention of eval mode is one opaque operator, which no counter knows."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
