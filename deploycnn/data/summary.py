"""What a report says of a dataset."""

from __future__ import annotations

from typing import Any

import numpy as np

from deploycnn.data.base import Dataset


def describe(dataset: Dataset) -> dict[str, Any]:
    """Plain JSON values: name, classes, fingerprint, images per split and per class, files left out."""
    splits = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "classes": list(dataset.classes),
        "images": {name: len(split) for name, split in splits.items()},
        "images_per_class": {
            name: np.bincount(split.labels, minlength=len(dataset.classes)).tolist()
            for name, split in splits.items()
        },
        "skipped": [{"path": item.path, "why": item.why} for item in dataset.skipped],
    }
