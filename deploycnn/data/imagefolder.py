"""A folder of images with one folder for each class, or a zip of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Interval

from deploycnn.data.base import BadFile, Dataset, DataSource
from deploycnn.data.preprocessing import Preprocessing
from deploycnn.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from deploycnn.data.folders import Entry, Tree
    from deploycnn.data.layout import Layout, Part
    from deploycnn.data.scan import Finding

    #: Positions in a list of files, and the class of each.
    Members = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]

_LISTED = 10


@dataclass(frozen=True, kw_only=True)
class ImageFolder(DataSource):
    """Images as ``<class>/<image>`` or ``<train|val|test>/<class>/<image>``, in a folder or a zip of one.

    A split that has no folder of its own is cut out of train. Files are ordered by name, and what identifies
    the dataset is its content, so a zip and its extracted folder are the same dataset.
    """

    default_preprocessing: ClassVar[Preprocessing] = Preprocessing(size=(224, 224), resize="center_crop")

    root: Annotated[Path, "The folder, or a zip of it."]
    val_ratio: Annotated[
        float,
        Interval(gt=0, lt=1),
        "Where there is no val folder: share of each class of train (what test leaves of it).",
    ] = 0.1
    test_ratio: Annotated[
        float, Interval(gt=0, lt=1), "Where there is no test folder: share of each class of train."
    ] = 0.2
    val: Annotated[
        Literal["seeded", "last"], "Which images of each class become val: random ones, or the last by name."
    ] = "seeded"
    val_per_class: Annotated[
        int | None, Ge(1), "With val: last, how many of each class; null: by val_ratio."
    ] = None
    split_seed: Annotated[int, Ge(0), "Of the splits; the same for all runs that are compared."] = 0
    bad_files: Annotated[
        Literal["refuse", "skip"], "What to do about files in class folders that are not usable images."
    ] = "refuse"
    verify: Annotated[
        Literal["full", "header"], "full: decode every image once; header: look at its first bytes only."
    ] = "full"

    def __post_init__(self) -> None:
        if self.val_per_class is not None and self.val != "last":
            raise ValueError("val_per_class belongs to val: last")

    def open(self) -> Dataset:
        """List, check and split the images; the check is cached (see :mod:`deploycnn.data.scan`).

        Raises:
            DataError: the folder or zip is missing, unreadable or laid out otherwise, a class is empty, or
                (where refused) files are not usable images.
        """
        from deploycnn.data.folders import open_tree
        from deploycnn.data.layout import arrange
        from deploycnn.data.scan import scan
        from deploycnn.data.splits import checked

        tree = open_tree(self.root)
        layout = arrange([entry.name for entry in tree.entries], tree.folders, str(self.root))
        positions = sorted(
            position
            for classes in layout.files.values()
            for members in classes.values()
            for position in members
        )
        found = scan(tree, [tree.entries[position] for position in positions], self.verify)
        findings = dict(zip(positions, found, strict=True))
        skipped = self._bad_files(tree, findings)
        parts = self._split(layout, findings)
        splits = {part: _FolderSplit(tree, layout, *members) for part, members in parts.items()}
        return checked(
            Dataset(
                name=self.root.stem if self.root.is_file() else self.root.name,
                classes=layout.classes,
                train=splits["train"],
                val=splits["val"],
                test=splits["test"],
                fingerprint=_fingerprint(splits, layout.classes, findings),
                skipped=skipped,
            )
        )

    def _bad_files(self, tree: Tree, findings: dict[int, Finding]) -> tuple[BadFile, ...]:
        bad = [
            BadFile(path=tree.entries[position].name, why=finding.problem)
            for position, finding in findings.items()
            if finding.problem is not None
        ]
        if bad and self.bad_files == "refuse":
            listing = ", ".join(f"{item.path} ({item.why})" for item in bad[:_LISTED])
            more = f" and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
            raise DataError(
                f"{self.root}: {len(bad)} of {len(findings)} files are not usable images: {listing}{more}; "
                "remove them, or set data.imagefolder.bad_files: skip"
            )
        return tuple(bad)

    def _split(self, layout: Layout, findings: dict[int, Finding]) -> dict[Part, Members]:
        """Usable files of each split, in the order of their names."""
        from deploycnn.data.splits import last_of_each, stratified

        parts = {part: _members(self.root, layout, part, findings) for part in layout.files}
        if "test" not in parts:
            positions, labels = parts["train"]
            rest, test = stratified(labels, self.test_ratio, self.split_seed, layout.classes, "test")
            parts["test"] = positions[test], labels[test]
            parts["train"] = positions[rest], labels[rest]
        if "val" not in parts:
            positions, labels = parts["train"]
            if self.val == "last":
                amount = self.val_per_class if self.val_per_class is not None else self.val_ratio
                rest, val = last_of_each(labels, amount, layout.classes, "val")
            else:
                rest, val = stratified(labels, self.val_ratio, self.split_seed + 1, layout.classes, "val")
            parts["val"] = positions[val], labels[val]
            parts["train"] = positions[rest], labels[rest]
        return parts


class _FolderSplit:
    """Images that are read when they are asked for."""

    def __init__(
        self, tree: Tree, layout: Layout, positions: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]
    ) -> None:
        self._tree = tree
        self.labels = labels
        self.positions: list[int] = positions.tolist()
        start = len(layout.prefix)
        self.names = tuple(tree.entries[position].name[start:] for position in self.positions)

    def __len__(self) -> int:
        return len(self.positions)

    def decode(self, index: int) -> npt.NDArray[np.uint8]:
        """Image ``index``, RGB, shape (H, W, 3).

        Raises:
            DataError: the file was changed or removed since the dataset was opened.
        """
        from deploycnn.data.decoding import UnusableImage, decode

        entry: Entry = self._tree.entries[self.positions[index]]
        try:
            return decode(self._tree.read(entry))
        except (OSError, UnusableImage) as error:
            raise DataError(
                f"{self._tree.root}: {entry.name}: {error}; it was changed since the data were opened, or "
                "data.imagefolder.verify is not full; mend or remove the file and run again"
            ) from error


def _members(root: Path, layout: Layout, part: Part, findings: dict[int, Finding]) -> Members:
    import numpy as np

    positions: list[int] = []
    labels: list[int] = []
    for label, class_ in enumerate(layout.classes):
        listed = layout.files[part][class_]
        usable = [position for position in listed if findings[position].problem is None]
        if not usable:
            raise DataError(
                f'{root}: none of the {len(listed)} files of class "{class_}" in {part} is a usable image '
                f"(the first: {findings[listed[0]].problem})"
            )
        positions.extend(usable)
        labels.extend([label] * len(usable))
    return np.array(positions, np.int64), np.array(labels, np.int64)


def _fingerprint(
    splits: dict[Part, _FolderSplit], classes: Sequence[str], findings: dict[int, Finding]
) -> str:
    """sha256 hex over splits, classes, names inside the dataset and contents."""
    digest = hashlib.sha256("\0".join(classes).encode())
    parts: tuple[Part, ...] = ("train", "val", "test")
    for part in parts:
        split = splits[part]
        for name, label, position in zip(split.names, split.labels.tolist(), split.positions, strict=True):
            digest.update(f"\n{part}\0{label}\0{name}\0{findings[position].sha256}".encode())
    return digest.hexdigest()
