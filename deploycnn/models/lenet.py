"""LeNet-5 after LeCun et al., "Gradient-based learning applied to document recognition" (1998).

Layer sizes are the paper's, with every C3 map connected to all S2 maps; ReLU and max pooling stand in for the
scaled tanh and the trained subsampling, as in today's use of the name.
"""

from __future__ import annotations

from torch import Tensor, nn


class LeNet5(nn.Module):
    """Two 5x5 convolutions and three fully connected layers. Input (N, in_channels, 32, 32)."""

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 6, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(
            nn.Linear(16 * 5 * 5, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(N, in_channels, 32, 32) -> logits (N, num_classes)."""
        logits: Tensor = self.classifier(self.features(images))
        return logits
