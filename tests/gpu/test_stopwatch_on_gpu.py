"""The stopwatch where models are deployed as engines, and tables of latency that are made with it."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from onnx import helper

from deploycnn.cli import main
from deploycnn.engines import audit
from deploycnn.engines.flavour import Flavour
from deploycnn.errors import TimingUnavailable
from deploycnn.latency.reading import load_table
from deploycnn.passes.prune import Prune
from deploycnn.profiling import engines
from deploycnn.profiling.stopwatch import RuntimeStopwatch
from tests.engines import graphs
from tests.gpu import on_gpu, simulated
from tests.gpu.simulated import Simulated
from tests.passes.test_prune import context, made_by


def watch_of(trt: Flavour) -> RuntimeStopwatch:
    return RuntimeStopwatch(runtime=f"tensorrt:{on_gpu.MODES[trt.name]}")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8_fp16"])
def test_nodes_of_engines_have_times_by_their_names(precision: str, trt: Flavour, tmp_path: Path) -> None:
    model = on_gpu.graph(precision)
    times = watch_of(trt).layer_ms(graphs.saved(model, tmp_path), batch_size=2, threads=1)
    assert all(ms >= 0 for ms in times.values())
    macs = {item.node: item.macs or 0 for item in audit.asked_of(model)}
    assert [name for name in times if name in macs] == list(macs)
    if isinstance(trt, Simulated):
        for name, count in macs.items():
            kernels = (times[name] - simulated.MAC_MS * 2 * count) / simulated.KERNEL_MS
            assert kernels == pytest.approx(round(kernels), abs=1e-6)
            assert round(kernels) >= 1


def test_engines_are_raced_and_built_once(
    trt: Flavour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = graphs.saved(graphs.net(), tmp_path / "one")
    many = graphs.saved(graphs.net(shape=("N", 8, 48, 48)), tmp_path / "many")
    built: list[str] = []
    real = engines.Engines._build

    def build(self: Any, model: Any, *arguments: Any) -> Any:
        built.append(model.path.parent.name)
        return real(self, model, *arguments)

    monkeypatch.setattr(engines.Engines, "_build", build)
    watch = watch_of(trt)
    for _ in range(2):
        speeds = watch.race({"one": one, "many": many}, batch_size=4, threads=1, budget_s=0.1)
    assert built == ["one", "many"]
    assert speeds["one"].ratio == 1.0
    if isinstance(trt, Simulated):  # sixteen times the multiply-accumulates
        assert speeds["many"].ratio < 0.2
    watch.layer_ms(one, batch_size=4, threads=1)
    assert built == ["one", "many"]
    watch.layer_ms(one, batch_size=2, threads=1)
    assert built == ["one", "many", "one"]
    folder = next(iter(watch.engines._made.values())).path.parent.parent
    assert folder.is_dir()
    del watch
    gc.collect()
    assert not folder.exists(), "engines are gone with who built them"


def test_the_oldest_engines_go_where_they_are_too_many(
    trt: Flavour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {
        str(side): graphs.saved(graphs.net(shape=("N", 8, side, side)), tmp_path / str(side))
        for side in (8, 12, 16)
    }
    monkeypatch.setattr(engines, "_KEPT_BYTES", 1)
    watch = watch_of(trt)
    watch.layer_ms(paths["8"], batch_size=1, threads=1)
    speeds = watch.race({name: paths[name] for name in ("12", "16")}, batch_size=1, threads=1, budget_s=0.1)
    assert set(speeds) == {"12", "16"}
    assert [made.inputs[0].shape[2] for made in watch.engines._made.values()] == [12, 16]
    assert all(made.path.is_file() for made in watch.engines._made.values())


def test_what_becomes_no_engine_is_named(trt: Flavour, tmp_path: Path) -> None:
    strange = helper.make_node("Strange", ["images"], ["logits"], name="odd", domain="foreign")
    path = graphs.saved(graphs.model([strange], {}), tmp_path)
    with pytest.raises(TimingUnavailable, match="cannot be timed here.*odd"):
        watch_of(trt).race({"bad": path}, batch_size=1, threads=1, budget_s=0.1)


def test_integers_that_make_an_engine_slower_are_not_shipped(trt: Flavour, tmp_path: Path) -> None:
    """The simulated GPU multiplies integers no faster, and moving to and from them takes kernels of its own."""
    from deploycnn.graph.model import load_onnx
    from deploycnn.quantization import packs
    from deploycnn.quantization.engine import Candidate, Engine
    from deploycnn.quantization.harm import do_no_harm
    from deploycnn.quantization.preparation import prepare

    source = graphs.saved(graphs.net(), tmp_path)
    pack = packs.get(trt.name)
    model = prepare(load_onnx(source), pack)
    engine = Engine(pack, lambda: [on_gpu.images(4)], threads=1)

    def build(kept: Any) -> Any:
        return engine.build(Candidate(model=model, calibrator="minmax", keep_float=frozenset(kept)))

    (tmp_path / "work").mkdir()
    watch = replace(watch_of(trt), settings=((2, 1),))
    found = do_no_harm(source, model, build, watch, tmp_path / "work", budget_s=0.05)
    assert found.runtime == watch.runtime
    assert {"float", "int8"} <= set(found.races[0].speeds)
    if isinstance(trt, Simulated):
        assert found.ship_float
        assert found.races[0].speeds["int8"].ratio < 1


def test_a_table_of_an_engine_target_is_measured_and_used(
    trt: Flavour,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DEPLOYCNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("deploycnn.latency.samples.CONFIGS", 8)
    monkeypatch.setattr("deploycnn.latency.steps.WIDTHS", (8, 17))
    race = RuntimeStopwatch.race
    monkeypatch.setattr(RuntimeStopwatch, "race", lambda *a, **k: race(*a, **{**k, "budget_s": 0.05}))
    precision = "int8_fp16"
    table = tmp_path / "table.json"
    arguments = ["--target", trt.name, "--precision", precision, "--out", str(table)]
    assert main(["latency-table", "zoo:resnet8x2", *arguments]) == 0
    assert "layer times" in capsys.readouterr().out
    found = load_table(table)
    assert found.runtime == f"tensorrt:{on_gpu.MODES[trt.name]}"
    assert found.precision == precision
    assert found.error is not None
    if isinstance(trt, Simulated):
        assert found.error.median < 0.02
    source = made_by("source", "zoo", {"name": "resnet8x2"}, context(tmp_path / "source"))
    watch = replace(watch_of(trt), settings=((1, 1),))
    ctx = context(tmp_path / "pruned", stopwatch=watch, target=trt.name)
    options: Any = {"latency_precision": precision, "latency_table": table}
    draft = Prune(latency_ratio=0.8, **options).run(source, ctx)
    latency = draft.facts.record["pruning"]["latency"]
    assert (latency["runtime"], latency["precision"]) == (found.runtime, precision)
    assert latency["races"]
    if isinstance(trt, Simulated):
        assert latency["met"] is True
        assert latency["measured_ratio"] == pytest.approx(0.8, rel=0.05)
