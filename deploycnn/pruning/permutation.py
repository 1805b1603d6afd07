"""Reorder channels so that fewer large weights fall victim to 2:4.

Which four channels share two places is an accident of their order. A permutation of a layer's input channels changes
nothing if the layers that make them are permuted alike, and the groups of ``structure.py`` say which those are.

Search: Pool & Yu, "Channel Permutations for N:M Sparsity" (NeurIPS 2021): any two stripes of four channels are split
anew in the best of the 35 possible ways, the pair that gains most first, until no pair gains.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from deploycnn.models.cifar_resnet import PadShortcut
from deploycnn.pruning.groups import ChannelGroup, IntArray, Member
from deploycnn.pruning.layers import MIXING, by_channel, is_depthwise, is_grouped, width
from deploycnn.pruning.sparsity import weight_of

Floats = npt.NDArray[np.float32]

#: The 70 ways to take four of eight channels, and for each of the 35 splits the indices of its two halves.
_FOURS = tuple(itertools.combinations(range(8), 4))
_SPLITS = tuple(
    (index, _FOURS.index(tuple(sorted(set(range(8)) - set(four)))))
    for index, four in enumerate(_FOURS)
    if 0 in four
)
#: Pairs of eight channels, and of each four the places of its first and of its last two among these pairs.
_TWOS = tuple(itertools.combinations(range(8), 2))
_ONE, _OTHER = ([two[place] for two in _TWOS] for place in (0, 1))
_FIRST = [_TWOS.index(four[:2]) for four in _FOURS]
_LAST = [_TWOS.index(four[2:]) for four in _FOURS]
#: Rows of weights that the search looks at, drawn by its seed; more change the choice little and cost time.
_ROWS = 1024
#: Pairs of stripes that are looked at anew; beyond, the search ends.
_PAIRS = 6000
#: Smallest gain, relative to all that is kept, for which stripes are split anew.
_LEAST_GAIN = 1e-6


def kept_magnitude(rows: Floats) -> float:
    """Sum of the magnitudes that 2:4 keeps of ``rows``, shape (R, C), C a multiple of 4."""
    fours = np.abs(rows).reshape(len(rows), -1, 4)
    return float(np.sort(fours, axis=2)[:, :, 2:].sum(dtype=np.float64))


def search(rows: Floats, *, seed: int = 0) -> IntArray:
    """An order of the columns of ``rows`` of which 2:4 keeps more.

    Args:
        rows: Weights by input channel, shape (R, C), C a multiple of 4.
        seed: Of the rows and pairs that are looked at, where there are very many.

    Returns:
        The old index of each column, shape (C,).
    """
    generator = np.random.default_rng(seed)
    drawn = rows if len(rows) <= _ROWS else rows[generator.choice(len(rows), _ROWS, replace=False)]
    sizes = np.ascontiguousarray(np.abs(drawn).T)
    stripes = np.arange(rows.shape[1]).reshape(-1, 4)
    pairs = list(itertools.combinations(range(len(stripes)), 2))
    if len(pairs) > _PAIRS // 2:
        pairs = [pairs[i] for i in generator.choice(len(pairs), _PAIRS // 2, replace=False)]
    gains = {pair: _best_split(sizes, stripes, pair) for pair in pairs}
    looked, least = len(pairs), _LEAST_GAIN * max(kept_magnitude(drawn), 1e-30)
    while gains and looked < _PAIRS:
        best = max(gains, key=lambda pair: gains[pair][0])
        gain, halves = gains[best]
        if gain <= least:
            break
        stripes[list(best)] = halves
        touched = [pair for pair in gains if set(pair) & set(best)]
        gains |= {pair: _best_split(sizes, stripes, pair) for pair in touched}
        looked += len(touched)
    return stripes.ravel()


def _best_split(sizes: Floats, stripes: IntArray, pair: tuple[int, int]) -> tuple[float, IntArray]:
    """What the best split of two stripes gains, and the two stripes."""
    columns = stripes[list(pair)].ravel()
    eight = sizes[columns]
    sums, largest = eight[_ONE] + eight[_OTHER], np.maximum(eight[_ONE], eight[_OTHER])
    # The two largest of four are in one half, in the other, or one in each.
    both = np.maximum(sums[_FIRST], sums[_LAST])
    kept = np.maximum(both, largest[_FIRST] + largest[_LAST]).sum(axis=1, dtype=np.float64)
    values = [kept[one] + kept[other] for one, other in _SPLITS]
    best = int(np.argmax(values))
    now = values[_SPLITS.index((0, len(_FOURS) - 1))]
    one, other = _SPLITS[best]
    return values[best] - now, np.stack([columns[list(_FOURS[one])], columns[list(_FOURS[other])]])


def permute_group(
    model: nn.Module, group: ChannelGroup, names: Collection[str], *, seed: int = 0
) -> tuple[float, float] | None:
    """Reorder a group's channels in place, for those of its readers that will be 2:4.

    Args:
        model: Its other layers keep what they compute.
        group: Of its channels.
        names: Layers that will be 2:4.
        seed: As for :func:`search`.

    Returns:
        Magnitude that 2:4 keeps of the readers before and after, or ``None`` where nothing is gained: no reader will
        be 2:4, or stripes cross the group's borders.
    """
    layers = dict(model.named_modules())
    readers = [
        m
        for m in group.members
        # Of a flattened map four inputs are pixels of one channel, which no order of channels changes.
        if m.side == "in" and m.layer in names and len(m.channels) == len(np.unique(m.roots))
    ]
    if not readers or any(is_grouped(layers[m.layer]) for m in group.members):
        return None
    before = after = 0.0
    order = np.arange(group.width)
    for unit in group.units:
        if unit.atoms.shape[1] != 1:
            continue
        blocks = _blocks(unit.atoms.ravel(), readers)
        if len(blocks) < 2:
            continue
        roots = np.concatenate(blocks)
        rows = _rows(layers, readers, roots)
        found = search(rows, seed=seed)
        kept, better = kept_magnitude(rows), kept_magnitude(rows[:, found])
        if better > kept:
            order[roots] = roots[found]
        before, after = before + kept, after + max(kept, better)
    if after <= before:
        return None
    for member in group.members:
        _reorder(layers[member.layer], member, order)
    return before, after


def _blocks(roots: IntArray, readers: Sequence[Member]) -> list[IntArray]:
    """Fours of a unit's channels that are whole stripes in every reader that holds them."""
    found: set[tuple[int, ...]] | None = None
    for reader in readers:
        mine = np.isin(reader.roots, roots)
        if not mine.any():
            continue
        stripes: dict[int, list[int]] = {}
        for channel, root in sorted(
            zip(reader.channels[mine].tolist(), reader.roots[mine].tolist(), strict=True)
        ):
            stripes.setdefault(channel // 4, []).append(root)
        whole = {tuple(stripe) for stripe in stripes.values() if len(set(stripe)) == 4}
        found = whole if found is None else found & whole
    return [np.array(block, dtype=np.int64) for block in sorted(found or ())]


def _rows(layers: Mapping[str, nn.Module], readers: Sequence[Member], roots: IntArray) -> Floats:
    """The readers' weights by channel, shape (R, len(roots))."""
    parts = []
    for reader in readers:
        layer = layers[reader.layer]
        weight = by_channel(layer, "in", weight_of(layer).detach().float().cpu())
        place = dict(zip(reader.roots.tolist(), reader.channels.tolist(), strict=True))
        if all(int(root) in place for root in roots):
            parts.append(weight[[place[int(root)] for root in roots]].T.numpy())
    return np.concatenate(parts)


def _reorder(layer: nn.Module, member: Member, order: IntArray) -> None:
    """Put the content of channel ``order[r]`` where channel r was, in one side of a layer."""
    if isinstance(layer, PadShortcut):
        return  # it copies channels from place to place, and both places are reordered alike
    source = np.arange(width(layer, member.side))
    sort = np.lexsort((member.channels, member.roots))
    channels, roots = member.channels[sort], member.roots[sort]
    starts = np.searchsorted(roots, order[roots])
    nth = np.arange(len(roots)) - np.searchsorted(roots, roots)
    source[channels] = channels[starts + nth]
    index = torch.from_numpy(source)
    crosswise = isinstance(layer, MIXING) and not is_depthwise(layer)
    dim = int(crosswise and (member.side == "in") != bool(getattr(layer, "transposed", False)))
    names = ("weight",) if member.side == "in" else ("weight", "bias", "running_mean", "running_var")
    for name in names:
        before = getattr(layer, name, None)
        if before is not None:
            moved = before.detach().index_select(dim if before.dim() > 1 else 0, index.to(before.device))
            setattr(layer, name, nn.Parameter(moved) if isinstance(before, nn.Parameter) else moved)
