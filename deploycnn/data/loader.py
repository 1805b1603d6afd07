"""Batches of preprocessed images: streamed, decoded in parallel, in a fixed order.

Workers are threads, as Pillow and zlib release the interpreter while they work. At most ``prefetch`` batches
are in the making besides the one handed out, so memory stays bounded whatever the size of the dataset.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deploycnn.data.augment import Augmentation
from deploycnn.data.base import Split
from deploycnn.data.pixels import CACHE_BYTES, reader
from deploycnn.data.preprocessing import Preprocessing
from deploycnn.data.views import augment as augmented

Indices = npt.NDArray[np.int64]

#: Images per piece of work: enough to outweigh the handing over, few enough to share a batch among threads.
_CHUNK = 64


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some images of a split.

    Attributes:
        images: float32, shape (N, C, H, W), as the model takes them.
        labels: int64, shape (N,).
        indices: int64, shape (N,): which images of the split they are.
    """

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    indices: Indices


def batches(
    split: Split,
    preprocessing: Preprocessing,
    batch_size: int,
    *,
    limit: int | None = None,
    indices: Indices | None = None,
    threads: int | None = None,
    prefetch: int = 2,
    cache_bytes: int = CACHE_BYTES,
) -> Iterator[Batch]:
    """Batches in the split's order, or in that of ``indices``; the last one may be smaller.

    Args:
        split: Images.
        preprocessing: Resolved.
        batch_size: Images in a batch.
        limit: At most so many images, spread evenly: files are sorted by class, so the first ones would all
            be of one class.
        indices: Which images, in which order; all by default.
        threads: That decode; by default as many as there are CPUs, at most 8.
        prefetch: Batches prepared ahead.
        cache_bytes: Resized pixels are kept in memory if all fit in so many bytes.

    Raises:
        DataError: an image cannot be decoded any more.
        ValueError: an argument is out of range, or the preprocessing is not resolved.
    """
    _check(preprocessing, batch_size)
    order = _order(split, indices)
    if limit is not None and limit < len(order):
        if limit < 1:
            raise ValueError(f"limit should be at least 1, got {limit}")
        order = order[np.arange(limit) * len(order) // limit]
    source = reader(split, preprocessing, cache_bytes)

    def prepare(chunk: Indices) -> npt.NDArray[np.float32]:
        return preprocessing.normalize(source.read(chunk))

    return _labelled(split, _stream(prepare, preprocessing, order, batch_size, threads, prefetch))


def training_batches(
    split: Split,
    preprocessing: Preprocessing,
    batch_size: int,
    *,
    epoch: int,
    seed: int,
    augment: Augmentation | None = None,
    indices: Indices | None = None,
    threads: int | None = None,
    prefetch: int = 2,
    cache_bytes: int = CACHE_BYTES,
) -> Iterator[Batch]:
    """One epoch of shuffled, augmented batches; the last one may be smaller.

    The order depends on ``(seed, epoch)`` and the number of images, a view on ``(seed, epoch)`` and its
    image's
    index: the same bits come out for every number of threads, and whether or not earlier epochs were run.

    Args:
        split: Images.
        preprocessing: Resolved.
        batch_size: Images in a batch.
        epoch: Counted from 0.
        seed: Of the run.
        augment: Random changes; none by default.
        indices: Train on these images only.
        threads: That decode and augment; by default as many as there are CPUs, at most 8.
        prefetch: Batches prepared ahead.
        cache_bytes: Resized pixels are kept in memory if all fit in so many bytes.

    Raises:
        DataError: an image cannot be decoded any more.
        ValueError: an argument is out of range, or the preprocessing is not resolved.
    """
    _check(preprocessing, batch_size)
    order = np.random.default_rng([seed, epoch]).permutation(_order(split, indices))
    source = reader(split, preprocessing, cache_bytes)
    augmentation = augment or Augmentation()
    fill = _mean_color(preprocessing)

    def prepare(chunk: Indices) -> npt.NDArray[np.float32]:
        pixels = augmented(source.read(chunk), augmentation, indices=chunk, seed=seed, epoch=epoch, fill=fill)
        return preprocessing.normalize(pixels)

    return _labelled(split, _stream(prepare, preprocessing, order, batch_size, threads, prefetch))


def pixel_chunks(
    split: Split, preprocessing: Preprocessing, *, cache_bytes: int = CACHE_BYTES
) -> Iterator[npt.NDArray[np.uint8]]:
    """All resized images in order, uint8, shape (n, H, W, C); the preprocessing need not be resolved."""
    source = reader(split, preprocessing, cache_bytes)
    order = np.arange(len(split), dtype=np.int64)
    shape = source.shape
    for _, chunk in _parallel(source.read, np.uint8, shape, order, _CHUNK, None, 4):
        yield chunk


def _check(preprocessing: Preprocessing, batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size should be at least 1, got {batch_size}")
    if not preprocessing.resolved:
        raise ValueError("mean and std are not known yet; call preprocessing.resolve(train) first")


def _order(split: Split, indices: Indices | None) -> Indices:
    if indices is None:
        return np.arange(len(split), dtype=np.int64)
    order = np.asarray(indices, np.int64)
    if order.size and (order.min() < 0 or order.max() >= len(split)):
        raise ValueError(f"indices should be from 0 to {len(split) - 1}")
    return order


def _mean_color(preprocessing: Preprocessing) -> tuple[int, ...]:
    """The pixel that becomes about zero, in RGB or gray."""
    if preprocessing.mean is None:
        return (127,) * preprocessing.channel_count
    color = tuple(min(255, max(0, round(255 * value))) for value in preprocessing.mean)
    return color[::-1] if preprocessing.channels == "bgr" else color


def _labelled(split: Split, stream: Iterator[tuple[Indices, npt.NDArray[np.float32]]]) -> Iterator[Batch]:
    labels = split.labels
    for indices, images in stream:
        yield Batch(images, labels[indices], indices)


def _stream(
    prepare: Callable[[Indices], npt.NDArray[np.float32]],
    preprocessing: Preprocessing,
    order: Indices,
    batch_size: int,
    threads: int | None,
    prefetch: int,
) -> Iterator[tuple[Indices, npt.NDArray[np.float32]]]:
    return _parallel(prepare, np.float32, preprocessing.input_shape, order, batch_size, threads, prefetch)


def _parallel(
    prepare: Callable[[Indices], npt.NDArray[Any]],
    dtype: type[np.generic],
    shape: tuple[int, ...],
    order: Indices,
    batch_size: int,
    threads: int | None,
    prefetch: int,
) -> Iterator[tuple[Indices, npt.NDArray[Any]]]:
    """Prepare batches of ``order`` piece by piece in threads; yield them in order."""
    workers = threads if threads is not None else default_threads()
    chunk = min(_CHUNK, max(1, -(-batch_size // workers)))

    def fill(target: npt.NDArray[Any], indices: Indices) -> None:
        target[:] = prepare(indices)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
    waiting: deque[tuple[Indices, npt.NDArray[Any], list[Future[None]]]] = deque()
    starts = iter(range(0, len(order), batch_size))
    try:
        while True:
            while len(waiting) <= prefetch and (start := next(starts, None)) is not None:
                indices = order[start : start + batch_size]
                batch = np.empty((len(indices), *shape), dtype)
                pieces = [slice(at, at + chunk) for at in range(0, len(indices), chunk)]
                waiting.append((indices, batch, [pool.submit(fill, batch[p], indices[p]) for p in pieces]))
            if not waiting:
                return
            indices, batch, futures = waiting.popleft()
            for future in futures:
                future.result()
            yield indices, batch
    finally:
        # Also when the consumer stops early or an image is damaged: leave no thread behind.
        pool.shutdown(wait=True, cancel_futures=True)


def default_threads() -> int:
    """CPUs that this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
