"""Which channels fall together, and which are left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deploycnn.errors import PassRequirementError
from deploycnn.models.cifar_resnet import CifarResNet
from deploycnn.pruning.groups import ChannelGroup
from deploycnn.pruning.layers import width
from deploycnn.pruning.pruner import Goal, prune
from deploycnn.pruning.splits import Split
from deploycnn.pruning.structure import Structure, analyse, shrunk
from tests.pruning import nets
from tests.pruning.test_pruner import MAGNITUDE


def producers(structure: Structure) -> dict[str, tuple[str, ...]]:
    return {group.name: group.producers for group in structure.groups}


def held(group: ChannelGroup) -> set[tuple[str, str]]:
    return {(member.layer, member.side) for member in group.members}


def reasons(structure: Structure) -> dict[str, str]:
    return {layer: kept.reason for kept in structure.protected for layer in kept.layers}


def unit_sizes(group: ChannelGroup) -> list[tuple[int, int]]:
    return sorted((len(unit.atoms), unit.atoms.shape[1]) for unit in group.units)


def test_chain_has_one_group_per_layer() -> None:
    structure = analyse(nets.Chain(), nets.images())
    assert producers(structure) == {"conv1": ("conv1",), "conv2": ("conv2",), "fc1": ("fc1",)}
    by_name = {group.name: group for group in structure.groups}
    assert held(by_name["conv1"]) == {("conv1", "out"), ("bn1", "out"), ("conv2", "in")}
    assert held(by_name["conv2"]) == {("conv2", "out"), ("act", "out"), ("fc1", "in")}
    flattened = next(m for m in by_name["conv2"].members if m.layer == "fc1")
    # Channel c is flattened to inputs 4c .. 4c + 3.
    assert {int(c): int(r) for c, r in zip(flattened.channels, flattened.roots, strict=True)} == {
        c: c // 4 for c in range(64)
    }
    assert reasons(structure) == {"fc2": "these are the model's outputs"}


def test_residual_stream_is_one_group() -> None:
    structure = analyse(nets.Residual(), nets.images())
    assert producers(structure) == {"stem": ("stem", "conv2"), "conv1": ("conv1",)}
    expected = {
        ("stem", "out"),
        ("bn", "out"),
        ("conv1", "in"),
        ("conv2", "out"),
        ("bn2", "out"),
        ("fc", "in"),
    }
    assert held(structure.groups[0]) == expected


def test_sum_of_a_concatenation_has_a_unit_per_branch() -> None:
    structure = analyse(nets.Concat(), nets.images())
    stream = structure.groups[0]
    assert stream.producers == ("left", "right", "whole")
    assert unit_sizes(stream) == [(8, 1), (16, 1)]
    assert stream.width == 24


def test_depthwise_and_squeeze_follow_their_stream() -> None:
    structure = analyse(nets.Depthwise(), nets.images())
    assert producers(structure) == {
        "stem": ("stem", "project"),
        "expand": ("expand", "excite"),
        "squeeze": ("squeeze",),
    }
    assert ("depthwise", "out") in held(structure.groups[1])


def test_grouped_convolutions_tie_their_groups() -> None:
    structure = analyse(nets.Grouped(), nets.images())
    sizes = {group.name: unit_sizes(group) for group in structure.groups}
    assert sizes == {
        "conv1": [(8, 4)],
        "grouped": [(8, 4)],
        "conv3": [(8, 2)],
        "up": [(8, 2)],
        "last": [(8, 1)],
    }


def test_cifar_stream_runs_through_all_stages() -> None:
    structure = analyse(CifarResNet(8), nets.images(32))
    streams = [group for group in structure.groups if len(group.units) > 1]
    assert len(streams) == 1
    assert streams[0].width == 64
    # 16 channels of all three stages, 16 more from the second on, 32 of the third only.
    assert unit_sizes(streams[0]) == [(16, 1), (16, 1), (32, 1)]
    assert {"conv1", "layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2"} == set(streams[0].producers)
    assert reasons(structure) == {"linear": "these are the model's outputs"}


@pytest.mark.parametrize(
    "net",
    [
        nets.Chain,
        nets.Residual,
        nets.Concat,
        nets.Depthwise,
        nets.Grouped,
        nets.Parts,
        nets.Hierarchy,
        lambda: CifarResNet(8),
    ],
)
def test_groups_partition_the_channels(net: type[nn.Module]) -> None:
    model = net()
    structure = analyse(model, nets.images(16))
    seen = [
        (member.layer, member.side, int(channel))
        for group in structure.groups
        for member in group.members
        for channel in member.channels
    ]
    assert len(seen) == len(set(seen))
    layers = dict(model.named_modules())
    for layer in {layer for layer, side, _ in seen if side == "out"}:
        channels = sorted(channel for name, side, channel in seen if (name, side) == (layer, "out"))
        assert channels == list(range(width(layers[layer], "out")))
    for group in structure.groups:
        roots = sorted(int(root) for unit in group.units for root in unit.atoms.ravel())
        assert roots == list(range(group.width))


def test_channel_shuffle_is_left_alone_and_inner_channels_are_not() -> None:
    structure = analyse(nets.Shuffle(), nets.images())
    assert producers(structure) == {"inner1": ("inner1",)}
    assert set(reasons(structure)) == {"stem", "inner2", "fc"}


def test_halves_of_a_gate_are_pruned_together() -> None:
    structure = analyse(nets.Split("chunk"), nets.images())
    sizes = {group.name: unit_sizes(group) for group in structure.groups}
    assert sizes == {"stem": [(16, 1)], "both": [(16, 2)], "last": [(8, 1)]}
    assert structure.groups[1].units[0].atoms.tolist() == [[c, c + 16] for c in range(16)]
    assert structure.groups[1].partings == ()


@pytest.mark.parametrize(("width", "parts"), [(6, 2), (16, 2), (16, 4), (24, 3)])
def test_parts_that_the_code_counts_lose_the_same_number(width: int, parts: int) -> None:
    """Whatever the seed: a trial must not pass because parts became equal by chance."""
    for seed in range(20):
        structure = analyse(nets.Chunks(width, parts), nets.images(), seed=seed)
        groups = {group.name: group for group in structure.groups}
        size = width // parts
        atoms = groups["stem"].units[0].atoms
        assert sorted(map(tuple, atoms.tolist())) == [
            tuple(range(place, width, size)) for place in range(size)
        ]
    model = nets.lively(nets.Chunks(width, parts))
    prune(model, nets.images(), MAGNITUDE, Goal(params_ratio=0.7, round_to=1))
    assert model(nets.images()).shape == (2, 5)


def test_parts_that_the_code_counts_and_that_differ_stay() -> None:
    class Uneven(nets.Chunks):
        def __init__(self) -> None:
            super().__init__(8, 2)
            self.parts = 3
            self.inner = nn.Conv2d(2, 8, 1)

    found = reasons(analyse(Uneven(), nets.images()))["stem"]
    assert (
        found == "the code counts the parts into which these channels are split, and these differ: (3, 3, 2)"
    )


def test_halves_by_slices_are_pruned_together_or_not_at_all() -> None:
    for seed in range(20):
        for group in analyse(nets.Halves(4), nets.images(), seed=seed).groups:
            if group.name == "stem":
                assert unit_sizes(group) == [(2, 2)]


@pytest.mark.parametrize(("first", "second"), [([8, 16], [8, 16]), ([12, 12], [8, 16]), ([8, 8], [16, 8])])
def test_two_splits_in_a_module_are_told_apart(first: list[int], second: list[int]) -> None:
    structure = analyse(nets.TwoSplits(first, second), nets.images())
    groups = {group.name: group for group in structure.groups}
    named = {
        group: [parting.split.attribute for parting in groups[group].partings] for group in ("one", "two")
    }
    assert named == {"one": ["a_sizes"], "two": ["b_sizes"]}


def test_parts_of_named_sizes_are_pruned_each_by_itself() -> None:
    structure = analyse(nets.Parts(), nets.images())
    groups = {group.name: group for group in structure.groups}
    assert groups.keys() == {"stem", "first", "second", "last"}
    assert unit_sizes(groups["stem"]) == [(6, 1), (8, 1), (10, 1)]
    (parting,) = groups["stem"].partings
    assert (parting.module, parting.split) == ("", Split("sizes", 3, "sizes"))
    (joined,) = (member for member in groups["stem"].members if member.layer == "last")
    # Of the concatenation 8 .. 15 is the third part, 24 .. 29 the first.
    assert dict(zip(joined.channels.tolist(), joined.roots.tolist(), strict=True)) == dict(
        zip([*range(8, 16), *range(24, 30)], [*range(16, 24), *range(6)], strict=True)
    )


def test_splits_of_rows_are_none_of_channels() -> None:
    structure = analyse(nets.Rows(), nets.images(16))
    assert {group.name: unit_sizes(group) for group in structure.groups} == {
        "stem": [(16, 1)],
        "last": [(8, 1)],
    }
    assert all(not group.partings for group in structure.groups)


@pytest.mark.parametrize("total", [False, True])
def test_parts_of_one_named_size_lose_the_same_number(*, total: bool) -> None:
    structure = analyse(nets.Hierarchy(total=total), nets.images())
    groups = {group.name: group for group in structure.groups}
    assert groups.keys() == {"stem", "convs.1", "last"}
    assert groups["stem"].producers == ("stem", "convs.0")
    assert groups["stem"].units[0].atoms.tolist() == [[c, c + 8, c + 16] for c in range(8)]
    (parting,) = groups["stem"].partings
    assert parting.split == Split("size", 3, "total" if total else "size")


@pytest.mark.parametrize(
    ("how", "layer", "reason"),
    [
        ("split", "both", "pruning them on trial breaks the model (RuntimeError: split_with_sizes expects"),
        (
            "broadcast",
            "stem",
            "Torch-Pruning places these channels outside mask, as it does where tensors are split",
        ),
    ],
)
def test_parts_that_cannot_be_followed_are_left_alone(how: str, layer: str, reason: str) -> None:
    structure = analyse(nets.Split(how), nets.images())
    assert reasons(structure)[layer].startswith(reason)
    assert "last" in producers(structure)


def test_what_cannot_be_pruned_is_named_with_its_reason() -> None:
    structure = analyse(nets.Awkward(), nets.images())
    found = reasons(structure)
    assert producers(structure) == {"free": ("free",)}
    assert found["conv1"] == "GroupNorm computes across these channels"
    assert found["conv2"] == "a parameter that belongs to no layer is as wide as these channels"
    assert found["conv3"] == "shared holds these channels and is run more than once"
    assert found["conv4"].startswith("pruning them on trial breaks the model (the outputs change by")


def test_heads_of_training_mode_are_followed() -> None:
    structure = analyse(nets.Auxiliary(), nets.images())
    assert structure.training_heads
    early = next(group for group in structure.groups if group.name == "conv1")
    assert ("heads.aux", "in") in held(early)
    assert set(reasons(structure)) == {"heads.main", "heads.aux"}


@pytest.mark.parametrize(("name", "kept"), [("layer2.0.conv1", {"layer2.0.conv1"}), ("layer1", {"conv1"})])
def test_protected_layers_stay(name: str, kept: set[str]) -> None:
    model = CifarResNet(8)
    structure = analyse(model, nets.images(32), protect=(name,))
    protected = [
        found for found in structure.protected if found.reason == f"protected by the recipe ({name})"
    ]
    assert kept <= {layer for found in protected for layer in found.layers}
    assert not any(
        layer == name or layer.startswith(f"{name}.") for g in structure.groups for layer in g.producers
    )


@pytest.mark.parametrize(
    ("name", "mend"), [("layer2.0.conv3", 'mean "layer2.0.conv'), ("lineer", 'mean "linear"'), ("", "")]
)
def test_unknown_protected_layer_names_the_nearest(name: str, mend: str) -> None:
    with pytest.raises(PassRequirementError, match=f'no module "{name}"') as caught:
        analyse(CifarResNet(8), nets.images(32), protect=(name,))
    assert mend in str(caught.value)
    assert "\n" not in str(caught.value)


def test_model_is_left_as_it_was() -> None:
    model = nets.lively(nets.Depthwise())
    model.stem.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    analyse(model, nets.images())
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert not model.training
    assert not any(layer._forward_hooks for layer in model.modules())


def test_a_branch_that_starts_silent_does_not_hide_its_dependencies() -> None:
    # Zero-initialized last normalizations are common; with them, every surgery of the branch looks right.
    model = nets.lively(nets.Residual())
    nn.init.zeros_(model.bn2.weight)
    nn.init.zeros_(model.bn2.bias)
    assert producers(analyse(model, nets.images())) == producers(analyse(nets.Residual(), nets.images()))


def test_layers_behind_no_gradient_are_left_alone() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.conv(images).detach().mean((2, 3))

    structure = analyse(Detached(), nets.images())
    assert structure.groups == ()
    assert reasons(structure)["conv"].startswith("not run, or nothing differentiable")


def test_trial_images_shrink_where_the_model_allows_it() -> None:
    model = nets.Residual().eval()
    assert shrunk(model, nets.images(224)).shape == (2, 3, 56, 56)
    assert shrunk(model, nets.images(80)).shape == (2, 3, 80, 80)
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(3 * 128 * 128, 2)).eval()
    assert shrunk(fixed, nets.images(128)).shape == (2, 3, 128, 128)
    kept = copy.deepcopy(model)
    kept.fc = nn.Identity()
    assert shrunk(nn.Sequential(kept.stem), nets.images(128)).shape == (2, 3, 128, 128)
