"""Images to try a graph on: real ones where there are data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from deploycnn.data.calibration import calibration_indices

if TYPE_CHECKING:
    from deploycnn.data.base import Data

_BATCH = 32


def parity_images(
    data: Data | None, input_shape: tuple[int, int, int], count: int, seed: int
) -> tuple[npt.NDArray[np.float32], str]:
    """Up to ``count`` preprocessed images (N, C, H, W), evenly over the classes, and where they came from.

    They come from the validation split, else the training split; never from the test split. Without data they
    are standard normal noise.

    Args:
        data: Dataset and preprocessing, if any.
        input_shape: (C, H, W), for noise.
        count: How many.
        seed: Of the choice, or of the noise.
    """
    if data is None:
        noise = np.random.default_rng([seed, 0xFA1]).standard_normal((count, *input_shape), dtype=np.float32)
        return noise, "random images"
    from deploycnn.data.loader import batches

    split, source = (
        (data.dataset.val, "val images") if len(data.dataset.val) else (data.dataset.train, "train images")
    )
    indices = calibration_indices(split.labels, count, seed)
    images = [batch.images for batch in batches(split, data.preprocessing, _BATCH, indices=indices)]
    return np.concatenate(images), source


def calibration_batches(data: Data, count: int, seed: int) -> Iterator[npt.NDArray[np.float32]]:
    """Preprocessed training images (N, C, H, W) in batches, evenly over the classes.

    Raises:
        DataError: the training split is empty.
    """
    from deploycnn.data.loader import batches

    train = data.dataset.train
    indices = calibration_indices(train.labels, count, seed)
    for batch in batches(train, data.preprocessing, _BATCH, indices=indices):
        yield batch.images
