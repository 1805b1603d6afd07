"""Which residual blocks can go, and which go first."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from deploycnn.errors import PassRequirementError
from deploycnn.models import delta
from deploycnn.models.cifar_resnet import CifarResNet
from deploycnn.models.small_mobilenet import SmallMobileNetV2
from deploycnn.pruning.blocks import check_names, droppable, rank_and_drop
from tests.pruning import nets


class Branchy(nn.Module):
    """Blocks of all kinds in a row, of equal width."""

    class Block(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.conv, self.kind = nn.Conv2d(8, 8, 3, padding=1), kind

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            branch = self.conv(x)
            return {
                "residual": x + branch,
                "plain": branch,
                "halved": x / 2 + branch,
                "gated": x * torch.sigmoid(branch),
            }[self.kind]

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        for kind in ("residual", "plain", "halved", "gated"):
            setattr(self, kind, Branchy.Block(kind))
        self.twice = Branchy.Block("residual")
        self.fc = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.gated(self.halved(self.plain(self.residual(self.stem(images)))))
        return self.fc(self.twice(self.twice(x)).mean((2, 3)))


def test_only_what_passes_its_input_on_can_go() -> None:
    model = Branchy().eval()
    assert droppable(model, nets.images()) == ("residual",)
    assert float(model.residual.conv.weight.detach().abs().sum()) > 0  # left as it was
    assert not any(module._forward_hooks for module in model.modules())


def test_a_block_that_is_told_more_than_its_input_stays() -> None:
    """An identity in its place would not take the keyword."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)
            self.named, self.plain = Block(), Block()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.fc(self.plain(self.named(self.stem(images), scale=0.5)).mean((2, 3)))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return x + scale * self.conv(x)

    assert droppable(Scaled().eval(), nets.images()) == ("plain",)


def test_of_a_cifar_resnet_all_but_the_narrowing_blocks_can_go() -> None:
    found = droppable(CifarResNet(20), nets.images(32))
    assert found == (
        "layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2",
    )  # fmt: skip


def test_inverted_residuals_can_go() -> None:
    model = nets.lively(SmallMobileNetV2())
    found = droppable(model, nets.images(32))
    assert found
    for name in found:
        block = model.get_submodule(name)
        assert any(isinstance(layer, nn.Conv2d) for layer in block.modules())


def test_a_gate_on_a_branch_that_starts_silent_is_no_block() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.gate = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), Gate()
            nn.init.zeros_(self.bn.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x + self.gate(self.bn(self.conv(x))))

    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Block(), nn.Flatten(), nn.Linear(512, 5)).eval()
    assert droppable(model, nets.images()) == ("2",)


def test_a_block_that_writes_into_its_input_is_judged_by_what_came_in() -> None:
    class Block(nn.Module):
        def __init__(self, rectifies: bool) -> None:
            super().__init__()
            self.conv, self.rectifies = nn.Conv2d(8, 8, 1), rectifies

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.rectifies:  # the shortcut carries what is left of x, so an identity is something else
                x.relu_()
            x += self.conv(x)
            return x

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), Block(rectifies=True), Block(rectifies=False), nn.Flatten(), nn.Linear(512, 5)
    ).eval()
    images, labels = nets.images(8, count=4), torch.arange(4)
    assert droppable(model, images) == ("2",)
    twin = copy.deepcopy(model)
    delta.drop(twin, ("2",))
    expected = loss(twin, images, labels) - loss(model, images, labels)
    (found,) = rank_and_drop(model, ("2",), 1, lambda: [(images, labels)])
    assert found.loss_increase == pytest.approx(expected, rel=1e-4)
    assert abs(expected) > 1e-4


def loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float(functional.cross_entropy(model(images), labels))


def test_the_block_that_is_missed_least_goes_first_and_ranks_are_made_anew() -> None:
    torch.manual_seed(3)
    model = CifarResNet(20).eval()
    images, labels = nets.images(16, count=6), torch.arange(6)
    candidates = droppable(model, images)

    def without(names: tuple[str, ...]) -> float:
        twin = copy.deepcopy(model)
        delta.drop(twin, names)
        return loss(twin, images, labels)

    first = min(candidates, key=lambda name: without((name,)))
    second = min((n for n in candidates if n != first), key=lambda name: without((first, name)))
    pruned, seen = copy.deepcopy(model), []
    found = rank_and_drop(
        pruned,
        candidates,
        2,
        lambda: [(images[:4], labels[:4]), (images[4:], labels[4:])],
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [block.name for block in found if block.dropped] == [first, second]
    base = loss(model, images, labels)
    by_name = {block.name: block.loss_increase for block in found}
    assert by_name[first] == pytest.approx(without((first,)) - base, rel=1e-3, abs=1e-5)
    assert by_name[second] == pytest.approx(without((first, second)) - base, rel=1e-3, abs=1e-5)
    assert isinstance(pruned.get_submodule(first), nn.Identity)
    assert loss(pruned, images, labels) == pytest.approx(without((first, second)), abs=1e-5)
    assert seen[-1] == (13, 13)
    assert len(found) == 7


def test_names_that_are_no_blocks_are_refused() -> None:
    model = CifarResNet(8)
    candidates = droppable(model, nets.images(32))
    check_names(model, candidates, candidates)
    with pytest.raises(PassRequirementError, match='no module "layer1.7"; did you mean "layer1.0"'):
        check_names(model, candidates, ("layer1.7",))
    with pytest.raises(
        PassRequirementError, match='"layer2.0" is no residual block with an identity shortcut'
    ):
        check_names(model, candidates, ("layer2.0",))


@pytest.mark.parametrize("names", list(itertools.combinations(("layer1.0", "layer2.1", "layer3.2"), 2)))
def test_the_delta_tells_what_was_dropped(names: tuple[str, ...]) -> None:
    torch.manual_seed(1)
    model = CifarResNet(20).eval()
    delta.drop(model, names)
    change = delta.difference(model, CifarResNet(20))
    assert change.dropped == names
    rebuilt = CifarResNet(20).eval()
    delta.apply(delta.Delta.from_json(change.to_json()), rebuilt, dict(model.state_dict()))
    images = nets.images(32)
    with torch.no_grad():
        assert torch.equal(rebuilt(images), model(images))
    assert isinstance(rebuilt.get_submodule(names[0]), nn.Identity)
