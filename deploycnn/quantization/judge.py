"""How much a quantized graph differs from its float twin, on labelled images that choose between candidates.

Three figures, because one alone misleads: the drop of top-1 is what is paid, but on 5,000 images its noise (0.15
points) hides small harm; agreement of the predictions is finer; the signal-to-noise ratio of the outputs is finer
still, and ranks candidates whose top-1 is equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from deploycnn.core import Json
from deploycnn.errors import PassRequirementError
from deploycnn.graph.parity import evaluator
from deploycnn.quantization.packed import packed

if TYPE_CHECKING:
    from onnx import ModelProto

    from deploycnn.data.base import Data

#: Images (N, C, H, W) and their classes (N,), where these are known.
Labelled = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64] | None]

#: Prepared images are kept for the next candidate up to this size; beyond it they are decoded again.
HELD_BYTES = 2**29

#: Reported where the error is zero: more decibels than float32 can resolve.
EXACT_DB = 200.0

#: A batch has this many images, and fewer where these are large: the activations of a float net take a hundred times
#: the bytes of its images.
_BATCH = 64
_BATCH_BYTES = 2**22


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A candidate against its float twin.

    Attributes:
        top1_drop: Float top-1 minus this one's, in [-1, 1]; ``None`` where the model is no classifier, or the classes
            are not known.
        agreement: Share of images whose predicted class is the float model's; ``None`` where it is no classifier.
        sqnr_db: Signal-to-quantization-noise ratio of all outputs, in decibels.
        images: How many images.
    """

    top1_drop: float | None
    agreement: float | None
    sqnr_db: float
    images: int

    @property
    def noise(self) -> float:
        """Power of the outputs' error as a share of their power."""
        return float(10.0 ** (-self.sqnr_db / 10.0))

    def within(self, max_top1_drop: float) -> bool:
        """Whether the drop stays in a budget; a model without top-1 never proves that."""
        return self.top1_drop is not None and self.top1_drop <= max_top1_drop

    def to_json(self) -> Json:
        """The record."""
        return asdict(self)


class Judge:
    """Compares candidates with one float graph on the same images, which are prepared once."""

    def __init__(
        self,
        reference: ModelProto,
        batches: Callable[[], Iterable[Labelled]],
        *,
        threads: int = 1,
        integers: bool = True,
        most_bytes: int | None = None,
    ) -> None:
        """Run ``reference`` once.

        Args:
            reference: The float graph.
            batches: Gives the images anew at each call, always the same.
            threads: CPU threads.
            integers: Whether candidates run on this CPU's integer kernels. Where these saturate, a graph that
                was made for better ones is to be judged without them.
            most_bytes: Of outputs, which are kept: no more images are looked at than give these. A few with many
                outputs each tell noise as well as many with few.

        Raises:
            PassRequirementError: there are no images.
        """
        self._threads = threads
        self._integers = integers
        self._images = _Held(batches, HELD_BYTES)
        self._labels: list[npt.NDArray[np.int64] | None] = []
        self._outputs: list[list[npt.NDArray[np.float32]]] = []
        run = evaluator(reference, threads=threads)
        self.images = 0
        self._classifies = True
        # Beside real numbers, classes and indices tell nothing more.
        self._real = False
        held = 0
        for images, labels in self._images:
            self.images += len(images)
            self._labels.append(labels)
            self._outputs.append(run(images))
            first = self._outputs[-1][0]
            self._classifies &= first.ndim == 2 and first.shape[1] > 1 and len(first) == len(images)
            self._real |= any(output.dtype.kind == "f" for output in self._outputs[-1])
            held += sum(output.nbytes for output in self._outputs[-1])
            if most_bytes is not None and held >= most_bytes:
                self._images.stop_behind(len(self._outputs))
                break
        if not self._labels:
            raise PassRequirementError("no validation images to judge by; give data with a val split")
        self._hits = sum(
            int((outputs[0].argmax(axis=1) == labels).sum())
            for outputs, labels in zip(self._outputs, self._labels, strict=True)
            if self._classifies and labels is not None
        )
        known = self._classifies and all(labels is not None for labels in self._labels)
        self.top1 = self._hits / self.images if known else None

    def __call__(self, candidate: ModelProto) -> Judgement:
        """Run ``candidate`` on the images and compare."""
        run = evaluator(packed(candidate), threads=self._threads, integers=self._integers)
        signal = noise = 0.0
        hits = same = 0
        for expected, (images, labels) in zip(self._outputs, self._images, strict=True):
            found = run(images)
            for right, output in zip(expected, found, strict=True):
                if right.dtype.kind == "f" or not self._real:
                    power, error = _powers(right, output)
                    signal, noise = signal + power, noise + error
            if self._classifies:
                predicted = found[0].argmax(axis=1)
                hits += 0 if labels is None else int((predicted == labels).sum())
                same += int((predicted == expected[0].argmax(axis=1)).sum())
        return Judgement(
            # Of counts: a difference of shares would put a drop of exactly the budget above it.
            top1_drop=None if self.top1 is None else (self._hits - hits) / self.images,
            agreement=same / self.images if self._classifies else None,
            sqnr_db=decibels(signal, noise),
            images=self.images,
        )


