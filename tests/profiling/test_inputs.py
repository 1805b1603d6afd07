"""Images that models are timed with."""

from __future__ import annotations

import numpy as np
import pytest

from deploycnn.data.digits import Digits
from deploycnn.data.opening import open_source
from deploycnn.errors import RecipeError
from deploycnn.profiling.inputs import first_images, noise, require_memory


def test_a_batch_that_cannot_fit_is_refused_and_its_settings_are_named() -> None:
    with pytest.raises(
        RecipeError, match=r"batch size 100000000: .*3x224x224.*profile\.batch_sizes.*--batch-size"
    ):
        require_memory(100_000_000, (3, 224, 224))
    require_memory(1, (3, 224, 224))


def test_noise_is_the_same_again() -> None:
    images = noise(4, (3, 8, 8), seed=1)
    assert (images.shape, images.dtype) == ((4, 3, 8, 8), np.float32)
    np.testing.assert_array_equal(images, noise(4, (3, 8, 8), seed=1))
    assert not np.array_equal(images, noise(4, (3, 8, 8), seed=2))


def test_validation_images_are_repeated_where_there_are_fewer() -> None:
    data = open_source(Digits())
    count = len(data.dataset.val)
    images = first_images(data, count + 2)
    np.testing.assert_array_equal(images[count:], images[:2])
    np.testing.assert_array_equal(images[1], data.preprocessing.apply(data.dataset.val.decode(1)))
    assert not np.array_equal(images[0], images[1])
