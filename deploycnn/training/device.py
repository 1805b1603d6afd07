"""Moving models and images to where they are computed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn


def model_to(model: nn.Module, device: str) -> nn.Module:
    """Move ``model`` in place to ``device``, kernels laid out channels last.

    Convolutions want that layout. On a CPU with AVX-512 a float32 training step took 0.69 of the time for
    CIFAR ResNet-20 and MobileNetV2, 0.86 for ResNet-18, 0.94 for VGG-11; on GPUs tensor cores need it.
    """
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def model_home(model: nn.Module) -> nn.Module:
    """Move ``model`` in place to the CPU, in PyTorch's usual layout and evaluation mode."""
    model.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return model.eval()


def images_to(images_NCHW: npt.NDArray[np.float32], device: str) -> Tensor:
    """Images as a channels-last tensor on ``device``."""
    images = torch.from_numpy(images_NCHW)
    return images.to(device, non_blocking=True, memory_format=torch.channels_last)


def labels_to(labels_N: npt.NDArray[np.int64], device: str) -> Tensor:
    """Labels as a tensor on ``device``."""
    return torch.from_numpy(labels_N).to(device, non_blocking=True)
