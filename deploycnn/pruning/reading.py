"""Groups of channels as a dependency graph has them: who holds them, and why some of them must stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch_pruning as tp
from torch import nn
from torch_pruning import ops

from deploycnn.pruning.groups import (
    ChannelGroup,
    Counted,
    Groups,
    IntArray,
    Member,
    Parting,
    Protected,
    partition,
)
from deploycnn.pruning.layers import SUPPORTED, Side, is_grouped, is_producer, width
from deploycnn.pruning.splits import Split, part_sizes

#: How Torch-Pruning fails on graphs that it cannot follow.
GRAPH_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)


def _ties(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layers that share a parameter with another layer, and that layer's name."""
    holders: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    return {
        name: next(other for other in names if other != name)
        for names in holders.values()
        if len(set(names)) > 1
        for name in names
    }


class GroupReader:
    """Reads groups off a graph, each channel of each layer once."""

    def __init__(
        self,
        model: nn.Module,
        graph: tp.DependencyGraph,
        opaque: set[Any],
        repeated: set[nn.Module],
        splits: Mapping[object, tuple[str, Split]],
    ) -> None:
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.names = {module: name for name, module in self.modules.items()}
        self.order = {name: index for index, name in enumerate(self.modules)}
        self.graph = graph
        self.opaque = opaque
        self.repeated = repeated
        self.splits = splits
        self.taken: set[tuple[str, Side | Split, int]] = set()
        self.ties = _ties(self.modules)

    def read(self) -> Groups:
        """All groups, in the order of the model's layers.

        Wide layers come first: a stream that is padded or concatenated into them is part of their group,
        whereas the narrow stream's group would hold a part of theirs.
        """
        prunable, protected = [], []
        roots = [name for name, layer in self.modules.items() if self._is_root(layer)]
        for root in sorted(roots, key=lambda name: -width(self.modules[name], "out")):
            size = width(self.modules[root], "out")
            free = np.asarray([c for c in range(size) if (root, "out", c) not in self.taken], dtype=np.int64)
            if not len(free):
                continue
            found = self._group(root, free)
            if isinstance(found, ChannelGroup):
                prunable.append(found)
            else:
                protected.append(found)
        prunable.sort(key=lambda group: self.order[group.name])
        protected.sort(key=lambda kept: self.order[kept.layers[0]])
        return Groups(prunable=tuple(prunable), protected=tuple(protected))

    def _is_root(self, layer: nn.Module) -> bool:
        return is_producer(layer) and layer in self.graph.module2node

    def _group(self, root: str, channels: IntArray) -> ChannelGroup | Protected:
        """The group of some output channels of a layer, numbered from 0, or why it cannot be pruned."""
        layer = self.modules[root]
        prune = self.graph.get_pruner_of_module(layer).prune_out_channels
        try:
            raw = self.graph.get_pruning_group(layer, prune, channels.tolist())
        except GRAPH_ERRORS as error:
            self.taken |= {(root, "out", int(channel)) for channel in channels}
            reason = f"Torch-Pruning cannot follow these channels ({type(error).__name__}: {error})"
            return Protected(layers=(root,), channels=len(channels), reason=reason)
        members = tuple(self._members(raw, channels))
        partings = tuple(self._partings(raw, channels))
        counted = tuple(self._counted(raw, channels))
        held: set[tuple[str, Side | Split, int]]
        held = {(m.layer, m.side, int(c)) for m in members for c in m.channels}
        held |= {(p.module, p.split, int(c)) for p in partings for c in p.channels}
        layers = {member.layer for member in members if member.side == "out"} | {root}
        producers = tuple(
            sorted((n for n in layers if is_producer(self.modules[n])), key=self.order.__getitem__)
        )
        why = self._why_not(raw, members, partings, counted)
        if why is None and held & self.taken:
            why = "some of these channels belong to another group as well"
        self.taken |= held
        if why is not None:
            return Protected(layers=producers, channels=len(channels), reason=why)
        units = tuple(partition(len(channels), members, partings, counted, self.modules))
        return ChannelGroup(
            name=producers[0],
            width=len(channels),
            members=members,
            units=units,
            producers=producers,
            partings=partings,
        )

    def _members(self, group: tp.Group, channels: IntArray) -> Iterator[Member]:
        for item in group.items:
            layer = item.dep.target.module
            if not isinstance(layer, SUPPORTED) or (
                isinstance(layer, nn.PReLU) and layer.num_parameters == 1
            ):
                continue
            if any(root is None for root in item.root_idxs):
                continue
            yield Member(
                layer=self.names[layer],
                side="out" if self.graph.is_out_channel_pruning_fn(item.dep.handler) else "in",
                channels=np.asarray(item.idxs, dtype=np.int64),
                roots=np.searchsorted(channels, np.asarray(item.root_idxs, dtype=np.int64)),
            )

    def _partings(self, group: tp.Group, channels: IntArray) -> Iterator[Parting]:
        for item in group.items:
            found = self.splits.get(getattr(item.dep.target, "grad_fn", None))
            if found is not None and not any(root is None for root in item.root_idxs):
                yield Parting(
                    module=found[0],
                    split=found[1],
                    channels=np.asarray(item.idxs, dtype=np.int64),
                    roots=np.searchsorted(channels, np.asarray(item.root_idxs, dtype=np.int64)),
                )

    def _counted(self, group: tp.Group, channels: IntArray) -> Iterator[Counted]:
        """Splits whose sizes no attribute has."""
        for item in group.items:
            node = item.dep.target
            sizes = part_sizes(node.grad_fn) if node.type == ops.OPTYPE.SPLIT else None
            if sizes is None or node.grad_fn in self.splits or any(root is None for root in item.root_idxs):
                continue
            yield Counted(
                sizes=tuple(sizes),
                channels=np.asarray(item.idxs, dtype=np.int64),
                roots=np.searchsorted(channels, np.asarray(item.root_idxs, dtype=np.int64)),
            )

    def _why_not(
        self,
        group: tp.Group,
        members: Sequence[Member],
        partings: Sequence[Parting],
        counted: Sequence[Counted],
    ) -> str | None:
        """Why a group cannot be pruned, as far as can be seen without trying."""
        for item in group.items:
            node = item.dep.target
            layer = node.module
            makes = self.graph.is_out_channel_pruning_fn(item.dep.handler)
            last = makes and is_producer(layer) and not node.outputs
            if last or node.type == ops.OPTYPE.OUTPUT:
                return "these are the model's outputs"
            if layer in self.opaque:
                return "a reshape moves these channels to other places, as channel shuffles do"
            if isinstance(layer, nn.Parameter):
                return "a parameter that belongs to no layer is as wide as these channels"
            if self.names.get(layer) in self.ties:
                name = self.names[layer]
                return f"{name} has its weights in common with {self.ties[name]}, which would come apart"
            if layer in self.repeated:
                return f"{self.names[layer]} holds these channels and is run more than once"
            if not isinstance(layer, SUPPORTED) and next(layer.parameters(), None) is not None:
                return f"{type(layer).__name__} computes across these channels"
            if any(root is None for root in item.root_idxs):
                return "Torch-Pruning cannot say which channels belong together"
        misfits = [self._misfit(member) for member in members]
        misfits += [
            f"they are only a part of what {parting.module} splits into equal parts"
            for parting in partings
            if parting.split.uniform
            and len(parting.channels) != sum(parting.split.sizes(self.modules[parting.module]))
        ]
        misfits += [split.misfit() for split in counted]
        return next((why for why in misfits if why is not None), None)

    def _misfit(self, member: Member) -> str | None:
        layer = self.modules[member.layer]
        limit = width(layer, member.side)
        if len(member.channels) and not 0 <= member.channels.min() <= member.channels.max() < limit:
            return (
                f"Torch-Pruning places these channels outside {member.layer}, as it does where tensors are split or "
                "broadcast"
            )
        if is_grouped(layer):
            if layer.groups in (layer.out_channels, layer.in_channels) and member.side == "in":
                return f"each group of {member.layer} reads or makes a single channel"
            if len(member.channels) != limit:
                return f"they are only a part of what the grouped convolution {member.layer} holds"
        return None
