"""What a step sees: images as they are shown to student and teacher alike, and what they are of."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from deploycnn.training.settings import TrainingSettings

#: Sets the stream of random numbers for mixing apart from others of the same seed and epoch.
_STREAM = 0x6D6978


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class View:
    """A batch on the device that trains.

    Attributes:
        images: (N, C, H, W). Augmented, and mixed where asked for.
        labels: Class of each image, (N,).
        others: Class of what was mixed into each image; ``None`` where nothing was.
        share: Of ``labels`` in the image, in [0, 1]; the rest is of ``others``.
        indices: Which images of the training split they are; ``None`` where that is not known.
        flipped: Which of them are mirrored; ``None`` where none is.
    """

    images: Tensor
    labels: Tensor
    others: Tensor | None = None
    share: float = 1.0
    indices: npt.NDArray[np.int64] | None = None
    flipped: npt.NDArray[np.bool_] | None = None

    @property
    def main_labels(self) -> Tensor:
        """The class of the larger share."""
        return self.labels if self.others is None or self.share >= 0.5 else self.others


def mixed(view: View, settings: TrainingSettings, *, seed: int, epoch: int, step: int) -> View:
    """Mix each image of a batch with another one of it, as ``settings`` say.

    mixup (Zhang et al. 2018) blends, cutmix (Yun et al. 2019) pastes a box; the share is drawn from
    Beta(alpha, alpha), once for a batch. Where both are on, each batch takes one of them, by a fair coin.

    Args:
        view: Not mixed yet.
        settings: ``mixup`` and ``cutmix`` are the alphas; 0 is off.
        seed: Of the run.
        epoch: With ``seed`` and ``step`` it determines everything random here.
        step: Within the epoch.
    """
    if not settings.mixup and not settings.cutmix:
        return view
    random = np.random.default_rng([_STREAM, seed, epoch, step])
    cut = settings.cutmix > 0 and (not settings.mixup or random.random() < 0.5)
    alpha = settings.cutmix if cut else settings.mixup
    share = float(random.beta(alpha, alpha))
    partners = random.permutation(len(view.labels))
    images_NCHW, others_NCHW = view.images, view.images[partners]
    if cut:
        top, bottom, left, right = _box(images_NCHW.shape[2], images_NCHW.shape[3], share, random)
        images_NCHW = images_NCHW.clone()
        images_NCHW[:, :, top:bottom, left:right] = others_NCHW[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (images_NCHW.shape[2] * images_NCHW.shape[3])
    else:
        images_NCHW = share * images_NCHW + (1 - share) * others_NCHW
    return replace(view, images=images_NCHW, others=view.labels[partners], share=share)


def _box(height: int, width: int, share: float, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of a box that leaves about ``share``; cut off at the image's edges."""
    ratio = math.sqrt(1 - share)
    box_h, box_w = int(height * ratio), int(width * ratio)
    middle_y, middle_x = int(random.integers(height)), int(random.integers(width))
    top, left = middle_y - box_h // 2, middle_x - box_w // 2
    return max(0, top), min(height, top + box_h), max(0, left), min(width, left + box_w)
