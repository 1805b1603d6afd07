"""A torch artifact and tiny data for the passes that make ONNX files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from torch import nn

from deploycnn.core import Artifact, Context, Draft, Facts, TensorSpec
from deploycnn.data.base import Data, Dataset
from deploycnn.data.preprocessing import Preprocessing

CLASSES = ("ant", "bee", "cat", "dog", "elk")


@dataclass(frozen=True)
class Pictures:
    """A split of random pictures that are brighter for higher classes."""

    count: int
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{self.seed}-{index}" for index in range(self.count))

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return np.arange(self.count, dtype=np.int64) % len(CLASSES)

    def __len__(self) -> int:
        return self.count

    def decode(self, index: int) -> npt.NDArray[np.uint8]:
        rng = np.random.default_rng([self.seed, index])
        bright = rng.integers(0, 120 + 25 * int(self.labels[index]), (12, 12, 3))
        return bright.astype(np.uint8)


def pictures(*, train: int = 40, val: int = 20, size: int = 12) -> Data:
    preprocessing = Preprocessing(size=(size, size), mean=(0.4, 0.4, 0.4), std=(0.25, 0.25, 0.25))
    dataset = Dataset(
        name="pictures",
        classes=CLASSES,
        train=Pictures(train, 1),
        val=Pictures(val, 2),
        test=Pictures(0, 3),
        fingerprint=f"pictures-{train}-{val}-{size}",
    )
    return Data(dataset=dataset, preprocessing=preprocessing)


def context(folder: Path, data: Data | None, **changes: object) -> Context:
    output = folder / "output"
    scratch = folder / "scratch"
    for path in (output, scratch):
        path.mkdir(parents=True, exist_ok=True)
    return Context(output=output, scratch=scratch, data=data, **changes)  # type: ignore[arg-type]


def torch_artifact(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, *, preprocessing: object = None, size: int | None = 12
) -> Artifact:
    """An artifact whose files are not needed: loading it returns ``model``."""
    monkeypatch.setattr("deploycnn.models.artifact.load_model", lambda _: model)
    return Artifact(
        key="torch",
        format="torch",
        path=Path("model.safetensors"),
        inputs=(TensorSpec(name="images", dtype="float32", shape=(None, 3, size, size)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=(None, 5)),),
        parents=(),
        facts=Facts(params=7, macs=11, preprocessing=preprocessing),
    )


def minted(draft: Draft, ctx: Context) -> Artifact:
    """What the store makes of a draft."""
    return Artifact(
        key="made",
        format=draft.format,
        path=ctx.output / "model.onnx",
        inputs=draft.inputs,
        outputs=draft.outputs,
        parents=("torch",),
        facts=draft.facts,
    )
