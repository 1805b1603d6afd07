"""Layouts, splits, bad files, fingerprints and the cache of a folder of images or a zip of one."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from deploycnn import schema
from deploycnn.data import scan
from deploycnn.data.base import Dataset
from deploycnn.data.imagefolder import ImageFolder
from deploycnn.errors import DataError, RecipeError
from tests.data.samples import PARTS, encoded, picture, tree_files, write_tree, write_zip
from tests.data.test_decoding import DAMAGED, LOSSLESS, LOSSY, UNUSABLE

THREE = {"splits": ("train", "val", "test")}


def opened(root: Path, **options: object) -> Dataset:
    return ImageFolder(root=root, **options).open()


def error_of(root: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        opened(root, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(root) in message
    return message


def all_names(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    return {part: getattr(dataset, part).names for part in PARTS}


def test_three_folders_are_three_splits(tmp_path: Path) -> None:
    files = tree_files(**THREE, count=4)
    dataset = opened(write_tree(tmp_path / "set", files))
    assert dataset.classes == ("cat", "dog")
    assert dataset.name == "set"
    for part in PARTS:
        split = getattr(dataset, part)
        assert list(split.names) == sorted(name for name in files if name.startswith(f"{part}/"))
        assert split.labels.tolist() == [0] * 4 + [1] * 4
        assert split.labels.dtype == np.int64
    np.testing.assert_array_equal(dataset.val.decode(5), picture(10_000 + 1000 + 1))


def test_class_folders_alone_are_split_by_class(tmp_path: Path) -> None:
    files = tree_files(classes=("a", "b", "c"), count=50)
    dataset = opened(write_tree(tmp_path, files), val_ratio=0.1, test_ratio=0.2)
    names = all_names(dataset)
    assert sorted(sum(names.values(), ())) == sorted(files)
    assert [np.bincount(getattr(dataset, part).labels).tolist() for part in PARTS] == [
        [36] * 3,
        [4] * 3,
        [10] * 3,
    ]
    for part in PARTS:
        assert list(names[part]) == sorted(names[part])
    assert all_names(opened(tmp_path, val_ratio=0.1, test_ratio=0.2)) == names
    assert all_names(opened(tmp_path, val_ratio=0.1, test_ratio=0.2, split_seed=1)) != names


@pytest.mark.parametrize("spelling", ["val", "valid", "Validation"])
def test_folders_have_several_names(tmp_path: Path, spelling: str) -> None:
    dataset = opened(write_tree(tmp_path, tree_files(splits=("Train", spelling, "TEST"), count=3)))
    assert [len(getattr(dataset, part)) for part in PARTS] == [6, 6, 6]


def test_val_is_cut_out_of_train_where_it_is_missing(tmp_path: Path) -> None:
    root = write_tree(tmp_path, tree_files(splits=("train", "test"), count=20))
    seeded = opened(root, val_ratio=0.25)
    assert [len(getattr(seeded, part)) for part in PARTS] == [30, 10, 40]
    last = opened(root, val="last", val_per_class=3)
    expected = [f"train/{name}/{index:03d}.png" for name in ("cat", "dog") for index in (17, 18, 19)]
    assert list(last.val.names) == expected
    assert set(last.train.names).isdisjoint(expected)
    by_ratio = opened(root, val="last", val_ratio=0.15)
    assert by_ratio.val.names == last.val.names
    assert by_ratio.fingerprint == last.fingerprint != seeded.fingerprint


def test_test_is_cut_out_of_train_where_it_is_missing(tmp_path: Path) -> None:
    dataset = opened(write_tree(tmp_path, tree_files(splits=("train", "val"), count=20)), test_ratio=0.2)
    assert [len(getattr(dataset, part)) for part in PARTS] == [32, 40, 8]
    assert all(name.startswith("train/") for name in dataset.test.names)


def test_too_few_images_to_split(tmp_path: Path) -> None:
    files = tree_files(count=5) | {"emu/0.png": encoded(picture(0))}
    with pytest.raises(DataError, match='class "emu" has too few images to set some aside for test'):
        opened(write_tree(tmp_path / "a", files))
    root = write_tree(tmp_path / "b", tree_files(splits=("train", "test"), count=5))
    with pytest.raises(DataError, match='"cat" has 5 images, so its last 5 cannot'):
        opened(root, val="last", val_per_class=5)


def test_images_may_lie_deeper_in_their_class(tmp_path: Path) -> None:
    files = tree_files(count=6) | {"cat/more/of/them/x.png": encoded(picture(77))}
    dataset = opened(write_tree(tmp_path, files))
    assert dataset.classes == ("cat", "dog")
    assert "cat/more/of/them/x.png" in sum(all_names(dataset).values(), ())


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("prefix", ["", "top/", "top/inner/"])
@pytest.mark.parametrize("splits", [(), ("train", "test"), ("train", "val", "test")])
def test_a_zip_is_its_folder(tmp_path: Path, method: int, prefix: str, splits: tuple[str, ...]) -> None:
    files = tree_files(splits=splits, count=8)
    folder = opened(write_tree(tmp_path / "folder", files))
    inside = {prefix + name: data for name, data in reversed(files.items())}
    inside |= {f"{prefix}README.md": b"hello", "__MACOSX/._x": b"litter", f"{prefix}.DS_Store": b"litter"}
    archive = opened(write_zip(tmp_path / "some.zip", inside, method))
    extracted = opened(write_tree(tmp_path / "extracted", inside))
    assert folder.fingerprint == archive.fingerprint == extracted.fingerprint
    assert all_names(folder) == all_names(archive) == all_names(extracted)
    assert archive.name == "some"
    for index in range(len(folder.train)):
        np.testing.assert_array_equal(folder.train.decode(index), archive.train.decode(index))


def test_a_zip_is_read_by_many_threads(tmp_path: Path) -> None:
    dataset = opened(write_zip(tmp_path / "set.zip", tree_files(**THREE, count=60)))
    order = np.random.default_rng(0).integers(0, len(dataset.train), 600).tolist()
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(dataset.train.decode, order))
    for index, image in zip(order, images, strict=True):
        np.testing.assert_array_equal(image, picture((index // 60) * 1000 + index % 60))


def test_the_fingerprint_is_of_content_and_not_of_place_or_time(tmp_path: Path) -> None:
    files = tree_files(count=6)
    base = opened(write_tree(tmp_path / "a", files))
    other = write_tree(tmp_path / "b", files)
    for path in other.rglob("*.png"):
        os.utime(path, (1, 1))
    assert opened(other).fingerprint == base.fingerprint
    changes = [
        {"cat/000.png": encoded(picture(4711))},
        {"cat/new.png": files["cat/000.png"]},
        {"dog/000.png": files["cat/000.png"], "cat/000.png": files["dog/000.png"]},
    ]
    prints = {
        opened(write_tree(tmp_path / f"c{i}", files | change)).fingerprint for i, change in enumerate(changes)
    }
    assert len(prints | {base.fingerprint}) == 4


def test_litter_and_files_outside_the_classes_are_left_alone(tmp_path: Path) -> None:
    files = tree_files(**THREE, count=3)
    clean = opened(write_tree(tmp_path / "clean", files))
    litter = {
        ".DS_Store": b"x",
        "train/.DS_Store": b"x",
        "train/cat/.DS_Store": b"x",
        "train/cat/._000.png": b"x",
        "train/cat/Thumbs.db": b"x",
        "train/dog/desktop.ini": b"x",
        "train/.ipynb_checkpoints/y.png": b"x",
        "labels.csv": b"x",
        "train/labels.csv": b"x",
        "annotations/one.xml": b"x",
    }
    dataset = opened(write_tree(tmp_path / "littered", files | litter))
    assert dataset.fingerprint == clean.fingerprint
    assert dataset.skipped == ()


BAD: Mapping[str, bytes] = {
    "train/cat/notes.txt": b"not an image",
    "train/cat/zero.png": b"",
    "train/dog/cut.jpg": encoded(picture(0, 64, 64), "JPEG")[:900],
    "test/dog/cut.png": encoded(picture(0, 64, 64))[:3000],
}


@pytest.mark.parametrize("zipped", [False, True])
def test_bad_files_are_listed_and_refused_or_skipped(tmp_path: Path, zipped: bool) -> None:
    files = tree_files(**THREE, count=4)
    clean = opened(write_tree(tmp_path / "clean", files))
    write = write_zip if zipped else write_tree
    root = write(tmp_path / "bad", files | BAD)
    message = error_of(root)
    assert "4 of 28 files are not usable images" in message
    assert all(name in message for name in BAD)
    assert "train/cat/notes.txt (not an image)" in message
    assert "bad_files: skip" in message
    dataset = opened(root, bad_files="skip")
    assert {item.path for item in dataset.skipped} == set(BAD)
    assert dataset.fingerprint == clean.fingerprint


def test_at_most_ten_bad_files_are_listed(tmp_path: Path) -> None:
    bad = {f"cat/z{index:02d}.png": b"junk" for index in range(13)}
    message = error_of(write_tree(tmp_path, tree_files(count=5) | bad))
    assert "13 of 23 files" in message
    assert message.count("(not an image)") == 10
    assert "and 3 more" in message


def test_a_header_check_finds_what_is_no_image_and_decoding_the_rest(tmp_path: Path) -> None:
    files = tree_files(splits=("train", "val", "test"), count=4)
    cut = {"train/cat/zzz.png": BAD["test/dog/cut.png"]}
    root = write_tree(tmp_path, files | cut)
    assert "zzz.png" in error_of(root)
    dataset = opened(root, verify="header")
    position = dataset.train.names.index("train/cat/zzz.png")
    with pytest.raises(DataError, match=r"train/cat/zzz\.png: damaged") as caught:
        dataset.train.decode(position)
    assert "verify" in str(caught.value)
    (root / "train/cat/text.png").write_bytes(b"text")
    assert "text.png (not an image)" in error_of(root, verify="header")


def test_a_file_that_vanishes_later_is_named(tmp_path: Path) -> None:
    dataset = opened(write_tree(tmp_path, tree_files(**THREE, count=4)))
    (tmp_path / "train/cat/000.png").unlink()
    with pytest.raises(DataError, match=r"train/cat/000\.png"):
        dataset.train.decode(0)


LAYOUT_ERRORS = {
    "empty": ({}, "no class folders .it is empty"),
    "no class folders": (
        {"a.png": b"x", "b.png": b"x"},
        "its 2 files should lie in one folder for each class",
    ),
    "one class": (tree_files(classes=("cat",)), 'one class only ."cat"'),
    "one class in train": (tree_files(splits=("train", "test"), classes=("cat",)), 'one class only ."cat"'),
    "no train": (tree_files(splits=("val", "test"), count=2), 'has test, val, but no folder "train"'),
    "no classes in test": (tree_files(splits=("train",)) | {"test/a.png": b"x"}, 'test/" has no folder for'),
    "a class is missing": (
        tree_files(splits=("train",)) | tree_files(splits=("test",), classes=("cat",)),
        '"test/" has no folder for the class "dog" of train',
    ),
    "a class is misspelt": (
        tree_files(**THREE, count=2) | {"val/dgo/1.png": b"x"},
        '"val/dgo" is a class that train does not have; did you mean "dog"',
    ),
    "two vals": (tree_files(splits=("train", "val", "valid"), count=2), "both .* could be the val split"),
    "all bad": (tree_files(count=3) | {"emu/a.png": b"x", "emu/b.png": b"y"}, "2 of 8 files are not usable"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", LAYOUT_ERRORS)
def test_layouts_that_cannot_be_used(tmp_path: Path, kind: str, zipped: bool) -> None:
    files, message = LAYOUT_ERRORS[kind]
    root = tmp_path / "set"
    root.mkdir(exist_ok=True)
    root = write_zip(tmp_path / "set.zip", files) if zipped else write_tree(root, files)
    with pytest.raises(DataError, match=message) as caught:
        opened(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["emu", "train/emu"])
def test_an_empty_class_folder_is_named(tmp_path: Path, place: str) -> None:
    root = write_tree(tmp_path / "set", tree_files(splits=("train",) if "/" in place else (), count=4))
    (root / place).mkdir()
    assert f'the class folder "{place}" is empty' in error_of(root)
    (root / place / ".DS_Store").write_bytes(b"x")
    assert "is empty" in error_of(root)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted(root.rglob("*.png")):
            archive.write(path, str(path.relative_to(root)))
        archive.writestr(f"{place}/", b"")
    assert f'the class folder "{place}" is empty' in error_of(tmp_path / "set.zip")


def test_a_class_of_bad_files_only_is_named(tmp_path: Path) -> None:
    files = tree_files(count=5) | {"emu/a.png": b"x", "emu/b.png": b"y"}
    message = error_of(write_tree(tmp_path, files), bad_files="skip")
    assert 'none of the 2 files of class "emu"' in message


def test_roots_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no such folder or zip" in error_of(tmp_path / "missing")
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    assert "neither a folder nor" in error_of(text)
    whole = write_zip(tmp_path / "whole.zip", tree_files(count=4)).read_bytes()
    cut = tmp_path / "cut.zip"
    cut.write_bytes(whole[: len(whole) // 2])
    assert "complete" in error_of(cut)
    garbled = tmp_path / "garbled.zip"
    at = whole.index(b"PK\x01\x02")
    garbled.write_bytes(whole[:at] + b"XXXX" + whole[at + 4 :])
    assert "cannot be read" in error_of(garbled)


def test_damaged_zip_entries_are_bad_files(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", tree_files(count=4), zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[data.index(b"cat/001.png") + 60] ^= 0xFF
    path.write_bytes(bytes(data))
    message = error_of(path)
    assert "1 of 8 files" in message
    assert "cat/001.png (cannot be read (damaged in the zip" in message


def test_a_zip_made_otherwise_is_explained(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", tree_files(count=2), zipfile.ZIP_LZMA)
    assert "compressed by method 14" in error_of(path)
    path = write_zip(
        tmp_path / "windows.zip", {n.replace("/", "\\"): d for n, d in tree_files(count=9).items()}
    )
    assert opened(path).classes == ("cat", "dog")


def test_zip_names_that_lead_outside_lead_nowhere(tmp_path: Path) -> None:
    files = tree_files(count=9)
    outside = {"../evil/x.png": b"x", "../../cat/x.png": b"x"}
    plain = opened(write_zip(tmp_path / "plain.zip", files))
    assert opened(write_zip(tmp_path / "evil.zip", files | outside)).fingerprint == plain.fingerprint
    absolute = {f"/{name}": data for name, data in files.items()}
    assert opened(write_zip(tmp_path / "absolute.zip", absolute)).fingerprint == plain.fingerprint


def test_links_pipes_and_circles(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "set", tree_files(**THREE, count=3))
    fingerprint = opened(root).fingerprint
    linked = tmp_path / "linked"
    linked.mkdir()
    for part in PARTS:
        (linked / part).symlink_to(root / part)
    assert opened(linked).fingerprint == fingerprint
    circle = root / "train" / "cat" / "again"
    circle.symlink_to(root / "train" / "cat")
    assert len(opened(root).train) in (6, 9)
    circle.unlink()
    (root / "train/cat/broken.png").symlink_to(root / "nowhere")
    os.mkfifo(root / "train/cat/pipe.png")
    message = error_of(root)
    assert "broken.png (cannot be read (No such file or directory))" in message
    assert "pipe.png (not a regular file)" in message


def test_names_of_any_kind(tmp_path: Path) -> None:
    files = tree_files(classes=("Katze ä", "犬"), count=5)
    files["犬/zeile\numbruch.png"] = encoded(picture(5))
    root = write_tree(tmp_path / "set", files)
    (root / "犬" / os.fsdecode(b"bytes\xff.png")).write_bytes(encoded(picture(6)))
    dataset = opened(root, test_ratio=0.5)
    names = sum(all_names(dataset).values(), ())
    assert len(names) == 12
    assert all(name.isprintable() for name in names)
    decomposed = write_tree(
        tmp_path / "other", {"Katze a\u0308/" + n.split("/")[1]: d for n, d in files.items() if "K" in n}
    )
    write_tree(decomposed, {n: d for n, d in files.items() if "K" not in n})
    (decomposed / "犬" / os.fsdecode(b"bytes\xff.png")).write_bytes(encoded(picture(6)))
    assert opened(decomposed, test_ratio=0.5).fingerprint == dataset.fingerprint


def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    original = scan._look

    def look(tree: object, entry: object, verify: str) -> scan.Finding:
        seen.append(entry.name)
        return original(tree, entry, verify)

    monkeypatch.setattr(scan, "_look", look)
    return seen


@pytest.mark.parametrize("zipped", [False, True])
def test_files_are_looked_at_once(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    seen = looks(monkeypatch)
    files = tree_files(count=6) | {"cat/bad.png": b"junk"}
    root = (write_zip if zipped else write_tree)(tmp_path / "set", files)
    first = opened(root, bad_files="skip")
    assert len(seen) == 13
    again = opened(root, bad_files="skip")
    assert len(seen) == 13
    assert again.fingerprint == first.fingerprint
    assert again.skipped == first.skipped
    assert "cat/bad.png" in error_of(root)
    assert len(seen) == 13
    stored = list(cache_folder.rglob("*.json"))
    assert len(stored) == 1
    for damage in (
        b"",
        b"junk",
        stored[0].read_bytes()[:-10],
        stored[0].read_bytes().replace(b"junk", b"kunj")[::-1],
    ):
        stored[0].write_bytes(damage)
        seen.clear()
        assert opened(root, bad_files="skip").fingerprint == first.fingerprint
        assert len(seen) == 13
    assert opened(root, bad_files="skip").skipped == first.skipped
    assert len(seen) == 13


def test_only_what_changed_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tree(tmp_path / "set", tree_files(count=6))
    before = opened(root).fingerprint
    seen = looks(monkeypatch)
    (root / "cat/000.png").write_bytes(encoded(picture(999)))
    os.utime(root / "cat/000.png", ns=(1, 1))
    (root / "dog/new.png").write_bytes(encoded(picture(1000)))
    assert opened(root).fingerprint != before
    assert sorted(seen) == ["cat/000.png", "dog/new.png"]


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    monkeypatch.setenv("DEPLOYCNN_CACHE", str(blocker))
    dataset = opened(write_tree(tmp_path / "set", tree_files(count=6)))
    assert len(dataset.train) > 0
    assert "cannot be written" in caplog.text


def test_recipe_options_are_held_to_their_ranges(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert schema.build(ImageFolder, {"root": root}, "data").root == tmp_path
    wrong = [
        {"root": root, "val_ratio": 1.0},
        {"root": root, "bad_files": "ignore"},
        {"root": root, "val_per_class": 5},
        {},
    ]
    for options, key in zip(wrong, ["val_ratio", "bad_files", "val_per_class", "root"], strict=True):
        with pytest.raises(RecipeError, match=key):
            schema.build(ImageFolder, options, "data.imagefolder")


def test_every_kind_of_file_in_one_folder(tmp_path: Path) -> None:
    good = {**LOSSLESS, **LOSSY}
    bad = {**{kind: data for kind, (data, _) in UNUSABLE.items()}, **DAMAGED}
    assert len(good) + len(bad) > 30
    files = {f"cat/{kind}.x": data for kind, data in good.items()} | {
        f"cat/{kind}.y": d for kind, d in bad.items()
    }
    files |= {f"dog/{kind}.png": data for kind, data in good.items()}
    dataset = opened(write_tree(tmp_path, files), bad_files="skip")
    assert {item.path for item in dataset.skipped} == {f"cat/{kind}.y" for kind in bad}
    for part in PARTS:
        split = getattr(dataset, part)
        for index in range(len(split)):
            assert split.decode(index).shape == (12, 20, 3)


def test_a_file_too_large_for_an_image_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_MAX_BYTES", 500)
    root = write_tree(tmp_path, tree_files(count=4) | {"cat/video.mp4": bytes(501)})
    assert "cat/video.mp4 (too large for an image (501 bytes))" in error_of(root)