class _Held:
    """Batches that are kept in memory while they fit, and made again where they do not."""

    def __init__(self, batches: Callable[[], Iterable[Labelled]], limit: int) -> None:
        self._make = batches
        self._limit = limit
        self._kept: list[Labelled] | None = None
        self._most: int | None = None

    def stop_behind(self, batches: int) -> None:
        """Give no more than so many batches from now on."""
        self._most = batches

    def __iter__(self) -> Iterator[Labelled]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Labelled] | None = []
        size = 0
        for batch in islice(self._make(), self._most):
            size += batch[0].nbytes
            if kept is not None and size <= self._limit:
                kept.append(batch)
            else:
                kept = None
            yield batch
        self._kept = kept


def _powers(right: npt.NDArray[Any], output: npt.NDArray[Any]) -> tuple[float, float]:
    """Power of an output, and of its error; of integers, how many there are and how many differ.

    What is not finite in the float model (the logarithm of zero) has no error that could be compared.
    """
    if right.shape != output.shape:
        # So many boxes as were found: other numbers of them have nothing in common.
        right, output = right.ravel(), np.zeros(right.size, right.dtype)
    if right.dtype.kind != "f":
        return float(right.size), float(np.not_equal(right, output).sum())
    finite = np.isfinite(right)
    right, output = right[finite].astype(np.float64), output[finite].astype(np.float64)
    return float(np.square(right).sum()), float(np.square(right - output).sum())


def images_at_once(height: int, width: int) -> int:
    """How many images of a size are judged in one batch."""
    return int(np.clip(_BATCH_BYTES // (3 * height * width * 4), 1, _BATCH))


def decibels(signal: float, noise: float) -> float:
    """Ratio of two powers; ``EXACT_DB`` at most, and that without noise; ``-EXACT_DB`` where either is not finite."""
    if not math.isfinite(signal) or not math.isfinite(noise):
        return -EXACT_DB
    if noise <= 0.0 or signal / noise >= 10.0 ** (EXACT_DB / 10):
        return EXACT_DB
    return float(10.0 * np.log10(signal / noise)) if signal > 0 else -EXACT_DB


def val_batches(data: Data, count: int | None, seed: int) -> Callable[[], Iterator[Labelled]]:
    """The validation images to judge by, evenly over the classes; all of them where ``count`` is ``None``."""
    from deploycnn.data.calibration import calibration_indices
    from deploycnn.data.loader import batches

    split = data.dataset.val
    size = images_at_once(*data.preprocessing.size)

    def make() -> Iterator[Labelled]:
        if not len(split):
            return
        indices = np.sort(calibration_indices(split.labels, min(count or len(split), len(split)), seed))
        for batch in batches(split, data.preprocessing, size, indices=indices):
            yield batch.images, batch.labels

    return make
