"""Images, models and contexts small enough to train many times."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from deploycnn.core import Context
from deploycnn.data.augment import Augmentation
from deploycnn.data.base import Data, Dataset
from deploycnn.data.preprocessing import Preprocessing
from deploycnn.training.settings import TrainingSettings

CLASSES = ("bar", "dot", "frame")


class Pictures:
    """Noisy drawings of three kinds, shape (side, side, 3)."""

    def __init__(self, count: int, seed: int, side: int = 8) -> None:
        rng = np.random.default_rng(seed)
        self._labels = np.arange(count, dtype=np.int64) % len(CLASSES)
        self._images = rng.integers(0, 100, (count, side, side, 3), dtype=np.uint8)
        quarter = side // 4
        for image, label in zip(self._images, self._labels, strict=True):
            if label == 0:
                image[:, quarter : 2 * quarter] += 120
            elif label == 1:
                image[2 * quarter :, 2 * quarter :] += 120
            else:
                image[[0, -1]] += 120

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(str(index) for index in range(len(self)))

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return self._labels

    def __len__(self) -> int:
        return len(self._labels)

    def decode(self, index: int) -> npt.NDArray[np.uint8]:
        return self._images[index]


class Forbidden:
    """A split that nobody may touch."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"the test split was touched: {name}")

    def __len__(self) -> int:
        raise AssertionError("the test split was counted")


def make_data(train: int = 49, val: int = 30, side: int = 8) -> Data:
    """49 images make batches of 16 with a single one left over."""
    dataset = Dataset(
        name="pictures",
        classes=CLASSES,
        train=Pictures(train, 0, side),
        val=Pictures(val, 1, side),
        test=Forbidden(),  # type: ignore[arg-type]
        fingerprint=f"pictures-{train}-{val}-{side}",
    )
    return Data(dataset=dataset, preprocessing=Preprocessing(size=(side, side), scale="unit"))


def make_model(seed: int = 0, classes: int = len(CLASSES)) -> nn.Module:
    """Convolution, batch norm, dropout, linear: everything that resuming could get wrong."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(128, classes),
        ).eval()


def make_context(
    folder: Path, data: Data | None = None, *, progress: Callable[..., None] | None = None, **options: Any
) -> Context:
    """A context over ``folder``; the scratch folder survives from call to call."""
    output, scratch = folder / "output", folder / "scratch"
    output.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(exist_ok=True)
    if progress is not None:
        options["progress"] = progress
    return Context(
        output=output, scratch=scratch, data=data, log=logging.getLogger("tests.training"), **options
    )


def settings(**options: Any) -> TrainingSettings:
    defaults: dict[str, Any] = {"epochs": 4, "batch_size": 16, "augment": Augmentation(crop_padding=1)}
    return TrainingSettings(**{**defaults, **options})


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
