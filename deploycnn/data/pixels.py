"""Resized images of a split, kept in memory where they all fit."""

from __future__ import annotations

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

_kept: weakref.WeakKeyDictionary[Split, dict[tuple[Any, ...], PixelReader]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class PixelReader:
    """Reads resized uint8 images, shape (H, W, C); safe to use from several threads.

    Attributes:
        shape: Of one image.
        kept: All images, shape (N, H, W, C), each valid once it was read; ``None`` where they do not fit.
    """

    def __init__(self, split: Split, preprocessing: Preprocessing, *, keep: bool) -> None:
        """Read ``split``; with ``keep``, every image just once."""
        self.shape = (*preprocessing.size, preprocessing.channel_count)
        # A weak reference: the reader is kept as a value under its split, which must stay free to go.
        self._split = weakref.ref(split) if keep else (lambda: split)
        self._preprocessing = preprocessing
        # Pages of the empty array are given by the system when they are first written.
        self.kept: Pixels | None = np.empty((len(split), *self.shape), np.uint8) if keep else None
        self._valid = np.zeros(len(split) if keep else 0, np.bool_)

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
        split = self._split()
        if split is None:
            raise ReferenceError("the split was discarded while it was read")
        return self._preprocessing.resize_image(split.decode(index))


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
    need = len(split) * preprocessing.height * preprocessing.width * preprocessing.channel_count
    with _lock:
        try:
            known = _kept.get(split, {})
        except TypeError:  # a foreign split that can be neither hashed nor weakly referenced
            return PixelReader(split, preprocessing, keep=False)
        if key not in known:
            held = sum(
                item.kept.nbytes
                for group in _kept.values()
                for item in group.values()
                if item.kept is not None
            )
            if held + need > cache_bytes:
                return PixelReader(split, preprocessing, keep=False)
            known[key] = PixelReader(split, preprocessing, keep=True)
            _kept[split] = known
        return known[key]
