"""Summaries of values, for the tests of ranges."""

from __future__ import annotations

import numpy as np

from deploycnn.quantization.statistics import Statistics


def summarize(*batches: np.ndarray) -> Statistics:
    """Each batch's first axis counts images."""
    statistics = Statistics()
    for batch in batches:
        statistics.update(batch.astype(np.float32))
    return statistics
