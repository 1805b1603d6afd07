"""`benchmarks/gpu.py` as far as it needs no GPU: what it plans, how rows find their figures or reasons, its table."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from deploycnn import recipe as recipes
from deploycnn.engines import device
from deploycnn.errors import RuntimeUnavailable
from deploycnn.runtimes.base import parse_spec

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmarks are not part of this distribution")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("gpu_plan", monkeypatch)


@pytest.fixture
def results(plan: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("gpu_results", monkeypatch)


@pytest.fixture
def engines(results: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("gpu_engines", monkeypatch)


@pytest.fixture
def script(engines: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("gpu", monkeypatch)


def test_the_plan_holds_every_precision_form_and_way_of_timing(plan: ModuleType) -> None:
    rows = plan.combinations(plan.NETS["resnet50"], plan.PRECISIONS, [1, 8, 64, 256])
    assert len(set(rows)) == len(rows)
    assert {row.batch_size for row in rows} == {1, 8, 64, 256}
    one = [row for row in rows if row.batch_size == 8]
    for spec in ("tensorrt:trt", "tensorrt:rtx"):
        for options, transfers in (("", True), ("+device", False), ("+graph+device", False)):
            found = [row for row in one if row.runtime == spec + options]
            assert {row.precision for row in found} == {"fp32", "tf32", "fp16", "int8", "int8_fp16"}
            assert {row.transfers for row in found} == {transfers}
    named = {row.runtime.partition("+")[0] for row in one}
    assert {
        "onnxruntime:cuda",
        "onnxruntime:tensorrt",
        "pytorch:eager-cuda",
        "pytorch:compiled-cuda",
    } <= named
    assert "pytorch:eager-cuda+graph+device+fp16+channels-last" in {row.runtime for row in one}


def test_every_planned_runtime_is_one_that_a_recipe_takes_as_it_is_written(plan: ModuleType) -> None:
    for spec in plan.specs(plan.PRECISIONS):
        assert ":".join(parse_spec(spec)) == spec, "rows are found by the spec in its own order"


@pytest.mark.parametrize("net", ["resnet50", "resnet20", "resnet56"])
def test_the_recipe_of_a_net_is_valid_and_makes_every_variant_of_the_plan(
    plan: ModuleType, net: str, tmp_path: Path
) -> None:
    raw = plan.recipe(
        plan.NETS[net], plan.PRECISIONS, batch_sizes=[1, 64], budget_s=0.5, accuracy=True, trained=False,
        runtimes=plan.specs(plan.PRECISIONS), best=128,
    )  # fmt: skip
    loaded = recipes.parse(raw, base=tmp_path)
    planned = {row.variant for row in plan.combinations(plan.NETS[net], plan.PRECISIONS, [1])}
    assert {variant.name for variant in loaded.variants} == planned
    assert loaded.baseline == "torch"
    engines = {
        variant.name: variant.passes[-1][1]
        for variant in loaded.variants
        if variant.passes and variant.passes[-1][0] == "build_engine"
    }
    assert {name: engine.tf32 for name, engine in engines.items() if engine.tf32} == {
        "trt-tf32": True, "rtx-tf32": True,
    }  # fmt: skip
    assert {engine.flavour for engine in engines.values()} == {"tensorrt", "tensorrt-rtx"}
    assert {(engine.opt_batch, engine.max_batch) for engine in engines.values()} == {(64, 64)}
    quantized = [step for variant in loaded.variants for name, step in variant.passes if name == "int8"]
    assert quantized
    assert not any(step.do_no_harm for step in quantized), "the INT8 graph itself is compared"


def test_given_weights_are_not_trained_away(plan: ModuleType) -> None:
    kept = plan.variants(plan.NETS["resnet56"], ["fp32"], trained=True)
    assert kept["onnx-fp32"] == ["export"]


def measurement(variant: str, runtime: str, **changed: Any) -> dict[str, Any]:
    figures = {
        "variant": variant, "runtime": runtime, "batch_size": 1, "status": "measured", "why": "", "precision": "f16",
        "median_ms": 0.5, "p90_ms": 0.625, "p99_ms": 0.75, "median_interval_ms": [0.4, 0.6], "throughput_ips": 2000.0,
        "ratio": 3.0, "top1": 0.75,
    }  # fmt: skip
    return {**figures, **changed}


RESULT: dict[str, Any] = {
    "net": "resnet50",
    "unavailable": {"onnxruntime:cuda": "no CUDA provider; install onnxruntime-gpu"},
    "variants": {"rtx-int8": {"status": "failed", "why": "build_engine: no kernels for sm_90", "top1": None}},
    "measurements": [
        measurement("trt-fp16", "tensorrt:trt+device"),
        measurement("trt-fp16", "tensorrt:trt", status="not measured", why="out of device memory"),
    ],
    "parity": [
        {
            "variant": "trt-fp16",
            "runtime": "tensorrt:trt",
            "max_relative_error": 0.0125,
            "top1_agreement": 0.96875,
        }
    ],
    "audits": [
        {"variant": "trt-fp16", "census": "100% of MACs ran FP16", "why": ""},
        {"variant": "rtx-fp16", "census": "", "why": "no audit: damaged"},
    ],
    "rebuilds": [
        {
            "variant": "trt-fp16",
            "builds": 3,
            "median_ms": 0.5,
            "spread": 0.125,
            "medians_ms": [0.5, 0.5, 0.5625],
        },
        {"variant": "rtx-fp16", "builds": 3, "why": "tensorrt:rtx does not run here"},
    ],
    "streams": [
        {"variant": "trt-fp16", "batch_size": 8, "images_per_s": [(1, 1000.4), (2, 1900.0)]},
        {"variant": "rtx-fp16", "batch_size": 8, "images_per_s": [], "why": "tensorrt:rtx does not run here"},
    ],
    "gpu": {
        "1": {
            "name": "NVIDIA Fake", "driver": "580.65", "sm_clock_mhz": [1900, 1980], "memory_clock_mhz": None,
            "temperature_c": [50, 61], "power_w": [210.5, 301.0], "reasons": ["power cap"],
        },
        "8": None,
    },
    "data": {"name": "digits", "counts": {"test": 450}},
}  # fmt: skip


def rows_of(plan: ModuleType) -> list[Any]:
    row = plan.Combination
    common = {"net": "resnet50", "batch_size": 1}
    return [
        row(variant="trt-fp16", precision="fp16", runtime="tensorrt:trt+device", **common),
        row(variant="trt-fp16", precision="fp16", runtime="tensorrt:trt", **common),
        row(variant="onnx-fp16", precision="fp16", runtime="onnxruntime:cuda", **common),
        row(variant="rtx-int8", precision="int8", runtime="tensorrt:rtx", **common),
        row(variant="torch", precision="fp16", runtime="pytorch:eager-cuda+fp16", **common),
    ]


def test_every_planned_row_has_its_figures_or_its_reason(plan: ModuleType, results: ModuleType) -> None:
    joined = results.join(rows_of(plan), [RESULT])
    assert [row["why"] for row in joined] == [
        "", "out of device memory", "no CUDA provider; install onnxruntime-gpu", "build_engine: no kernels for sm_90",
        "",
    ]  # fmt: skip
    assert [row["status"] for row in joined] == ["measured", *["not measured"] * 4]
    first = joined[0]
    assert (first["precision"], first["executed"], first["p99_ms"]) == ("fp16", "f16", 0.75)
    assert (first["parity"], first["agreement"], first["top1"]) == (0.0125, 0.96875, 0.75)
    assert first["transfers"] is False


def test_a_net_that_failed_as_a_whole_is_the_reason_of_all_its_rows(
    plan: ModuleType, results: ModuleType
) -> None:
    joined = results.join(rows_of(plan), [{"net": "resnet50", "failed": "torch: out of memory"}])
    assert {row["why"] for row in joined} == {"torch: out of memory"}


def test_the_table_tells_figures_and_everything_that_is_missing(
    plan: ModuleType, results: ModuleType
) -> None:
    lines = results.table(results.join(rows_of(plan), [RESULT]), [RESULT]).splitlines()
    [row] = [line for line in lines if "tensorrt:trt+device" in line and line.startswith("resnet50")]
    assert row.split() == [
        "resnet50", "1", "fp16", "f16", "tensorrt:trt+device", "without", "0.500", "0.625", "0.750", "2000.0",
        "1.3e-02", "0.97", "0.7500",
    ]  # fmt: skip
    text = "\n".join(lines)
    for told in (
        "audit trt-fp16         100% of MACs ran FP16",
        "audit rtx-fp16          (no audit: damaged)",
        "3 builds of trt-fp16: median 0.500 ms, from build to build 12.5%",
        "3 builds of rtx-fp16:  (tensorrt:rtx does not run here)",
        "trt-fp16 at batch 8: 1 stream 1000 images/s, 2 streams 1900 images/s",
        "rtx-fp16 at batch 8:  (tensorrt:rtx does not run here)",
        "GPU at batch 1: NVIDIA Fake, driver 580.65: SM clock 1900 to 1980 MHz, power 210.5 to 301 W, temperature",
        "held down by power cap",
        "GPU at batch 8: not recorded",
        "top1: digits, test split of 450 images",
        "1 rows (trt-fp16 on tensorrt:trt at 1): out of device memory",
        "no reason was recorded: this is a fault of the benchmark",
    ):
        assert told in text


def test_without_a_gpu_it_ends_with_one_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def none() -> None:
        raise RuntimeUnavailable("no NVIDIA driver on this machine; run on a GPU host")

    monkeypatch.setattr(device, "require_gpu", none)
    assert script.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err == "error: no NVIDIA driver on this machine; run on a GPU host\n"
    assert not said.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nets", "resnet51"], 'no net "resnet51"'),
        (["--precisions", "fp12"], 'no precision "fp12"'),
        (["--without", "pytroch"], "--without pytroch: no runtime begins so"),
    ],
)
def test_unknown_names_are_refused(
    script: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_plan_is_printed_without_a_gpu(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--plan", "--nets", "resnet50", "--precisions", "fp16", "--batch-sizes", "1,8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{len(lines) - 1} rows"
    assert sum("tensorrt:trt+graph+device" in line for line in lines) == 2


def test_what_is_left_out_as_asked_says_so(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(availability=lambda: SimpleNamespace(ok=False, why="absent", mend="install it"))
    monkeypatch.setattr(script, "create", lambda _: runtime)
    assert script._reason("tensorrt:trt+device", ["pytorch:compiled"]) == "absent; install it"
    reason = script._reason("pytorch:compiled-cuda+device", ["pytorch:compiled"])
    assert reason == "left out as asked (--without pytorch:compiled)"


def test_what_nothing_explains_is_a_failure(
    script: ModuleType, plan: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = SimpleNamespace(out=tmp_path)
    rows = rows_of(plan)
    assert script._write(rows, [RESULT], options) == 1
    assert script._write(rows[:4], [RESULT], options) == 0, "what the host lacks is no failure"
    [path] = tmp_path.glob("gpu_*.json")
    stored = json.loads(path.read_text())
    assert [row["status"] for row in stored["rows"]] == ["measured", *["not measured"] * 3]
    assert path.with_suffix(".txt").read_text().rstrip("\n") in capsys.readouterr().out
