"""Mean and standard deviation of a split's channels, in one pass over any number of images."""

from __future__ import annotations

import logging
import math

import numpy as np

from deploycnn.data.base import Split
from deploycnn.data.loader import pixel_chunks
from deploycnn.data.preprocessing import Preprocessing

log = logging.getLogger(__name__)


def channel_statistics(split: Split, declared: Preprocessing) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (population) standard deviation of each channel of the resized images, scaled to [0, 1].

    The images are streamed. Sums of 8-bit pixels and of their squares are whole numbers, so the result does
    not depend on the order of the images or on threads.

    Returns:
        Means and deviations, in the order of the model's input channels.
    """
    log.info("computing channel statistics of %d training images", len(split))
    channels = declared.channel_count
    counts = np.zeros((channels, 256), np.int64)
    for chunk in pixel_chunks(split, declared):
        for channel in range(channels):
            counts[channel] += np.bincount(chunk[..., channel].ravel(), minlength=256)
    values = list(range(256))
    means, deviations = [], []
    for row in counts.tolist():
        pixels = sum(row)
        total = sum(count * value for count, value in zip(row, values, strict=True))
        squares = sum(count * value * value for count, value in zip(row, values, strict=True))
        means.append(total / pixels / 255)
        deviations.append(math.sqrt((pixels * squares - total**2) / pixels**2) / 255)
    if declared.channels == "bgr":
        means.reverse()
        deviations.reverse()
    return tuple(means), tuple(deviations)
