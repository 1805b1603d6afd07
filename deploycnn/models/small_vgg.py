"""VGG-16 with batch normalization for small images.

Configuration D of Simonyan and Zisserman, "Very Deep Convolutional Networks" (ICLR 2015). Five poolings bring
32x32 down to 1x1, so that one linear layer takes the place of the three of 4096 units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Channels of the 3x3 convolutions of each stage; a 2x2 max pooling follows every stage.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class SmallVGG16BN(nn.Module):
    """Thirteen 3x3 convolutions and one linear layer. Input (N, in_channels, H, W) with H, W >= 32."""

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for stage in STAGES:
            for width in stage:
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits (N, num_classes)."""
        logits: Tensor = self.classifier(torch.flatten(self.pool(self.features(images)), 1))
        return logits
