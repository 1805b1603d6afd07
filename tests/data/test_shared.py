"""Real images: CIFAR-10 as JPEG in a zip. Run with DEPLOYCNN_SHARED naming the folder that holds data/."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploycnn.data.imagefolder import ImageFolder
from deploycnn.data.loader import batches
from deploycnn.data.opening import open_source

ARCHIVE = Path(os.environ.get("DEPLOYCNN_SHARED", "/nonexistent")) / "data" / "cifar10-jpeg.zip"
pytestmark = pytest.mark.skipif(
    not ARCHIVE.is_file(), reason="DEPLOYCNN_SHARED names no folder with the archive"
)


def test_cifar10_as_jpeg() -> None:
    data = open_source(ImageFolder(root=ARCHIVE, val="last", val_per_class=500), {"size": 32})
    dataset = data.dataset
    assert [len(split) for split in (dataset.train, dataset.val, dataset.test)] == [45_000, 5_000, 5_000]
    assert dataset.val.names[0] == "train/airplane/4500.jpg"
    assert dataset.skipped == ()
    # Published statistics of CIFAR-10 (whose pixels the JPEG files nearly have).
    np.testing.assert_allclose(data.preprocessing.mean, (0.4914, 0.4822, 0.4465), atol=2e-3)
    np.testing.assert_allclose(data.preprocessing.std, (0.2470, 0.2435, 0.2616), atol=4e-3)
    with zipfile.ZipFile(ARCHIVE) as archive, archive.open(f"cifar10/{dataset.test.names[3003]}") as file:
        expected = np.asarray(Image.open(file).convert("RGB"))
    np.testing.assert_array_equal(dataset.test.decode(3003), expected)
    counted = np.concatenate([b.labels for b in batches(dataset.test, data.preprocessing, 256)])
    np.testing.assert_array_equal(counted, dataset.test.labels)
