"""Channels that fall together, and the layers that hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import nn

from deploycnn.pruning.layers import Side, groups_of, is_grouped, width
from deploycnn.pruning.splits import Split, parts_of

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A side of a layer that loses channels with its group.

    Attributes:
        layer: The layer's name in the model.
        side: What of it.
        channels: Its channels, shape (M,).
        roots: The group's channel that each one falls with, shape (M,). A flattened feature map has several
            inputs of a linear layer per channel.
    """

    layer: str
    side: Side
    channels: IntArray
    roots: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Parting:
    """A split whose parts lose channels with a group.

    Attributes:
        module: Name of the module that splits.
        split: Where it has the sizes.
        channels: Those of the tensor that is split, shape (M,).
        roots: The group's channel that each one falls with, shape (M,).
    """

    module: str
    split: Split
    channels: IntArray
    roots: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """A split into parts that the code counts (``chunk``): all must stay equally wide.

    Attributes:
        sizes: Channels of each part.
        channels: Those of the tensor that is split, shape (M,).
        roots: The group's channel that each one falls with, shape (M,).
    """

    sizes: tuple[int, ...]
    channels: IntArray
    roots: IntArray

    def misfit(self) -> str | None:
        """Why the group cannot be pruned, if it cannot."""
        if len(set(self.sizes)) > 1:
            return f"the code counts the parts into which these channels are split, and these differ: {self.sizes}"
        if len(self.channels) != sum(self.sizes):
            return "they are only a part of what is split into equal parts"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Channels that may be ranked against one another, because the same layers read and make them.

    Attributes:
        atoms: Group channels that only fall together, shape (A, S). S is 1 but for grouped convolutions, each
            of whose groups must lose as many channels as the others.
    """

    atoms: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelGroup:
    """Channels 0 .. ``width`` - 1, and where in the model each of them lives.

    Attributes:
        name: The first layer that makes these channels.
        members: All sides of layers that hold them.
        units: A partition of the channels. A stream that is narrower in one place than in another (by padding
            or concatenation) has several.
        producers: Layers that make them.
        partings: Splits of them whose sizes must follow.
    """

    name: str
    width: int
    members: tuple[Member, ...]
    units: tuple[Unit, ...]
    producers: tuple[str, ...]
    partings: tuple[Parting, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Protected:
    """Layers whose output channels stay, and why."""

    layers: tuple[str, ...]
    channels: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """All channels of a model: those that can be pruned, and the rest."""

    prunable: tuple[ChannelGroup, ...]
    protected: tuple[Protected, ...]


def partition(
    size: int,
    members: Sequence[Member],
    partings: Sequence[Parting],
    counted: Sequence[Counted],
    modules: Mapping[str, nn.Module],
) -> Iterator[Unit]:
    """Part the channels 0 .. size - 1 by the members that hold them, and tie those that fall together."""
    tied = np.arange(size)

    def tie(channels: IntArray, roots: IntArray, period: int) -> None:
        """Channels at the same place in each period fall together."""
        for place in np.unique(channels % period):
            together = np.unique(tied[roots[channels % period == place]])
            tied[np.isin(tied, together)] = together[0]

    for member in members:
        layer = modules[member.layer]
        if is_grouped(layer):
            tie(member.channels, member.roots, width(layer, member.side) // groups_of(layer))
    for split in counted:
        tie(split.channels, split.roots, split.sizes[0])
    holders = [member.roots for member in members]
    for parting in partings:
        module = modules[parting.module]
        if parting.split.uniform:
            tie(parting.channels, parting.roots, parting.split.sizes(module)[0])
        else:
            parts = parts_of(parting.split.sizes(module), parting.channels)
            holders += [parting.roots[parts == part] for part in np.unique(parts)]
    held = np.zeros((len(holders), size), dtype=np.bool_)
    for row, roots in enumerate(holders):
        held[row, roots] = True
    atoms: dict[tuple[bytes, int], list[IntArray]] = {}
    for label in np.unique(tied):
        channels = np.flatnonzero(tied == label)
        signature = held[:, channels].any(axis=1).tobytes()
        atoms.setdefault((signature, len(channels)), []).append(channels)
    for same in atoms.values():
        yield Unit(atoms=np.stack(same))
