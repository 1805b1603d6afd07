import pytest
import torch
from torch import nn
from torchvision import models as torchvision_models

from deploycnn.models.macs import count_macs, count_params
from tests.models.pruned import build


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return build("torchvision", {"name": name}, 1000)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet50", 224),
        ("mobilenet_v2", 224),
        ("vgg16", 224),
        ("densenet121", 224),
        ("googlenet", 224),
        ("inception_v3", 299),
        ("shufflenet_v2_x1_0", 224),
        ("mobilenet_v3_large", 224),
        ("convnext_tiny", 224),
        ("vit_b_16", 224),
    ],
)
def test_as_torchvision_publishes(name, size):
    """``_ops`` of a weights entry is in units of 10^9 multiply-accumulates."""
    published = torchvision_models.get_model_weights(name)["IMAGENET1K_V1"].meta
    model = on_meta(name)
    auxiliary = {"googlenet": 0, "inception_v3": 27_161_264 - 23_834_568}.get(name, 0)
    assert count_params(model) == published["num_params"] - auxiliary
    assert count_macs(model, (3, size, size)) / 1e9 == pytest.approx(published["_ops"], rel=2e-3, abs=6e-4)


@pytest.mark.parametrize(
    ("name", "published"), [("resnet50", 4.09), ("mobilenet_v2", 0.30), ("vgg16", 15.47)]
)
def test_as_in_the_literature(name, published):
    assert count_macs(on_meta(name), (3, 224, 224)) / 1e9 == pytest.approx(published, abs=0.005)


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), (4, 8, 8), 8 * 8 * 6 * 4 * 9),
        (nn.Conv2d(4, 8, (3, 5), stride=2, groups=4), (4, 9, 9), 4 * 3 * 8 * 1 * 15),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 8, 8), 8 * 8 * 4 * 6 * 4),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (3, 2, 2), 60),
        (nn.Linear(6, 5), (3, 4, 6), 3 * 4 * 6 * 5),
        (nn.ReLU(), (3, 4, 4), 0),
    ],
)
def test_single_layers_by_hand(layer, shape, expected):
    assert count_macs(layer, shape) == expected


def test_counting_changes_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[2].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    count_macs(model, (3, 8, 8))
    assert model.training
    assert model[1].training
    assert not model[2].training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_shared_parameters_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert count_params(model) == 16 + 8
