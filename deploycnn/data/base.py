"""Datasets: classes, splits of images decoded on demand, and the preprocessing that goes with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from deploycnn.data.preprocessing import Preprocessing

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Split(Protocol):
    """Labelled images, decoded one at a time so that a dataset may be larger than memory."""

    @property
    def names(self) -> tuple[str, ...]:
        """What a person calls each image: its path inside the dataset, or an index."""
        ...

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class indices, shape (N,)."""
        ...

    def __len__(self) -> int: ...

    def decode(self, index: int) -> npt.NDArray[np.uint8]:
        """Image ``index`` as uint8 RGB, shape (H, W, 3). Safe to call from several threads."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BadFile:
    """A file that is not a usable image, and why."""

    path: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """An opened dataset.

    Attributes:
        name: For people.
        classes: Names, in label order.
        train: The only split that statistics, calibration and gradients may see.
        val: Picks checkpoints and candidates.
        test: Proves; never picks.
        fingerprint: sha256 over names, labels and contents of all splits.
        skipped: Files that were left out because the recipe says ``bad_files: skip``.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    fingerprint: str
    skipped: tuple[BadFile, ...] = field(default=())


@dataclass(frozen=True, kw_only=True)
class DataSource(ABC):
    """Where images come from: ``data/<name>.py``; written ``data: {<name>: {...}}`` or ``data: <name>``."""

    #: Preprocessing used where the recipe declares none.
    default_preprocessing: ClassVar[Preprocessing]

    @abstractmethod
    def open(self) -> Dataset:
        """Find, check and split the images; decode nothing but what the check needs.

        Raises:
            DataError: missing, empty, one class only, corrupt (where refused), or a label outside the range.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """A dataset together with its resolved preprocessing (statistics filled in from the training split)."""

    dataset: Dataset
    preprocessing: Preprocessing

    @property
    def fingerprint(self) -> str:
        """Identity of images and preprocessing together, as it enters cache keys."""
        return f"{self.dataset.fingerprint}-{self.preprocessing.fingerprint}"
