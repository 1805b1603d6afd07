"""Find the channels of a model that can be pruned, and say of all others why they cannot."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from deploycnn.errors import PassRequirementError, nearest
from deploycnn.pruning.control_flow import check_control_flow
from deploycnn.pruning.groups import ChannelGroup, Groups, IntArray, Protected, Unit
from deploycnn.pruning.layers import RUN_ERRORS, is_producer, width
from deploycnn.pruning.surgery import TOLERANCE, difference, randomized, removals
from deploycnn.pruning.tracing import forward, propose, unreached

#: Images for trials are not made smaller than this: networks reduce them up to 32 times.
_LEAST_SIDE = 48


_UNREACHED = "not run, or nothing differentiable leads from these channels to the outputs"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """A model's channels.

    Attributes:
        groups: Prunable ones, each tried out, in the order of the model's layers.
        protected: The others.
        training_heads: Whether the model computes more in training mode (auxiliary classifiers).
    """

    groups: tuple[ChannelGroup, ...]
    protected: tuple[Protected, ...]
    training_heads: bool


def analyse(
    model: nn.Module, images: Tensor, *, protect: Sequence[str] = (), seed: int = 0, where: str = "prune"
) -> Structure:
    """Find the groups of channels that can be pruned from ``model``, which is left as it is.

    Args:
        model: Any module from images to one or more tensors.
        images: Example input, (N, C, H, W) with N >= 2.
        protect: Names of layers, or of modules for all layers in them, whose output channels must stay.
        seed: Seed of the weights and channels with which the groups are tried out.
        where: Which pass or option asks, for messages.

    Raises:
        PassRequirementError: a name in ``protect`` is unknown, or the model cannot be followed.
    """
    check_modules(model, protect, f"{where}.protect")
    check_control_flow(model, images, where)
    named = dict(model.named_modules())
    trial = images.detach().double()
    twin = randomized(model, trial, seed)
    groups, graph = propose(twin, trial, training_heads=False, where=where)
    heads = False
    if unreached(twin, graph):
        with_heads, graph_with_heads = propose(twin, trial, training_heads=True, where=where)
        heads = len(unreached(twin, graph_with_heads)) < len(unreached(twin, graph))
        if heads:
            groups, graph = with_heads, graph_with_heads
    kept, protected = _set_aside(groups, protect)
    protected += [
        Protected(layers=(name,), channels=width(named[name], "out"), reason=_UNREACHED)
        for name in unreached(twin, graph)
        if is_producer(named[name])
    ]
    sound, broken = _tried_out(twin, trial, kept, training_heads=heads, seed=seed, where=where)
    return Structure(groups=tuple(sound), protected=(*protected, *broken), training_heads=heads)


def shrunk(model: nn.Module, images: Tensor) -> Tensor:
    """Smaller images that the model takes as well, for trials that are about channels and not about pixels.

    Args:
        model: In evaluation mode.
        images: (N, C, H, W).

    Returns:
        ``images``, without some of their rows and columns where their sides are 2 * 48 or more.
    """
    with torch.no_grad():
        shapes = [output.shape for output in forward(model, images)]
        while min(images.shape[2:]) >= 2 * _LEAST_SIDE:
            smaller = images[:, :, ::2, ::2]
            try:
                if [output.shape for output in forward(model, smaller)] != shapes:
                    break
            except RUN_ERRORS:
                break  # a model may demand its size
            images = smaller
    return images


def check_modules(model: nn.Module, names: Iterable[str], where: str) -> None:
    """Names of modules that a user gives must be the model's.

    Raises:
        PassRequirementError: one is not; ``where`` names the option.
    """
    named = dict(model.named_modules())
    for name in names:
        if not name or name not in named:
            raise PassRequirementError(
                f'{where}: the model has no module "{name}"; {nearest(name, suggestions(named, name))}'
            )


def suggestions(names: Iterable[str], wrong: str) -> list[str]:
    """Names of modules as deep as ``wrong``: what its writer may have meant."""
    return [name for name in names if name and name.count(".") == wrong.count(".")]


def _set_aside(groups: Groups, protect: Sequence[str]) -> tuple[list[ChannelGroup], list[Protected]]:
    """Take the groups out that the user wants to keep."""
    kept, protected = [], list(groups.protected)
    for group in groups.prunable:
        wanted = next(
            (name for name in protect if any(is_inside(layer, name) for layer in group.producers)), None
        )
        if wanted is None:
            kept.append(group)
        else:
            reason = f"protected by the recipe ({wanted})"
            protected.append(Protected(layers=group.producers, channels=group.width, reason=reason))
    return kept, protected


def is_inside(layer: str, module: str) -> bool:
    """Whether a layer is the module of that name, or lies in it."""
    return layer == module or layer.startswith(module + ".")


def _tried_out(
    twin: nn.Module,
    images: Tensor,
    groups: Sequence[ChannelGroup],
    *,
    training_heads: bool,
    seed: int,
    where: str,
) -> tuple[list[ChannelGroup], list[Protected]]:
    """Prune some of every group; where the result is wrong, find the groups to blame.

    Twice: some of each unit at random, and a single atom of each group. Equal numbers by chance would hide that parts
    must be equal (a trial of ``chunk`` may pass with them), and a single atom never makes them equal.
    """

    def fault(tested: Sequence[ChannelGroup]) -> str | None:
        for choose in (_some, _one):
            cuts = [(group, choose(group, seed + place[group.name])) for group in tested]
            found = difference(twin, removals(cuts), images, training_heads=training_heads)
            if isinstance(found, str):
                return found
            if found > TOLERANCE:
                return f"the outputs change by {found:.1e} of their size"
        return None

    place = {group.name: index for index, group in enumerate(groups)}

    sound, broken = list(groups), []
    if fault(sound) is not None:
        sound = []
        for group in groups:
            why = fault([group])
            paired = _paired(group) if why is not None else None
            if why is None:
                sound.append(group)
            elif paired is not None and fault([paired]) is None:
                sound.append(paired)
            else:
                reason = f"pruning them on trial breaks the model ({why})"
                broken.append(Protected(layers=group.producers, channels=group.width, reason=reason))
        why = fault(sound)
        if why is not None:
            raise PassRequirementError(
                f"{where}: groups that can be pruned alone break the model together ({why})"
            )
    return sound, broken


def _paired(group: ChannelGroup) -> ChannelGroup | None:
    """The group with each channel of its first half tied to that of the second.

    Where a model halves its channels by slices (``x[:, : x.shape[1] // 2]``), both halves must stay equally wide, which
    neither Torch-Pruning nor autograd tells.
    """
    if group.width % 2 or any(unit.atoms.shape[1] != 1 for unit in group.units):
        return None
    halves = np.arange(group.width, dtype=np.int64).reshape(2, -1)
    return dataclasses.replace(group, units=(Unit(atoms=halves.T.copy()),))


def _some(group: ChannelGroup, seed: int) -> IntArray:
    """Random channels of a group, a random number from each unit."""
    generator = np.random.default_rng(seed)
    chosen = []
    for unit in group.units:
        count = len(unit.atoms)
        removed = int(generator.integers(1, max(2, count // 2 + 1))) if count > 1 else 0
        chosen.append(unit.atoms[generator.permutation(count)[:removed]].ravel())
    return np.sort(np.concatenate(chosen))


def _one(group: ChannelGroup, seed: int) -> IntArray:
    """Channels of a group that only fall together, from the first unit that has others besides."""
    unit = next((unit for unit in group.units if len(unit.atoms) > 1), None)
    if unit is None:
        return np.empty(0, dtype=np.int64)
    return np.sort(unit.atoms[np.random.default_rng(seed).integers(len(unit.atoms))])
