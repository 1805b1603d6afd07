"""Goals of latency on a target whose times are known exactly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import pytest
import torch

from deploycnn import environment
from deploycnn.core import Context, Speed
from deploycnn.errors import PassRequirementError, RuntimeUnavailable
from deploycnn.latency.goal import latency_goal
from deploycnn.models.cifar_resnet import CifarResNet
from deploycnn.models.onnx_macs import known_shapes, node_macs, with_shapes
from deploycnn.pruning import importance
from deploycnn.pruning.latency_goal import LatencyGoal
from deploycnn.pruning.pruner import Goal, prune


class Exact:
    """A target: 1 us a node, and 1 ms for a million multiply-accumulates; whole models take ``more`` times that."""

    runtime = "onnxruntime:cpu"
    settings = ((1, 1),)

    def __init__(self, more: float = 1.0) -> None:
        self.more = more
        self.races = 0

    def layer_ms(self, model: Path, *, batch_size: int, threads: int) -> dict[str, float]:
        graph = with_shapes(onnx.load(model))
        shapes = known_shapes(graph)
        return {node.name: 0.001 + (node_macs(node, shapes) or 0) / 1e6 for node in graph.graph.node}

    def race(
        self,
        models: Mapping[str, Path],
        *,
        batch_size: int,
        threads: int,
        budget_s: float,
    ) -> dict[str, Speed]:
        self.races += 1
        times = {}
        for index, (name, path) in enumerate(models.items()):
            total = sum(self.layer_ms(path, batch_size=1, threads=1).values())
            times[name] = total * (self.more if index and "pruned" in models else 1.0)
        first = next(iter(times.values()))
        return {
            name: Speed(median_ms=ms, ratio=first / ms, low=first / ms, high=first / ms)
            for name, ms in times.items()
        }


def goal(ratio: float, stopwatch: Exact | None, tmp_path: Path, table: Path | None = None) -> LatencyGoal:
    torch.manual_seed(0)
    model = CifarResNet(8).eval()
    ctx = Context(output=tmp_path, scratch=tmp_path, stopwatch=stopwatch)
    images = torch.randn(2, 3, 32, 32)
    found = latency_goal(model, images, ratio=ratio, precision="fp32", table=table, ctx=ctx)
    found.record["model"] = model
    return found


def pruned(found: LatencyGoal, round_to: int = 2) -> dict[str, object]:
    model = found.record["model"]
    return prune(
        model,
        torch.randn(2, 3, 32, 32),
        lambda model, groups: importance.magnitude(model, groups, power=2),
        Goal(latency=found, round_to=round_to),
    )


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPLOYCNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("deploycnn.latency.samples.CONFIGS", 16)


def test_the_goal_is_reached_also_where_the_prediction_is_off(tmp_path: Path) -> None:
    stopwatch = Exact(more=1.15)
    record = pruned(goal(0.5, stopwatch, tmp_path))["latency"]
    assert isinstance(record, dict)
    assert record["measured_ratio"] == pytest.approx(0.5, rel=0.02)
    assert len(record["tried"]) > 1
    assert record["measured_ratio"] / record["predicted_ratio"] == pytest.approx(1.15, rel=0.05)
    layers = {row["layer"]: row for row in record["layers"]}
    assert sum(row["ms"][1] for row in layers.values()) < sum(row["ms"][0] for row in layers.values())


class Corner(Exact):
    """Whose dense model is 8% slower than its widths would have it: no smooth fit follows that."""

    def race(
        self, models: Mapping[str, Path], *, batch_size: int, threads: int, budget_s: float
    ) -> dict[str, Speed]:
        found = super().race(models, batch_size=batch_size, threads=threads, budget_s=budget_s)
        first = found[next(iter(models))].median_ms
        return {
            name: Speed(
                median_ms=speed.median_ms * (1.08 if speed.median_ms == first else 1),
                ratio=speed.ratio if speed.median_ms == first else speed.ratio * 1.08,
                low=speed.low,
                high=speed.high,
            )
            for name, speed in found.items()
        }


def test_shares_are_of_the_dense_model_as_measured(tmp_path: Path) -> None:
    record = pruned(goal(0.5, Corner(), tmp_path))["latency"]
    assert isinstance(record, dict)
    first = record["tried"][0]
    assert first["races"][0] / first["predicted_ratio"] == pytest.approx(1, rel=0.04)


class Lucky(Exact):
    """Of which the first race with a pruned model says what was asked for, by chance."""

    def race(
        self, models: Mapping[str, Path], *, batch_size: int, threads: int, budget_s: float
    ) -> dict[str, Speed]:
        found = super().race(models, batch_size=batch_size, threads=threads, budget_s=budget_s)
        if "pruned" in models:
            self.true = 1 / found["pruned"].ratio
            if not hasattr(self, "lucky"):
                self.lucky = True
                found["pruned"] = Speed(median_ms=1.0, ratio=2.0, low=2.0, high=2.0)
        return found


def test_one_lucky_race_is_not_believed(tmp_path: Path) -> None:
    stopwatch = Lucky(more=1.15)
    record = pruned(goal(0.5, stopwatch, tmp_path))["latency"]
    assert isinstance(record, dict)
    assert record["met"]
    assert len(record["races"]) >= 2
    assert stopwatch.true == pytest.approx(0.5, rel=0.03)
    first = record["tried"][0]["races"]
    assert first[0] == 0.5
    assert first[1] > 0.55


class Noisy(Exact):
    """Of which every other race with a pruned model is 5% above, and the next 5% below."""

    def race(
        self, models: Mapping[str, Path], *, batch_size: int, threads: int, budget_s: float
    ) -> dict[str, Speed]:
        found = super().race(models, batch_size=batch_size, threads=threads, budget_s=budget_s)
        if "pruned" in models:
            self.sign = -getattr(self, "sign", -1)
            ratio = found["pruned"].ratio / (1 + 0.05 * self.sign)
            found["pruned"] = Speed(median_ms=1 / ratio, ratio=ratio, low=ratio, high=ratio)
        return found


def test_noise_is_raced_again_and_not_corrected(tmp_path: Path) -> None:
    record = pruned(goal(0.5, Noisy(), tmp_path))["latency"]
    assert isinstance(record, dict)
    assert len(record["tried"]) == 1
    assert len(record["races"]) == 2
    assert record["measured_ratio"] == pytest.approx(0.5, rel=0.02)


def test_tables_of_other_widths_are_other_tables(tmp_path: Path) -> None:
    for step in (2, 8):
        found = goal(0.5, Exact(), tmp_path)
        pruned(found, step)
        assert found.table is not None
        widths = {sample.width_in for sample in found.table.samples} - {3}
        assert all(width % step == 0 for width in widths)
        assert any(width % (2 * step) for width in widths)


class Stuck(Exact):
    """On which whatever is pruned takes 0.55 of the dense time."""

    def race(
        self, models: Mapping[str, Path], *, batch_size: int, threads: int, budget_s: float
    ) -> dict[str, Speed]:
        found = super().race(models, batch_size=batch_size, threads=threads, budget_s=budget_s)
        if "pruned" in models:
            found["pruned"] = Speed(median_ms=1.0, ratio=1 / 0.55, low=1.8, high=1.9)
        return found


def test_a_goal_that_is_not_met_says_so(tmp_path: Path) -> None:
    record = pruned(goal(0.5, Stuck(), tmp_path))["latency"]
    assert isinstance(record, dict)
    assert record["met"] is False
    assert record["measured_ratio"] == pytest.approx(0.55)
    assert len(record["tried"]) > 2
    assert (
        f"asked for): slower by more than 2%, the nearest of {len(record['tried'])} choices"
        in record["words"]
    )


def test_what_is_faster_than_asked_for_is_kept_where_widths_are_too_coarse(tmp_path: Path) -> None:
    """Multiples of 16 channels."""
    record = pruned(goal(0.83, Exact(), tmp_path), 16)["latency"]
    assert isinstance(record, dict)
    assert record["measured_ratio"] < 0.81
    assert record["met"] is True
    assert "asked for): faster than asked for, as nothing" in record["words"]
    assert len(record["races"]) == 2


def test_a_table_that_was_just_measured_chooses_like_the_stored_one(tmp_path: Path) -> None:
    fresh, stored = (goal(0.5, Exact(), tmp_path) for _ in range(2))
    first, second = pruned(fresh)["latency"], pruned(stored)["latency"]
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert fresh.table is not None
    assert stored.table is not None
    assert fresh.table.samples == stored.table.samples
    assert first["loss"] == second["loss"]


def test_what_is_out_of_reach_is_refused_with_the_fastest(tmp_path: Path) -> None:
    with pytest.raises(
        PassRequirementError, match=r"latency_ratio: 0.001 is out of reach, the fastest reachable is"
    ):
        pruned(goal(0.001, Exact(), tmp_path))


def test_a_target_that_this_host_lacks_needs_a_table(tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeUnavailable, match="onnxruntime-cpu cannot be timed on this host.*latency_table"
    ):
        goal(0.5, None, tmp_path)


def test_a_table_from_another_machine_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = goal(0.5, Exact(), tmp_path)
    pruned(measured)
    assert measured.table is not None
    measured.table.save(stored := tmp_path / "table.json")
    here = environment.detect()
    monkeypatch.setattr(
        environment, "detect", lambda: environment.Environment.from_json({**here.to_json(), "cpu": "another"})
    )
    stopwatch = Exact()
    found = goal(0.5, stopwatch, tmp_path, stored)
    record = pruned(found)["latency"]
    assert isinstance(record, dict)
    assert stopwatch.races == 0
    assert record["predicted_ratio"] == pytest.approx(0.5, rel=0.02)
    assert "measured_ratio" not in record
    with pytest.raises(
        PassRequirementError, match="latency_table.*is of fp32, latency_precision asks for int8"
    ):
        latency_goal(
            CifarResNet(8).eval(),
            torch.randn(2, 3, 32, 32),
            ratio=0.5,
            precision="int8",
            table=stored,
            ctx=Context(output=tmp_path, scratch=tmp_path),
        )


def test_a_table_of_another_runtime_or_setting_is_refused_with_both(tmp_path: Path) -> None:
    measured = goal(0.5, Exact(), tmp_path)
    pruned(measured)
    assert measured.table is not None
    measured.table.save(stored := tmp_path / "table.json")
    assert goal(0.5, Exact(), tmp_path, stored).bench is not None
    for changed, message in (
        ({"runtime": "openvino:f32"}, "is of onnxruntime:cpu, what decides .* here is openvino:f32"),
        ({"settings": ((64, 1), (1, 1))}, "is of batch size 1, the first of profile.batch_sizes is 64"),
        ({"settings": ((1, 4),)}, "is of 1 threads, the first of profile.threads is 4"),
    ):
        stopwatch = Exact()
        for name, value in changed.items():
            setattr(stopwatch, name, value)
        target = "cpu" if "runtime" in changed else "onnxruntime-cpu"
        ctx = Context(output=tmp_path, scratch=tmp_path, stopwatch=stopwatch, target=target)
        model = CifarResNet(8).eval()
        with pytest.raises(PassRequirementError, match=message):
            latency_goal(model, torch.randn(2, 3, 32, 32), ratio=0.5, precision="fp32", table=stored, ctx=ctx)


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda"])
def test_targets_that_are_not_here_say_what_to_do_instead(tmp_path: Path, target: str) -> None:
    ctx = Context(output=tmp_path, scratch=tmp_path, target=target)
    with pytest.raises(RuntimeUnavailable, match=f"{target} cannot be timed on this host.*Measure a table"):
        latency_goal(
            CifarResNet(8).eval(), torch.randn(2, 3, 32, 32), ratio=0.5, precision="fp16", table=None, ctx=ctx
        )


@pytest.mark.parametrize(("precision", "instead"), [("fp16", "fp32"), ("int8_fp16", "int8")])
def test_halves_are_refused_for_cpus(tmp_path: Path, precision: str, instead: str) -> None:
    ctx = Context(output=tmp_path, scratch=tmp_path, target="onnxruntime-cpu", stopwatch=Exact())
    with pytest.raises(
        PassRequirementError, match=f"latency_precision: {precision} is for GPUs.*use {instead}$"
    ):
        latency_goal(
            CifarResNet(8).eval(),
            torch.randn(2, 3, 32, 32),
            ratio=0.5,
            precision=precision,
            table=None,
            ctx=ctx,
        )


def test_what_is_nearest_to_a_goal_just_out_of_reach_is_kept_and_called_missed(tmp_path: Path) -> None:
    """The prediction allows it, the first race shows that it is 6% off, and nothing is faster."""
    with pytest.raises(PassRequirementError) as caught:
        pruned(goal(0.001, Exact(), tmp_path))
    fastest = float(str(caught.value).partition("the fastest reachable is ")[2].partition(" ")[0])
    record = pruned(goal(1.04 * fastest, Exact(more=1.1), tmp_path))["latency"]
    assert isinstance(record, dict)
    assert record["met"] is False
    assert "slower by more than 2%" in record["words"]
    assert record["measured_ratio"] == pytest.approx(1.1 * fastest, rel=0.04)
