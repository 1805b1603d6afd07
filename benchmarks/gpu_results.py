"""From the runs of `benchmarks/gpu.py` to its table: figures, parity, and the reasons of what is missing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_plan
import numpy as np
import numpy.typing as npt

import deploycnn
from deploycnn import store
from deploycnn.core import Artifact
from deploycnn.errors import DeployCNNError
from deploycnn.runtimes.base import create, untimed

#: Images that parity is measured on, and the batch that they are run in.
PARITY_IMAGES, PARITY_BATCH = 32, 8
_FIGURES = (
    "median_ms",
    "p90_ms",
    "p99_ms",
    "median_interval_ms",
    "throughput_ips",
    "ratio",
    "top1",
)


def of_run(run: deploycnn.Run) -> dict[str, Any]:
    """Measurements, failed variants, the GPU's state and problems of one run."""
    report = run.report
    states: dict[str, Any] = {}
    for row in report["measurements"]:
        samples = row.get("samples")
        if samples and samples["file"] and str(row["batch_size"]) not in states:
            stored = json.loads((run.path / samples["file"]).read_text())
            disturbed = [item["disturbance"] for item in stored["rows"] if item["disturbance"]]
            states[str(row["batch_size"])] = disturbed[0]["gpu"] if disturbed else None
    return {
        "measurements": [
            {key: value for key, value in row.items() if key != "samples"} for row in report["measurements"]
        ],
        "variants": {
            item["name"]: {"why": item.get("why", ""), "top1": item["top1"], "status": item["status"]}
            for item in report["variants"]
        },
        "gpu": states,
        "data": report["data"] and {key: report["data"][key] for key in ("name", "counts")},
        "baseline": report["baseline"],
        "problems": list(run.problems),
    }


def artifacts(folder: Path) -> dict[str, Artifact]:
    """The variants that were made, by name."""
    return {
        link.name: store.load_artifact(link.resolve()) for link in sorted((folder / "variants").iterdir())
    }


def parity(folder: Path, usable: Sequence[str]) -> list[dict[str, Any]]:
    """Every variant on every runtime that opens it against the float64 model on the CPU."""
    import torch

    from deploycnn.models.artifact import load_model

    made = artifacts(folder)
    shape = [size or 1 for size in made["torch"].inputs[0].shape[1:]]
    images = np.random.default_rng(0).standard_normal((PARITY_IMAGES, *shape), dtype=np.float32)
    model = load_model(made["torch"].path).double().eval()
    with torch.inference_mode():
        chunks = [
            model(torch.from_numpy(images[i : i + PARITY_BATCH]).double())
            for i in range(0, PARITY_IMAGES, PARITY_BATCH)
        ]
    wanted = torch.cat(chunks).numpy()
    found = []
    for variant, artifact in made.items():
        named = {untimed(spec) for _, spec in gpu_plan.runtimes_of(variant, gpu_plan.PRECISIONS)}
        for spec in dict.fromkeys(untimed(spec) for spec in usable):
            if spec in named:
                near = _deviation(artifact, spec, images, wanted)
                found.append({"variant": variant, "runtime": spec, **near})
    return found


def _deviation(
    artifact: Artifact, spec: str, images: npt.NDArray[np.float32], wanted: npt.NDArray[np.float64]
) -> dict[str, Any]:
    try:
        session = create(spec).open(artifact, batch_size=PARITY_BATCH, threads=1)
        try:
            got = np.concatenate(
                [session.run(images[i : i + PARITY_BATCH])[0] for i in range(0, len(images), PARITY_BATCH)]
            )
        finally:
            session.close()
    except DeployCNNError as error:
        return {"why": str(error)}
    apart = np.abs(got.astype(np.float64) - wanted)
    spread = float(np.abs(wanted - wanted.mean(axis=0)).max())
    return {
        "max_relative_error": float(apart.max() / np.abs(wanted).max()),
        # as a share of how far outputs of different images lie apart: near 1, equality of top-1 is chance
        "max_spread_error": float(apart.max() / spread) if spread else None,
        "top1_agreement": float((got.argmax(axis=1) == wanted.argmax(axis=1)).mean()),
        "images": len(images),
    }


