"""A teacher's logits, computed once for each image where it sees the same few views again and again."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from deploycnn.training.settings import TrainingSettings
from deploycnn.training.view import View

#: Logits of one teacher may take so much memory.
MOST_BYTES = 256 * 2**20
#: Batches that are computed although they are known, to see whether they come out the same.
CHECKS = 3

log = logging.getLogger(__name__)


def views_of(settings: TrainingSettings) -> int | None:
    """How many views of an image there are: 1, or 2 where it is only mirrored; ``None`` where there are too many.

    Shifts, colours and mixing make a view that hardly ever comes again.
    """
    if settings.mixup or settings.cutmix:
        return None
    if dataclasses.replace(settings.augment, horizontal_flip=False).active:
        return None
    return 2 if settings.augment.horizontal_flip else 1


def fits(images: int, classes: int, views: int) -> bool:
    """Whether the logits take no more than ``MOST_BYTES``."""
    return views * images * classes * 4 <= MOST_BYTES


class LogitCache:
    """Remembers the logits of one teacher by image and view.

    It must not change a bit of the result. Batches are filled up to one size, since arithmetic may depend on
    it, and the first known batches are computed again: if a bit differs on this machine, all later ones are computed.
    """

    def __init__(self, images: int, classes: int, views: int, batch_size: int, *, keep: bool = True) -> None:
        """Make room for ``views`` of each image of the training split; with ``keep`` false, for nothing."""
        self._batch_size, self._checks = batch_size, CHECKS
        self._logits = torch.zeros(views if keep else 0, images, classes)
        self._known = np.zeros((views if keep else 0, images), np.bool_)
        #: Whether logits are remembered.
        self.exact = keep

    def __call__(self, view: View, teacher: nn.Module) -> Tensor:
        """The teacher's logits for a view, shape (N, K), without gradients."""
        if view.indices is None or not self.exact:
            return self._compute(view, teacher)
        which: npt.NDArray[np.int64] = (
            np.zeros(len(view.indices), np.int64) if view.flipped is None else view.flipped.astype(np.int64)
        )
        known = bool(self._known[which, view.indices].all())
        if known and self._checks == 0:
            return self._logits[which, view.indices].to(view.images.device)
        logits_NK = self._compute(view, teacher)
        if logits_NK.dtype != self._logits.dtype:
            self._logits = self._logits.to(logits_NK.dtype)  # at the first batch, under autocast
        if known:
            self._checks -= 1
            if not torch.equal(self._logits[which, view.indices], logits_NK.cpu()):
                self.exact = False
                log.info("the teacher's logits depend on the batch here, so they are computed each time")
        self._logits[which, view.indices] = logits_NK.cpu()
        self._known[which, view.indices] = True
        return logits_NK

    def _compute(self, view: View, teacher: nn.Module) -> Tensor:
        images_NCHW = view.images
        missing = self._batch_size - len(images_NCHW)
        if missing > 0:
            filling = images_NCHW[:1].expand(missing, -1, -1, -1)
            images_NCHW = torch.cat((images_NCHW, filling)).to(memory_format=torch.channels_last)
        with torch.no_grad():
            logits_NK: Tensor = teacher(images_NCHW)
        return logits_NK[: len(view.images)]
