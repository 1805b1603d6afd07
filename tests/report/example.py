"""A realistic report, made up and seeded.

Five variants, three runtimes, two batch sizes, two thread counts; one variant failed, one runtime is not
there.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

from deploycnn.report.schema import Report, summarize_samples, validate

BATCHES = (1, 64)
THREADS = (1, 2)
RUNTIMES = {"onnxruntime:cpu": 1.0, "openvino:f32": 1.13}
NO_CUDA = 'CUDAExecutionProvider is not in this onnxruntime build; pip install "deploycnn[gpu]" on a GPU host'

#: name -> (passes, batch-1 speed-up over fp32, top-1 on 450 images, size, params, MACs, precision)
VARIANTS: dict[str, tuple[list[str], float, int, int, int, int, str]] = {
    "fp32": (["train", "export"], 1.0, 443, 1_120_402, 272_474, 40_813_184, "f32"),
    "int8": (["train", "export", "int8"], 2.27, 442, 371_208, 272_474, 40_813_184, "u8s8+f32"),
    "pruned": (["train", "prune", "distill", "export"], 1.72, 437, 446_811, 107_914, 15_902_208, "f32"),
    "pruned_int8": (
        ["train", "prune", "distill", "export", "int8"],
        3.1,
        439,
        158_114,
        107_914,
        15_902_208,
        "u8s8+f32",
    ),
}
FAILED = "parity 0.31 exceeds the tolerance 0.05 at batch 4; keep the first layer in fp32 (keep_fp32_ops)"


def _row(name: str, runtime: str, batch: int, threads: int, rng: random.Random) -> dict[str, Any]:
    _, factor, _, _, _, _, precision = VARIANTS[name]
    base = (
        0.79
        * (0.83 * batch if batch > 1 else 1)
        / (1.6 if threads == 2 and batch > 1 else 1.08 if threads == 2 else 1)
    )
    ratio = factor ** (1.05 if batch > 1 else 1) * RUNTIMES[runtime]
    median = base / ratio
    samples = [
        median * (1 + abs(rng.gauss(0, 0.012)) + (rng.random() < 0.03) * rng.random() * 0.6 - 0.008)
        for _ in range(1600)
    ]
    found = summarize_samples(
        samples, f"measurements/{name}--{runtime.replace(':', '-')}--b{batch}--t{threads}.json"
    )
    at = dict(zip(found["probabilities"], found["quantiles_ms"], strict=True))
    reference = name == "fp32" and runtime == "onnxruntime:cpu"
    return {
        "id": f"{name}|{runtime}|b{batch}|t{threads}",
        "variant": name,
        "runtime": runtime,
        "precision": precision,
        "batch_size": batch,
        "threads": threads,
        "status": "measured",
        "why": "",
        "median_ms": at[0.5],
        "p90_ms": at[0.9],
        "p99_ms": at[0.99],
        "median_interval_ms": [at[0.5] * 0.974, at[0.5] * 1.031],
        "throughput_ips": 1000 * batch / at[0.5],
        "ratio": 1.0 if reference else ratio,
        "low": 1.0 if reference else ratio * 0.94,
        "high": 1.0 if reference else ratio * 1.065,
        "verdict": "baseline" if reference else "faster",
        "reference": None if reference else f"fp32|onnxruntime:cpu|b{batch}|t{threads}",
        "sessions": 8,
        "warmup": 20,
        "disturbance": "2 of 80 blocks ran beside another process"
        if name == "int8" and batch == 64
        else None,
        "samples": found,
    }


def _absent(name: str, runtime: str, batch: int, threads: int, status: str, why: str) -> dict[str, Any]:
    keys = ("median_ms", "p90_ms", "p99_ms", "median_interval_ms", "throughput_ips", "ratio", "low", "high")
    return {
        "id": f"{name}|{runtime}|b{batch}|t{threads}",
        "variant": name,
        "runtime": runtime,
        "precision": None,
        "batch_size": batch,
        "threads": threads,
        "status": status,
        "why": why,
        "verdict": None,
        "reference": None,
        "sessions": 0,
        "warmup": 0,
        "disturbance": None,
        "samples": None,
        **dict.fromkeys(keys),
    }


def _record(step: str, rng: random.Random) -> dict[str, Any]:
    if step in {"train", "distill"}:
        epochs = 24 if step == "train" else 16
        return {
            "training": {
                "epochs": [
                    {
                        "epoch": epoch,
                        "loss": 2.1 * 0.82**epoch + 0.05 + 0.02 * rng.random(),
                        "val_top1": 0.985 - 0.75 * 0.72**epoch - 0.01 * rng.random(),
                        "val_loss": 1.9 * 0.8**epoch + 0.11 + 0.02 * rng.random(),
                        "lr": 0.1 * (1 - epoch / epochs),
                        "seconds": 2.6,
                    }
                    for epoch in range(1, epochs + 1)
                ],
                "kept_epoch": epochs - 2,
                "stopped": "finished",
                "precision": "fp32",
                "device": "cpu",
            },
        }
    if step == "prune":
        widths = {f"layer{1 + block // 3}.{block % 3}.conv1": 16 * 2 ** (block // 3) for block in range(9)}
        return {
            "pruning": {
                "importance": "taylor",
                "macs_ratio": 0.39,
                "widths": {
                    layer: {"before": [width, width], "after": [width, max(8, width * 5 // 8 // 8 * 8)]}
                    for layer, width in widths.items()
                }
                | {"fc": {"before": [64, 10], "after": [40, 10]}},
            }
        }
    if step == "export":
        return {
            "parity": {"max_abs_error": 3.1e-6, "tolerance": 1e-4, "images": 16, "batch_sizes": [1, 4]},
            "opset": 18,
        }
    return {
        "calibration": {"images": 512, "method": "minmax", "per_class": 51},
        "quantized_ops": {"Conv": 21, "Gemm": 1, "Add": 9},
    }


def _options(step: str) -> dict[str, Any]:
    return {
        "train": {"epochs": 24, "optimizer": "sgd", "learning_rate": 0.1},
        "prune": {"latency_ratio": 0.5, "importance": "taylor", "multiple": 8},
        "distill": {"teacher": "fp32", "epochs": 16, "temperature": 4.0},
        "export": {"opset": 18},
        "int8": {"method": "minmax", "per_channel": True},
        "fp16": {"keep_fp32_ops": []},
    }[step]


def _provenance(passes: list[str]) -> list[dict[str, Any]]:
    """Shared prefixes have the same keys, and the same key means the same record."""
    keys = [
        hashlib.sha256("/".join(passes[: end + 1]).encode()).hexdigest()[:12] for end in range(len(passes))
    ]
    return [
        {
            "pass": step,
            "key": key,
            "options": _options(step),
            "seconds": {"train": 61.2, "distill": 44.0, "prune": 3.4, "export": 5.1}.get(step, 7.7),
            "record": _record(step, random.Random(key)),
            "warnings": [],
        }
        for step, key in zip(passes, keys, strict=True)
    ]


def _variant(name: str, rows: list[dict[str, Any]], rng: random.Random) -> dict[str, Any]:
    passes, _, right, size, params, macs, precision = VARIANTS[name]
    runtime = "openvino:f32" if name == "int8" else "onnxruntime:cpu"
    own = {
        row["batch_size"]: row
        for row in rows
        if row["variant"] == name and row["runtime"] == runtime and row["threads"] == 1
    }
    top1, drop = right / 450, (443 - right) / 450
    lost, gained = {"fp32": (0, 0), "int8": (1, 0), "pruned": (8, 2), "pruned_int8": (7, 3)}[name]
    half = 1.96 * ((lost + gained) ** 0.5) / 450 + 0.001
    flips = [f"test/{rng.randrange(10)}/{rng.randrange(1797):04d}.png" for _ in range(lost + gained)]
    return {
        "name": name,
        "passes": passes,
        "runtime": runtime,
        "precision": precision,
        "top1": top1,
        "top1_interval": [top1 - 0.0125, min(1.0, top1 + 0.0085)],
        "top1_drop": drop,
        "top1_drop_interval": [0.0, 0.0] if name == "fp32" else [drop - half, drop + half],
        "val_top1_drop": drop * 0.8,
        "val_top1_drop_interval": [drop - half, drop + half],
        "mcnemar_p": None if name == "fp32" else {"int8": 1.0, "pruned": 0.109, "pruned_int8": 0.344}[name],
        "agreement": None if name == "fp32" else 1 - (lost + gained + 1) / 450,
        "agreement_interval": None if name == "fp32" else [0.9, 1.0],
        "flipped": None
        if name == "fp32"
        else {
            "right_to_wrong": {"count": lost, "names": flips[:lost]},
            "wrong_to_right": {"count": gained, "names": flips[lost:]},
        },
        "latency_ms": {
            str(b): {"median": r["median_ms"], "p90": r["p90_ms"], "p99": r["p99_ms"]} for b, r in own.items()
        },
        "speedup": {
            str(b): {key: r[key] for key in ("ratio", "low", "high", "verdict")} for b, r in own.items()
        },
        "size_bytes": size,
        "params": params,
        "macs": macs,
        "peak_memory_bytes": 61_000_000 + size * 4,
        "parity": {"max_abs_error": 3.1e-6, "tolerance": 1e-4, "images": 16},
        "within_budget": {"fp32": True, "int8": True, "pruned": False, "pruned_int8": "unproven"}[name],
        "status": "measured",
        "why": "",
        "provenance": _provenance(passes),
    }


def _failed(name: str, why: str) -> dict[str, Any]:
    absent = (
        "runtime",
        "precision",
        "top1",
        "top1_interval",
        "top1_drop",
        "top1_drop_interval",
        "val_top1_drop",
        "val_top1_drop_interval",
        "mcnemar_p",
        "flipped",
        "size_bytes",
        "params",
        "macs",
        "peak_memory_bytes",
        "parity",
        "within_budget",
    )
    passes = ["train", "export", "fp16"]
    return {
        "name": name,
        "passes": passes,
        **dict.fromkeys(absent),
        "latency_ms": {},
        "speedup": {},
        "status": "failed",
        "why": why,
        "provenance": _provenance(passes[:2]),
    }


def example_report() -> Report:
    """The example, new on every call so that a test may change it."""
    rng = random.Random(7)
    settings = [(runtime, batch, threads) for runtime in RUNTIMES for batch in BATCHES for threads in THREADS]
    rows = [_row(name, *one, rng) for name in VARIANTS for one in settings]
    rows += [
        _absent(name, "onnxruntime:cuda", batch, threads, "not measured", NO_CUDA)
        for name in VARIANTS
        for batch in BATCHES
        for threads in THREADS
    ]
    rows += [_absent("fp16", *one, "not measured", "the variant failed") for one in settings]
    report = {
        "schema_version": 1,
        "name": "digits-resnet20",
        "created": "2026-11-24T12:46:03Z",
        "environment": {
            "cpu": "AMD EPYC 9R14",
            "isa": ["avx2", "avx512_vnni", "avx512_bf16"],
            "cores": 2,
            "gpu": None,
            "os": "Linux 6.8 x86_64",
            "python": "3.11.9",
            "power": "unknown",
            "versions": {
                "deploycnn": "0.1.0",
                "torch": "2.15.0",
                "onnxruntime": "1.32.0",
                "openvino": "2026.4.0",
            },
        },
        "data": {
            "name": "digits",
            "counts": {"train": 1077, "val": 270, "test": 450},
            "classes": [str(digit) for digit in range(10)],
            "fingerprint": "9f6c1f0c2d5b7a11",
            "skipped": [{"path": "train/3/notes.txt", "why": "not an image"}],
            "preprocessing": {
                "size": [32, 32],
                "resize": "squash",
                "scale": "standardize",
                "channels": "rgb",
            },
        },
        "baseline": {"variant": "fp32", "runtime": "onnxruntime:cpu"},
        "budget": {"max_top1_drop": 0.01},
        "winner": {
            "variant": "pruned_int8",
            "runtime": "onnxruntime:cpu",
            "why": "the fastest at batch 1 of the 3 variants whose drop on val is within the budget",
        },
        "why_no_winner": "",
        "primary": {"runtimes": ["onnxruntime:cpu", "openvino:f32"], "threads": 1, "batch_size": 1},
        "variants": [*(_variant(name, rows, rng) for name in VARIANTS), _failed("fp16", FAILED)],
        "measurements": rows,
        "warnings": ["the CPU's frequency governor is not known: latencies may drift"],
        "method": {
            "confidence": 0.95,
            "sessions": 8,
            "blocks": 10,
            "runs_per_block": 20,
            "warmup_runs": 20,
            "resamples": 2000,
        },
        "recipe": "source: {zoo: resnet20}\ndata: digits\ntarget: cpu\nbudget: {max_top1_drop: 0.01}\n",
        "command": "deploycnn compress recipes/digits.yaml",
    }
    return validate(report)
