"""The project's own models by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from torch import nn

from deploycnn.errors import SourceError, nearest
from deploycnn.models.cifar_resnet import CifarResNet
from deploycnn.models.lenet import LeNet5
from deploycnn.models.small_efficientnet import SmallEfficientNet
from deploycnn.models.small_mobilenet import SmallMobileNetV2
from deploycnn.models.small_vgg import SmallVGG16BN

#: Name -> builder with the keyword arguments ``num_classes`` and ``in_channels``. A trailing ``b`` means
#: projection shortcuts (option B) in place of zero channels (option A); ``x0_5`` and ``x2`` half and twice the
#: width; ``s16`` a total stride of 16 in place of 8.
BUILDERS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        "lenet5": LeNet5,
        **{f"resnet{depth}": partial(CifarResNet, depth) for depth in (20, 32, 44, 56, 110)},
        **{f"resnet{depth}b": partial(CifarResNet, depth, option="B") for depth in (20, 32, 44, 56, 110)},
        **{f"resnet{depth}x2": partial(CifarResNet, depth, widening=2) for depth in (8, 14, 20)},
        "vgg16_bn": SmallVGG16BN,
        "mobilenet_v2": SmallMobileNetV2,
        "mobilenet_v2_x0_5": partial(SmallMobileNetV2, width=0.5),
        "mobilenet_v2_x0_5_s16": partial(SmallMobileNetV2, width=0.5, total_stride=16),
        "efficientnet": SmallEfficientNet,
    }
)

#: Image height and width that the models were made for.
INPUT_SIZE = (32, 32)


def build(name: str, *, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """A zoo model with random weights, drawn from PyTorch's global generator.

    Raises:
        SourceError: there is no such model; names the nearest.
    """
    if name not in BUILDERS:
        raise SourceError(f'zoo: unknown model "{name}"; {nearest(name, BUILDERS)}')
    return BUILDERS[name](num_classes=num_classes, in_channels=in_channels)
