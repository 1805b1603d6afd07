"""Accuracy of a session on a split, and of two sessions on the same images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from deploycnn.core import Json, ProgressFn, no_progress
from deploycnn.errors import ArtifactError
from deploycnn.profiling.proportions import (
    CONFIDENCE,
    mcnemar_p,
    paired_difference_interval,
    wilson_interval,
)

if TYPE_CHECKING:
    from deploycnn.data.base import Data, Split
    from deploycnn.runtimes.base import Session

SCHEMA_VERSION = 1

#: The prediction for an image whose outputs are not finite: no class, and so wrong.
NO_CLASS = -1

SplitName = Literal["train", "val", "test"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predictions:
    """What a session said to every image of a split.

    Attributes:
        split: Its name.
        images: Hash of the images' names and labels; only predictions with the same one are paired.
        predicted: int64, shape (N,): class with the greatest output; ``NO_CLASS``: outputs were not finite.
        labels: int64, shape (N,).
    """

    split: str
    images: str
    predicted: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Shape (N,)."""
        return np.equal(self.predicted, self.labels)

    @property
    def top1(self) -> float:
        """Share of images whose class was predicted, in [0, 1]."""
        return float(self.correct.mean())

    @property
    def not_finite(self) -> int:
        """Images whose outputs held NaN or infinity."""
        return int((self.predicted == NO_CLASS).sum())

    def top1_interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Wilson's interval of ``top1``: what further images of the same kind would give."""
        return wilson_interval(int(self.correct.sum()), len(self.labels), confidence)

    def to_json(self) -> Json:
        """As plain values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "split": self.split,
            "images": self.images,
            "predicted": self.predicted.tolist(),
            "labels": self.labels.tolist(),
        }

    @classmethod
    def from_json(cls, value: Json, where: str = "predictions") -> Predictions:
        """Read what ``to_json`` gave.

        Raises:
            ArtifactError: another schema version or damaged.
        """
        if not isinstance(value, Mapping) or value.get("schema_version") != SCHEMA_VERSION:
            found = value.get("schema_version") if isinstance(value, Mapping) else type(value).__name__
            raise ArtifactError(
                f"{where}: schema_version is {found!r}, expected {SCHEMA_VERSION}; measure again"
            )
        try:
            predicted = np.array(value["predicted"], dtype=np.int64)
            labels = np.array(value["labels"], dtype=np.int64)
            result = cls(
                split=str(value["split"]), images=str(value["images"]), predicted=predicted, labels=labels
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ArtifactError(
                f"{where}: damaged ({type(error).__name__}: {error}); measure again"
            ) from error
        if predicted.ndim != 1 or predicted.shape != labels.shape or not len(labels):
            raise ArtifactError(
                f"{where}: {predicted.shape} predictions for {labels.shape} labels; measure again"
            )
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Baseline top-1 minus another model's, on the same images: positive is worse.

    Attributes:
        drop: The difference.
        interval: Tango's, at the confidence asked for.
        mcnemar_p: Exact, two-sided.
        right_to_wrong: Indices of the images that the baseline had right and the other has wrong.
        wrong_to_right: The converse.
        agreement: Share of images of which both predict the same class, right or wrong.
        agreement_interval: Wilson's.
    """

    drop: float
    interval: tuple[float, float]
    mcnemar_p: float
    right_to_wrong: tuple[int, ...]
    wrong_to_right: tuple[int, ...]
    agreement: float
    agreement_interval: tuple[float, float]

    def names(self, split: Split) -> tuple[list[str], list[str]]:
        """Names of the images of ``right_to_wrong`` and ``wrong_to_right``."""
        names = split.names
        return [names[index] for index in self.right_to_wrong], [
            names[index] for index in self.wrong_to_right
        ]


def evaluate(
    session: Session,
    data: Data,
    split: SplitName = "test",
    batch_size: int = 64,
    *,
    threads: int | None = None,
    progress: ProgressFn = no_progress,
) -> Predictions:
    """Predict every image of a split, streaming.

    The last batch is filled up by repeating its last image, as some sessions take one batch size only.

    Args:
        session: Open for ``batch_size``; its first output holds scores, shape (N, classes).
        data: Images and the preprocessing that the model was made for.
        split: "val" to choose, "test" to prove.
        batch_size: Images in a batch.
        threads: That decode; by default the loader's choice.
        progress: Called after each batch.

    Raises:
        ArtifactError: the outputs are no class scores for these classes.
        DataError: an image cannot be decoded.
    """
    from deploycnn.data.loader import batches

    images = getattr(data.dataset, split)
    classes = len(data.dataset.classes)
    predicted = np.full(len(images), NO_CLASS, dtype=np.int64)
    done = 0
    for batch in batches(images, data.preprocessing, batch_size, threads=threads):
        scores = session.run(_filled(batch.images, batch_size))[0]
        if scores.shape != (batch_size, classes):
            raise ArtifactError(
                f"the first output is {' x '.join(map(str, scores.shape))}, expected {batch_size} x "
                f"{classes} (images x classes); is this a classifier of these data?"
            )
        scores = scores[: len(batch.indices)]
        best = scores.argmax(axis=1)
        predicted[batch.indices] = np.where(np.isfinite(scores).all(axis=1), best, NO_CLASS)
        done += len(batch.indices)
        progress(done, len(images), f"testing on {split}")
    return Predictions(
        split=split,
        images=_hash(images.names, images.labels),
        predicted=predicted,
        labels=np.asarray(images.labels, dtype=np.int64),
    )


def _filled(images_NCHW: npt.NDArray[np.float32], batch_size: int) -> npt.NDArray[np.float32]:
    missing = batch_size - len(images_NCHW)
    if missing == 0:
        return images_NCHW
    return np.concatenate([images_NCHW, np.repeat(images_NCHW[-1:], missing, axis=0)])


def _hash(names: Sequence[str], labels: npt.NDArray[np.int64]) -> str:
    digest = hashlib.sha256("\0".join(names).encode())
    digest.update(np.ascontiguousarray(labels, dtype="<i8").tobytes())
    return digest.hexdigest()[:16]


def compare(baseline: Predictions, other: Predictions, *, confidence: float = CONFIDENCE) -> Drop:
    """The drop of ``other`` against ``baseline``, paired by image.

    Raises:
        ValueError: they were not made on the same images.
    """
    if baseline.images != other.images or len(baseline.labels) != len(other.labels):
        raise ValueError(
            f"predictions on different images ({baseline.split}, {other.split}) cannot be paired"
        )
    lost = np.flatnonzero(baseline.correct & ~other.correct)
    gained = np.flatnonzero(~baseline.correct & other.correct)
    count = len(baseline.labels)
    same = int(np.equal(baseline.predicted, other.predicted).sum())
    return Drop(
        drop=(len(lost) - len(gained)) / count,
        interval=paired_difference_interval(len(lost), len(gained), count, confidence),
        mcnemar_p=mcnemar_p(len(lost), len(gained)),
        right_to_wrong=tuple(lost.tolist()),
        wrong_to_right=tuple(gained.tolist()),
        agreement=same / count,
        agreement_interval=wilson_interval(same, count, confidence),
    )
