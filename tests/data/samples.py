"""Images and datasets made on the spot."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from deploycnn.data.base import Dataset
from deploycnn.data.splits import ArraySplit

PARTS = ("train", "val", "test")


def picture(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, format_: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format_, **options)
    return buffer.getvalue()


def write_tree(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_zip(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tree_files(
    *, splits: tuple[str, ...] = (), classes: tuple[str, ...] = ("cat", "dog"), count: int = 10
) -> dict[str, bytes]:
    files = {}
    for s, split in enumerate(splits or ("",)):
        for c, name in enumerate(classes):
            for index in range(count):
                place = f"{split}/{name}" if split else name
                files[f"{place}/{index:03d}.png"] = encoded(picture(s * 10_000 + c * 1000 + index))
    return files


def array_split(count: int, height: int = 8, width: int = 8, classes: int = 3, seed: int = 0) -> ArraySplit:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return ArraySplit(images, rng.integers(0, classes, count), [f"{index}" for index in range(count)])


class MixedSplit:
    """Images of different sizes, counted as they are decoded."""

    def __init__(self, count: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.sizes = [(int(rng.integers(1, 40)), int(rng.integers(1, 40))) for _ in range(count)]
        self.labels = rng.integers(0, 3, count)
        self.names = tuple(f"{index}" for index in range(count))
        self.decoded: list[int] = []

    def __len__(self) -> int:
        return len(self.sizes)

    def decode(self, index: int) -> np.ndarray:
        self.decoded.append(index)
        return picture(index, *self.sizes[index])


def dataset(
    train: ArraySplit, val: ArraySplit, test: ArraySplit, classes: tuple[str, ...] = ("a", "b", "c")
) -> Dataset:
    return Dataset(name="made", classes=classes, train=train, val=val, test=test, fingerprint="0")
