"""PyTorch models on the GPU in the number format and memory layout that serve them best there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deploycnn.errors import RuntimeUnavailable


class Recast(nn.Module):
    """A model behind a change of number format and layout, which is part of what is timed."""

    def __init__(self, model: nn.Module, options: Sequence[str]) -> None:
        """Convert ``model`` in place.

        Args:
            model: In evaluation mode.
            options: ``fp16``: it computes in half precision, while inputs and outputs stay float32. ``fp32``: cuDNN
                may not round to TF32 (which the session sees to). ``channels-last``: images and weights lie as NHWC,
                as tensor cores want them.

        Raises:
            RuntimeUnavailable: ``fp16`` and ``fp32`` contradict each other.
        """
        super().__init__()
        if {"fp16", "fp32"} <= set(options):
            raise RuntimeUnavailable(
                "pytorch: +fp16 and +fp32 contradict each other; leave one out (+fp32 keeps TF32 away)"
            )
        self.half_precision = "fp16" in options
        self.layout = torch.channels_last if "channels-last" in options else torch.contiguous_format
        if self.half_precision:
            model.half()
        self.model = model.to(memory_format=self.layout)

    def forward(self, images_NCHW: Tensor) -> Any:
        """The model's outputs, as float32."""
        dtype = torch.float16 if self.half_precision else images_NCHW.dtype
        outputs = self.model(images_NCHW.to(dtype=dtype, memory_format=self.layout))
        return _to_float32(outputs) if self.half_precision else outputs


def _to_float32(outputs: Any) -> Any:
    if isinstance(outputs, Mapping):
        return {name: _to_float32(value) for name, value in outputs.items()}
    if isinstance(outputs, list | tuple):
        return [_to_float32(value) for value in outputs]
    return outputs.float()


def precision(options: Sequence[str], capability: tuple[int, int]) -> str:
    """What convolutions compute in on a GPU of this compute capability."""
    if "fp16" in options:
        return "f16"
    return "f32" if "fp32" in options or capability < (8, 0) else "tf32"