def join(rows: Sequence[gpu_plan.Combination], measured: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every planned row with its figures, or with the reason why there are none."""
    nets = {result["net"]: result for result in measured}
    return [
        {**dataclasses.asdict(row), "transfers": row.transfers, **_figures(row, nets.get(row.net, {}))}
        for row in rows
    ]


def _figures(row: gpu_plan.Combination, result: Mapping[str, Any]) -> dict[str, Any]:
    key = (row.variant, row.runtime, row.batch_size)
    found = next(
        (
            item
            for item in result.get("measurements", ())
            if (item["variant"], item["runtime"], item["batch_size"]) == key
        ),
        None,
    )
    if found is not None and found["status"] == "measured":
        near: Mapping[str, Any] = next(
            (
                item
                for item in result.get("parity", ())
                if (item["variant"], item["runtime"]) == (row.variant, untimed(row.runtime))
            ),
            {},
        )
        return {
            "status": "measured",
            "why": "",
            "executed": found.get("precision"),
            **{name: found.get(name) for name in _FIGURES},
            "parity": near.get("max_relative_error"),
            "agreement": near.get("top1_agreement"),
        }
    variant = result.get("variants", {}).get(row.variant, {})
    why = (
        result.get("failed")
        or result.get("unavailable", {}).get(row.runtime)
        or (variant.get("why") if variant.get("status") == "failed" else "")
        or (found["why"] if found is not None else "")
    )
    return {"status": "not measured", "why": why or ""}


_HEAD = (
    f"{'net':9} {'batch':>5} {'asked':10} {'ran':10} {'runtime':48} {'copies':7} {'p50 ms':>9} {'p90 ms':>9} "
    f"{'p99 ms':>9} {'images/s':>10} {'parity':>8} {'agree':>6} {'top1':>6}"
)
_FOOT = "parity: largest error / largest output of the float64 model on the CPU; agree: share of equal top-1"


def _line(row: Mapping[str, Any]) -> str:
    agreement, top1 = _number(row["agreement"], ".2f"), _number(row["top1"], ".4f")
    return (
        f"{row['net']:9} {row['batch_size']:5} {row['precision']:10} {row['executed'] or '':10} {row['runtime']:48} "
        f"{'with' if row['transfers'] else 'without':7} {row['median_ms']:9.3f} {row['p90_ms']:9.3f} "
        f"{row['p99_ms']:9.3f} {row['throughput_ips']:10.1f} {_number(row['parity'], '.1e'):>8} "
        f"{agreement:>6} {top1:>6}"
    )


def table(rows: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]]) -> str:
    """The table as text: figures, audits, rebuilds, the GPU's state, and all that is missing, with reasons."""
    lines = [_HEAD, *(_line(row) for row in rows if row["status"] == "measured"), _FOOT]
    for result in measured:
        lines += _told(result)
    missing: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "measured":
            key = (row["net"], row["why"] or "no reason was recorded: this is a fault of the benchmark")
            missing.setdefault(key, []).append(f"{row['variant']} on {row['runtime']} at {row['batch_size']}")
    if missing:
        lines.append("not measured:")
    for (net, why), names in missing.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"  {net}: {len(names)} rows ({shown}): {why}")
    return "\n".join(lines)


def _told(result: Mapping[str, Any]) -> list[str]:
    net = result["net"]
    lines = [
        f"{net} audit {item['variant']:16} {item['census'] or ''}{_why(item)}"
        for item in result.get("audits", ())
    ]
    for item in result.get("rebuilds", ()):
        figures = (
            f"median {item['median_ms']:.3f} ms, from build to build {100 * item['spread']:.1f}%"
            if "spread" in item
            else ""
        )
        lines.append(f"{net} {item['builds']} builds of {item['variant']}: {figures}{_why(item)}")
    lines += [
        f"{net} {item['variant']} at batch {item['batch_size']}: "
        + ", ".join(
            f"{count} stream{'s' * (count > 1)} {ips:.0f} images/s" for count, ips in item["images_per_s"]
        )
        + _why(item)
        for item in result.get("streams", ())
    ]
    data = result.get("data")
    if data is not None and any(row.get("top1") is not None for row in result.get("measurements", ())):
        lines.append(f"{net} top1: {data['name']}, test split of {data['counts']['test']} images")
    for batch_size, state in result.get("gpu", {}).items():
        lines.append(f"{net} GPU at batch {batch_size}: {_state(state)}")
    return lines


def _why(item: Mapping[str, Any]) -> str:
    return f" ({item['why']})" if item.get("why") else ""


def _state(state: Mapping[str, Any] | None) -> str:
    if state is None:
        return "not recorded (NVML tells nothing here)"
    ranges = [
        f"{words} {state[key][0]:g} to {state[key][1]:g} {unit}"
        for key, words, unit in (("sm_clock_mhz", "SM clock", "MHz"), ("memory_clock_mhz", "memory clock", "MHz"),
                                 ("power_w", "power", "W"), ("temperature_c", "temperature", "C"))
        if state[key] is not None
    ]  # fmt: skip
    return f"{state['name']}, driver {state['driver']}: {', '.join(ranges)}{_reasons(state)}"


def _reasons(state: Mapping[str, Any]) -> str:
    return f"; held down by {', '.join(state['reasons'])}" if state["reasons"] else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
