"""Which training images a quantizer looks at."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from deploycnn.errors import DataError


def calibration_indices(labels: npt.NDArray[np.int64], count: int, seed: int) -> npt.NDArray[np.int64]:
    """Choose images evenly over the classes.

    Classes take turns, each giving its images in a random order of its own, until ``count`` are chosen; a
    class with few images gives all that it has. A larger ``count`` only adds images to those of a smaller
    one.

    Args:
        labels: Class of each image of the training split, shape (N,).
        count: How many to choose; all, where there are fewer.
        seed: Of the random order.

    Returns:
        Distinct indices, shape (min(count, N),), in the order in which they were chosen.

    Raises:
        DataError: there is no image, or none is asked for.
    """
    if len(labels) == 0:
        raise DataError("calibration needs images, but the training split has none")
    if count < 1:
        raise DataError(f"calibration needs at least one image, got {count}; raise the number of images")
    rng = np.random.default_rng([seed, 0xCA11B])
    turn = np.empty(len(labels), np.int64)
    shuffled = rng.permutation(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        turn[members] = np.arange(len(members))
    # Within a turn the classes come in random order too, so that any `count` is unbiased.
    order = np.lexsort((rng.random(len(labels)), turn))
    return order[:count].astype(np.int64)
