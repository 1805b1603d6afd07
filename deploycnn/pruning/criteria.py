"""Criteria by the names that recipes use, with the images that some of them look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from deploycnn.core import Context
from deploycnn.data.base import Data
from deploycnn.data.calibration import calibration_indices
from deploycnn.data.loader import batches
from deploycnn.errors import PassRequirementError
from deploycnn.pruning import feature_maps, fisher, importance
from deploycnn.pruning.groups import ChannelGroup
from deploycnn.pruning.importance import Criterion, Scores

#: Images at a time: few, so that Taylor's changes of single images do not average out, and maps fit into memory.
_BATCH = 16


class _Measured(Protocol):
    """A criterion that looks at images."""

    def __call__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        *,
        batches: Iterator[tuple[Tensor, Tensor]],
        progress: Callable[[int], None],
    ) -> list[Scores]:
        """Score the groups' channels."""
        ...


_WITH_IMAGES: Mapping[str, _Measured] = {
    "taylor": importance.taylor,
    "fisher": fisher.fisher,
    "group_fisher": fisher.group_fisher,
    "hrank": feature_maps.hrank,
    "chip": feature_maps.chip,
}


def criterion(name: str, *, norm: str, images: int, ctx: Context) -> Criterion:
    """A criterion by its name in recipes.

    Args:
        name: "magnitude", "group_norm", "bn_scale", "random", "taylor", "fisher", "group_fisher", "hrank" or "chip".
        norm: "l1" or "l2", of magnitude.
        images: How many images of the training split the last five look at, evenly over the classes.
        ctx: Seed, device, data and progress.

    Raises:
        PassRequirementError: it needs images and there are none.
    """
    if name == "magnitude":
        return partial(importance.magnitude, power=1 if norm == "l1" else 2)
    if name == "group_norm":
        return importance.group_norm
    if name == "bn_scale":
        return importance.bn_scale
    if name == "random":
        return partial(importance.random, seed=ctx.seed)
    measured = _WITH_IMAGES[name]
    if ctx.data is None:
        raise PassRequirementError(
            f"prune.importance: {name} needs images, but the recipe has no `data`; "
            "add it or choose another importance"
        )
    data = ctx.data
    indices = calibration_indices(data.dataset.train.labels, images, ctx.seed)

    def found(model: nn.Module, groups: Sequence[ChannelGroup]) -> list[Scores]:
        model.to(ctx.device)
        try:
            return measured(
                model,
                groups,
                batches=training_images(data, indices, ctx),
                progress=lambda seen: ctx.progress(seen, len(indices), "importance"),
            )
        finally:
            model.cpu()

    return found


def training_images(
    data: Data, indices: npt.NDArray[np.int64], ctx: Context, size: int = _BATCH
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (N, C, H, W) and labels (N,) of the training split, on the device."""
    for batch in batches(data.dataset.train, data.preprocessing, size, indices=indices, threads=ctx.threads):
        yield torch.from_numpy(batch.images).to(ctx.device), torch.from_numpy(batch.labels).to(ctx.device)
