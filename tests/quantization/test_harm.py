"""Do no harm: blocks are cut where one value lives, and what is shipped follows from the races."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from deploycnn.core import Speed
from deploycnn.quantization.harm import do_no_harm, slower_blocks, split_blocks


def chain() -> ModelProto:
    """a -> (b, c joined by add) -> relu -> d: four convolutions, one residual."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["xa"], name="a"),
        helper.make_node("Conv", ["xa", "w"], ["xb"], name="b"),
        helper.make_node("Conv", ["xb", "w"], ["xc"], name="c"),
        helper.make_node("Add", ["xc", "xa"], ["sum"], name="add"),
        helper.make_node("Relu", ["sum"], ["r"], name="relu"),
        helper.make_node("Conv", ["r", "w"], ["y"], name="d"),
    ]
    value = helper.make_tensor_value_info
    weight = helper.make_tensor("w", TensorProto.FLOAT, (2, 2, 1, 1), [1.0, 0.0, 0.0, 1.0])
    shape = [None, 2, 4, 4]
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, shape)], [value("y", TensorProto.FLOAT, shape)], [weight]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


class Watch:
    """Latency is a sum over nodes; a file's nodes on integers are read from its doc string."""

    runtime = "fake:cpu"

    def __init__(
        self, float_ms: Mapping[str, float], int8_ms: Mapping[str, float], crossing_ms: float = 0.0
    ) -> None:
        self.settings = ((1, 2), (16, 2))
        self.float_ms, self.int8_ms, self.crossing_ms = float_ms, int8_ms, crossing_ms
        self.raced: list[tuple[int, list[str]]] = []

    def layer_ms(self, model: Path, *, batch_size: int, threads: int) -> Mapping[str, float]:
        kept = self._kept(model)
        return {
            name: (self.float_ms if kept is None or name in kept else self.int8_ms)[name]
            for name in self.float_ms
        }

    def race(
        self, models: Mapping[str, Path], *, batch_size: int, threads: int, budget_s: float
    ) -> Mapping[str, Speed]:
        self.raced.append((batch_size, list(models)))
        times = {}
        for name, path in models.items():
            times[name] = sum(self.layer_ms(path, batch_size=1, threads=1).values())
            times[name] += self.crossing_ms * len(self._kept(path) or ())
        first = next(iter(times.values()))
        return {
            name: Speed(median_ms=ms, ratio=first / ms, low=0.99 * first / ms, high=1.01 * first / ms)
            for name, ms in times.items()
        }

    @staticmethod
    def _kept(model: Path) -> set[str] | None:
        text = onnx.load(str(model)).doc_string
        return None if text == "float" else set(text.split())


def build(kept: Collection[str]) -> ModelProto:
    model = chain()
    model.doc_string = " ".join(sorted(kept))
    return model


@pytest.fixture
def float_path(tmp_path: Path) -> Path:
    model = chain()
    model.doc_string = "float"
    path = tmp_path / "float.onnx"
    onnx.save(model, str(path))
    return path


FLOAT_MS = {"a": 4.0, "b": 4.0, "c": 4.0, "add": 1.0, "relu": 0.0, "d": 4.0}


def test_blocks_end_where_a_single_value_lives() -> None:
    assert split_blocks(chain()) == [["a"], ["b", "c", "add", "relu"], ["d"]]


def test_times_of_unknown_nodes_count_for_the_block_before_them() -> None:
    before = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}
    after = {"a": 0.5, "Transpose_1": 0.1, "b": 1.0, "c": 1.0, "Q_9": 3.0, "d": 1.5}
    worst, second = slower_blocks(chain(), before, after)
    assert worst.nodes == ("b", "c", "add", "relu")
    assert worst.loss_ms == pytest.approx(3.0)
    assert second.nodes == ("d",)
    assert second.int8_ms == pytest.approx(1.5)


def test_a_block_slower_on_integers_stays_float(float_path: Path, tmp_path: Path) -> None:
    watch = Watch(FLOAT_MS, {"a": 2.0, "b": 2.0, "c": 2.0, "add": 1.0, "relu": 0.0, "d": 6.0})
    found = do_no_harm(float_path, chain(), build, watch, tmp_path)
    assert not found.ship_float
    assert found.keep_float == {"d"}
    assert "1 nodes stay float" in found.words
    assert [batch for batch, _ in watch.raced] == [1, 16]
    assert found.races[0].speeds["int8, worst block float"].ratio == pytest.approx(17 / 11)
    assert found.to_json()["slower_blocks"] == [{"first": "d", "last": "d", "float_ms": 4.0, "int8_ms": 6.0}]


