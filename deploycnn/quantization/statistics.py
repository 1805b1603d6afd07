"""What calibration remembers of a value: a summary of fixed size, however many images are seen.

A value is summed up by its exact minimum and maximum, the moving averages of each image's, and a histogram over
[-w, w], where w is a power of two. When a larger magnitude arrives, w doubles and neighbouring bins merge: bin
edges then coincide, so that neither the order nor the grouping of the images changes the histogram.

The histogram of a large value holds a regular sample of each image's elements. Its step shares no factor with the
number of elements, so it walks over all channels and positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

#: Bins on each side of zero. The largest magnitude lies in the outer half, so at least half of a side is in
#: use: eight bins for each of 256 levels.
BINS = 4096

#: Elements of one image that enter the histogram, about.
SAMPLES_PER_IMAGE = 4096

#: Weight of a new image in the moving averages: they look back about a hundred images.
MOMENTUM = 0.01

Floats = npt.NDArray[np.float32]


def extremes(content: Floats) -> tuple[Floats, Floats]:
    """Smallest and largest element of each image of ``content`` (N, ...); NaN where the image holds one."""
    if content.size == 0:
        return np.zeros(0, np.float32), np.zeros(0, np.float32)
    flat = _by_image(content)
    return flat.min(axis=1), flat.max(axis=1)


def _by_image(content: Floats) -> Floats:
    """Shape (N, elements); a scalar is one image."""
    return content.reshape(len(content) if content.ndim else 1, -1)


@cache
def sampling_step(size: int) -> int:
    """Every how manieth of an image's ``size`` elements is counted."""
    step = max(1, size // SAMPLES_PER_IMAGE)
    while math.gcd(step, size) != 1:
        step += 1
    return step


class Statistics:
    """Running summary of one value.

    Attributes:
        low: Smallest element, or 0.
        high: Largest element, or 0.
        average_low: Moving average of each image's smallest element; 0 before the first image.
        average_high: Likewise of the largest.
        images: Images seen.
        zeros: Sampled elements that are exactly zero.
        exponent: The histogram covers [-2**exponent, 2**exponent]; ``None`` before the first non-zero element.
        counts: Of sampled non-zero elements, shape (2 * BINS,); bin i covers
            [(i - BINS), (i - BINS + 1)) * 2**exponent / BINS. ``None`` without a histogram.
    """

    def __init__(self, *, histogram: bool = True) -> None:
        self.low = 0.0
        self.high = 0.0
        self.average_low = 0.0
        self.average_high = 0.0
        self.images = 0
        self.zeros = 0
        self.exponent: int | None = None
        self.counts = np.zeros(2 * BINS, dtype=np.int64) if histogram else None

    @property
    def bin_width(self) -> float:
        """Width of a bin in the value's own unit."""
        return 2.0 ** (self.exponent or 0) / BINS

    def update(self, content: Floats, ends: tuple[Floats, Floats] | None = None) -> None:
        """Take in more images.

        Args:
            content: Finite elements, shape (N, ...).
            ends: ``extremes(content)``, where the caller has them.
        """
        if content.size == 0:
            return
        lows, highs = extremes(content) if ends is None else ends
        # Eight bits must represent zero exactly, so every range includes it.
        self.low = min(self.low, float(lows.min()))
        self.high = max(self.high, float(highs.max()))
        self._average(np.minimum(lows, 0), np.maximum(highs, 0))
        if self.counts is None:
            return
        peak = max(-float(lows.min()), float(highs.max()))
        if peak > 0:
            self._widen(peak)
        flat = _by_image(content)
        self._count(np.ascontiguousarray(flat[:, :: sampling_step(flat.shape[1])]))

    def _average(self, lows: Floats, highs: Floats) -> None:
        for low, high in zip(lows.tolist(), highs.tolist(), strict=True):
            # A true mean until it looks back far enough, so that the first image weighs no more than others.
            weight = max(MOMENTUM, 1.0 / (self.images + 1))
            self.average_low += weight * (low - self.average_low)
            self.average_high += weight * (high - self.average_high)
            self.images += 1

    def _widen(self, peak: float) -> None:
        _, needed = np.frexp(peak)  # peak < 2**needed
        self.widen_to(int(needed))

    def widen_to(self, exponent: int) -> None:
        """Let the histogram reach 2**exponent at least; bins merge in pairs."""
        assert self.counts is not None  # noqa: S101 - only called with a histogram
        if self.exponent is None:
            self.exponent = exponent
        while self.exponent < exponent and self.counts.any():
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts[:] = 0
            self.counts[BINS // 2 : BINS // 2 + BINS] = merged
            self.exponent += 1
        self.exponent = max(self.exponent, exponent)

    def _count(self, values: Floats) -> None:
        assert self.counts is not None  # noqa: S101 - only called with a histogram
        # Scaling by a power of two is exact, except that a product may underflow to zero, which floors right.
        # Its factor may lie outside float32 for tiny values.
        kind = np.float32 if -100 < (self.exponent or 0) < 100 else np.float64
        places = values * kind(1.0 / self.bin_width)
        np.floor(places, out=places)
        bins = places.reshape(-1).astype(np.intp)
        bins += BINS
        counted = np.bincount(bins, minlength=2 * BINS)
        zeros = values.size - int(np.count_nonzero(values))
        counted[BINS] -= zeros
        self.zeros += zeros
        self.counts += counted

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Everything that is remembered, for storage."""
        ends = [self.low, self.high, self.average_low, self.average_high]
        whole = [self.images, self.zeros, -(2**31) if self.exponent is None else self.exponent]
        counts = np.zeros(0, np.int64) if self.counts is None else self.counts
        return {"ends": np.array(ends), "whole": np.array(whole, np.int64), "counts": counts}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Statistics:
        """The inverse of :meth:`arrays`."""
        made = cls(histogram=arrays["counts"].size > 0)
        made.low, made.high, made.average_low, made.average_high = arrays["ends"].tolist()
        made.images, made.zeros, exponent = arrays["whole"].tolist()
        made.exponent = None if exponent == -(2**31) else exponent
        if made.counts is not None:
            made.counts[:] = arrays["counts"]
        return made


def merged(parts: Iterable[Statistics]) -> Statistics:
    """The summary of several values that share one range: as if their elements were one value's."""
    parts = list(parts)
    whole = Statistics(histogram=all(part.counts is not None for part in parts))
    whole.low, whole.high = min(part.low for part in parts), max(part.high for part in parts)
    whole.average_low = min(part.average_low for part in parts)
    whole.average_high = max(part.average_high for part in parts)
    whole.images = max(part.images for part in parts)
    whole.zeros = sum(part.zeros for part in parts)
    widest = max((part.exponent for part in parts if part.exponent is not None), default=None)
    if whole.counts is None or widest is None:
        return whole
    for part in parts:
        if part.counts is None or part.exponent is None:
            continue
        copy = Statistics.from_arrays(part.arrays())
        copy.widen_to(widest)
        assert copy.counts is not None  # noqa: S101 - copied from a histogram
        whole.counts += copy.counts
    whole.exponent = widest
    return whole


def save(path: Path, statistics: Mapping[str, Statistics]) -> None:
    """Write summaries to one ``.npz`` file, to choose other ranges later without the images."""
    content: dict[str, npt.NDArray[np.generic]] = {"names": np.array(list(statistics), dtype=np.str_)}
    for index, summary in enumerate(statistics.values()):
        content |= {f"{index}.{key}": array for key, array in summary.arrays().items()}
    with path.open("wb") as file:
        np.savez_compressed(file, **content)  # type: ignore[arg-type]


def load(path: Path) -> dict[str, Statistics]:
    """Read what :func:`save` wrote."""
    with np.load(path, allow_pickle=False) as content:
        return {
            str(name): Statistics.from_arrays(
                {key: content[f"{index}.{key}"] for key in ("ends", "whole", "counts")}
            )
            for index, name in enumerate(content["names"])
        }
