"""The stopwatch that remembers: what is asked again is not timed again, and anything else is."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from deploycnn import environment
from deploycnn.core import Speed
from deploycnn.profiling.remembering import RememberingStopwatch

LOG = logging.getLogger("tests.remembering")


@dataclass
class Counting:
    """A stopwatch whose every answer is another one."""

    runtime: str = "onnxruntime:cpu"
    settings: tuple[tuple[int, int], ...] = ((1, 1),)
    races: list[tuple[str, ...]] = field(default_factory=list)
    profiles: int = 0

    def race(
        self, models: Mapping[str, Path], *, batch_size: int, threads: int, budget_s: float
    ) -> dict[str, Speed]:
        assert min(batch_size, threads, budget_s) > 0
        self.races.append(tuple(models))
        base = float(len(self.races))
        return {
            name: Speed(median_ms=base, ratio=base + place, low=base, high=base + place)
            for place, name in enumerate(models)
        }

    def layer_ms(self, model: Path, *, batch_size: int, threads: int) -> dict[str, float]:
        assert model.is_file()
        assert min(batch_size, threads) > 0
        self.profiles += 1
        return {"second": float(self.profiles), "first": 0.5}


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.setenv("DEPLOYCNN_CACHE", str(tmp_path / "cache"))
    found = {name: tmp_path / f"{name}.onnx" for name in ("float", "int8")}
    for name, path in found.items():
        path.write_text(name)
    return found


def test_what_was_kept_says_so(paths: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOG.name)
    watch = RememberingStopwatch(stopwatch=Counting(), log=LOG)
    for kept in (False, True):
        caplog.clear()
        speeds = watch.race(paths, batch_size=1, threads=1, budget_s=0.5)
        watch.layer_ms(paths["int8"], batch_size=1, threads=1)
        assert [bool(speed.earlier) for speed in speeds.values()] == [kept, kept]
        told = [record.message.partition(": timed on ")[0] for record in caplog.records]
        assert told == ["onnxruntime:cpu: race of float, int8", "onnxruntime:cpu: layers of int8"] * kept


def test_the_same_models_are_raced_once_whatever_they_are_called(paths: dict[str, Path]) -> None:
    counting = Counting()
    watch = RememberingStopwatch(stopwatch=counting, log=LOG)
    first = watch.race(paths, batch_size=1, threads=1, budget_s=0.5)
    renamed = {f"{name} again": path.rename(path.with_stem(f"{name}2")) for name, path in paths.items()}
    again = RememberingStopwatch(stopwatch=Counting(), log=LOG).race(
        renamed, batch_size=1, threads=1, budget_s=0.5
    )
    assert list(again) == ["float again", "int8 again"]
    assert [replace(speed, earlier="") for speed in again.values()] == list(first.values())
    assert counting.races == [("float", "int8")]


@pytest.mark.parametrize("other", ["order", "bytes", "batch", "threads", "budget", "runtime", "machine"])
def test_anything_else_is_timed(paths: dict[str, Path], other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting()
    watch = RememberingStopwatch(stopwatch=counting, log=LOG)
    asked = {"batch_size": 1, "threads": 1}
    watch.race(paths, **asked, budget_s=0.5)
    budget_s = 0.5
    if other == "order":
        paths = dict(reversed(paths.items()))
    elif other == "bytes":
        paths["int8"].write_text("other")
    elif other == "batch":
        asked["batch_size"] = 2
    elif other == "threads":
        asked["threads"] = 2
    elif other == "budget":
        budget_s = 1.0
    elif other == "runtime":
        counting.runtime = "openvino:f32"
    else:
        monkeypatch.setattr(environment.Environment, "fingerprint", "another")
    watch.race(paths, **asked, budget_s=budget_s)
    assert len(counting.races) == 2


def test_layers_keep_their_order(paths: dict[str, Path]) -> None:
    counting = Counting()
    watch = RememberingStopwatch(stopwatch=counting, log=LOG)
    first = watch.layer_ms(paths["int8"], batch_size=1, threads=1)
    again = watch.layer_ms(paths["int8"], batch_size=1, threads=1)
    assert list(first.items()) == list(again.items()) == [("second", 1.0), ("first", 0.5)]
    assert counting.profiles == 1
    watch.layer_ms(paths["float"], batch_size=1, threads=1)
    assert counting.profiles == 2
    assert (watch.runtime, watch.settings) == ("onnxruntime:cpu", ((1, 1),))
