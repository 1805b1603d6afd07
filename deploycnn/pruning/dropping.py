"""Whole residual blocks beside widths: what it costs to drop each, and how many are worth their channels.

Blocks and channels are ranked in different units. The rise of the loss without blocks is measured; what channels are
worth in it, the rate of exchange, is not known before they are cut. So the solver chooses at several rates, and the
choice is kept of which the training loss is least, measured before any training.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from deploycnn.core import Context, Json, Table
from deploycnn.data.calibration import calibration_indices
from deploycnn.errors import PassRequirementError
from deploycnn.pruning.blocks import droppable, rank_and_drop
from deploycnn.pruning.criteria import training_images
from deploycnn.pruning.layers import BATCH_NORMS, MIXING
from deploycnn.pruning.structure import check_modules, is_inside, shrunk

FloatArray = npt.NDArray[np.float64]

#: Rates that are tried, as multiples of that at which all blocks and all channels lose the same.
RATES = tuple(2.0**power for power in range(-6, 7))
#: Then those on both sides of the best so far.
NEARER = (2**0.5, 2**0.25)
#: Training images on which blocks are ranked at most, and how many at a time.
_IMAGES, _BATCH = 256, 64
#: No block is free: one without which the loss even falls would go at any goal.
_LEAST_LOSS = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A residual block that may go.

    Attributes:
        name: Of the module.
        layers: Convolutions and linear layers in it.
        loss: By how much the training loss rises without it, where those before it in the ranking are gone.
    """

    name: str
    layers: frozenset[str]
    loss: float

    @property
    def losses(self) -> FloatArray:
        """As a variable of the solver: kept, dropped."""
        return np.array([0.0, self.loss])


@dataclass(slots=True, kw_only=True)
class Dropping:
    """The blocks of a model, and what judges models without them.

    Attributes:
        blocks: Those that may go, first those that are missed least.
        judge: Training loss of a model before training, with the batch-norm statistics of the batches.
        tried: What was found at the rates.
    """

    blocks: tuple[Block, ...]
    judge: Callable[[nn.Module], float]
    tried: list[Json] = field(default_factory=list)

    def rate(self, channels: Sequence[FloatArray]) -> float:
        """What the loss of channels (``losses_of``) is multiplied by, so that all channels weigh what all blocks do."""
        most = sum(float(losses.max()) for losses in channels)
        return sum(block.loss for block in self.blocks) / most if most > 0 else 1.0

    def note(self, rate: float, blocks: int, channels: int, loss: float) -> None:
        """Keep what was found at a rate: blocks and channels that go, and what the judge says."""
        self.tried.append({"rate": rate, "blocks": blocks, "channels": channels, "loss": loss})
        self.tried.sort(key=lambda row: float(row["rate"]))

    def names(self, levels: Sequence[int]) -> tuple[str, ...]:
        """The blocks that the last ``levels`` of a solution drop."""
        return tuple(
            block.name for block, level in zip(self.blocks, levels[-len(self.blocks) :], strict=True) if level
        )

    def tables(self, dropped: Sequence[str]) -> list[Table]:
        """For the report."""
        return [
            Table(
                title="Residual blocks",
                columns=("block", "rise of the training loss", "dropped"),
                rows=tuple((block.name, block.loss, block.name in dropped) for block in self.blocks),
            ),
            Table(
                title="Blocks against channels: choices of the same predicted latency",
                columns=("blocks dropped", "channels removed", "training loss before recovery"),
                rows=tuple((row["blocks"], row["channels"], row["loss"]) for row in self.tried),
            ),
        ]


def ranked_blocks(
    model: nn.Module,
    images: Tensor,
    *,
    protect: Sequence[str],
    ratios: Iterable[str],
    limit: int,
    ctx: Context,
) -> Dropping | None:
    """Rank a model's blocks on images of the training split; ``None`` where it has none that may go.

    Args:
        model: In evaluation mode, on the CPU; left as it is.
        images: Example input, (N, C, H, W).
        protect: Names of modules that no block may hold or lie in.
        ratios: Likewise, of modules whose widths are named.
        limit: Most images.
        ctx: Seed, device, data and progress.

    Raises:
        PassRequirementError: a name is no module, or there are no images.
    """
    if ctx.data is None:
        raise PassRequirementError(
            "prune.drop_blocks: ranking blocks needs images, but the recipe has no `data`; add it or leave blocks alone"
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
    if found is None:
        ctx.log.info("drop_blocks: the model has no residual block that may go")
    return found


def rank(
    model: nn.Module,
    images: Tensor,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    *,
    keep: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> Dropping | None:
    """Rank the blocks of a model; ``None`` where it has none that may go.

    Blocks that are dropped one after the other lose more and more; ranking ends where the loss is that of a guess.

    Args:
        model: In evaluation mode, on the CPU; left as it is.
        images: Example input for trials, (N, C, H, W).
        batches: Gives (images, class indices) of the training split, anew with each call; models run where they are.
        keep: Names of modules that no block may hold or lie in.
        progress: Called with the number of blocks tried and of all trials.
    """
    candidates = [
        name
        for name in droppable(model, images)
        if not any(is_inside(name, kept) or is_inside(kept, name) for kept in keep)
    ]
    if not candidates:
        return None
    with torch.no_grad():
        classes = model(images).shape[1]
    device = next((example.device for example, _ in batches()), images.device)
    ranked = rank_and_drop(
        copy.deepcopy(model).to(device),
        candidates,
        len(candidates),
        batches,
        until=math.log(classes),
        progress=progress,
    )
    found, before, most = [], 0.0, _LEAST_LOSS
    for missed in ranked:
        if missed.dropped:
            # The order is greedy, so a block may seem to lose less than one that went before it.
            most = max(most, missed.loss_increase - before)
            before = missed.loss_increase
            found.append(Block(name=missed.name, layers=_layers_in(model, missed.name), loss=most))
    if not found:
        return None
    return Dropping(blocks=tuple(found), judge=lambda pruned: _loss_as_met(pruned.to(device), batches()))


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
