"""Order, coverage, bounded memory, and the same bits whatever the threads."""

from __future__ import annotations

import gc
import threading
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploycnn.data import pixels
from deploycnn.data.augment import Augmentation
from deploycnn.data.loader import Batch, batches, training_batches
from deploycnn.data.pixels import reader
from deploycnn.data.preprocessing import Preprocessing
from deploycnn.errors import DataError
from tests.data.samples import MixedSplit, array_split, picture

UNIT = Preprocessing(size=(8, 8), scale="unit")
EVERYTHING = Augmentation(
    resized_crop=0.5,
    rotation=15,
    crop_padding=2,
    horizontal_flip=True,
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
    erasing=0.5,
)


def joined(stream: list[Batch]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tuple(
        np.concatenate([getattr(batch, key) for batch in stream]) for key in ("images", "labels", "indices")
    )


@given(
    count=st.integers(1, 150),
    batch_size=st.integers(1, 160),
    threads=st.integers(1, 4),
    prefetch=st.integers(0, 3),
    cached=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_every_image_once_in_order(
    count: int, batch_size: int, threads: int, prefetch: int, cached: bool
) -> None:
    split = MixedSplit(count)
    stream = list(
        batches(
            split,
            UNIT,
            batch_size,
            threads=threads,
            prefetch=prefetch,
            cache_bytes=pixels.CACHE_BYTES if cached else 0,
        )
    )
    images, labels, indices = joined(stream)
    assert [len(batch.images) for batch in stream[:-1]] == [batch_size] * (len(stream) - 1)
    np.testing.assert_array_equal(indices, np.arange(count))
    np.testing.assert_array_equal(labels, split.labels)
    expected = np.stack([UNIT.apply(picture(i, *split.sizes[i])) for i in range(count)])
    np.testing.assert_array_equal(images, expected)


def test_indices_and_limit_choose() -> None:
    split = array_split(100)
    chosen = np.array([7, 3, 99, 3])
    images, labels, indices = joined(list(batches(split, UNIT, 3, indices=chosen)))
    np.testing.assert_array_equal(indices, chosen)
    np.testing.assert_array_equal(labels, split.labels[chosen])
    np.testing.assert_array_equal(images, UNIT.normalize(split.images[chosen]))
    spread = joined(list(batches(split, UNIT, 3, limit=10)))[2]
    np.testing.assert_array_equal(spread, np.arange(0, 100, 10))
    assert len(joined(list(batches(split, UNIT, 3, limit=1000)))[2]) == 100
    assert list(batches(split, UNIT, 3, indices=np.zeros(0, np.int64))) == []


@pytest.mark.parametrize("options", [{"limit": 0}, {"indices": np.array([100])}, {"indices": np.array([-1])}])
def test_arguments_out_of_range_are_our_bug(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="should be"):
        list(batches(array_split(100), UNIT, 4, **options))
    with pytest.raises(ValueError, match="batch_size"):
        list(batches(array_split(100), UNIT, 0))
    with pytest.raises(ValueError, match="resolve"):
        list(batches(array_split(100), Preprocessing(size=(8, 8)), 4))


def epoch(split: object, number: int, **options: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    defaults = {"seed": 3, "augment": EVERYTHING, "batch_size": 16}
    arguments = {**defaults, **options}
    size = arguments.pop("batch_size")
    return joined(list(training_batches(split, UNIT, size, epoch=number, **arguments)))


def test_an_epoch_is_a_permutation_and_the_same_bits_every_time() -> None:
    split = MixedSplit(70)
    first = epoch(split, 5)
    np.testing.assert_array_equal(np.sort(first[2]), np.arange(70))
    np.testing.assert_array_equal(first[1], split.labels[first[2]])
    variations = [
        {"threads": 1},
        {"threads": 4},
        {"prefetch": 0},
        {"cache_bytes": 0},
        {"prefetch": 5, "threads": 3},
    ]
    for options in variations:
        for ours, theirs in zip(first, epoch(MixedSplit(70), 5, **options), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_epochs_and_seeds_differ() -> None:
    split = array_split(70)
    orders = [epoch(split, number, seed=seed)[2] for number, seed in [(0, 3), (1, 3), (0, 4)]]
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])


def test_a_view_depends_on_its_image_and_not_on_its_batch() -> None:
    split = array_split(70)
    images, _, indices = epoch(split, 2)
    others, _, other_indices = epoch(split, 2, batch_size=7)
    np.testing.assert_array_equal(indices, other_indices)
    np.testing.assert_array_equal(images, others)
    few, _, few_indices = epoch(split, 2, indices=np.array([9, 60, 33]))
    for image, index in zip(few, few_indices, strict=True):
        np.testing.assert_array_equal(image, images[indices == index][0])


def test_training_on_a_part_never_touches_the_rest() -> None:
    split = MixedSplit(50)
    epoch(split, 0, indices=np.arange(10, 20))
    assert sorted(split.decoded) == list(range(10, 20))


def test_pixels_that_fit_are_decoded_once_and_let_go_with_their_split() -> None:
    split = MixedSplit(60)
    for number in range(3):
        epoch(split, number)
    assert sorted(split.decoded) == list(range(60))
    list(batches(split, Preprocessing(size=(9, 9), scale="unit"), 8))
    assert len(split.decoded) == 120
    held = len(pixels._kept)
    del split
    gc.collect()
    assert len(pixels._kept) == held - 1


def test_a_reader_keeps_its_split() -> None:
    """Batches that were prepared ahead may still be decoded when the last other reference goes."""
    held = reader(MixedSplit(60), UNIT)
    gc.collect()
    assert held.kept is not None
    assert held.read(np.array([3, 59])).shape == (2, 8, 8, 3)


def test_pixels_that_do_not_fit_are_streamed() -> None:
    split = MixedSplit(60)
    for number in range(2):
        epoch(split, number, cache_bytes=8 * 8 * 3 * 60 - 1)
    assert len(split.decoded) == 120


def test_the_budget_is_shared_by_all_splits() -> None:
    one, two = MixedSplit(60), MixedSplit(60)
    need = 8 * 8 * 3 * 60
    held = sum(store.pixels.nbytes for stores in pixels._kept.values() for store in stores.values())
    assert reader(one, UNIT, held + need + 1).kept is not None
    assert reader(two, UNIT, held + need + 1).kept is None
    assert reader(two, UNIT, held + 2 * need).kept is not None


def test_images_in_memory_at_the_right_size_are_not_copied() -> None:
    split = array_split(20)
    assert reader(split, UNIT).kept is split.images
    assert reader(split, Preprocessing(size=(8, 8), channels="gray", scale="unit")).kept is not split.images


def test_a_split_that_cannot_be_referenced_weakly_is_streamed() -> None:
    class Slotted:
        __slots__ = ("labels", "names")

        def __init__(self) -> None:
            self.labels, self.names = np.zeros(5, np.int64), tuple("abcde")

        def __len__(self) -> int:
            return 5

        def decode(self, index: int) -> np.ndarray:
            return picture(index)

    assert len(joined(list(batches(Slotted(), UNIT, 2)))[0]) == 5


class LargeSplit:
    """1 MB each, 400 of them; fails at one of them if told so."""

    def __init__(self, count: int = 400, bad: int = -1) -> None:
        self.labels = np.zeros(count, np.int64)
        self.names = tuple(str(index) for index in range(count))
        self.bad = bad
        self.alive = 0

    def __len__(self) -> int:
        return len(self.labels)

    def decode(self, index: int) -> np.ndarray:
        if index == self.bad:
            raise DataError(f"{index}: damaged")
        return np.full((580, 580, 3), index % 256, np.uint8)


def test_memory_stays_bounded_when_streaming() -> None:
    declared = Preprocessing(size=(128, 128), scale="unit")
    per_batch = 8 * 3 * 128 * 128 * 4
    tracemalloc.start()
    try:
        total = sum(
            len(batch.labels)
            for batch in batches(LargeSplit(), declared, 8, threads=2, prefetch=2, cache_bytes=0)
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 400
    # Four batches at most, and what two threads decode; all 400 images would be 400 MB decoded, 79 MB as
    # inputs.
    assert peak < 4 * per_batch + 10e6


def test_a_damaged_image_ends_the_stream_with_its_error_and_leaves_no_thread() -> None:
    before = threading.active_count()
    stream = batches(
        LargeSplit(bad=50), Preprocessing(size=(8, 8), scale="unit"), 8, threads=3, cache_bytes=0
    )
    seen = []
    with pytest.raises(DataError, match="50: damaged"):
        seen.extend(int(batch.indices[0]) for batch in stream)
    assert seen == [0, 8, 16, 24, 32, 40]
    assert threading.active_count() == before


def test_stopping_early_leaves_no_thread() -> None:
    before = threading.active_count()
    stream = batches(LargeSplit(), Preprocessing(size=(8, 8), scale="unit"), 8, threads=3, cache_bytes=0)
    next(stream)
    assert threading.active_count() > before
    stream.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
