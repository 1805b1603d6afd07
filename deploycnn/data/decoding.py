"""From the bytes of an image file to RGB pixels, or to the reason why not."""

from __future__ import annotations

import functools
import io
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from deploycnn.errors import one_line

#: Formats that are recognized by their content. Those that run other programs (EPS, WMF) are left out on
#: purpose.
_FORMATS = ("JPEG", "MPO", "PNG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "AVIF", "PPM", "JPEG2000")
_ORIENTATION = 0x0112
#: EXIF orientation -> what turns the pixels upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


class UnusableImage(ValueError):  # noqa: N818 - what it is, rather than that it is an error
    """Some bytes are no image that can be used; the message says why."""


def decode(data: bytes) -> npt.NDArray[np.uint8]:
    """The pixels of an image file's first frame, upright.

    Palettes, CMYK, gray and 16-bit images become 8-bit RGB; what is transparent shows white.

    Args:
        data: The file's content.

    Returns:
        uint8 RGB, shape (H, W, 3).

    Raises:
        UnusableImage: not an image, damaged, or of a kind without a defined range (floating-point pixels).
    """
    return _guarded(data, pixels=True)


def check_header(data: bytes) -> None:
    """Check that ``data`` begins like a usable image, without decoding its pixels.

    Raises:
        UnusableImage: it does not.
    """
    _guarded(data, pixels=False)


def _guarded(data: bytes, *, pixels: bool) -> npt.NDArray[np.uint8]:
    if not data:
        raise UnusableImage("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            _check_range(image)
            if not pixels:
                return np.zeros((0, 0, 3), np.uint8)
            image.load()
            return np.asarray(_rgb(_upright(image)), dtype=np.uint8)
    except UnusableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnusableImage("not an image") from error
    except (Image.DecompressionBombError, MemoryError) as error:
        raise UnusableImage(f"too large ({one_line(error, 120)})") from error
    except Exception as error:
        # On damaged files Pillow's decoders raise nearly anything: OSError, SyntaxError, struct.error,
        # KeyError...
        raise UnusableImage(f"damaged ({one_line(error, 120)})") from error


def _check_range(image: Image.Image) -> None:
    # In PNG and PPM mode I means 16 bit; elsewhere it says nothing of the range.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise UnusableImage(f"pixels of mode {image.mode} have no defined range; save 8 or 16 bit")


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of ``_FORMATS`` that this build of Pillow has."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, LookupError, TypeError, OSError, EOFError, struct.error, Warning):
        return image  # broken metadata around good pixels
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        deep: npt.NDArray[Any] = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
