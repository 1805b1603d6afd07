"""What `benchmarks/gpu.py` asks of engines beside their latency: audits with times, builds again, several streams."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_plan
import gpu_results
import numpy as np

import deploycnn
from deploycnn import files
from deploycnn.core import Artifact
from deploycnn.engines.auditing import audit_engine
from deploycnn.errors import DeployCNNError
from deploycnn.runtimes.base import create

#: Contexts that run side by side, each on a stream of its own.
STREAMS = (1, 2, 4)
_ROUNDS, _CALLS = 5, 20


def audits(folder: Path, *, batch_size: int) -> list[dict[str, Any]]:
    """Census of each engine; with its layers' times where its runtime runs here."""
    found = []
    for variant, artifact in gpu_results.artifacts(folder).items():
        if artifact.format != "engine":
            continue
        spec = gpu_plan.ENGINES[variant.partition("-")[0]][1]
        times, why = None, ""
        try:
            times = _layer_times(artifact, spec, batch_size, folder / "layer-times" / f"{variant}.json")
        except DeployCNNError as error:
            why = f"no times of layers: {error}"
        try:
            audited = audit_engine(artifact.path, times=times)
            result: dict[str, Any] = {
                "census": audited.audit.census(),
                "metrics": audited.audit.metrics(),
                "source": audited.source,
                "times_at_batch": batch_size if times else None,
            }
        except DeployCNNError as error:
            result, why = {"census": ""}, f"no audit: {error}"
        found.append({"variant": variant, "why": why, **result})
    return found


def _layer_times(artifact: Artifact, spec: str, batch_size: int, target: Path) -> dict[str, float]:
    images = _noise(artifact, batch_size)
    session: Any = create(spec).open(artifact, batch_size=batch_size, threads=1)
    try:
        times: dict[str, float] = session.layer_times(images)
    finally:
        session.close()
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(target, times)
    return times


def rebuilds(folder: Path, count: int, budget_s: float, usable: Sequence[str]) -> list[dict[str, Any]]:
    """Build engines of one graph ``count`` times, without what earlier builds timed, and time them side by side."""
    found = []
    made = gpu_results.artifacts(folder)
    for form, (flavour, spec) in gpu_plan.ENGINES.items():
        for precision in ("fp16", "int8_fp16"):
            graph, variant = made.get(f"onnx-{precision}"), f"{form}-{precision}"
            told: dict[str, Any] = {"why": f"{spec} does not run here"}
            try:
                if graph is None:
                    told = {"why": f"onnx-{precision} was not made"}
                elif spec in usable:
                    told = _rebuild(graph, folder / "rebuilds" / variant, flavour, spec, count, budget_s)
            except DeployCNNError as error:
                told = {"why": str(error)}
            found.append({"variant": variant, "builds": count, **told})
    return found


def _rebuild(
    graph: Artifact, folder: Path, flavour: str, spec: str, count: int, budget_s: float
) -> dict[str, Any]:
    build = {"flavour": flavour, "max_batch": 64, "opt_batch": 8, "timing_cache": False}
    runs = []
    for number in range(count):
        recipe = {
            "source": {"onnx": str(graph.path)},
            "target": "tensorrt",
            "variants": {"engine": [{"build_engine": build}]},
        }
        runs.append(folder / f"build{number}")
        deploycnn.export(recipe, out=runs[-1])
    run = deploycnn.profile(
        *runs, runtimes=(f"{spec}+device",), batch_sizes=(8,), threads=(1,), budget_s=max(budget_s, 2.0),
        out=folder / f"profile-{count}",
    )  # fmt: skip
    medians = [row["median_ms"] for row in run.report["measurements"] if row["status"] == "measured"]
    if not medians:
        return {"why": "; ".join(row["why"] for row in run.report["measurements"])}
    middle = statistics.median(medians)
    return {"median_ms": middle, "medians_ms": medians, "spread": (max(medians) - min(medians)) / middle}


def streams(folder: Path, usable: Sequence[str], batch_size: int) -> list[dict[str, Any]]:
    """Images per second of FP16 and INT8 engines on several streams at once, copies included, by the host's clock."""
    found = []
    for variant, artifact in gpu_results.artifacts(folder).items():
        form, _, precision = variant.partition("-")
        if artifact.format != "engine" or precision not in ("fp16", "int8_fp16"):
            continue
        spec = gpu_plan.ENGINES[form][1]
        where: dict[str, Any] = {"variant": variant, "batch_size": batch_size, "images_per_s": []}
        try:
            if spec in usable:
                where["images_per_s"] = _throughput(artifact, spec, batch_size)
            else:
                where["why"] = f"{spec} does not run here"
        except DeployCNNError as error:
            where["why"] = str(error)
        found.append(where)
    return found


def _throughput(artifact: Artifact, spec: str, batch_size: int) -> list[tuple[int, float]]:
    """Median over rounds, in which all stream counts take turns."""
    images = _noise(artifact, batch_size)
    session: Any = create(spec).open(artifact, batch_size=batch_size, threads=1)
    try:
        calls = {count: session.concurrent(images, count) for count in STREAMS}
        rates: dict[int, list[float]] = {count: [] for count in STREAMS}
        for _ in range(_ROUNDS):
            for count, call in calls.items():
                call()
                start = time.perf_counter()
                for _ in range(_CALLS):
                    call()
                rates[count].append(_CALLS * count * batch_size / (time.perf_counter() - start))
    finally:
        session.close()
    return [(count, statistics.median(values)) for count, values in rates.items()]


def _noise(artifact: Artifact, batch_size: int) -> Any:
    shape = [size or 1 for size in artifact.inputs[0].shape[1:]]
    return np.random.default_rng(0).standard_normal((batch_size, *shape), dtype=np.float32)
