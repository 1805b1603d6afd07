"""An EfficientNet for small images: SiLU, depthwise convolutions and squeeze-excitation.

After Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (ICML 2019): the
blocks are MBConv with squeeze-excitation (Hu et al., CVPR 2018) and SiLU throughout. It is narrower and
shallower than B0 and downsamples by 8 in all, as suits 32x32 images; there is no stochastic depth.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: (expansion, channels, repeats, stride of the first, kernel size) of each group of blocks.
BLOCKS = (
    (1, 16, 1, 2, 3),
    (4, 24, 2, 1, 3),
    (4, 48, 3, 2, 5),
    (4, 96, 3, 2, 3),
)
STEM_CHANNELS = 16
LAST_CHANNELS = 384

#: Channels of a squeeze-excitation's hidden layer, as a share of the channels that enter the block.
SQUEEZE_RATIO = 0.25


def conv_bn_silu(
    in_channels: int, channels: int, kernel_size: int, *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution that keeps the size (but for its stride), batch normalization and SiLU."""
    padding = kernel_size // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel_size, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.SiLU(),
    )


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate in (0, 1) that is computed from the means of all channels."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.activation = nn.SiLU()
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        scale: Tensor = self.gate(self.fc2(self.activation(self.fc1(self.pool(images)))))
        return images * scale


class MBConv(nn.Module):
    """Expand by a 1x1 convolution, filter each channel, squeeze and excite, project linearly."""

    def __init__(
        self, in_channels: int, channels: int, *, stride: int, expansion: int, kernel_size: int
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        expand = [conv_bn_silu(in_channels, hidden, 1)] if expansion != 1 else []
        self.block = nn.Sequential(
            *expand,
            conv_bn_silu(hidden, hidden, kernel_size, stride=stride, groups=hidden),
            SqueezeExcitation(hidden, max(1, int(in_channels * SQUEEZE_RATIO))),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.use_res_connect = stride == 1 and in_channels == channels

    def forward(self, images: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, channels, ceil(H / stride), ceil(W / stride))."""
        output: Tensor = self.block(images)
        return images + output if self.use_res_connect else output


class SmallEfficientNet(nn.Module):
    """EfficientNet of total stride 8. Input (N, in_channels, H, W) with H, W >= 8."""

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn_silu(in_channels, STEM_CHANNELS, 3)]
        channels = STEM_CHANNELS
        for expansion, width, repeats, stride, kernel_size in BLOCKS:
            for index in range(repeats):
                layers.append(
                    MBConv(
                        channels,
                        width,
                        stride=stride if index == 0 else 1,
                        expansion=expansion,
                        kernel_size=kernel_size,
                    )
                )
                channels = width
        layers.append(conv_bn_silu(channels, LAST_CHANNELS, 1))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(LAST_CHANNELS, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits (N, num_classes)."""
        logits: Tensor = self.classifier(torch.flatten(self.pool(self.features(images)), 1))
        return logits
