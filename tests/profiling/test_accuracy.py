from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from deploycnn.data.base import Data
from deploycnn.errors import ArtifactError
from deploycnn.profiling.accuracy import NO_CLASS, Predictions, compare, evaluate
from deploycnn.profiling.proportions import mcnemar_p, paired_difference_interval, wilson_interval
from deploycnn.runtimes.base import Executed, Session

CLASSES, COUNT = 4, 13


class Reader(Session):
    """Reads the class off the image's first pixel and gives it the greatest score; one batch size only."""

    def __init__(self, batch_size: int, wrong: frozenset[int] = frozenset(), classes: int = CLASSES) -> None:
        self.executed = Executed(provider="fake", precision="f32", threads=1)
        self.batch_size, self.wrong, self.classes = batch_size, wrong, classes
        self.batches: list[int] = []

    def run(self, images_NCHW: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        assert len(images_NCHW) == self.batch_size
        self.batches.append(len(images_NCHW))
        scores = np.zeros((len(images_NCHW), self.classes), dtype=np.float32)
        for row, image in zip(scores, images_NCHW, strict=True):
            label, index = int(image[0, 0, 0]), int(image[0, 0, 1])
            row[(label + (index in self.wrong)) % CLASSES] = 1
            if index in self.wrong and index == 5:
                row[:] = np.nan
        return [scores]

    def bind(self, images_NCHW: npt.NDArray[np.float32]) -> Callable[[], None]:
        raise NotImplementedError

    def close(self) -> None:
        pass


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Data:
    labels = np.arange(COUNT, dtype=np.int64) % CLASSES

    def batches(split: Any, preprocessing: Any, batch_size: int, *, threads: int | None) -> Any:
        for start in range(0, COUNT, batch_size):
            indices = np.arange(start, min(start + batch_size, COUNT))
            images = np.zeros((len(indices), 1, 2, 2), dtype=np.float32)
            images[:, 0, 0, 0], images[:, 0, 0, 1] = labels[indices], indices
            yield SimpleNamespace(images=images, labels=labels[indices], indices=indices)

    class Images:
        names = tuple(f"img{index}.png" for index in range(COUNT))

        def __len__(self) -> int:
            return COUNT

    Images.labels = labels  # type: ignore[attr-defined]
    monkeypatch.setattr("deploycnn.data.loader.batches", batches)
    dataset = SimpleNamespace(test=Images(), val=Images(), classes=tuple("abcd"))
    return Data(dataset=dataset, preprocessing=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [1, 4, 5, 13, 64])
def test_every_image_is_predicted_once_whatever_the_batch(data: Data, batch_size: int) -> None:
    session = Reader(batch_size, wrong=frozenset({2, 7}))
    found = evaluate(session, data, "test", batch_size)
    assert found.top1 == pytest.approx(11 / 13)
    assert np.flatnonzero(~found.correct).tolist() == [2, 7]
    assert found.top1_interval() == wilson_interval(11, 13)
    assert len(session.batches) == -(-COUNT // batch_size)


def test_outputs_that_are_no_numbers_are_wrong_and_counted(data: Data) -> None:
    found = evaluate(Reader(4, wrong=frozenset({5})), data, "test", 4)
    assert found.predicted[5] == NO_CLASS
    assert found.not_finite == 1
    assert found.top1 == pytest.approx(12 / 13)


def test_a_model_of_other_classes_is_refused(data: Data) -> None:
    with pytest.raises(ArtifactError, match=r"4 x 7, expected 4 x 4"):
        evaluate(Reader(4, classes=7), data, "test", 4)


def test_progress_counts_images(data: Data) -> None:
    told: list[float] = []
    evaluate(Reader(5), data, "val", 5, progress=lambda done, total, _="": told.append(done / total))
    assert told == [5 / 13, 10 / 13, 1.0]


def test_the_drop_is_paired_by_image(data: Data) -> None:
    baseline = evaluate(Reader(4, wrong=frozenset({0, 1})), data, "test", 4)
    other = evaluate(Reader(4, wrong=frozenset({1, 2, 3})), data, "test", 4)
    drop = compare(baseline, other)
    assert (drop.right_to_wrong, drop.wrong_to_right) == ((2, 3), (0,))
    assert drop.drop == pytest.approx(baseline.top1 - other.top1)
    assert drop.interval == paired_difference_interval(2, 1, COUNT)
    assert drop.mcnemar_p == mcnemar_p(2, 1)
    assert drop.names(data.dataset.test) == (["img2.png", "img3.png"], ["img0.png"])
    same = int((baseline.predicted == other.predicted).sum())
    assert 0 < same < COUNT
    assert drop.agreement == same / COUNT
    assert drop.agreement_interval == wilson_interval(same, COUNT)


def test_agreement_counts_equal_mistakes_and_no_different_ones() -> None:
    labels = np.zeros(4, np.int64)
    first, second = (
        Predictions(split="test", images="x", predicted=np.array(predicted), labels=labels)
        for predicted in ([0, 1, 1, 0], [0, 1, 2, 0])
    )
    assert compare(first, second).drop == 0.0
    assert compare(first, second).agreement == 0.75


def test_predictions_on_other_images_are_not_paired(data: Data) -> None:
    here = evaluate(Reader(4), data, "test", 4)
    there = Predictions(split="val", images="other", predicted=here.predicted, labels=here.labels)
    with pytest.raises(ValueError, match="different images"):
        compare(here, there)


def test_predictions_survive_their_json(data: Data) -> None:
    found = evaluate(Reader(4, wrong=frozenset({5})), data, "test", 4)
    again = Predictions.from_json(json.loads(json.dumps(found.to_json())))
    assert again.to_json() == found.to_json()
    assert again.top1 == found.top1
    assert compare(found, again).drop == 0.0


@pytest.mark.parametrize(
    "damage",
    [
        {"schema_version": 0},
        {"predicted": [1, 2]},
        {"labels": "x"},
        {"predicted": [], "labels": []},
        {"split": None, "predicted": None},
    ],
)
def test_damaged_predictions_are_named(data: Data, damage: dict[str, Any]) -> None:
    value = {**evaluate(Reader(4), data, "test", 4).to_json(), **damage}
    with pytest.raises(ArtifactError, match=r"^p\.json: "):
        Predictions.from_json(value, "p.json")
