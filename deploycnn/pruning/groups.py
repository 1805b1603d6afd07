"""Channels that fall together, and the layers that hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import nn

from deploycnn.pruning.layers import Side, groups_of, is_grouped, width

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
    """

    name: str
    width: int
    members: tuple[Member, ...]
    units: tuple[Unit, ...]
    producers: tuple[str, ...]


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


def partition(size: int, members: Sequence[Member], modules: Mapping[str, nn.Module]) -> Iterator[Unit]:
    """Part the channels 0 .. size - 1 by the members that hold them, and tie those that fall together."""
    tied = np.arange(size)
    for member in members:
        layer = modules[member.layer]
        if is_grouped(layer):
            size_in_group = width(layer, member.side) // groups_of(layer)
            position = member.channels % size_in_group
            for place in np.unique(position):
                together = np.unique(tied[member.roots[position == place]])
                tied[np.isin(tied, together)] = together[0]
    held = np.zeros((len(members), size), dtype=np.bool_)
    for row, member in enumerate(members):
        held[row, member.roots] = True
    atoms: dict[tuple[bytes, int], list[IntArray]] = {}
    for label in np.unique(tied):
        channels = np.flatnonzero(tied == label)
        signature = held[:, channels].any(axis=1).tobytes()
        atoms.setdefault((signature, len(channels)), []).append(channels)
    for same in atoms.values():
        yield Unit(atoms=np.stack(same))
