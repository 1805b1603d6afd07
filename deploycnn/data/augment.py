"""Random views of training images, reproducible image by image.

Every random number is a hash of (seed, epoch, image index, what it is for). A view therefore depends on neither
batch, order, threads nor interruption, and a teacher and its student see the same one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Interval, Le
from PIL import Image

Pixels = npt.NDArray[np.uint8]

#: Random numbers per image, by what they are for. Append only: positions fix the views of existing recipes.
_DRAWS = ("flip", "crop_y", "crop_x", "area", "aspect", "box_y", "box_x", "angle", "brightness", "contrast",
          "saturation", "erase", "erase_area", "erase_aspect", "erase_y", "erase_x")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Which random changes a training image goes through, in the order of the fields. All off by default.

    They act on uint8 images that have already been resized to the model's input.
    """

    resized_crop: Annotated[
        float,
        Interval(gt=0, le=1),
        "Cut out a random box of at least this share of the area (aspect 3:4 to 4:3) and enlarge it; 1: off.",
    ] = 1.0
    rotation: Annotated[float, Interval(ge=0, le=180), "Rotate by up to so many degrees either way."] = 0.0
    crop_padding: Annotated[int, Ge(0), "Shift by up to so many pixels either way."] = 0
    padding: Annotated[
        Literal["reflect", "zero"], "What shifted and rotated images show outside their edges (rotation: zero)."
    ] = "reflect"
    horizontal_flip: Annotated[bool, "Mirror every second image."] = False
    brightness: Annotated[float, Interval(ge=0, lt=1), "Multiply by up to 1 ± this."] = 0.0
    contrast: Annotated[float, Interval(ge=0, lt=1), "Stretch around the image's mean luma by up to 1 ± this."] = 0.0
    saturation: Annotated[float, Interval(ge=0, le=1), "Stretch around each pixel's luma by up to 1 ± this."] = 0.0
    erasing: Annotated[float, Ge(0), Le(1), "Probability of overwriting a random box by the mean colour."] = 0.0
    erasing_area: Annotated[
        float, Interval(gt=0, le=0.5), "Largest share of the area that is erased (smallest: 0.02)."
    ] = 0.25

    @property
    def active(self) -> bool:
        """Whether any image is changed at all."""
        changes = (self.rotation, self.crop_padding, self.brightness, self.contrast, self.saturation, self.erasing)
        return self.horizontal_flip or self.resized_crop < 1 or any(changes)


def augment(
    images: Pixels,
    augmentation: Augmentation,
    *,
    indices: npt.NDArray[np.int64],
    seed: int,
    epoch: int,
    fill: tuple[int, ...],
) -> Pixels:
    """Random views of ``images``.

    Args:
        images: uint8, shape (N, H, W, C), C being 3 (RGB) or 1; left as they are.
        augmentation: What is done.
        indices: Which image of the split each one is, shape (N,); with ``seed`` and ``epoch`` it determines the
            view.
        seed: Of the run.
        epoch: Of the training.
        fill: Colour of erased boxes, one value per channel.

    Returns:
        uint8, shape (N, H, W, C).
    """
    raise NotImplementedError
