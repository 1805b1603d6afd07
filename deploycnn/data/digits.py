"""scikit-learn's handwritten digits: 1,797 images of 8x8 that come with the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Interval

from deploycnn.data.base import Dataset, DataSource
from deploycnn.data.preprocessing import Preprocessing

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_SIDE = 32


@dataclass(frozen=True, kw_only=True)
class Digits(DataSource):
    """scikit-learn's handwritten digits, enlarged to 32x32 RGB; nothing to download."""

    default_preprocessing: ClassVar[Preprocessing] = Preprocessing(size=(_SIDE, _SIDE))

    val_ratio: Annotated[float, Interval(gt=0, lt=0.5), "Share of all images that picks checkpoints."] = 0.15
    test_ratio: Annotated[float, Interval(gt=0, lt=0.5), "Share of all images that proves results."] = 0.25
    split_seed: Annotated[int, Ge(0), "Of the split; the same for all runs that are compared."] = 0

    def open(self) -> Dataset:
        """The images, each class split in the same ratios."""
        from deploycnn.data.splits import ArraySplit, array_fingerprint, checked, stratified

        images, labels = _load()
        classes = tuple(str(digit) for digit in range(10))
        names = [f"digit {index:04d}" for index in range(len(labels))]
        everything = ArraySplit(images, labels, names)
        rest, test = stratified(labels, self.test_ratio, self.split_seed, classes, "test")
        of_rest = self.val_ratio / (1 - self.test_ratio)
        train, val = stratified(labels[rest], of_rest, self.split_seed + 1, classes, "val")
        splits = [everything.take(part) for part in (rest[train], rest[val], test)]
        return checked(
            Dataset(
                name="digits",
                classes=classes,
                train=splits[0],
                val=splits[1],
                test=splits[2],
                fingerprint=array_fingerprint(splits, classes),
            )
        )


def _load() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images of shape (1797, 32, 32, 3), from values 0..16; labels of shape (1797,)."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    small, labels = load_digits(return_X_y=True)
    pixels = np.rint(small.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    large = [
        np.asarray(Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))
        for image in pixels
    ]
    return np.repeat(np.stack(large)[..., None], 3, axis=3), labels.astype(np.int64)
