"""Calibration images: balanced, seeded, and a longer list only adds to a shorter one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploycnn.data.calibration import calibration_indices
from deploycnn.errors import DataError


@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=200).map(np.array),
    count=st.integers(1, 250),
    seed=st.integers(0, 1000),
)
def test_the_choice_is_as_even_as_the_classes_allow(labels: np.ndarray, count: int, seed: int) -> None:
    chosen = calibration_indices(labels, count, seed)
    assert chosen.dtype == np.int64
    assert len(chosen) == len(set(chosen.tolist())) == min(count, len(labels))
    available, taken = np.bincount(labels, minlength=6), np.bincount(labels[chosen], minlength=6)
    most = taken.max()
    # A class gives fewer than the most, less one, only where it has no more.
    assert all(taken[c] >= most - 1 or taken[c] == available[c] for c in range(6))
    np.testing.assert_array_equal(chosen, calibration_indices(labels, count, seed))
    np.testing.assert_array_equal(
        chosen[: count // 2], calibration_indices(labels, max(1, count // 2), seed)[: count // 2]
    )


def test_seeds_choose_otherwise() -> None:
    labels = np.arange(1000) % 10
    assert set(calibration_indices(labels, 50, 0)) != set(calibration_indices(labels, 50, 1))


def test_no_images_is_an_error() -> None:
    with pytest.raises(DataError, match="training split has none"):
        calibration_indices(np.zeros(0, np.int64), 10, 0)
    with pytest.raises(DataError, match="at least one"):
        calibration_indices(np.zeros(5, np.int64), 0, 0)
