"""Feature distillation against float64 NumPy, and which layers are compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from deploycnn.errors import PassRequirementError
from deploycnn.models import zoo
from deploycnn.training import features
from deploycnn.training.features import Features, find_pairs, stages

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def maps(seed: int, channels: int = 4, side: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(3, channels, side, side))


def test_attention_is_the_papers() -> None:
    student, teacher = maps(0), maps(1, channels=7)

    def attention(x: np.ndarray) -> np.ndarray:
        q = (x**2).sum(axis=1).reshape(len(x), -1)
        return q / np.sqrt((q**2).sum(axis=1, keepdims=True))

    expected = ((attention(student) - attention(teacher)) ** 2).mean()
    ours = features.at(torch.from_numpy(student), torch.from_numpy(teacher))
    assert ours.item() == pytest.approx(expected, rel=1e-5)
    assert features.at(torch.from_numpy(3 * student), torch.from_numpy(student)).item() < 1e-12


def test_hints_are_the_papers() -> None:
    student, teacher = maps(2), maps(3)
    ours = features.fitnet(torch.from_numpy(student), torch.from_numpy(teacher))
    assert ours.item() == pytest.approx(((student - teacher) ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20", {(32, 32): "layer1", (16, 16): "layer2", (8, 8): "layer3"}),
        ("resnet56", {(32, 32): "layer1", (16, 16): "layer2", (8, 8): "layer3"}),
    ],
)
def test_the_last_layer_of_each_stage_is_found(name: str, expected: dict[tuple[int, int], str]) -> None:
    model = zoo.build(name).eval()
    assert stages(model, IMAGES) == expected
    assert not any(module._forward_hooks for module in model.modules())


def test_modules_that_run_twice_are_passed_over() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.relu = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.relu(self.conv(self.relu(x))).mean((2, 3))

    assert stages(Twice(), IMAGES) == {(32, 32): "conv"}


def test_pairs_are_found_by_size_or_named() -> None:
    student, teacher = zoo.build("resnet20").eval(), zoo.build("resnet56").eval()
    assert find_pairs(student, teacher, IMAGES, (), "d") == [(f"layer{i}", f"layer{i}") for i in (1, 2, 3)]
    named = find_pairs(student, teacher, IMAGES, ("layer2", "layer3.0 = layer3.8"), "d")
    assert named == [("layer2", "layer2"), ("layer3.0", "layer3.8")]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (("layer9",), "'layer9' of the student puts out no feature maps; layers that do are layer1"),
        (("layer1=linear",), "'linear' of the teacher puts out no feature maps"),
    ],
)
def test_layers_that_are_not_there_are_refused(layers: tuple[str, ...], message: str) -> None:
    student, teacher = zoo.build("resnet20").eval(), zoo.build("resnet20").eval()
    with pytest.raises(PassRequirementError, match=message):
        find_pairs(student, teacher, IMAGES, layers, "distill")


def test_nothing_in_common_is_refused() -> None:
    small = nn.Sequential(nn.Conv2d(3, 2, 3, stride=7), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(PassRequirementError, match=r"student 5x5, teacher 32x32, 16x16, 8x8"):
        find_pairs(small, zoo.build("resnet20").eval(), IMAGES, (), "distill")


def two_nets() -> tuple[nn.Sequential, nn.Sequential]:
    student = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 1024, 3))
    teacher = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(6 * 256, 3))
    return student.eval(), teacher.eval().requires_grad_(False)


@pytest.mark.parametrize("method", ["at", "fitnet"])
def test_the_term_is_that_of_the_hooked_maps(method: features.FeatureMethod) -> None:
    student, teacher = two_nets()
    compared = Features(student, teacher, [("0", "0")], method, IMAGES, seed=0)
    student(IMAGES)
    with torch.no_grad():
        teacher(IMAGES)
    term = compared.term()
    ours = nn.functional.avg_pool2d(student[0](IMAGES), 2)  # 32x32 meets 16x16
    if method == "fitnet":
        assert compared.regressors[0].weight.shape == (6, 4, 1, 1)
        expected = features.fitnet(compared.regressors[0](ours), teacher[0](IMAGES))
    else:
        assert len(compared.regressors) == 0
        expected = features.at(ours, teacher[0](IMAGES))
    torch.testing.assert_close(term, expected)
    term.backward()
    assert student[0].weight.grad.abs().sum() > 0
    assert student[2].weight.grad is None
    assert teacher[0].weight.grad is None
    compared.close()
    assert not any(module._forward_hooks for net in (student, teacher) for module in net.modules())


def test_the_student_is_not_watched_while_it_is_scored() -> None:
    student, teacher = two_nets()
    compared = Features(student, teacher, [("0", "0")], "at", IMAGES, seed=0)
    with torch.no_grad():
        student(IMAGES)
    assert compared._student == {}


def test_regressors_begin_by_the_seed() -> None:
    student, teacher = two_nets()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    made = [
        Features(student, teacher, [("0", "0")], "fitnet", IMAGES, seed=s).regressors[0].weight
        for s in (1, 1, 2)
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert torch.equal(torch.get_rng_state(), state)
