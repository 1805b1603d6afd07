"""What benchmarks that train share: CIFAR-10 in parts, models as artifacts, passes run on them."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from deploycnn.core import MAIN_FILE, Artifact, Context, Pass, Source
from deploycnn.data.base import Data, Split
from deploycnn.data.imagefolder import ImageFolder
from deploycnn.data.opening import open_source
from deploycnn.models.artifact import load_model
from deploycnn.training.evaluate import evaluate

PREPROCESSING = {
    "size": [32, 32], "resize": "squash", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Some images of a split."""

    whole: Split
    indices: npt.NDArray[np.int64]

    @property
    def names(self) -> tuple[str, ...]:
        """As in the whole."""
        return tuple(self.whole.names[index] for index in self.indices)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class indices."""
        return self.whole.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def decode(self, index: int) -> npt.NDArray[np.uint8]:
        """Image ``index`` of the part."""
        return self.whole.decode(int(self.indices[index]))


def part(split: Split, count: int | None) -> Split:
    """At most ``count`` images, as many of each class as the split has in proportion: every n-th one by class."""
    if count is None or count >= len(split):
        return split
    by_class = np.argsort(split.labels, kind="stable")
    return Part(split, np.sort(by_class[np.arange(count) * len(split) // count]))


def open_cifar(given: argparse.Namespace) -> Data:
    """Val is the last 500 images of each training class, as for the fine-tuned checkpoints."""
    data = open_source(
        ImageFolder(root=given.data, val="last", val_per_class=500, verify="header"), PREPROCESSING
    )
    train, val = part(data.dataset.train, given.train_images), part(data.dataset.val, given.val_images)
    name = f"{data.dataset.fingerprint}-{len(train)}-{len(val)}"
    fingerprint = hashlib.sha256(name.encode()).hexdigest()
    return replace(data, dataset=replace(data.dataset, train=train, val=val, fingerprint=fingerprint))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, required=True, help="CIFAR-10 as an image folder or a zip of one"
    )
    parser.add_argument("--train-images", type=int, help="fewer of them, for a pilot")
    parser.add_argument("--val-images", type=int, help="likewise")
    parser.add_argument("--test-images", type=int, help="likewise")
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ...")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--work", type=Path, help="where artifacts and checkpoints go; kept, and continued from"
    )
    parser.add_argument("--out", type=Path, help="JSON lines; also on standard output")


class Bench:
    """Runs sources and passes in folders of their own, and continues what was interrupted."""

    def __init__(self, given: argparse.Namespace) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        self.given, self.data = given, open_cifar(given)
        self.folder = given.work or Path(tempfile.mkdtemp())
        self.test = part(self.data.dataset.test, given.test_images)

    def make(
        self,
        name: str,
        step: Source | Pass,
        source: Artifact | None = None,
        *,
        seed: int = 0,
        references: dict[str, Artifact] | None = None,
        lineage: tuple[Artifact, ...] = (),
    ) -> Artifact:
        """What ``step`` makes of ``source``; ``name`` should tell runs apart."""
        folder = self.folder / name
        output, scratch = folder / "output", folder / "scratch"
        for path in (output, scratch):
            path.mkdir(parents=True, exist_ok=True)
        ctx = Context(
            output=output,
            scratch=scratch,
            seed=seed,
            device=self.given.device,
            threads=self.given.threads,
            data=self.data,
            references=references or {},
            lineage=lineage,
        )
        if isinstance(step, Source):
            draft = step.run(ctx)
        else:
            assert source is not None, f"{name}: a pass needs an artifact"
            draft = step.run(source, ctx)
        return Artifact(
            key=name,
            format=draft.format,
            path=output / MAIN_FILE[draft.format],
            inputs=draft.inputs,
            outputs=draft.outputs,
            parents=(),
            facts=draft.facts,
        )

    def top1(self, made: Artifact, split: Split) -> float:
        """Of an artifact, in [0, 1]."""
        torch.set_num_threads(self.given.threads)
        model = load_model(made.path).to(self.given.device)
        return evaluate(model, split, self.data.preprocessing, batch_size=256, device=self.given.device).top1

    def tell(self, **row: Any) -> None:
        """Print a row, and append it to ``--out``."""
        line = json.dumps(row)
        print(line, flush=True)
        if self.given.out is not None:
            with self.given.out.open("a") as file:
                file.write(line + "\n")


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean, and half the width of a 95% interval by Student's t over seeds (NaN with one seed)."""
    from scipy import stats

    half = math.nan
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return {"mean": float(np.mean(values)), "half95": half}
