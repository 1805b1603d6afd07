import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.models.efficientnet import EfficientNet, MBConvConfig

from deploycnn.errors import SourceError
from deploycnn.models import small_efficientnet, zoo
from deploycnn.models.cifar_resnet import CifarResNet, PadShortcut
from deploycnn.models.macs import count_macs, count_params
from tests.models.akamaster_resnet20 import KEYS


def state_keys(model: nn.Module) -> set[str]:
    return {key for key in model.state_dict() if not key.endswith("num_batches_tracked")}


def test_resnet20_has_the_published_checkpoints_keys():
    assert state_keys(zoo.build("resnet20")) == KEYS


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85), ("resnet110", 1.7)],
)
def test_parameters_as_in_table_6_of_he_et_al(name, millions):
    assert count_params(zoo.build(name)) / 1e6 == pytest.approx(millions, abs=0.03)


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("lenet5", 62_006, 651_720),  # 61,706 of LeCun et al. with three input channels: 6 * 2 * 25 more
        ("resnet56", 853_018, 125_485_696),
        (
            "resnet56b",
            855_770,
            125_747_840,
        ),  # 0.86 M and 125.75 M with projection shortcuts (chenyaofo's table)
        ("resnet20b", 272_474, 40_813_184),  # 0.27 M and 40.81 M, same table
        ("mobilenet_v2", 2_236_682, 87_976_448),  # 2.24 M and 87.98 M, same table
        ("mobilenet_v2_x0_5", 700_490, 27_969_024),  # 0.70 M and 27.97 M, same table
    ],
)
def test_published_sizes(name, params, macs):
    model = zoo.build(name)
    assert count_params(model) == params
    assert count_macs(model, (3, 32, 32)) == macs


def test_vgg16_bn_has_the_convolutions_of_configuration_d():
    model = zoo.build("vgg16_bn")
    widths = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert widths == [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    # 313.2 M in HRank's and others' tables, of which 0.26 M for their second linear layer.
    assert count_macs(model, (3, 32, 32)) == pytest.approx(313.2e6, rel=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "lenet5",
        "resnet20",
        "resnet20b",
        "resnet32",
        "vgg16_bn",
        "mobilenet_v2",
        "mobilenet_v2_x0_5_s16",
        "efficientnet",
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_builds_for_other_classes_and_channels(name, training):
    model = zoo.build(name, num_classes=7, in_channels=1).train(training)
    logits = model(torch.rand(2, 1, 32, 32))
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()


def test_efficientnet_is_made_of_what_torchvision_makes_it_of():
    """Stem, MBConv blocks and head have the parameters of torchvision's for the same settings."""
    settings = [
        MBConvConfig(expansion, kernel, stride, first, channels, repeats, 1.0, 1.0)
        for (expansion, channels, repeats, stride, kernel), first in zip(
            small_efficientnet.BLOCKS, (small_efficientnet.STEM_CHANNELS, 16, 24, 48), strict=True
        )
    ]
    theirs = EfficientNet(
        settings, dropout=0.2, num_classes=10, last_channel=small_efficientnet.LAST_CHANNELS
    )
    ours = zoo.build("efficientnet")
    shapes = sorted(tuple(p.shape) for p in ours.parameters())
    assert shapes == sorted(tuple(p.shape) for p in theirs.parameters())
    assert sum(isinstance(module, nn.SiLU) for module in ours.modules()) == sum(
        isinstance(module, nn.SiLU) for module in theirs.modules()
    )
    # The same but for the stem, which keeps the size here: 32 pixels as their 64.
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    theirs.features[0][0].stride = (1, 1)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


def test_the_strides_of_the_small_mobilenet():
    images = torch.rand(1, 3, 32, 32)
    assert zoo.build("mobilenet_v2_x0_5").features(images).shape[-2:] == (4, 4)
    assert zoo.build("mobilenet_v2_x0_5_s16").features(images).shape[-2:] == (2, 2)


def test_unknown_model_names_the_nearest():
    with pytest.raises(SourceError, match='did you mean "resnet56"'):
        zoo.build("resnet57")


def test_depth_must_fit():
    with pytest.raises(ValueError, match="6n \\+ 2"):
        CifarResNet(18)


def test_pad_shortcut_is_the_papers_option_a():
    images = torch.rand(2, 16, 8, 8)
    expected = functional.pad(images[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
    assert torch.equal(PadShortcut(16, 8, 8, 2)(images), expected)


def test_pad_shortcut_stays_right_after_coupled_pruning():
    """Removing input channels with their output channels, and zero channels, changes three integers."""
    images = torch.rand(1, 16, 4, 4)
    whole = PadShortcut(16, 8, 8, 2)(images)
    kept_inputs = [i for i in range(16) if i not in (0, 5, 15)]
    kept_zeros = [1, 2, 7], [24, 30]
    pruned = PadShortcut(len(kept_inputs), len(kept_zeros[0]), len(kept_zeros[1]), 2)
    kept = [*kept_zeros[0], *(8 + i for i in kept_inputs), *kept_zeros[1]]
    assert pruned.out_channels == len(kept)
    assert torch.equal(pruned(images[:, kept_inputs]), whole[:, kept])
