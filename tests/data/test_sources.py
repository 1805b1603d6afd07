"""Digits, CIFAR-10 from a folder, and what opening any source checks and caches."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import sys
import urllib.error
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from sklearn.datasets import load_digits

from deploycnn import registry, schema
from deploycnn.data import opening
from deploycnn.data.base import Dataset, DataSource
from deploycnn.data.cifar10 import Cifar10
from deploycnn.data.digits import Digits
from deploycnn.data.imagefolder import ImageFolder
from deploycnn.data.opening import open_source
from deploycnn.data.preprocessing import Preprocessing
from deploycnn.data.splits import ArraySplit, checked, stratified
from deploycnn.data.summary import describe
from deploycnn.errors import DataError, PreprocessingError, RecipeError
from tests.data.samples import PARTS, array_split, dataset, encoded, picture, tree_files, write_tree


def test_the_registry_knows_the_sources_and_nothing_else() -> None:
    assert set(registry.names("data")) >= {"cifar10", "digits", "imagefolder"}
    for name in registry.names("data"):
        source = registry.get("data", name)
        assert issubclass(source, DataSource)
        assert isinstance(source.default_preprocessing, Preprocessing)
        assert all(text for *_, text in schema.describe(source))


def test_digits_are_scikit_learns_enlarged() -> None:
    opened = Digits().open()
    splits = [getattr(opened, part) for part in PARTS]
    small, labels = load_digits(return_X_y=True)
    seen = sorted(int(name.split()[1]) for split in splits for name in split.names)
    assert seen == list(range(1797))
    for split in splits:
        numbers = [int(name.split()[1]) for name in split.names]
        assert numbers == sorted(numbers)
        np.testing.assert_array_equal(split.labels, labels[numbers])
        assert split.images.shape == (len(numbers), 32, 32, 3)
        assert split.images.dtype == np.uint8
        # Each 4x4 block of the enlarged image is, about, one pixel of the small one.
        means = split.images[..., 0].reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4)).reshape(-1, 64)
        correlation = [np.corrcoef(a, small[n])[0, 1] for a, n in zip(means[:50], numbers, strict=False)]
        assert min(correlation) > 0.95
    assert max(split.images.max() for split in splits) == 255
    assert 0.24 < len(opened.test) / 1797 < 0.26
    assert 0.14 < len(opened.val) / 1797 < 0.16
    counts = np.stack([np.bincount(split.labels, minlength=10) / len(split) for split in splits])
    assert np.ptp(counts, axis=0).max() < 0.01


def test_the_digits_split_is_seeded() -> None:
    base, same, other = Digits().open(), Digits().open(), Digits(split_seed=1).open()
    assert base.fingerprint == same.fingerprint != other.fingerprint
    assert base.test.names == same.test.names != other.test.names


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.99])
def test_stratified_parts_are_disjoint_and_never_empty(ratio: float) -> None:
    labels = np.random.default_rng(0).integers(0, 5, 83)
    rest, part = stratified(labels, ratio, 0, "abcde", "val")
    assert sorted([*rest, *part]) == list(range(83))
    for label in range(5):
        total = int((labels == label).sum())
        expected = min(total - 1, max(1, round(ratio * total)))
        assert int((labels[part] == label).sum()) == expected


def bad_datasets() -> dict[str, tuple[Dataset, str]]:
    good = [array_split(30, seed=seed) for seed in range(3)]

    def with_labels(labels: object, position: int = 0) -> Dataset:
        splits = list(good)
        old = splits[position]
        splits[position] = ArraySplit(old.images, labels, old.names)
        return dataset(*splits)

    outside = good[1].labels.copy()
    outside[[4, 7]] = 3
    negative = good[2].labels.copy()
    negative[0] = -1
    empty = array_split(0)
    return {
        "label too large": (
            with_labels(outside, 1),
            r'2 labels of the val split are outside 0\.\.2; .* is 3, of "4"',
        ),
        "label below zero": (with_labels(negative, 2), "1 labels of the test split .* is -1"),
        "labels missing": (with_labels(good[0].labels[:-1]), "30 images, but labels of shape"),
        "labels of floats": (with_labels(good[0].labels / 1.0), "whole numbers"),
        "a class without images": (
            with_labels(np.minimum(good[0].labels, 1)),
            'class "c" has no training images',
        ),
        "empty split": (dataset(good[0], empty, good[2]), "the val split has no images"),
        "one class": (dataset(*good, classes=("a",)), 'at least two classes .* has 1 ."a"'),
        "no class": (dataset(*good, classes=()), "has 0"),
    }


@pytest.mark.parametrize("kind", bad_datasets())
def test_every_dataset_is_held_to_the_same(kind: str) -> None:
    broken, message = bad_datasets()[kind]

    @dataclass(frozen=True, kw_only=True)
    class Foreign(DataSource):
        default_preprocessing: ClassVar[Preprocessing] = Preprocessing(size=(8, 8))

        def open(self) -> Dataset:
            return broken

    with pytest.raises(DataError, match=message):
        checked(broken)
    with pytest.raises(DataError, match=message):
        open_source(Foreign())


def test_opening_resolves_statistics_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_source(Digits())
    train = first.dataset.train
    pixels = train.images.astype(np.float64) / 255
    np.testing.assert_allclose(first.preprocessing.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    assert first.fingerprint == f"{first.dataset.fingerprint}-{first.preprocessing.fingerprint}"

    def never(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(Preprocessing, "resolve", never)
    assert open_source(Digits()).preprocessing == first.preprocessing
    assert open_source(Digits(), {"scale": "unit"}).preprocessing.mean is None
    for other, options in [
        (Digits(split_seed=1), {}),
        (Digits(), {"size": 16}),
        (Digits(), {"channels": "gray"}),
    ]:
        with pytest.raises(AssertionError, match="computed again"):
            open_source(other, options)


def test_cached_statistics_of_the_wrong_form_are_computed_again() -> None:
    first = open_source(Digits())
    for junk in ({"mean": [1], "std": [1]}, {"mean": "a", "std": "b"}, [1, 2], "x"):
        for path in (opening.cache.folder() / "statistics").glob("*.json"):
            text = json.dumps(junk)
            path.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
        assert open_source(Digits()).preprocessing == first.preprocessing


def test_a_wrong_preprocessing_is_refused_before_data_are_opened(tmp_path: Path) -> None:
    with pytest.raises(PreprocessingError, match="scal"):
        open_source(ImageFolder(root=tmp_path / "missing"), {"scal": "unit"})


def test_a_summary_counts_images(tmp_path: Path) -> None:
    files = tree_files(splits=("train", "test"), count=10) | {"train/cat/x.png": b"junk"}
    opened = ImageFolder(root=write_tree(tmp_path, files), bad_files="skip", val_ratio=0.2).open()
    summary = describe(opened)
    assert summary["images"] == {"train": 16, "val": 4, "test": 20}
    assert summary["images_per_class"] == {"train": [8, 8], "val": [2, 2], "test": [10, 10]}
    assert summary["classes"] == ["cat", "dog"]
    assert summary["skipped"] == [{"path": "train/cat/x.png", "why": "not an image"}]
    assert summary["fingerprint"] == opened.fingerprint


CLASSES = ["plane", "car", "bird"]


@pytest.fixture
def batches_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small folder in the format of CIFAR-10's python version; torchvision is told its checksums."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "data" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name: str, value: Any) -> list[str]:
        data = pickle.dumps(value)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data, usedforsecurity=False).hexdigest()]

    def part(name: str, count: int) -> list[str]:
        # Channel after channel, row after row, as its authors describe it.
        images = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        return write(name, {"data": images, "labels": [i % 3 for i in range(count)]})

    monkeypatch.setattr(CIFAR10, "train_list", [part("data_batch_1", 30), part("data_batch_2", 30)])
    monkeypatch.setattr(CIFAR10, "test_list", [part("test_batch", 12)])
    name, digest = write("batches.meta", {"label_names": CLASSES})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": digest})
    return tmp_path / "data"


@pytest.mark.parametrize("download", [True, False])
def test_cifar10_is_read_from_its_folder(batches_folder: Path, download: bool) -> None:
    opened = Cifar10(root=str(batches_folder), download=download, val_ratio=0.2).open()
    assert opened.classes == tuple(CLASSES)
    assert [len(getattr(opened, part)) for part in PARTS] == [48, 12, 12]
    assert np.bincount(opened.val.labels).tolist() == [4, 4, 4]
    raw = pickle.loads((batches_folder / "cifar-10-batches-py" / "test_batch").read_bytes())
    expected = raw["data"][5].reshape(3, 32, 32).transpose(1, 2, 0)
    np.testing.assert_array_equal(opened.test.decode(5), expected)
    assert opened.test.labels.tolist() == raw["labels"]
    assert len({*opened.train.names, *opened.val.names, *opened.test.names}) == 72


def test_cifar10_that_cannot_be_downloaded_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torchvision.datasets.cifar as module

    def offline(*_: object, **__: object) -> None:
        sys.stdout.write("Downloading ...")
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(module, "download_and_extract_archive", offline)
    with pytest.raises(DataError, match=r"data\.imagefolder\.root .* --data PATH") as caught:
        Cifar10(root=str(tmp_path / "new")).open()
    assert "Name or service not known" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_cifar10_that_is_missing_or_damaged(batches_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="download is off"):
        Cifar10(root=str(tmp_path / "nothing"), download=False).open()
    path = batches_folder / "cifar-10-batches-py" / "data_batch_1"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match="missing or damaged"):
        Cifar10(root=str(batches_folder), download=False).open()


def test_cifar10_is_kept_in_the_cache_by_default(cache_folder: Path, batches_folder: Path) -> None:
    target = cache_folder / "cifar10"
    target.parent.mkdir(exist_ok=True)
    batches_folder.rename(target)
    assert len(Cifar10(download=False).open().test) == 12


@pytest.mark.parametrize(
    ("source", "options"), [(Digits, {"val_ratio": 0.6}), (Cifar10, {"root": 3}), (Digits, {"seed": 1})]
)
def test_options_are_held_to_their_ranges(source: type[DataSource], options: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        schema.build(source, options, "data")


def test_a_folder_of_photographs_becomes_inputs(tmp_path: Path) -> None:
    files = {
        f"{name}/{index}.jpg": encoded(picture(index, 50 + index, 70), "JPEG")
        for name in ("cat", "dog")
        for index in range(10)
    }
    data = open_source(ImageFolder(root=write_tree(tmp_path, files)), {"size": [24, 32]})
    assert data.preprocessing.resize == "center_crop"
    assert data.preprocessing.apply(data.dataset.train.decode(0)).shape == (3, 24, 32)
    assert dataclasses.replace(data.preprocessing, mean=None, std=None).resolved is False
