from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploycnn.models.inspection import inspect_model
from deploycnn.models.receptive_field import Field, Span, union
from tests.models.pruned import build


def test_closed_form_of_araujo_et_al():
    """Equation 2 of the article, for kernels, strides (3, 2), (5, 1), (3, 3)."""
    span = Span().window(3, 2, 1).window(5, 1, 2).window(3, 3, 0)
    assert span.size == 1 + (3 - 1) * 1 + (5 - 1) * 2 + (3 - 1) * 2
    assert span.stride == 6


def test_branches_of_unequal_stride_are_unknown():
    assert Span().window(3, 2).union(Span().window(3, 3), 4) is None
    assert (
        union([(Field(), (1, 1, 8, 8)), (Field((Span().window(1, 2),) * 2), (1, 1, 8, 8))], (1, 1, 8, 8))
        is None
    )


def influence(model: nn.Module, size: int) -> tuple[int, int]:
    """Height and width of the input area that the middle output depends on, by autograd in float64."""
    model = model.double().eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.abs() + 0.1
    image = torch.ones(1, 1, size, size, dtype=torch.float64, requires_grad=True)
    output = model(image)
    output[0, :, output.shape[2] // 2, output.shape[3] // 2].sum().backward()
    rows, columns = torch.nonzero(image.grad[0, 0], as_tuple=True)
    return int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1


class Residual(nn.Module):
    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.inner, self.outer = nn.Sequential(*layers), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return self.inner(x) + self.outer(x)


KEEPS_SIZE = st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 2]))


@settings(max_examples=25, deadline=None)
@given(
    stem=st.lists(st.tuples(st.sampled_from([1, 3, (3, 1)]), st.sampled_from([1, 2])), max_size=2),
    branch=st.lists(KEEPS_SIZE, min_size=1, max_size=2),
    pool=st.booleans(),
)
def test_branching_networks_against_autograd(stem, branch, pool):
    layers: list[nn.Module] = [nn.Conv2d(1, 2, 1)]
    layers += [nn.Conv2d(2, 2, kernel, stride=stride) for kernel, stride in stem]
    layers.append(Residual([nn.Conv2d(2, 2, k, padding=d * (k // 2), dilation=d) for k, d in branch]))
    if pool:
        layers.append(nn.AvgPool2d(2))
    model = nn.Sequential(*layers)
    size = 96
    assert inspect_model(model, (1, size, size)).rows[-1].receptive_field == influence(model, size)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(1, 2, 3, stride=2), nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(2, 2, 3)],
        [nn.Conv2d(1, 2, 3, stride=4), nn.ConvTranspose2d(2, 2, 4, stride=4)],
        [nn.ZeroPad2d(2), nn.Conv2d(1, 2, 5)],
    ],
)
def test_other_layers_against_autograd(layers):
    model = nn.Sequential(*layers)
    height, width = inspect_model(model, (1, 96, 96)).rows[-1].receptive_field
    real = influence(model, 96)
    assert (height, width) >= real
    assert height - real[0] <= 2


@pytest.mark.parametrize(
    ("name", "layer", "size", "published"),
    [
        ("resnet18", "layer4.1.relu", 224, 435),
        ("vgg16", "features.29", 224, 196),  # conv5_3
        ("vgg16", "features.30", 224, 212),  # pool5, Araujo et al.'s figure for VGG-16
        ("alexnet", "features.12", 224, 195),  # Araujo et al.'s AlexNet v2
        ("inception_v3", "Mixed_7c:cat", 299, 1311),  # Araujo et al.'s Inception v3
    ],
)
def test_published_receptive_fields(name, layer, size, published):
    with torch.device("meta"):
        model = build("torchvision", {"name": name}, 1000)
    rows = [row for row in inspect_model(model, (3, size, size)).rows if row.name == layer]
    assert rows[-1].receptive_field == (published, published)


def test_squeeze_and_excitation_sees_the_whole_map():
    """After a global gate every position depends on all others, and later convolutions add nothing."""
    with torch.device("meta"):
        model = build("torchvision", {"name": "efficientnet_b0"}, 1000)
    rows = {row.name: row.receptive_field for row in inspect_model(model, (3, 224, 224)).rows}
    assert rows["features.1.0.block.0.0"] == (7, 7)
    assert rows["features.1.0.block.1:mul"] == (7 + 2 * 111, 7 + 2 * 111)
    assert rows["features.8.0"] == rows["features.1.0.block.1:mul"]


def test_stride_of_fractions():
    assert Span().window(3, 2).transposed(2, 2).stride == Fraction(1)
