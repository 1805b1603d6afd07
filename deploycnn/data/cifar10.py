"""CIFAR-10 (Krizhevsky 2009) as torchvision downloads it: 50,000 + 10,000 images of 32x32."""

from __future__ import annotations

import contextlib
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Interval

from deploycnn.data.base import Dataset, DataSource
from deploycnn.data.preprocessing import Preprocessing
from deploycnn.errors import DataError, one_line

_ELSEWHERE = (
    "to use a copy as an image folder, or a zip of one, set data.imagefolder.root in the recipe "
    "or give --data PATH"
)


@dataclass(frozen=True, kw_only=True)
class Cifar10(DataSource):
    """CIFAR-10, downloaded once (170 MB); its 10,000 test images are the test split."""

    default_preprocessing: ClassVar[Preprocessing] = Preprocessing(size=(32, 32))

    # Not a Path: the folder need not exist yet.
    root: Annotated[
        str | None, "Folder that holds cifar-10-batches-py, or receives it; null: in the user's cache."
    ] = None
    download: Annotated[bool, "Download what is missing."] = True
    val_ratio: Annotated[float, Interval(gt=0, lt=1), "Share of each class of train that is val."] = 0.1
    split_seed: Annotated[int, Ge(0), "Of the split; the same for all runs that are compared."] = 0

    def open(self) -> Dataset:
        """Download if need be, verify, and split.

        Raises:
            DataError: it is not there and cannot be downloaded, or is damaged.
        """
        import numpy as np

        from deploycnn.data.splits import ArraySplit, array_fingerprint, checked, stratified

        everything, test = (self._load(train=train) for train in (True, False))
        classes = tuple(everything.classes)
        labels = np.asarray(everything.targets, np.int64)
        rest, val = stratified(labels, self.val_ratio, self.split_seed, classes, "val")
        names = [f"train {index:05d}" for index in range(len(labels))]
        source = ArraySplit(everything.data, labels, names)
        test_names = [f"test {index:05d}" for index in range(len(test.data))]
        splits = [
            source.take(rest),
            source.take(val),
            ArraySplit(test.data, np.asarray(test.targets, np.int64), test_names),
        ]
        return checked(
            Dataset(
                name="cifar10",
                classes=classes,
                train=splits[0],
                val=splits[1],
                test=splits[2],
                fingerprint=array_fingerprint(splits, classes),
            )
        )

    def _load(self, *, train: bool) -> Any:
        from torchvision.datasets import CIFAR10

        from deploycnn import cache

        root = (
            Path(self.root).expanduser().absolute() if self.root is not None else cache.folder() / "cifar10"
        )
        try:
            # Its messages must not end up in the output that programs read.
            with contextlib.redirect_stdout(sys.stderr):
                return CIFAR10(root, train=train, download=self.download)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            state = "is not complete" if self.download else "is missing or damaged, and download is off"
            raise DataError(f"{root}: CIFAR-10 {state} ({one_line(error, 160)}); {_ELSEWHERE}") from error
        except OSError as error:  # also URLError
            raise DataError(
                f"{root}: CIFAR-10 cannot be downloaded ({one_line(error, 160)}); {_ELSEWHERE}"
            ) from error
