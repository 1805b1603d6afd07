"""Races of many models, with a stopwatch that is told how long each takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deploycnn.core import Speed
from deploycnn.latency.measure import FIRST_RUNS, Bench, parts
from deploycnn.models.cifar_resnet import CifarResNet


class Drifting:
    """A machine that is half as fast with each race; a model takes as many milliseconds as its file has bytes."""

    runtime = "onnxruntime:cpu"

    def __init__(self) -> None:
        self.raced: list[list[str]] = []

    def race(
        self, models: Mapping[str, Path], *, batch_size: int, threads: int, budget_s: float
    ) -> dict[str, Speed]:
        self.raced.append(list(models))
        ms = {name: path.stat().st_size * 2.0 ** len(self.raced) for name, path in models.items()}
        first = next(iter(ms.values()))
        return {
            name: Speed(median_ms=value, ratio=first / value, low=first / value, high=first / value)
            for name, value in ms.items()
        }


def bench_of(stopwatch: Drifting, precision: str, target: str) -> Bench:
    return Bench(
        model=CifarResNet(8),
        images=torch.zeros(2, 3, 32, 32),
        stopwatch=stopwatch,
        precision=precision,
        batch_size=1,
        threads=1,
        target=target,
    )


def test_what_is_too_large_for_one_race_is_raced_in_several_with_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"dense": 90, "a": 30, "b": 40, "c": 50, "d": 100}
    paths = {name: tmp_path / name for name in sizes}
    for name, path in paths.items():
        path.write_bytes(bytes(sizes[name]))
    monkeypatch.setattr("deploycnn.latency.measure.RACE_BYTES", 80)
    stopwatch = Drifting()
    bench = bench_of(stopwatch, "fp32", "onnxruntime-cpu")
    found = bench.race(paths)
    assert [names[: -(FIRST_RUNS - 1)] for names in stopwatch.raced] == [
        ["dense", "a", "b"],
        ["dense", "c"],
        ["dense", "d"],
    ]
    assert found == pytest.approx({name: 2.0 * size for name, size in sizes.items()})


def test_on_a_gpu_few_are_raced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploycnn.latency.measure.GPU_RACE", 2)
    paths = {name: tmp_path / name for name in ("dense", "a", "b", "c")}
    for path in paths.values():
        path.write_bytes(b"x")
    stopwatch = Drifting()
    bench = bench_of(stopwatch, "fp16", "tensorrt")
    bench.race(paths)
    assert [names[: -(FIRST_RUNS - 1)] for names in stopwatch.raced] == [["dense", "a", "b"], ["dense", "c"]]


@given(st.lists(st.integers(1, 100)), st.integers(1, 300), st.integers(1, 9))
def test_parts_are_all_in_order_and_small_enough(sizes: list[int], most: int, count: int) -> None:
    found = parts(sizes, most, count)
    assert all(len(part) <= count for part in found)
    assert [index for part in found for index in part] == list(range(len(sizes)))
    assert all(len(part) == 1 or sum(sizes[index] for index in part) <= most for part in found)
