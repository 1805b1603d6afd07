"""From a data source and a recipe's ``preprocessing`` to images that are ready to use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import PIL

from deploycnn import cache
from deploycnn.data.base import Data, Dataset, DataSource
from deploycnn.data.preprocessing import Preprocessing
from deploycnn.data.splits import checked
from deploycnn.errors import PreprocessingError


def open_source(source: DataSource, preprocessing: Mapping[str, Any] | None = None) -> Data:
    """Open a dataset, check it, and resolve its preprocessing.

    Args:
        source: Where the images come from.
        preprocessing: Plain values that are laid over ``source.default_preprocessing``.

    Raises:
        DataError: the images are missing or unusable.
        PreprocessingError: a value does not fit.
    """
    declared = source.default_preprocessing.merged(preprocessing or {})
    dataset = checked(source.open())
    return Data(dataset=dataset, preprocessing=resolved(declared, dataset))


def resolved(preprocessing: Preprocessing, dataset: Dataset) -> Preprocessing:
    """Fill in missing statistics from the training split, or from the cache if they were computed before.

    Raises:
        PreprocessingError: a channel of the training split is constant.
    """
    if preprocessing.resolved:
        return preprocessing
    # Resampling may change in the last bit between versions of Pillow.
    identity = json.dumps([dataset.fingerprint, preprocessing.to_json(), PIL.__version__])
    known = cache.load("statistics", identity)
    if isinstance(known, dict) and known.keys() == {"mean", "std"}:
        try:
            return Preprocessing.from_json({**preprocessing.to_json(), **known})
        except PreprocessingError:
            pass  # of another version of this package: compute them again
    result = preprocessing.resolve(dataset.train)
    cache.store("statistics", identity, {name: list(getattr(result, name) or ()) for name in ("mean", "std")})
    return result
