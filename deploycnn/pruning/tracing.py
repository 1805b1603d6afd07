"""Which channels must fall together, read off a trace of the model.

Torch-Pruning's dependency graph (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023) says
which layers lose a channel when one layer does. It is a proposal only: each group is tried out on a copy of
the model before it is believed (see ``structure.py``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning.dependency.index_mapping import _ConcatIndexMapping

from deploycnn.errors import PassRequirementError
from deploycnn.models.cifar_resnet import PadShortcut
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
from deploycnn.pruning.splits import Split, map_parts, part_sizes, splits_of, watching

#: How Torch-Pruning fails on graphs that it cannot follow.
_GRAPH_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)


class _Graph(tp.DependencyGraph):
    """Torch-Pruning's graph, which also knows the padding shortcut and which reshapes it cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.opaque: set[Any] = set()
        self.register_customized_layer(PadShortcut, _PadPruner())

    def _build_dependency(self, module2node: dict[Any, Any]) -> None:
        for node in module2node.values():
            if node.type == ops.OPTYPE.RESHAPE and not _keeps_channels(node.grad_fn):
                # As an element-wise operation it couples all it touches, so that its group is recognized
                # below.
                node.type = ops.OPTYPE.ELEMENTWISE
                self.opaque.add(node.module)
        super()._build_dependency(module2node)
        for module, node in module2node.items():
            if isinstance(module, PadShortcut):
                _map_padding(module, node)


class _PadPruner(tp.BasePruningFunc):
    """Tells Torch-Pruning how wide a padding shortcut is; both sides count output channels."""

    def prune_out_channels(self, layer: PadShortcut, idxs: Sequence[int]) -> PadShortcut:
        raise NotImplementedError("the graph is only read; see layers.remove_channels")

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: PadShortcut) -> int:
        return layer.out_channels

    def get_in_channels(self, layer: PadShortcut) -> int:
        return layer.in_channels


def _map_padding(layer: PadShortcut, node: Any) -> None:
    """A padded tensor is a concatenation of which only one part comes from somewhere."""
    span = [layer.channels_before, layer.channels_before + layer.in_channels]
    for source in node.inputs:
        for dependency in node.dependencies:
            if dependency.target is source:
                dependency.index_mapping[1] = _ConcatIndexMapping(offset=span, reverse=True)
        for dependency in source.dependencies:
            if dependency.target is node:
                dependency.index_mapping[1] = _ConcatIndexMapping(offset=span, reverse=False)


def _keeps_channels(grad_fn: Any) -> bool:
    """Whether a reshape leaves channels where they are, or flattens (N, C, H, W) to (N, C * H * W) or back.

    Others, such as those of a channel shuffle, give Torch-Pruning wrong channels or make it fail.
    """
    before = getattr(grad_fn, "_saved_self_sym_sizes", None)
    metadata = getattr(grad_fn, "_input_metadata", None)
    if before is None or not metadata:
        return True
    after = tuple(metadata[0].shape)
    if len(before) == 1:  # a vector of parameters, made to fit a feature map
        return True
    if len(before) < 2 or len(after) < 2:
        return False
    matrix = 2 in (len(before), len(after))
    if matrix and before[-1] == after[-1]:  # a linear layer over the last axis of more than two
        return True
    if before[0] != after[0]:
        return False
    return before[1] == after[1] or (matrix and math.prod(before[1:]) == math.prod(after[1:]))


def propose(model: nn.Module, images: Tensor, *, training_heads: bool, where: str) -> tuple[Groups, _Graph]:
    """Read the groups off Torch-Pruning's dependency graph.

    Args:
        model: In evaluation mode; its parameters must require gradients. It is left as it was.
        images: (N, C, H, W).
        training_heads: Follow what is computed in training mode only as well.
        where: Which pass or option asks, for messages.

    Raises:
        PassRequirementError: Torch-Pruning cannot follow the model.
    """
    graph = _Graph()
    calls: Counter[nn.Module] = Counter()
    hooks = [
        layer.register_forward_hook(lambda module, *_: calls.update((module,)))
        for layer in model.modules()
        if isinstance(layer, SUPPORTED)
    ]
    try:
        with watching(model) as watch:
            graph.build_dependency(
                model,
                images,
                forward_fn=lambda traced, inputs: forward(traced, inputs, training_heads=training_heads),
                verbose=False,
            )
    except _GRAPH_ERRORS as error:
        raise PassRequirementError(
            f"{where}: Torch-Pruning cannot follow this model, so it is not known which channels depend on one another "
            f"({type(error).__name__}: {error})"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        model.eval()
    map_parts(graph, watch)
    repeated = {layer for layer, count in calls.items() if count > 1}
    return _Reader(model, graph, repeated, splits_of(model, watch)).read(), graph


def forward(model: nn.Module, images: Tensor, *, training_heads: bool = False) -> tuple[Tensor, ...]:
    """All output tensors, computed with batch-norm statistics and without dropout.

    With ``training_heads``, modules that hold others are told that they train, so that auxiliary classifiers
    run.
    """
    model.eval()
    if training_heads:
        for module in model.modules():
            module.training = next(module.children(), None) is not None
    try:
        return tuple(_tensors(model(images)))
    finally:
        model.eval()


def _tensors(outputs: object) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, dict):
        yield from _tensors(tuple(outputs.values()))
    elif isinstance(outputs, list | tuple):
        for item in outputs:
            yield from _tensors(item)


def unreached(model: nn.Module, graph: tp.DependencyGraph) -> tuple[str, ...]:
    """Layers with weights that the traced graph does not hold."""
    return tuple(
        name
        for name, layer in model.named_modules()
        if isinstance(layer, SUPPORTED)
        and layer not in graph.module2node
        and not isinstance(layer, PadShortcut)
    )


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


class _Reader:
    """Reads groups off a graph, each channel of each layer once."""

    def __init__(
        self,
        model: nn.Module,
        graph: _Graph,
        repeated: set[nn.Module],
        splits: Mapping[object, tuple[str, Split]],
    ) -> None:
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.names = {module: name for name, module in self.modules.items()}
        self.order = {name: index for index, name in enumerate(self.modules)}
        self.graph = graph
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
        except _GRAPH_ERRORS as error:
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
            if layer in self.graph.opaque:
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
