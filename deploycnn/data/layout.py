"""Which files belong to which split and class, from their paths alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from deploycnn.errors import DataError, nearest

Part = Literal["train", "val", "test"]

#: What people call the folders of the splits, in lower case.
_SPLIT_FOLDERS: Mapping[str, Part] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where a dataset's files are.

    Attributes:
        prefix: Of all files: "" or the one folder that holds everything, with a slash.
        classes: Names of the class folders, sorted.
        files: For each split that has a folder (only "train" where there are none), for each class: positions
            in the list of names, ascending.
    """

    prefix: str
    classes: tuple[str, ...]
    files: Mapping[Part, Mapping[str, Sequence[int]]]


def arrange(names: Sequence[str], folders: Collection[str], where: str) -> Layout:
    """Find splits and classes.

    Either ``<split>/<class>/.../<image>`` or ``<class>/.../<image>``, all of it perhaps inside further
    folders that hold nothing else. Files outside class folders (a README, a list of labels) are left alone.

    Args:
        names: Paths of all files, "/" between the parts, sorted.
        folders: Paths of all folders.
        where: The dataset, for errors.

    Raises:
        DataError: no class folders, an empty one, one class only, no train folder beside test or val, or
            splits with different classes.
    """
    prefix = _prefix(folders)
    tops = _children(folders, prefix)
    if not tops:
        inside = sum(name.startswith(prefix) for name in names)
        hint = f"; its {inside} files should lie in one folder for each class" if inside else " (it is empty)"
        raise DataError(f"{where}: has no class folders{hint}")
    split_folders = {top: _SPLIT_FOLDERS[top.lower()] for top in tops if top.lower() in _SPLIT_FOLDERS}
    places: dict[Part, str] = {}
    for top, part in split_folders.items():
        if part in places:
            raise DataError(
                f'{where}: both "{places[part]}" and "{prefix}{top}/" could be the {part} split; keep one'
            )
        places[part] = f"{prefix}{top}/"
    if not places:
        places = {"train": prefix}
    elif "train" not in places:
        raise DataError(f'{where}: has {", ".join(sorted(split_folders))}, but no folder "train" beside it')
    classes = {part: _children(folders, place) for part, place in places.items()}
    _check_classes(classes, places, where)
    return Layout(
        prefix=prefix,
        classes=tuple(classes["train"]),
        files={part: _files(names, place, classes[part], where) for part, place in places.items()},
    )


def _prefix(folders: Collection[str]) -> str:
    """Go down while there is one folder only that holds folders, and that is not a split."""
    prefix = ""
    while True:
        tops = _children(folders, prefix)
        if len(tops) != 1 or tops[0].lower() in _SPLIT_FOLDERS:
            return prefix
        below = f"{prefix}{tops[0]}/"
        if not _children(folders, below):
            return prefix
        prefix = below


def _children(folders: Iterable[str], prefix: str) -> list[str]:
    start = len(prefix)
    return sorted({path[start:] for path in folders if path.startswith(prefix) and "/" not in path[start:]})


def _check_classes(classes: Mapping[Part, Sequence[str]], places: Mapping[Part, str], where: str) -> None:
    known = classes["train"]
    if not known:
        raise DataError(f'{where}: "{places["train"]}" has no class folders')
    if len(known) < 2:
        raise DataError(
            f'{where}: has one class only ("{known[0]}"); needs at least two class folders to tell apart'
        )
    for part, names in classes.items():
        missing = sorted(set(known) - set(names))
        if missing:
            raise DataError(f'{where}: "{places[part]}" has no folder for the class "{missing[0]}" of train')
        unknown = sorted(set(names) - set(known))
        if unknown:
            hint = nearest(unknown[0], known) if len(known) <= 20 else f"train has {len(known)} classes"
            raise DataError(
                f'{where}: "{places[part]}{unknown[0]}" is a class that train does not have; {hint}'
            )


def _files(names: Sequence[str], place: str, classes: Sequence[str], where: str) -> dict[str, list[int]]:
    files: dict[str, list[int]] = {name: [] for name in classes}
    start = len(place)
    for position, name in enumerate(names):
        if name.startswith(place):
            class_, slash, _ = name[start:].partition("/")
            if slash:
                files[class_].append(position)
    for class_, members in files.items():
        if not members:
            raise DataError(f'{where}: the class folder "{place}{class_}" is empty; add images or remove it')
    return files
