"""Every kind of image file, and files that are none."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from deploycnn.data.decoding import UnusableImage, check_header, decode
from tests.data.samples import encoded, picture

PIXELS = picture(0, 12, 20)
SMOOTH = np.stack(np.broadcast_arrays(np.arange(20) * 12, np.arange(12)[:, None] * 20, 90), axis=2).astype(
    np.uint8
)


def saved(image: Image.Image, format_: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


LOSSLESS = {
    "png": encoded(PIXELS),
    "png interlaced": encoded(PIXELS, "PNG", interlace=1),
    "bmp": encoded(PIXELS, "BMP"),
    "tiff": encoded(PIXELS, "TIFF"),
    "tiff lzw": encoded(PIXELS, "TIFF", compression="tiff_lzw"),
    "ppm": encoded(PIXELS, "PPM"),
    "png rgba, opaque": saved(Image.fromarray(PIXELS).convert("RGBA"), "PNG"),
    "two frames": saved(
        Image.fromarray(PIXELS), "TIFF", save_all=True, append_images=[Image.fromarray(PIXELS[::-1].copy())]
    ),
}
if features.check("webp"):
    LOSSLESS["webp lossless"] = encoded(PIXELS, "WEBP", lossless=True)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_give_the_pixels(kind: str) -> None:
    check_header(LOSSLESS[kind])
    np.testing.assert_array_equal(decode(LOSSLESS[kind]), PIXELS)


LOSSY = {
    "jpeg": encoded(SMOOTH, "JPEG", quality=95),
    "jpeg progressive": encoded(SMOOTH, "JPEG", quality=95, progressive=True),
    "jpeg cmyk": saved(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=95),
    "tiff cmyk": saved(Image.fromarray(SMOOTH).convert("CMYK"), "TIFF"),
    "gif palette": saved(Image.fromarray(SMOOTH).quantize(256), "GIF"),
    "png palette": saved(Image.fromarray(SMOOTH).quantize(256), "PNG"),
}


@pytest.mark.parametrize("kind", LOSSY)
def test_lossy_formats_come_close(kind: str) -> None:
    result = decode(LOSSY[kind])
    assert result.shape == SMOOTH.shape
    assert np.abs(result.astype(int) - SMOOTH).mean() < 8


def test_gray_images_become_rgb() -> None:
    gray = PIXELS[..., 0].copy()
    expected = np.repeat(gray[..., None], 3, axis=2)
    for data in (encoded(gray), encoded(gray, "TIFF"), encoded(gray, "PPM"), encoded(gray, "GIF")):
        np.testing.assert_array_equal(decode(data), expected)
    bits = gray > 127
    for format_ in ("PNG", "TIFF", "PPM"):
        data = saved(Image.fromarray(bits), format_)
        np.testing.assert_array_equal(decode(data), np.repeat(bits[..., None] * np.uint8(255), 3, axis=2))


@pytest.mark.parametrize("format_", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_and_not_cut_off(format_: str) -> None:
    deep = np.linspace(0, 65535, 240).astype(np.uint16).reshape(12, 20)
    result = decode(encoded(deep, format_))
    expected = np.rint(deep.astype(np.float64) / 257)
    assert np.abs(result[..., 0] - expected).max() <= 1
    assert result.min() == 0
    assert result.max() == 255


def test_big_endian_tiff() -> None:
    deep = np.linspace(0, 65535, 240).astype(">u2").reshape(12, 20)
    data = _tiff16(deep)
    assert np.abs(decode(data)[..., 1] - np.rint(deep.astype(np.float64) / 257)).max() <= 1


def _tiff16(pixels: np.ndarray) -> bytes:
    """A big-endian 16-bit gray TIFF, written by hand (TIFF 6.0, section 4)."""
    height, width = pixels.shape
    tags = [
        (256, 3, width),
        (257, 3, height),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
    ]
    tags += [(278, 3, height), (279, 4, pixels.nbytes)]
    entries = b"".join(
        struct.pack(">HHI", tag, kind, 1)
        + (struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value))
        for tag, kind, value in tags
    )
    directory = struct.pack(">H", len(tags)) + entries + bytes(4)
    return struct.pack(">2sHI", b"MM", 42, 8 + pixels.nbytes) + pixels.tobytes() + directory


def test_what_is_transparent_shows_white() -> None:
    alpha = np.zeros((12, 20), np.uint8)
    alpha[:, 10:] = 255
    alpha[:, 5] = 128
    rgba = np.dstack([PIXELS, alpha])
    result = decode(encoded(rgba))
    np.testing.assert_array_equal(result[:, 10:], PIXELS[:, 10:])
    assert (result[:, :5] == 255).all()
    assert np.abs(result[:, 5] - (PIXELS[:, 5] * (128 / 255) + 255 * 127 / 255)).max() <= 1
    gray_alpha = Image.fromarray(rgba).convert("LA")
    assert (decode(saved(gray_alpha, "PNG"))[:, :5] == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 1)
    result = decode(saved(palette, "PNG", transparency=0))
    assert result[0, 0].tolist() == [40, 50, 60]
    assert (result[1:] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_honoured(orientation: int, format_: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(SMOOTH, format_, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    plain = np.asarray(Image.open(io.BytesIO(encoded(SMOOTH, format_))).convert("RGB"))
    result = decode(data)
    np.testing.assert_array_equal(result, expected)
    assert result.shape == ((20, 12, 3) if orientation >= 5 else (12, 20, 3))
    if orientation == 6:  # the camera was turned to the left: turn the picture to the right
        np.testing.assert_array_equal(result, np.rot90(plain, -1))


def test_broken_metadata_do_not_spoil_good_pixels() -> None:
    data = encoded(PIXELS, "JPEG", exif=b"Exif\0\0garbage, not a TIFF header at all", quality=95)
    assert decode(data).shape == (12, 20, 3)
    wrong_type = Image.Exif()
    wrong_type[0x0112] = 99
    assert decode(encoded(PIXELS, "JPEG", exif=wrong_type)).shape == (12, 20, 3)


def _png_of(width: int, height: int) -> bytes:
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", b"x"),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


JPEG = encoded(picture(1, 64, 64), "JPEG", quality=95)
PNG = encoded(picture(1, 64, 64))
UNUSABLE = {
    "empty": (b"", "empty file"),
    "text": (b"hello, this is text\n" * 10, "not an image"),
    "html": (b"<!DOCTYPE html><html></html>", "not an image"),
    "json": (b'{"a": 1}', "not an image"),
    "zeros": (bytes(5000), "not an image"),
    "pdf": (b"%PDF-1.7\n%stuff", "not an image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
    "pickle": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", "not an image"),
    "zip": (b"PK\x03\x04" + bytes(60), "not an image"),
    "magic only": (b"\xff\xd8\xff", "not an image"),
    "floats": (encoded(np.zeros((4, 4), np.float32), "TIFF"), "mode F"),
    "32 bit": (encoded(np.zeros((4, 4), np.int32), "TIFF"), "mode I"),
    "huge": (_png_of(60_000, 60_000), "too large"),
    "no pixels": (_png_of(0, 0), "damaged|not an image"),
}
DAMAGED = {
    "half a jpeg": JPEG[: len(JPEG) // 2],
    "a jpeg without its end": JPEG[:-200],
    "half a png": PNG[: len(PNG) // 2],
    "a png with a flipped byte": PNG[:2000] + bytes([PNG[2000] ^ 0xFF]) + PNG[2001:],
    "half a gif": encoded(PIXELS, "GIF")[:200],
    "half a bmp": encoded(PIXELS, "BMP")[:400],
    "half a tiff": encoded(PIXELS, "TIFF", compression="tiff_lzw")[:300],
}


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_image_says_so(kind: str) -> None:
    data, message = UNUSABLE[kind]
    for check in (decode, check_header):
        with pytest.raises(UnusableImage, match=message) as caught:
            check(data)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_behind_the_header_is_found_by_decoding(kind: str) -> None:
    with pytest.raises(UnusableImage, match=r"damaged|not an image"):
        decode(DAMAGED[kind])


@pytest.mark.parametrize("seed", range(150))
def test_random_damage_never_escapes_as_another_error(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = [JPEG, PNG, *LOSSLESS.values(), *LOSSY.values()]
    data = bytearray(kinds[seed % len(kinds)])
    for _ in range(int(rng.integers(1, 30))):
        data[int(rng.integers(len(data)))] = int(rng.integers(256))
    cut = data[: int(rng.integers(1, len(data) + 1))]
    try:
        result = decode(bytes(cut))
    except UnusableImage:
        return
    assert result.dtype == np.uint8
    assert result.ndim == 3
    assert result.shape[2] == 3
