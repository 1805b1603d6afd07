"""MobileNetV2 for small images.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (CVPR 2018), table 2, with the first
two downsamplings left out, as is usual for 32x32 images. Module names are torchvision's.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

#: (expansion, channels, repeats, stride of the first) of each group of blocks.
BLOCKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
LAST_CHANNELS = 1280


def scaled(channels: int, width: float) -> int:
    """``channels`` times ``width``, as a multiple of 8 that is at least 0.9 of it (the paper's code's rule)."""
    wanted = channels * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


def conv_bn_relu6(
    in_channels: int, channels: int, kernel_size: int = 3, *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution that keeps the size (but for its stride), batch normalization and ReLU6."""
    padding = kernel_size // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel_size, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, filter each channel by 3x3, project by a linear 1x1 convolution."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        expand = [conv_bn_relu6(in_channels, hidden, 1)] if expansion != 1 else []
        self.conv = nn.Sequential(
            *expand,
            conv_bn_relu6(hidden, hidden, stride=stride, groups=hidden),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.use_res_connect = stride == 1 and in_channels == channels

    def forward(self, images: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, channels, ceil(H / stride), ceil(W / stride))."""
        output: Tensor = self.conv(images)
        return images + output if self.use_res_connect else output


class SmallMobileNetV2(nn.Module):
    """MobileNetV2. Input (N, in_channels, H, W) with H, W >= ``total_stride``.

    Args:
        width: Factor on the channels of all layers but the last convolution, which is never narrowed.
        total_stride: 8: the paper's first two downsamplings are left out; 16: only the first.
        num_classes: Outputs.
        in_channels: Image channels.
    """

    def __init__(
        self,
        *,
        width: float = 1.0,
        total_stride: Literal[8, 16] = 8,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        channels = scaled(32, width)
        layers: list[nn.Module] = [conv_bn_relu6(in_channels, channels)]
        blocks = list(BLOCKS)
        blocks[1] = (*BLOCKS[1][:3], total_stride // 8)
        for expansion, block_channels, repeats, stride in blocks:
            for index in range(repeats):
                wide = scaled(block_channels, width)
                layers.append(InvertedResidual(channels, wide, stride if index == 0 else 1, expansion))
                channels = wide
        layers.append(conv_bn_relu6(channels, LAST_CHANNELS, 1))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(LAST_CHANNELS, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits (N, num_classes)."""
        logits: Tensor = self.classifier(torch.flatten(self.pool(self.features(images)), 1))
        return logits
