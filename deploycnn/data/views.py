"""Random views of training images, reproducible image by image.

Every random number is a hash of (seed, epoch, image index, what it is for). A view therefore depends on
neither batch, order, threads nor interruption, and a teacher and its student see the same one.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from deploycnn.data.augment import Augmentation

Pixels = npt.NDArray[np.uint8]
Reals = npt.NDArray[np.float64]

#: Random numbers per image, by what they are for. Append only: positions fix the views of existing recipes.
_DRAWS = (
    *("flip", "shift_y", "shift_x"),
    *("area", "aspect", "box_y", "box_x", "angle"),
    *("brightness", "contrast", "saturation"),
    *("erase", "erase_area", "erase_aspect", "erase_y", "erase_x"),
)
_GOLDEN = 0x9E3779B97F4A7C15
#: Luma of RGB, ITU-R BT.601, as Pillow has it.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


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
        indices: Which image of the split each one is, shape (N,); with ``seed`` and ``epoch`` it determines
            the view.
        seed: Of the run.
        epoch: Of the training.
        fill: Colour of erased boxes, one value per channel.

    Returns:
        uint8, shape (N, H, W, C).
    """
    if not augmentation.active:
        return images
    random = uniforms(seed, epoch, indices)
    if augmentation.resized_crop < 1 or augmentation.rotation > 0:
        images = _warp(images, augmentation, random)
    if augmentation.crop_padding or augmentation.horizontal_flip:
        images = _shift_and_flip(images, augmentation, random)
    if augmentation.brightness or augmentation.contrast or augmentation.saturation:
        images = _jitter(images, augmentation, random)
    if augmentation.erasing:
        images = _erase(images.copy(), augmentation, random, fill)
    return images


