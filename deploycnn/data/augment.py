"""What a recipe may say about random changes of training images; :mod:`deploycnn.data.views` makes them.

Standard library only, as the fields of passes refer to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Interval, Le


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
        Literal["reflect", "zero"], "What shifted and rotated images show beyond their edges."
    ] = "reflect"
    horizontal_flip: Annotated[bool, "Mirror every second image."] = False
    brightness: Annotated[float, Interval(ge=0, lt=1), "Multiply by up to 1 ± this."] = 0.0
    contrast: Annotated[
        float, Interval(ge=0, lt=1), "Stretch around the image's mean luma by up to 1 ± this."
    ] = 0.0
    saturation: Annotated[
        float, Interval(ge=0, le=1), "Stretch around each pixel's luma by up to 1 ± this."
    ] = 0.0
    erasing: Annotated[float, Ge(0), Le(1), "Probability of overwriting a random box by the mean colour."] = (
        0.0
    )
    erasing_area: Annotated[
        float, Interval(gt=0, le=0.5), "Largest share of the area that is erased (smallest: 0.02)."
    ] = 0.25

    @property
    def active(self) -> bool:
        """Whether any image is changed at all."""
        changes = (
            self.rotation,
            self.crop_padding,
            self.brightness,
            self.contrast,
            self.saturation,
            self.erasing,
        )
        return self.horizontal_flip or self.resized_crop < 1 or any(changes)
