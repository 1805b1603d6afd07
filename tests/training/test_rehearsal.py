"""In which arithmetic a CPU trains, on a clock that the test turns."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from torch import nn

from deploycnn import cache
from deploycnn.training import loop, precision, rehearsal
from deploycnn.training.checkpoint import Progress
from deploycnn.training.history import History
from deploycnn.training.losses import CrossEntropy
from deploycnn.training.step import Stepper
from tests.training.support import make_context, make_data, make_model, same_bits, settings

DATA = make_data()  # 3 steps an epoch


class Steps:
    """Steps in bf16 take ``share`` of a second, others one; all else takes no time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, share: float) -> None:
        self.now, self.taken = 0.0, {"fp32": 0, "bf16": 0}
        step = Stepper.step

        def timed_step(stepper: Stepper, batch: object, lr: float) -> object:
            self.now += share if stepper.precision == "bf16" else 1.0
            self.taken[stepper.precision] += 1
            return step(stepper, batch, lr)  # type: ignore[arg-type]

        monkeypatch.setenv("DEPLOYCNN_CACHE", str(folder / "cache"))
        monkeypatch.setattr(Stepper, "step", timed_step)
        monkeypatch.setattr(loop, "clock", lambda: self.now)
        monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
        monkeypatch.setattr(rehearsal, "WORTH_STEPS", 6)


def train(folder: Path, **options: object) -> tuple[nn.Module, History]:
    model = make_model()
    history = loop.fit(model, DATA, settings(**options), loss=CrossEntropy(), ctx=make_context(folder, DATA))
    return model, history


@pytest.mark.parametrize(("share", "expected"), [(0.5, "bf16"), (0.84, "bf16"), (0.9, "fp32"), (1.4, "fp32")])
def test_bf16_where_its_steps_are_much_shorter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, expected: str
) -> None:
    steps = Steps(monkeypatch, tmp_path, share)
    model, history = train(tmp_path, epochs=2)
    assert history.precision == expected
    # Views: the first twice and two more; then six steps of training.
    assert steps.taken == {"fp32": 4, "bf16": 4, expected: 10}
    # The race left no trace in the weights.
    again, told = train(tmp_path / "again", epochs=2, precision=expected)
    assert (told.precision, same_bits(model, again)) == (expected, True)


def test_the_choice_is_remembered_for_this_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Steps(monkeypatch, tmp_path, 0.5)
    assert train(tmp_path / "first", epochs=2)[1].precision == "bf16"
    slow = Steps(monkeypatch, tmp_path, 2.0)
    assert train(tmp_path / "second", epochs=2)[1].precision == "bf16"
    assert slow.taken["fp32"] == 0
    assert train(tmp_path / "third", epochs=2, lr=0.02)[1].precision == "fp32"
    monkeypatch.setattr(cache, "load", lambda *_: None)
    assert train(tmp_path / "fourth", epochs=2)[1].precision == "fp32"


def test_short_trainings_are_not_raced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch, tmp_path, 0.1)
    assert train(tmp_path, epochs=1)[1].precision == "fp32"
    assert steps.taken == {"fp32": 3, "bf16": 0}


def test_a_continued_training_stays_with_its_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch, tmp_path, 0.5)
    whole, _ = train(tmp_path / "whole", epochs=3)

    one_epoch = loop._Training.one_epoch
    epochs = itertools.count(1)

    def stop_at_second(training: loop._Training, progress: Progress) -> None:
        if next(epochs) == 2:
            raise KeyboardInterrupt
        one_epoch(training, progress)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "one_epoch", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed", epochs=3)
    monkeypatch.setattr(rehearsal, "fastest", None)
    before = steps.taken["fp32"]
    model, history = train(tmp_path / "killed", epochs=3)
    assert (history.precision, same_bits(model, whole), steps.taken["fp32"]) == ("bf16", True, before)


def test_a_single_view_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch, tmp_path, 0.5)
    assert train(tmp_path, epochs=7, batch_size=48)[1].precision == "bf16"
    assert steps.taken["fp32"] == 2
