from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploycnn.quantization.statistics import (
    BINS,
    MOMENTUM,
    SAMPLES_PER_IMAGE,
    Statistics,
    load,
    merged,
    sampling_step,
    save,
)
from tests.quantization.summaries import summarize


@given(st.integers(0, 2**16), st.floats(1e-6, 1e6), st.integers(2, 6))
@settings(max_examples=50, deadline=None)
def test_the_histogram_does_not_depend_on_order_or_batches(seed: int, spread: float, parts: int) -> None:
    values = (np.random.default_rng(seed).standard_normal(600) * spread).astype(np.float32)
    values[:50] = 0
    whole = summarize(values)
    pieces = summarize(
        *np.array_split(np.sort(np.abs(values)) * np.sign(values[np.argsort(np.abs(values))]), parts)
    )
    assert whole.exponent == pieces.exponent
    assert whole.zeros == pieces.zeros == 50
    assert np.array_equal(whole.counts, pieces.counts)
    assert (whole.low, whole.high) == (min(values.min(), 0), max(values.max(), 0))


def test_bins_hold_the_values_that_they_say() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    statistics = summarize(*np.array_split(values, 7))
    edges = np.arange(-BINS, BINS + 1) * statistics.bin_width
    expected, _ = np.histogram(values.astype(np.float64), edges)
    assert np.array_equal(statistics.counts, expected)
    assert 2 * np.abs(values).max() >= edges[-1] >= np.abs(values).max()


def test_the_moving_average_forgets_old_images() -> None:
    images = np.concatenate([np.full((50, 4), 9.0), np.full((1000, 4), 1.0)])
    statistics = summarize(*np.array_split(images, 7))
    average = 0.0
    for index, image in enumerate(images):
        weight = max(MOMENTUM, 1 / (index + 1))
        average = (1 - weight) * average + weight * image.max()
    assert statistics.average_high == pytest.approx(average)
    assert 1.0 < average < 1.01
    assert statistics.average_low == 0.0
    assert statistics.high == 9.0
    assert statistics.images == len(images)


@pytest.mark.parametrize("shape", [(64, 112, 112), (16, 32, 32), (256, 56, 56), (24, 28, 28)])
def test_the_sample_of_a_large_value_reaches_all_channels_rows_and_columns(shape) -> None:
    size = math.prod(shape)
    places = np.unravel_index(np.arange(0, size, sampling_step(size)), shape)
    assert SAMPLES_PER_IMAGE / 2 < len(places[0]) < 4 * SAMPLES_PER_IMAGE
    for axis, found in enumerate(places):
        counts = np.bincount(found, minlength=shape[axis])
        assert counts.min() > 0
        assert counts.max() <= 2 * counts.mean() + 2


def test_small_values_are_counted_whole() -> None:
    values = np.random.default_rng(0).standard_normal((3, 5, 7, 7)).astype(np.float32)
    statistics = summarize(values)
    assert statistics.counts.sum() + statistics.zeros == values.size


@given(st.integers(0, 2**16), st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_merged_summaries_are_those_of_all_elements_together(seed: int, ratio: float) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((4, 100)), rng.standard_normal((4, 50)) * ratio
    together = merged([summarize(first), summarize(second)])
    whole = summarize(first, second)
    assert (together.low, together.high, together.exponent) == (whole.low, whole.high, whole.exponent)
    assert np.array_equal(together.counts, whole.counts)


def test_merging_leaves_the_parts_alone() -> None:
    parts = [summarize(np.full((2, 3), 1.5)), summarize(np.full((2, 3), 40.0)), summarize(np.zeros((2, 3)))]
    before = [part.counts.copy() for part in parts]
    assert merged(parts).zeros == 6
    assert all(np.array_equal(part.counts, old) for part, old in zip(parts, before, strict=True))


def test_summaries_survive_storage(tmp_path) -> None:
    rng = np.random.default_rng(2)
    kept = {
        "conv/out": summarize(rng.standard_normal((4, 100))),
        "zeros": summarize(np.zeros((4, 3))),
        "ends": Statistics(histogram=False),
    }
    kept["ends"].update(rng.standard_normal((2, 9)).astype(np.float32))
    save(tmp_path / "seen.npz", kept)
    loaded = load(tmp_path / "seen.npz")
    assert list(loaded) == list(kept)
    for name, summary in loaded.items():
        assert vars(summary).keys() == vars(kept[name]).keys()
        for key, value in vars(summary).items():
            assert np.array_equal(value, vars(kept[name])[key]), (name, key)


def test_memory_does_not_grow_with_the_images() -> None:
    statistics = Statistics()
    batch = np.random.default_rng(0).standard_normal((8, 20_000)).astype(np.float32)
    statistics.update(batch)
    tracemalloc.start()
    for scale in range(1, 60):
        statistics.update(batch * np.float32(scale))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 200_000
    assert peak < 4 * batch.nbytes + 1_000_000
