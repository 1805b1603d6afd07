"""Resized images of a split, kept in memory where they all fit."""

from __future__ import annotations

import math
import threading
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from deploycnn.data.base import Split
from deploycnn.data.preprocessing import Preprocessing
from deploycnn.data.splits import ArraySplit

Pixels = npt.NDArray[np.uint8]

#: What all kept pixels of the process may take together, unless said otherwise.
CACHE_BYTES = 1 << 30


class _Store:
    """Room for all resized images of a split.

    Attributes:
        pixels: Shape (N, H, W, C).
        valid: Which of them were read, shape (N,).
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        # Pages of the empty array are given by the system when they are first written.
        self.pixels: Pixels = np.empty(shape, np.uint8)
        self.valid = np.zeros(shape[0], np.bool_)


#: Stores know nothing of their split, so that it is free to go; then its stores go too.
_kept: weakref.WeakKeyDictionary[Split, dict[tuple[Any, ...], _Store]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class PixelReader:
    """Reads resized uint8 images, shape (H, W, C); safe to use from several threads.

    Attributes:
        shape: Of one image.
        kept: All images, shape (N, H, W, C), each valid once it was read; ``None`` where they do not fit.
    """

    def __init__(self, split: Split, preprocessing: Preprocessing, store: _Store | None = None) -> None:
        """Read ``split``; with a store of its images, every one just once."""
        self.shape = (*preprocessing.size, preprocessing.channel_count)
        self.kept = store.pixels if store is not None else None
        self._split, self._preprocessing = split, preprocessing
        self._valid = store.valid if store is not None else np.zeros(0, np.bool_)

    def read(self, indices: npt.NDArray[np.int64]) -> Pixels:
        """The images at ``indices``, shape (N, H, W, C).

        Raises:
            DataError: an image cannot be decoded any more.
        """
        if self.kept is None:
            result = np.empty((len(indices), *self.shape), np.uint8)
            for position, index in enumerate(indices.tolist()):
                result[position] = self._decode(index)
            return result
        for index in indices[~self._valid[indices]].tolist():
            self.kept[index] = self._decode(index)
            # After the pixels: another thread may look at any moment. Two that decode the same image agree.
            self._valid[index] = True
        return self.kept[indices]

    def _decode(self, index: int) -> Pixels:
        return self._preprocessing.resize_image(self._split.decode(index))


class _ArrayReader(PixelReader):
    """Reads images that are in memory at the right size already."""

    def __init__(self, images: Pixels) -> None:
        self.shape = images.shape[1:]
        self.kept = images

    def read(self, indices: npt.NDArray[np.int64]) -> Pixels:
        return self.kept[indices] if self.kept is not None else np.empty((0, *self.shape), np.uint8)


def reader(split: Split, preprocessing: Preprocessing, cache_bytes: int = CACHE_BYTES) -> PixelReader:
    """The reader of ``split`` at the size and channels of ``preprocessing``.

    Args:
        split: Images.
        preprocessing: Its scale does not matter here.
        cache_bytes: Pixels are kept if those of this split, with all that are kept already, fit in.
    """
    if isinstance(split, ArraySplit) and preprocessing.keeps(split.images.shape[1:]):
        return _ArrayReader(split.images)
    key = preprocessing.resize_key
    shape = (len(split), preprocessing.height, preprocessing.width, preprocessing.channel_count)
    with _lock:
        try:
            known = _kept.get(split, {})
        except TypeError:  # a foreign split that can be neither hashed nor weakly referenced
            return PixelReader(split, preprocessing)
        if key not in known:
            held = sum(store.pixels.nbytes for stores in _kept.values() for store in stores.values())
            if held + math.prod(shape) > cache_bytes:
                return PixelReader(split, preprocessing)
            known[key] = _Store(shape)
            _kept[split] = known
        return PixelReader(split, preprocessing, known[key])
