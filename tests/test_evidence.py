"""The verdict: val chooses, test proves, and every figure is taken against the right row."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploycnn import evidence
from deploycnn.core import Artifact, Facts
from deploycnn.measure import Measured, Timing, label
from deploycnn.profiling.accuracy import Predictions
from deploycnn.profiling.rows import TimingRow
from deploycnn.recipe import Budget, Profile
from deploycnn.report.schema import validate
from deploycnn.runtimes.base import Executed

ORT, OV = "onnxruntime:cpu", "openvino:f32"
IMAGES = 1000


def artifact(name: str) -> Artifact:
    return Artifact(
        key=name,
        format="onnx",
        path=Path("model.onnx"),
        inputs=(),
        outputs=(),
        parents=(),
        facts=Facts(size_bytes=1),
    )


def row(name: str, runtime: str, latency_ms: float) -> TimingRow:
    """Ten rounds of two blocks of five runs that scatter by a thousandth."""
    generator = np.random.default_rng(zlib.crc32(f"{name} {runtime}".encode()))
    samples = latency_ms * (1 + 0.001 * generator.standard_normal((10, 2, 5)))
    return TimingRow(
        label=label(name, runtime),
        runtime=runtime,
        executed=Executed(provider="CPU", precision="f32", threads=1),
        batch_size=1,
        threads=1,
        samples_ms=tuple(tuple(tuple(block) for block in blocks) for blocks in samples.tolist()),
        warmup_runs=2,
        group="g",
    )


def predictions(wrong: int, split: str) -> Predictions:
    labels = np.zeros(IMAGES, np.int64)
    predicted = labels.copy()
    predicted[:wrong] = 1
    return Predictions(split=split, images=split, predicted=predicted, labels=labels)


def report(
    latencies: dict[tuple[str, str], float],
    wrong: dict[str, tuple[int, int]],
    budget: Budget | None = Budget(max_top1_drop=0.01),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """A report of variants with given latencies and numbers of (val, test) images predicted wrongly."""
    runtimes = tuple(dict.fromkeys(runtime for _, runtime in latencies))
    measured = Measured(runtimes=runtimes)
    rows = tuple(row(name, runtime, value) for (name, runtime), value in latencies.items())
    measured.timings.append(Timing(batch_size=1, threads=1, rows=rows, file="measurements/t.json"))
    for name, counts in wrong.items():
        for runtime in runtimes:
            for split, count in zip(("val", "test"), counts, strict=True):
                measured.predictions[name, runtime, split] = predictions(count, split)
    names = list(dict.fromkeys(name for name, _ in latencies))
    result = evidence.report(
        evidence.Inputs(
            name="r",
            entries=[evidence.Entry(name=name, passes=(), artifact=artifact(name)) for name in names],
            baseline=names[0],
            measured=measured,
            profile=Profile(threads=(1,)),
            budget=budget,
            data=None,
        )
    )
    validate(result)
    return result


def test_val_chooses_even_where_test_would_choose_otherwise() -> None:
    found = report(
        {("fp32", ORT): 10, ("a", ORT): 5, ("b", ORT): 4},
        {"fp32": (50, 50), "a": (52, 90), "b": (70, 50)},  # b is faster and better on test, but not on val
    )
    assert found["winner"]["variant"] == "a"
    a, b = found["variants"][1:]
    assert (a["val_top1_drop"], a["top1_drop"]) == (pytest.approx(0.002), pytest.approx(0.04))
    assert a["within_budget"] is False
    assert b["within_budget"] in (True, "unproven")


def test_the_fastest_runtime_stands_for_a_variant_against_the_first_one() -> None:
    found = report(
        {("fp32", ORT): 10, ("fp32", OV): 8, ("a", ORT): 6, ("a", OV): 4},
        {"fp32": (50, 50), "a": (50, 50)},
    )
    assert found["baseline"] == {"variant": "fp32", "runtime": ORT}
    fp32, a = found["variants"]
    assert (fp32["runtime"], a["runtime"]) == (OV, OV)
    assert a["speedup"]["1"]["ratio"] == pytest.approx(2.5, rel=0.01)
    assert fp32["speedup"]["1"]["ratio"] == pytest.approx(1.25, rel=0.01)
    assert found["winner"] == {"variant": "a", "runtime": OV, "why": found["winner"]["why"]}


def test_nothing_wins_that_is_not_measured_faster() -> None:
    found = report(
        {("fp32", ORT): 10, ("a", ORT): 10, ("b", ORT): 12}, dict.fromkeys(("fp32", "a", "b"), (50, 50))
    )
    assert found["winner"] is None
    assert "faster" in found["why_no_winner"]
    verdicts = [variant["speedup"]["1"]["verdict"] for variant in found["variants"]]
    assert verdicts == ["baseline", "indistinguishable", "slower"]


@pytest.mark.parametrize(("wrong_on_test", "expected"), [(50, True), (58, "unproven"), (150, False)])
def test_the_budget_is_proven_only_by_the_whole_interval(wrong_on_test: int, expected: object) -> None:
    found = report({("fp32", ORT): 10, ("a", ORT): 5}, {"fp32": (50, 50), "a": (50, wrong_on_test)})
    assert found["variants"][1]["within_budget"] == expected


def test_where_val_rules_out_what_is_faster_its_drop_is_told() -> None:
    found = report(
        {("fp32", ORT): 10, ("a", ORT): 5, ("b", ORT): 4, ("slow", ORT): 10},
        {"fp32": (50, 50), "a": (80, 50), "b": (90, 50), "slow": (50, 50)},
    )
    assert found["winner"] is None
    drop = found["variants"][1]["val_top1_drop"]
    assert drop > found["budget"]["max_top1_drop"]
    assert found["why_no_winner"].endswith(f"; a was, and drops by {drop:.4f} there")


def test_without_budget_or_accuracy_there_is_no_winner_and_it_says_why() -> None:
    latencies = {("fp32", ORT): 10.0, ("a", ORT): 5.0}
    assert report(latencies, {"fp32": (5, 5), "a": (5, 5)}, budget=None)["winner"] is None
    without = report(latencies, {})
    assert (without["winner"], without["why_no_winner"]) == (None, "accuracy was not measured")


def test_the_baseline_is_within_any_budget_of_itself() -> None:
    found = report(
        {("fp32", ORT): 10, ("a", ORT): 5}, {"fp32": (50, 50), "a": (50, 50)}, Budget(max_top1_drop=0)
    )
    fp32, a = found["variants"]
    assert (fp32["within_budget"], fp32["top1_drop"], fp32["top1_drop_interval"]) == (True, 0, [0, 0])
    assert a["within_budget"] == "unproven"


#: A step that has nothing to say.
QUIET: dict[str, Any] = {"record": {}, "warnings": []}


def test_what_steps_warned_of_is_told_once_for_all_its_variants() -> None:
    shared = {**QUIET, "pass": "sparse", "warnings": ["no gain", "slow"]}
    entries = [
        evidence.Entry(name="a", passes=(), artifact=None, provenance=(QUIET, shared)),
        evidence.Entry(name="b", passes=(), artifact=None, provenance=(shared, QUIET)),
        evidence.Entry(name="c", passes=(), artifact=None, provenance=(QUIET,)),
    ]
    assert evidence._of_steps(entries) == ["a, b: sparse: no gain", "a, b: sparse: slow"]


def test_a_goal_of_latency_that_was_missed_is_a_warning_told_once_for_all_its_variants() -> None:
    def step(met: bool | None) -> dict[str, Any]:
        latency = {"met": met, "words": "0.55 measured (0.5 asked for)"}
        return {"record": {"pruning": {"latency": latency}}, "warnings": []}

    entries = [
        evidence.Entry(name=name, passes=(), artifact=None, provenance=(QUIET, step(met)))
        for name, met in (("a", False), ("b", False), ("c", True), ("elsewhere", None))
    ]
    assert evidence._of_steps(entries) == ["a, b: latency_ratio: 0.55 measured (0.5 asked for)"]


def test_a_budget_of_int8_that_was_missed_is_a_warning() -> None:
    int8 = {"budget_met": False, "max_top1_drop": 0.002, "judged": {"top1_drop": 0.0123, "images": 500}}
    twice = ({**QUIET, "record": {"int8": int8}}, {**QUIET, "record": {"int8": int8, "qat": {}}})
    met = {**QUIET, "record": {"int8": {**int8, "budget_met": True}}}
    entries = [
        evidence.Entry(name="a", passes=(), artifact=None, provenance=twice),
        evidence.Entry(name="b", passes=(), artifact=None, provenance=(met,)),
    ]
    assert evidence._of_steps(entries) == [
        "a: int8: top-1 drops by 0.0123 on 500 val images, more than max_top1_drop 0.002"
    ]
