"""How an image becomes a model's input: one declared object that travels from training to deployment.

Images enter as uint8 RGB, shape (H, W, 3). :meth:`Preprocessing.resize_image` makes them one size (still
uint8, so that they can be cached and augmented), :meth:`Preprocessing.normalize` makes float32 NCHW of them.
Resampling is Pillow's, which averages over all covered pixels when it shrinks an image.

Importing this module loads neither numpy nor Pillow.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from deploycnn.errors import PreprocessingError, nearest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from deploycnn.data.base import Split

Resize = Literal["squash", "letterbox", "center_crop"]
Scale = Literal["unit", "signed", "standardize"]
Channels = Literal["rgb", "bgr", "gray"]
Interpolation = Literal["bilinear", "bicubic", "nearest", "area"]

_MAX_SIDE = 16384


class _IntOrPair:
    """Lets pydantic accept ``size: 32`` for ``size: [32, 32]`` without importing it here."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(_pair)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """Size, channels and scale of a model's input.

    ``mean`` and ``std`` are per channel, in the order that ``channels`` gives the model, of pixels scaled to
    [0, 1]: the input is ``(pixel / 255 - mean) / std``. Where they are ``None`` they are computed from the
    training split by :meth:`resolve`.

    Raises:
        ValueError: a field's value does not fit, alone or with the others; names it.
    """

    size: Annotated[tuple[int, int], _IntOrPair(), "Height and width in pixels; one number for a square."] = (
        224,
        224,
    )
    resize: Annotated[
        Resize,
        "squash: stretch to the size; letterbox: fit inside and pad; center_crop: cover, cut out the middle.",
    ] = "squash"
    scale: Annotated[Scale, "unit: to [0, 1]; signed: to [-1, 1]; standardize: by mean and std."] = (
        "standardize"
    )
    mean: Annotated[
        tuple[float, ...] | None, "Per channel, of pixels in [0, 1]; null: from the training split."
    ] = None
    std: Annotated[
        tuple[float, ...] | None, "Per channel, of pixels in [0, 1]; null: from the training split."
    ] = None
    channels: Annotated[Channels, "Order of the model's input channels; gray has one."] = "rgb"
    interpolation: Annotated[Interpolation, "How pixels are resampled (by Pillow)."] = "bilinear"
    # 114 is close to the mean of natural images, so padding excites the first layer little.
    pad_value: Annotated[int, "Letterbox: 0..255, of the padding."] = 114
    crop_ratio: Annotated[float, "Center crop: side of the crop over the shorter side, e.g. 0.875."] = 1.0

    def __post_init__(self) -> None:
        _set(self, "size", _pair(self.size))
        for field, allowed in _CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}: {nearest(str(getattr(self, field)), allowed)}")
        _set(self, "mean", _floats(self.mean, "mean", self.channel_count))
        _set(self, "std", _floats(self.std, "std", self.channel_count))
        if self.scale != "standardize" and (self.mean is not None or self.std is not None):
            raise ValueError(f"mean and std belong to scale: standardize, not to scale: {self.scale}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std: give both, or neither to compute them from the training split")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std should be > 0, got {list(self.std)}")
        if not _is_int(self.pad_value) or not 0 <= self.pad_value <= 255:
            raise ValueError(f"pad_value should be a whole number from 0 to 255, got {self.pad_value!r}")
        if self.resize != "letterbox" and self.pad_value != _default("pad_value"):
            raise ValueError(f"pad_value belongs to resize: letterbox, not to resize: {self.resize}")
        if not _is_number(self.crop_ratio) or not 0.1 <= self.crop_ratio <= 1:
            raise ValueError(f"crop_ratio should be from 0.1 to 1, got {self.crop_ratio!r}")
        if self.resize != "center_crop" and self.crop_ratio != 1:
            raise ValueError(f"crop_ratio belongs to resize: center_crop, not to resize: {self.resize}")
        _set(self, "crop_ratio", float(self.crop_ratio))

    @property
    def height(self) -> int:
        """Height of the model's input in pixels."""
        return self.size[0]

    @property
    def width(self) -> int:
        """Width of the model's input in pixels."""
        return self.size[1]

    @property
    def channel_count(self) -> int:
        """Channels of the model's input: 1 or 3."""
        return 1 if self.channels == "gray" else 3

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one input."""
        return (self.channel_count, *self.size)

    @property
    def resolved(self) -> bool:
        """Whether nothing is left to be computed from the training split."""
        return self.scale != "standardize" or self.mean is not None

    @property
    def resize_key(self) -> tuple[Any, ...]:
        """What :meth:`resize_image` depends on; hashable."""
        gray = self.channels == "gray"
        return (self.size, self.resize, self.interpolation, self.pad_value, self.crop_ratio, gray)

    def keeps(self, shape: tuple[int, ...]) -> bool:
        """Whether :meth:`resize_image` leaves an image of this shape (H, W, 3) as it is."""
        return shape == (*self.size, 3) and self.channels != "gray" and self.crop_ratio == 1

    @property
    def fingerprint(self) -> str:
        """sha256 hex of all fields."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values; floats survive exactly."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, value: object, where: str = "preprocessing") -> Preprocessing:
        """The inverse of :meth:`to_json`; absent fields take their defaults.

        Raises:
            PreprocessingError: a key is unknown or a value does not fit; names ``where``.
        """
        if not isinstance(value, Mapping):
            raise PreprocessingError(f"{where}: should be a mapping of fields, got {value!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in value:
            if key not in known:
                raise PreprocessingError(f"{where}.{key}: unknown key; {nearest(str(key), known)}")
        try:
            fields: dict[str, Any] = {str(key): item for key, item in value.items()}
            return cls(**fields)
        except ValueError as error:
            raise PreprocessingError(f"{where}: {error}") from None

    def merged(self, options: Mapping[str, Any], where: str = "preprocessing") -> Preprocessing:
        """A copy with ``options`` (plain JSON values) laid over it: a recipe's over a dataset's.

        Fields that belong to a scale or resize that ``options`` replaces go back to their defaults.

        Raises:
            PreprocessingError: a key is unknown or a value does not fit.
        """
        fields = self.to_json()
        if options.get("scale", "standardize") != "standardize" or "channels" in options:
            fields.update(mean=None, std=None)
        if "resize" in options:
            fields.update(pad_value=_default("pad_value"), crop_ratio=_default("crop_ratio"))
        return Preprocessing.from_json({**fields, **options}, where)

    def check_same(self, other: Any, where: str) -> None:
        """Check that a model was made for images prepared like this.

        Args:
            other: :meth:`to_json` of what it was made for; ``None``, where that is unknown, passes.
            where: The model, for the error.

        Raises:
            PreprocessingError: it differs; names ``where`` and the fields with both values.
        """
        if other is None:
            return
        theirs, ours = Preprocessing.from_json(other, where).to_json(), self.to_json()
        different = [name for name in ours if ours[name] != theirs[name]]
        if different:
            listing = "; ".join(f"{name}: {theirs[name]} there, {ours[name]} here" for name in different)
            raise PreprocessingError(
                f"{where}: made for images prepared otherwise ({listing}); "
                "set the recipe's `preprocessing` to the model's, or train the model again"
            )

    def resize_image(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Bring an RGB image to the declared size.

        Args:
            image: uint8, shape (H, W, 3), RGB.

        Returns:
            uint8, shape (height, width, C): RGB for ``rgb`` and ``bgr``, luma (ITU-R 601) for ``gray``.
        """
        import numpy as np
        from PIL import Image

        from deploycnn.data.geometry import fit

        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected uint8 RGB of shape (H, W, 3), got {image.dtype} {image.shape}")
        if self.keeps(image.shape):
            return image
        picture = Image.fromarray(image)
        if self.channels == "gray":
            picture = picture.convert("L")
        pixels = np.asarray(fit(picture, self), dtype=np.uint8)
        return pixels[:, :, None] if self.channels == "gray" else pixels

    def normalize(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Scale resized images.

        A pixel has 256 values, so each is computed once in float64 and looked up: the result is the correctly
        rounded float32, the same on every machine.

        Args:
            images: uint8, shape (N, height, width, C), as :meth:`resize_image` gives them.

        Returns:
            float32, shape (N, C, height, width), channels in the declared order.
        """
        import numpy as np

        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != self.channel_count:
            raise ValueError(
                f"expected uint8 of shape (N, H, W, {self.channel_count}), got {images.dtype} {images.shape}"
            )
        table = _lookup_table(self)
        count, height, width, channels = images.shape
        result = np.empty((count, channels, height, width), np.float32)
        for channel in range(channels):
            taken = channels - 1 - channel if self.channels == "bgr" else channel
            np.take(table[channel], images[:, :, :, taken], out=result[:, channel], mode="clip")
        return result

    def apply(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """One uint8 RGB image of shape (H, W, 3) as a float32 input of shape (C, height, width)."""
        result: npt.NDArray[np.float32] = self.normalize(self.resize_image(image)[None])[0]
        return result

    def resolve(self, train: Split) -> Preprocessing:
        """Fill in ``mean`` and ``std`` from the resized images of the training split, where they are missing.

        The images are streamed. Sums of 8-bit pixels and of their squares are whole numbers, so the result
        does not depend on the order of the images or on threads.

        Raises:
            PreprocessingError: a channel is constant, so that it has no scale.
        """
        if self.resolved:
            return self
        from deploycnn.data.statistics import channel_statistics

        mean, std = channel_statistics(train, self)
        if min(std) <= 0:
            raise PreprocessingError(
                "preprocessing.scale: standardize is impossible, as all training pixels of a channel are "
                "equal; use scale: unit"
            )
        return dataclasses.replace(self, mean=mean, std=std)


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "resize": get_args(Resize),
    "scale": get_args(Scale),
    "channels": get_args(Channels),
    "interpolation": get_args(Interpolation),
}


@functools.lru_cache(maxsize=16)
def _lookup_table(preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """Input value of each pixel value, shape (C, 256)."""
    import numpy as np

    if not preprocessing.resolved:
        raise ValueError("mean and std are not known yet; call resolve(train) first")
    unit = np.arange(256, dtype=np.float64) / 255
    count = preprocessing.channel_count
    if preprocessing.scale == "unit":
        table = np.tile(unit, (count, 1))
    elif preprocessing.scale == "signed":
        table = np.tile(2 * unit - 1, (count, 1))
    else:
        mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
        table = (unit[None] - mean[:, None]) / std[:, None]
    return table.astype(np.float32)


def _default(name: str) -> Any:
    return next(field.default for field in dataclasses.fields(Preprocessing) if field.name == name)


def _set(instance: Preprocessing, name: str, value: object) -> None:
    """Store the canonical form of a field of a frozen instance that is still being made."""
    object.__setattr__(instance, name, value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _pair(value: object) -> tuple[int, int]:
    if _is_int(value):
        value = (value, value)
    if not (isinstance(value, tuple | list) and len(value) == 2 and all(_is_int(side) for side in value)):
        raise ValueError(f"size {value!r} is not a whole number or [height, width]")
    height, width = value
    if not (1 <= height <= _MAX_SIDE and 1 <= width <= _MAX_SIDE):
        raise ValueError(f"size {list(value)} is outside 1..{_MAX_SIDE} pixels")
    return height, width


def _floats(value: object, name: str, count: int) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not (isinstance(value, tuple | list) and all(_is_number(item) for item in value)):
        raise ValueError(f"{name} should be a list of {count} numbers, got {value!r}")
    if len(value) != count:
        raise ValueError(f"{name} should have {count} values, one for each channel, got {len(value)}")
    return tuple(float(item) for item in value)
