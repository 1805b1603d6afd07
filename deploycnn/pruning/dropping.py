"""Whole residual blocks beside widths: what it costs to drop each, and how many are worth their channels.

Blocks and channels are ranked in different units. The rise of the loss without blocks is measured; what channels are
worth in it, the rate of exchange, is not known before they are cut. So the solver chooses at several rates, and the
choice is kept of which the training loss is least, measured before any training.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from deploycnn.core import Context, Table
from deploycnn.data.calibration import calibration_indices
from deploycnn.errors import PassRequirementError
from deploycnn.pruning.blocks import droppable, rank_and_drop
from deploycnn.pruning.criteria import training_images
from deploycnn.pruning.layers import BATCH_NORMS, MIXING
from deploycnn.pruning.structure import check_modules, is_inside, shrunk

FloatArray = npt.NDArray[np.float64]

#: Training images on which blocks are ranked at most, and how many at a time.
_IMAGES, _BATCH = 256, 64
#: No block is free: one without which the loss even falls would go at any goal.
_LEAST_LOSS = 1e-3
#: Each loses more than the one before it by at least this share: among equals those go that were ranked first.
_APART = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A residual block that may go.

    Attributes:
        name: Of the module.
        layers: Convolutions and linear layers in it.
        rise: By how much the training loss rises without it and those before it in the ranking.
        loss: What it adds to the rise, for the solver: above 0, and above that of every block before it.
    """

    name: str
    layers: frozenset[str]
    rise: float
    loss: float

    @property
    def losses(self) -> FloatArray:
        """As a variable of the solver: kept, dropped."""
        return np.array([0.0, self.loss])


@dataclass(slots=True, kw_only=True)
class Dropping:
    """The blocks of a model, and what judges models without them.

    Attributes:
        blocks: Those that may go, first those that are missed least; none: see ``why``.
        judge: Training loss of a model before training, with the batch-norm statistics of the batches.
        why: No block may go.
    """

    blocks: tuple[Block, ...]
    judge: Callable[[nn.Module], float]
    why: str = ""

    def rate(self, channels: Sequence[FloatArray]) -> float:
        """What the loss of channels (``losses_of``) is multiplied by, so that all channels weigh what all blocks do."""
        most = sum(float(losses.max()) for losses in channels)
        return sum(block.loss for block in self.blocks) / most if most > 0 else 1.0

    def names(self, levels: Sequence[int]) -> tuple[str, ...]:
        """The blocks that the last ``levels`` of a solution drop."""
        last = levels[len(levels) - len(self.blocks) :]
        return tuple(block.name for block, level in zip(self.blocks, last, strict=True) if level)

    def table(self, dropped: Sequence[str]) -> Table:
        """For the report."""
        return Table(
            title="Residual blocks, as they were ranked",
            columns=("block", "rise of the training loss without it and those above it", "dropped"),
            rows=tuple((block.name, block.rise, block.name in dropped) for block in self.blocks),
        )


def ranked_blocks(
    model: nn.Module,
    images: Tensor,
    *,
    protect: Sequence[str],
    ratios: Iterable[str],
    limit: int,
    ctx: Context,
) -> Dropping:
    """Rank a model's blocks on images of the training split.

    Args:
        model: In evaluation mode, on the CPU; left as it is.
        images: Example input, (N, C, H, W).
        protect: Names of modules that no block may hold or lie in.
        ratios: Likewise, of modules whose widths are named.
        limit: Most images.
        ctx: Seed, device, data and progress.

    Raises:
        PassRequirementError: a name is no module, or there are fewer than two images.
    """
    if ctx.data is None:
        raise PassRequirementError(
            "prune.drop_blocks: ranking blocks needs images, but the recipe has no `data`; add it or leave blocks alone"
        )
    if limit < 2:
        raise PassRequirementError(
            f"prune.importance_images: ranking blocks needs 2 images or more, not {limit}"
        )
    data = ctx.data
    ratios = tuple(ratios)
    check_modules(model, protect, "prune.protect")
    check_modules(model, ratios, "prune.ratios")
    indices = calibration_indices(data.dataset.train.labels, min(limit, _IMAGES), ctx.seed)
    held = list(training_images(data, indices, ctx, _BATCH))  # the same few, again and again
    found = rank(
        model,
        shrunk(model, images),
        lambda: held,
        keep=(*protect, *ratios),
        progress=lambda done, total: ctx.progress(done, total, "ranking blocks"),
    )
    if not found.blocks:
        ctx.log.warning("drop_blocks: no block goes: %s", found.why)
    return found


def rank(
    model: nn.Module,
    images: Tensor,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    *,
    keep: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> Dropping:
    """Rank the blocks of a model.

    Blocks that are dropped one after the other lose more and more; ranking ends where the loss would rise above that of
    a guess.

    Args:
        model: In evaluation mode, on the CPU; left as it is.
        images: Example input for trials, (N, C, H, W).
        batches: Gives (images, class indices) of the training split, anew with each call; models run where they are.
        keep: Names of modules that no block may hold or lie in.
        progress: Called with the number of blocks tried and of all trials.
    """
    device = next((example.device for example, _ in batches()), images.device)

    def judge(pruned: nn.Module) -> float:
        return _loss_as_met(pruned.to(device), batches())

    free = droppable(model, images)
    candidates = [
        name for name in free if not any(is_inside(name, kept) or is_inside(kept, name) for kept in keep)
    ]
    if not candidates:
        why = (
            "`protect` and `ratios` keep all its residual blocks"
            if free
            else "the model has no residual block that can be an identity"
        )
        return Dropping(blocks=(), judge=judge, why=why)
    with torch.no_grad():
        classes = model(images).shape[1]
    ranked = rank_and_drop(
        copy.deepcopy(model).to(device),
        candidates,
        len(candidates),
        batches,
        until=math.log(classes),
        progress=progress,
    )
    found, before, most = [], 0.0, 0.0
    for missed in ranked:
        if missed.dropped:
            # The order is greedy, so a block may seem to lose less than one that went before it.
            most = max(most * (1 + _APART), missed.loss_increase - before, _LEAST_LOSS)
            before = missed.loss_increase
            layers = _layers_in(model, missed.name)
            found.append(Block(name=missed.name, layers=layers, rise=before, loss=most))
    why = (
        "" if found else f"without any of its {len(candidates)} blocks the model does no better than a guess"
    )
    return Dropping(blocks=tuple(found), judge=judge, why=why)


def _layers_in(model: nn.Module, block: str) -> frozenset[str]:
    return frozenset(
        name for name, layer in model.named_modules() if isinstance(layer, MIXING) and is_inside(name, block)
    )


def _loss_as_met(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean cross-entropy with each batch's own statistics in place of those that surgery made wrong."""
    model.eval()
    for layer in model.modules():
        if isinstance(layer, BATCH_NORMS) and layer.track_running_stats:
            layer.momentum = 0.0  # its running statistics stay
            layer.train()
    total, seen = 0.0, 0
    with torch.no_grad():
        for images, labels in batches:
            if len(images) > 1:
                total += float(functional.cross_entropy(model(images), labels, reduction="sum"))
                seen += len(images)
    if not seen:
        raise PassRequirementError("prune.drop_blocks: needs two training images or more")
    return total / seen
