"""CIFAR ResNets of He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2.

Module names are those of the widely used CIFAR ResNet checkpoints (``conv1``, ``bn1``, ``layer1.0.conv1``,
..., ``linear``), so that these load as they are.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

#: How a block whose shape changes passes its input on: "A" pads with zero channels, "B" projects with a 1x1
#: convolution (He et al. 2016, section 4.1).
ShortcutOption = Literal["A", "B"]


class PadShortcut(nn.Module):
    """Option-A shortcut: take every ``stride``-th pixel and put zero channels around the input's channels.

    Input (N, in_channels, H, W) -> output (N, channels_before + in_channels + channels_after, H', W') with
    H' = ceil(H / stride). Input channel ``i`` lands on output channel ``channels_before + i``. The three
    integers are the whole geometry: a pruner that removes input channel ``i`` together with output channel
    ``channels_before + i``, or removes zero channels, only has to change them.
    """

    def __init__(self, in_channels: int, channels_before: int, channels_after: int, stride: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.channels_before = channels_before
        self.channels_after = channels_after
        self.stride = stride

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.channels_before + self.in_channels + self.channels_after

    def forward(self, images: Tensor) -> Tensor:
        """Subsample and pad, without parameters."""
        subsampled = images[:, :, :: self.stride, :: self.stride]
        return functional.pad(subsampled, (0, 0, 0, 0, self.channels_before, self.channels_after))

    def extra_repr(self) -> str:
        """Geometry, for ``print``."""
        return f"{self.in_channels}, {self.channels_before}, {self.channels_after}, stride={self.stride}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalization and a shortcut around them."""

    def __init__(self, in_channels: int, channels: int, stride: int, option: ShortcutOption) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = self._shortcut(in_channels, channels, stride, option)
        self.relu2 = nn.ReLU()

    @staticmethod
    def _shortcut(in_channels: int, channels: int, stride: int, option: ShortcutOption) -> nn.Module:
        if stride == 1 and in_channels == channels:
            return nn.Identity()
        if option == "B":
            projection = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
            return nn.Sequential(projection, nn.BatchNorm2d(channels))
        added = channels - in_channels
        return PadShortcut(in_channels, added // 2, added - added // 2, stride)

    def forward(self, images: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, channels, ceil(H / stride), ceil(W / stride))."""
        inner = self.relu1(self.bn1(self.conv1(images)))
        inner = self.bn2(self.conv2(inner))
        outer: Tensor = self.relu2(inner + self.shortcut(images))
        return outer


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 with three stages of n blocks and 16, 32 and 64 channels, for small images.

    Input (N, in_channels, H, W), logits (N, num_classes). Any H, W >= 4 works; 32x32 is what it was made for.
    ``widening`` multiplies all widths (the factor k of Zagoruyko and Komodakis, "Wide Residual Networks", 2016).
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        option: ShortcutOption = "A",
        widening: int = 1,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth should be 6n + 2 with n >= 1, got {depth}")
        blocks = (depth - 2) // 6
        first, second, third = (channels * widening for channels in (16, 32, 64))
        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(first, first, blocks, 1, option)
        self.layer2 = self._stage(first, second, blocks, 2, option)
        self.layer3 = self._stage(second, third, blocks, 2, option)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(
        in_channels: int, channels: int, blocks: int, stride: int, option: ShortcutOption
    ) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride, option)
        rest = (BasicBlock(channels, channels, 1, option) for _ in range(blocks - 1))
        return nn.Sequential(first, *rest)

    def forward(self, images: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits (N, num_classes)."""
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.linear(torch.flatten(self.pool(features), 1))
        return logits
