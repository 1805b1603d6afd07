"""Which channels must fall together, read off a trace of the model.

Torch-Pruning's dependency graph (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023) says
which layers lose a channel when one layer does. It is a proposal only: each group is tried out on a copy of
the model before it is believed (see ``structure.py``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning.dependency.index_mapping import _ConcatIndexMapping

from deploycnn.errors import PassRequirementError
from deploycnn.models.cifar_resnet import PadShortcut
from deploycnn.pruning.groups import Groups
from deploycnn.pruning.layers import SUPPORTED
from deploycnn.pruning.reading import GRAPH_ERRORS, GroupReader
from deploycnn.pruning.splits import map_parts, splits_of, watching


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
    except GRAPH_ERRORS as error:
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
    return GroupReader(model, graph, graph.opaque, repeated, splits_of(model, watch)).read(), graph


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