def uniforms(seed: int, epoch: int, indices: npt.NDArray[np.int64]) -> dict[str, Reals]:
    """Numbers in [0, 1), shape (N,), for each of ``_DRAWS``: a counter-based generator.

    The counters go through the finalizer of SplitMix64 (Steele, Lea, Flood 2014) one after the other.
    """
    state = _mix(np.array([seed], np.uint64))
    state = _mix(state ^ np.array([epoch + 1], np.uint64))
    images_N = _mix(state ^ indices.astype(np.uint64))
    steps_D = np.arange(1, len(_DRAWS) + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    bits_DN = _mix(images_N[None] + steps_D[:, None])
    values_DN = (bits_DN >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return dict(zip(_DRAWS, values_DN, strict=True))


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    value = value + np.uint64(_GOLDEN)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _shift_and_flip(images: Pixels, augmentation: Augmentation, random: dict[str, Reals]) -> Pixels:
    """Cut each image out of its padded self, a position and a direction each its own."""
    _, height, width, _ = images.shape
    padding = augmentation.crop_padding
    tops = (random["shift_y"] * (2 * padding + 1)).astype(np.int64)
    lefts = (random["shift_x"] * (2 * padding + 1)).astype(np.int64)
    flips = (random["flip"] < 0.5) & augmentation.horizontal_flip
    padded = _pad(images, padding, augmentation)
    result = np.empty_like(images)
    for index, (top, left, flip) in enumerate(
        zip(tops.tolist(), lefts.tolist(), flips.tolist(), strict=True)
    ):
        view = padded[index, top : top + height, left : left + width]
        result[index] = view[:, ::-1] if flip else view
    return result


def _pad(images: Pixels, padding: int, augmentation: Augmentation) -> Pixels:
    if padding == 0:
        return images
    around = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    if augmentation.padding == "zero":
        return np.pad(images, around)
    return np.pad(images, around, mode="reflect")


def _warp(images: Pixels, augmentation: Augmentation, random: dict[str, Reals]) -> Pixels:
    """Cut out and enlarge a random box, rotated; one bilinear resampling for both."""
    _, height, width, channels = images.shape
    margin = math.ceil((math.hypot(height, width) - min(height, width)) / 2) if augmentation.rotation else 0
    if augmentation.padding == "zero":
        margin = 0  # Pillow shows zeros there anyway
    padded = _pad(images, margin, augmentation)
    result = np.empty_like(images)
    matrices = _box_matrices(height, width, margin, augmentation, random)
    for index, matrix in enumerate(matrices.tolist()):
        pixels = padded[index] if channels == 3 else padded[index, :, :, 0]
        picture = Image.fromarray(pixels).transform(
            (width, height), Image.Transform.AFFINE, tuple(matrix), Image.Resampling.BILINEAR
        )
        result[index] = np.asarray(picture).reshape(height, width, channels)
    return result


def _box_matrices(
    height: int, width: int, margin: int, augmentation: Augmentation, random: dict[str, Reals]
) -> Reals:
    """Pillow's (a, b, c, d, e, f) of each image, shape (N, 6): output (x, y) -> input (ax+by+c, dx+ey+f)."""
    smallest = augmentation.resized_crop
    area = smallest + (1 - smallest) * random["area"]
    # Around the whole image no other aspect than its own fits, so the range opens as the box gets smaller.
    spread = np.minimum(math.log(4 / 3), -np.log(area)) if smallest < 1 else np.zeros_like(area)
    aspect = np.exp(spread * (2 * random["aspect"] - 1))
    box_h = height * np.minimum(1, np.sqrt(area / aspect))
    box_w = width * np.minimum(1, np.sqrt(area * aspect))
    center_y = margin + box_h / 2 + (height - box_h) * random["box_y"]
    center_x = margin + box_w / 2 + (width - box_w) * random["box_x"]
    angle = np.deg2rad(augmentation.rotation) * (2 * random["angle"] - 1)
    a, b = np.cos(angle) * box_w / width, -np.sin(angle) * box_h / height
    d, e = np.sin(angle) * box_w / width, np.cos(angle) * box_h / height
    c = center_x - a * width / 2 - b * height / 2
    f = center_y - d * width / 2 - e * height / 2
    return np.stack([a, b, c, d, e, f], axis=1)


def _jitter(images: Pixels, augmentation: Augmentation, random: dict[str, Reals]) -> Pixels:
    """Brightness, then contrast, then saturation."""

    def factors(name: str, strength: float) -> npt.NDArray[np.float32]:
        return (1 + strength * (2 * random[name] - 1)).astype(np.float32)[:, None, None, None]

    color = images.shape[3] == 3
    pixels = images.astype(np.float32)
    if augmentation.brightness:
        pixels *= factors("brightness", augmentation.brightness)
        np.minimum(pixels, 255, out=pixels)
    if augmentation.contrast:
        channel_means = pixels.mean(axis=(1, 2))
        mean = (channel_means @ _LUMA if color else channel_means[:, 0])[:, None, None, None]
        pixels = (pixels - mean) * factors("contrast", augmentation.contrast) + mean
        np.clip(pixels, 0, 255, out=pixels)
    if augmentation.saturation and color:
        luma = (pixels @ _LUMA)[..., None]
        pixels = (pixels - luma) * factors("saturation", augmentation.saturation) + luma
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)


def _erase(
    images: Pixels, augmentation: Augmentation, random: dict[str, Reals], fill: tuple[int, ...]
) -> Pixels:
    """Random erasing (Zhong et al. 2017) with one colour; in place."""
    _, height, width, _ = images.shape
    smallest = min(0.02, augmentation.erasing_area)
    area = (smallest + (augmentation.erasing_area - smallest) * random["erase_area"]) * height * width
    aspect = np.exp(math.log(3.3) * (2 * random["erase_aspect"] - 1))
    box_h = np.clip(np.rint(np.sqrt(area * aspect)), 1, height).astype(np.int64)
    box_w = np.clip(np.rint(np.sqrt(area / aspect)), 1, width).astype(np.int64)
    tops = (random["erase_y"] * (height - box_h + 1)).astype(np.int64)
    lefts = (random["erase_x"] * (width - box_w + 1)).astype(np.int64)
    for index in np.flatnonzero(random["erase"] < augmentation.erasing):
        top, left = tops[index], lefts[index]
        images[index, top : top + box_h[index], left : left + box_w[index]] = fill
    return images
