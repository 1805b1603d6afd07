"""The batches that training sees."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor

from deploycnn.core import Context
from deploycnn.data.base import Data
from deploycnn.data.loader import training_batches
from deploycnn.data.views import uniforms
from deploycnn.training.device import images_to, labels_to
from deploycnn.training.settings import TrainingSettings
from deploycnn.training.view import View, mixed

#: Training images from which batch-norm statistics are re-estimated.
REESTIMATION_IMAGES = 4096


def count_steps(images: int, batch_size: int) -> int:
    """Batches of an epoch.

    A last batch of a single image is left out, as batch norm has no variance for it, unless it is all.
    """
    whole, rest = divmod(images, batch_size)
    return whole + (rest > 1) if whole else 1


def train_views(
    data: Data, settings: TrainingSettings, *, seed: int, epoch: int, device: str
) -> Iterator[View]:
    """The shuffled, augmented and mixed batches of an epoch: the same for the same seed and epoch."""
    train = data.dataset.train
    batches = training_batches(
        train, data.preprocessing, settings.batch_size, epoch=epoch, seed=seed, augment=settings.augment
    )
    for step, batch in enumerate(itertools.islice(batches, count_steps(len(train), settings.batch_size))):
        flipped = None
        if settings.augment.horizontal_flip:
            flipped = uniforms(seed, epoch, batch.indices)["flip"] < 0.5
        view = View(
            images=images_to(batch.images, device),
            labels=labels_to(batch.labels, device),
            indices=batch.indices,
            flipped=flipped,
        )
        yield mixed(view, settings, seed=seed, epoch=epoch, step=step)


def plain_batches(data: Data, settings: TrainingSettings, ctx: Context) -> Iterator[Tensor]:
    """Images (N, C, H, W) for batch-norm statistics: shuffled over classes, without augmentation.

    Batches are full where the split fills one: small ones have other statistics and would count as much.
    """
    train = data.dataset.train
    batches = training_batches(
        train, data.preprocessing, settings.batch_size, epoch=0, seed=ctx.seed, augment=None
    )
    full = min(len(train), REESTIMATION_IMAGES) // settings.batch_size
    for batch in itertools.islice(batches, max(1, full)):
        yield images_to(batch.images, ctx.device)
