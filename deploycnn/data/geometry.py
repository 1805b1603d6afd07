"""Where an image's pixels go when it is brought to one size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from deploycnn.data.preprocessing import Interpolation, Preprocessing

#: Pillow's filters; all but NEAREST average over the covered pixels when they shrink an image.
_FILTERS: Mapping[Interpolation, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
    "area": Image.Resampling.BOX,
}


def fit(picture: Image.Image, declared: Preprocessing) -> Image.Image:
    """``picture`` (mode RGB or L) at the declared size, squashed, letterboxed or cropped as declared."""
    filter_ = _FILTERS[declared.interpolation]
    height, width = declared.size
    source = (picture.height, picture.width)
    if declared.resize == "squash":
        return picture.resize((width, height), filter_)
    if declared.resize == "letterbox":
        new_h, new_w = letterbox_size(source, declared.size)
        color = declared.pad_value if picture.mode == "L" else (declared.pad_value,) * 3
        canvas = Image.new(picture.mode, (width, height), color)
        canvas.paste(picture.resize((new_w, new_h), filter_), ((width - new_w) // 2, (height - new_h) // 2))
        return canvas
    new_h, new_w = covering_size(source, declared.size, declared.crop_ratio)
    top, left = round((new_h - height) / 2), round((new_w - width) / 2)
    return picture.resize((new_w, new_h), filter_).crop((left, top, left + width, top + height))


def letterbox_size(source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The largest (height, width) of the same aspect as ``source`` that fits in ``target``."""
    factor = min(target[0] / source[0], target[1] / source[1])
    return (
        min(target[0], max(1, round(source[0] * factor))),
        min(target[1], max(1, round(source[1] * factor))),
    )


def covering_size(source: tuple[int, int], target: tuple[int, int], crop_ratio: float) -> tuple[int, int]:
    """The smallest (height, width) of the same aspect as ``source`` that covers ``target / crop_ratio``.

    The longer side is rounded down, as torchvision's ``Resize`` does.
    """
    height, width = (math.floor(side / crop_ratio) for side in target)
    if source[0] * width <= source[1] * height:  # relatively wider than the target
        return height, max(width, height * source[1] // source[0])
    return max(height, width * source[0] // source[1]), width
