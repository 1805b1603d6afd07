"""Splits in memory, stratified splitting, and what every dataset is held to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from deploycnn.data.base import Dataset, Split
from deploycnn.errors import DataError

Indices = npt.NDArray[np.int64]


class ArraySplit:
    """Images of one size in memory.

    Attributes:
        images: uint8 RGB, shape (N, H, W, 3).
        labels: Class indices, int64, shape (N,).
        names: Of the images.
    """

    def __init__(
        self, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], names: Sequence[str]
    ) -> None:
        """Hold the arrays as they are, without a copy."""
        self.images = images
        self.labels = labels
        self.names = tuple(names)

    def __len__(self) -> int:
        return len(self.images)

    def decode(self, index: int) -> npt.NDArray[np.uint8]:
        """Image ``index``, shape (H, W, 3); a view."""
        image: npt.NDArray[np.uint8] = self.images[index]
        return image

    def take(self, indices: Indices) -> ArraySplit:
        """A copy of the images at ``indices``."""
        return ArraySplit(
            self.images[indices], self.labels[indices], [self.names[i] for i in indices.tolist()]
        )


def stratified(
    labels: npt.NDArray[np.int64], ratio: float, seed: int, classes: Sequence[str], part: str
) -> tuple[Indices, Indices]:
    """Cut a random part of every class out.

    Args:
        labels: Class indices, shape (N,).
        ratio: Share of each class that is cut out; of every class at least one image is, and one stays.
        seed: Of the random choice.
        classes: Names, for the error.
        part: What the part is called, for the error.

    Returns:
        Indices of the rest and of the part, both ascending.

    Raises:
        DataError: a class has fewer than two images.
    """
    chosen = []
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise DataError(
                f'class "{classes[label]}" has too few images to set some aside for {part}; '
                f"add images, or a {part} folder"
            )
        count = min(len(members) - 1, max(1, round(ratio * len(members))))
        chosen.append(np.random.default_rng([seed, label]).permutation(members)[:count])
    return _rest_and_part(len(labels), chosen)


def last_of_each(
    labels: npt.NDArray[np.int64], amount: float, classes: Sequence[str], part: str
) -> tuple[Indices, Indices]:
    """Cut the last images of every class out; otherwise like :func:`stratified`.

    Args:
        labels: Class indices, shape (N,).
        amount: How many of each class; below 1, which share of it.
        classes: Names, for the error.
        part: What the part is called, for the error.

    Raises:
        DataError: nothing would stay of a class.
    """
    chosen = []
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        count = int(amount) if amount >= 1 else max(1, round(amount * len(members)))
        if len(members) <= count:
            raise DataError(
                f'class "{classes[label]}" has {len(members)} images, so its last {count} cannot be set '
                f"aside for {part}; lower data.imagefolder.val_per_class, or add images"
            )
        chosen.append(members[-count:])
    return _rest_and_part(len(labels), chosen)


def _rest_and_part(total: int, chosen: Sequence[Indices]) -> tuple[Indices, Indices]:
    part = np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)
    mask = np.ones(total, np.bool_)
    mask[part] = False
    return np.flatnonzero(mask), part


def checked(dataset: Dataset) -> Dataset:
    """``dataset`` itself, held to what everything else relies on.

    Raises:
        DataError: fewer than two classes, an empty split, a class without training images, a label outside
            the range of the classes, or labels and names that do not match the images in number.
    """
    where, classes = dataset.name, dataset.classes
    if len(classes) < 2:
        listing = f' ("{classes[0]}")' if classes else ""
        raise DataError(f"{where}: needs at least two classes to tell apart, has {len(classes)}{listing}")
    for name, split in (("train", dataset.train), ("val", dataset.val), ("test", dataset.test)):
        _check_split(where, name, split, classes)
    counts = np.bincount(dataset.train.labels, minlength=len(classes))
    if counts.min() == 0:
        raise DataError(f'{where}: class "{classes[int(counts.argmin())]}" has no training images')
    return dataset


def _check_split(where: str, name: str, split: Split, classes: Sequence[str]) -> None:
    if len(split) == 0:
        raise DataError(f"{where}: the {name} split has no images")
    labels = np.asarray(split.labels)
    if labels.shape != (len(split),) or len(split.names) != len(split):
        raise DataError(
            f"{where}: the {name} split has {len(split)} images, but labels of shape {labels.shape} and "
            f"{len(split.names)} names"
        )
    if labels.dtype.kind not in "iu":
        raise DataError(f"{where}: the {name} split's labels should be whole numbers, got {labels.dtype}")
    outside = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(outside):
        first = int(outside[0])
        raise DataError(
            f"{where}: {len(outside)} labels of the {name} split are outside 0..{len(classes) - 1}; "
            f'the first is {int(labels[first])}, of "{split.names[first]}"'
        )


def array_fingerprint(splits: Sequence[ArraySplit], classes: Sequence[str]) -> str:
    """sha256 hex over classes, labels and pixels."""
    digest = hashlib.sha256("\0".join(classes).encode())
    for split in splits:
        digest.update(f"\n{split.images.shape}".encode())
        digest.update(np.ascontiguousarray(split.labels, np.int64).data)
        digest.update(np.ascontiguousarray(split.images).data)
    return digest.hexdigest()
