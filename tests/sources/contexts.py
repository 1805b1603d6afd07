"""Contexts for sources, with and without data."""

from pathlib import Path

from deploycnn.core import Context
from deploycnn.data.base import Data, Dataset
from deploycnn.data.preprocessing import Preprocessing


class NoImages:
    """A split that no source may look into."""

    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        raise AssertionError("a source looked at the images")


def data_of(classes: int = 4, size: int = 32, channels: str = "rgb") -> Data:
    split = NoImages()
    names = tuple(f"class{i}" for i in range(classes))
    dataset = Dataset(name="fake", classes=names, train=split, val=split, test=split, fingerprint="0")
    preprocessing = Preprocessing(size=(size, size), scale="unit", channels=channels)
    return Data(dataset=dataset, preprocessing=preprocessing)


def context(folder: Path, *, seed: int = 0, data: Data | None = None) -> Context:
    output, scratch = folder / "output", folder / "scratch"
    output.mkdir(parents=True)
    scratch.mkdir()
    return Context(output=output, scratch=scratch, seed=seed, data=data)
