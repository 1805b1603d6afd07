"""Images that models are timed with: every array once, and only where there is memory for it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from deploycnn.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from deploycnn.data.base import Data


def require_memory(batch_size: int, image_shape: Sequence[int]) -> None:
    """Check, before anything is measured, that a batch of float32 images fits in memory.

    Args:
        batch_size: Images.
        image_shape: Of one, (C, H, W).

    Raises:
        RecipeError: it does not.
    """
    import psutil

    needed, available = 4 * batch_size * math.prod(image_shape), psutil.virtual_memory().available
    if needed > available:
        raise RecipeError(
            f"batch size {batch_size}: its images ({'x'.join(map(str, image_shape))}, float32) take "
            f"{needed / 2**30:,.1f} GiB, and {available / 2**30:,.1f} GiB of memory are free; take a smaller one "
            "(profile.batch_sizes of a recipe, or --batch-size)"
        )


def noise(batch_size: int, image_shape: Sequence[int], seed: int) -> npt.NDArray[np.float32]:
    """Normal noise, (N, C, H, W)."""
    import numpy as np

    return np.random.default_rng(seed).standard_normal((batch_size, *image_shape), dtype=np.float32)


def first_images(data: Data, batch_size: int) -> npt.NDArray[np.float32]:
    """The first validation images, preprocessed, (N, C, H, W); repeated where there are fewer."""
    import numpy as np

    split = data.dataset.val
    distinct = [data.preprocessing.apply(split.decode(index)) for index in range(min(batch_size, len(split)))]
    return np.stack([distinct[index % len(distinct)] for index in range(batch_size)])