def test_a_profile_only_proposes(float_path: Path, tmp_path: Path) -> None:
    """Leaving d in float looks good by itself and is not, since crossing costs more."""
    slow = {"a": 2.0, "b": 2.0, "c": 2.0, "add": 1.0, "relu": 0.0, "d": 5.0}
    found = do_no_harm(float_path, chain(), build, Watch(FLOAT_MS, slow, crossing_ms=3.0), tmp_path)
    assert not found.ship_float
    assert found.keep_float == frozenset()
    assert found.words.startswith("integers throughout")


@pytest.mark.parametrize(("loss_ms", "kept"), [(0.2, False), (1.0, True)])
def test_a_gain_of_hundredths_does_not_part_a_graph(
    float_path: Path, tmp_path: Path, loss_ms: float, kept: bool
) -> None:
    """11.2 against 11.0 ms is 1.8%, and 12 against 11 is 9%; the intervals of both are clear of it."""

    class Precise(Watch):
        def race(
            self, models: Mapping[str, Path], *, batch_size: int, threads: int, budget_s: float
        ) -> Mapping[str, Speed]:
            speeds = super().race(models, batch_size=batch_size, threads=threads, budget_s=budget_s)
            return {
                name: Speed(median_ms=it.median_ms, ratio=it.ratio, low=it.ratio - 1e-4, high=it.ratio + 1e-4)
                for name, it in speeds.items()
            }

    int8_ms = {"a": 2.0, "b": 2.0, "c": 2.0, "add": 1.0, "relu": 0.0, "d": 4.0 + loss_ms}
    found = do_no_harm(float_path, chain(), build, Precise(FLOAT_MS, int8_ms), tmp_path)
    assert found.keep_float == ({"d"} if kept else frozenset())


def test_float_is_returned_where_nothing_is_faster(float_path: Path, tmp_path: Path) -> None:
    slower = {name: ms * 1.2 for name, ms in FLOAT_MS.items()}
    found = do_no_harm(float_path, chain(), build, Watch(FLOAT_MS, slower), tmp_path)
    assert found.ship_float
    assert found.keep_float == frozenset()
    assert "float is returned" in found.words


def test_races_of_an_earlier_run_are_told(float_path: Path, tmp_path: Path) -> None:
    class Kept(Watch):
        def race(self, models: Mapping[str, Path], **settings: float) -> Mapping[str, Speed]:  # type: ignore[override]
            speeds = super().race(models, **settings)  # type: ignore[arg-type]
            return {name: replace(speed, earlier="2026-01-02T03:04:05") for name, speed in speeds.items()}

    faster = dict.fromkeys(FLOAT_MS, 1.0)
    (tmp_path / "again").mkdir()
    now = do_no_harm(float_path, chain(), build, Watch(FLOAT_MS, faster), tmp_path)
    kept = do_no_harm(float_path, chain(), build, Kept(FLOAT_MS, faster), tmp_path / "again")
    assert kept.words == f"{now.words}; raced on 2026-01-02T03:04:05, and kept on this machine"


def test_slower_at_another_batch_size_is_harm(float_path: Path, tmp_path: Path) -> None:
    class LargeBatchesHurt(Watch):
        def race(self, models: Mapping[str, Path], **settings: float) -> Mapping[str, Speed]:  # type: ignore[override]
            speeds = super().race(models, **settings)  # type: ignore[arg-type]
            if settings["batch_size"] == 16:
                slow = Speed(median_ms=9.0, ratio=0.9, low=0.89, high=0.91)
                return {name: speeds[name] if name == "float" else slow for name in speeds}
            return speeds

    found = do_no_harm(
        float_path, chain(), build, LargeBatchesHurt(FLOAT_MS, dict.fromkeys(FLOAT_MS, 1.0)), tmp_path
    )
    assert found.ship_float
    assert "0.90x (0.89-0.91) at batch 16" in found.words


def test_nodes_that_are_float_anyway_stay_so(float_path: Path, tmp_path: Path) -> None:
    seen: list[frozenset[str]] = []

    def noting(kept: Collection[str]) -> ModelProto:
        seen.append(frozenset(kept))
        return build(kept)

    fast = {name: ms / 2 for name, ms in FLOAT_MS.items()}
    found = do_no_harm(
        float_path, chain(), noting, Watch(FLOAT_MS, fast | {"d": 6.0}), tmp_path, keep_float={"a"}
    )
    assert all("a" in kept for kept in seen)
    assert found.keep_float == {"d"}
