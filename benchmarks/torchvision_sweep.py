"""Prune 30 %, export, quantize and profile torchvision's CNNs with random weights; say what works and what does not.

    python benchmarks/torchvision_sweep.py [--out runs/sweep] [--only resnet18,vgg16] [--budget-s 3]

Random weights suffice for latency and parity; accuracy is not measured. Timed with onnxruntime on all cores at
batch 1, all four variants of a net side by side. Ratios are FP32 latency / variant latency with their intervals.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import traceback
from datetime import datetime
from pathlib import Path
from typing import Any

import deploycnn
from deploycnn import environment
from deploycnn.errors import DeployCNNError

NETS = (
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "shufflenet_v2_x1_0",
    "densenet121", "vgg16", "googlenet", "squeezenet1_1", "alexnet",
)  # fmt: skip
VARIANTS = {
    "fp32": ["export"],
    "int8": ["export", {"int8": {"calibration_images": 32}}],
    "pruned": [{"prune": {"pruning_ratio": 0.3}}, "export"],
    "pruned_int8": [{"prune": {"pruning_ratio": 0.3}}, "export", {"int8": {"calibration_images": 32}}],
}


def recipe(net: str, budget_s: float) -> dict[str, Any]:
    return {
        "name": net,
        "source": {"torchvision": net},
        "data": "digits",
        "preprocessing": {"size": 224},
        "variants": VARIANTS,
        "profile": {
            "batch_sizes": [1],
            "threads": ["all"],
            "budget_s": budget_s,
            "accuracy": False,
            "memory": False,
        },
    }


def show(variant: dict[str, Any]) -> str:
    if variant["status"] != "measured":
        return f"{variant['status']}: {variant['why']}"
    speedup = variant["speedup"]["1"]
    return f"{speedup['ratio']:5.2f} ({speedup['low']:.2f}-{speedup['high']:.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/torchvision-sweep"))
    parser.add_argument("--only", help="nets, separated by commas")
    parser.add_argument("--budget-s", type=float, default=3.0)
    arguments = parser.parse_args()
    nets = arguments.only.split(",") if arguments.only else NETS
    results: dict[str, Any] = {}
    for net in nets:
        try:
            run = deploycnn.compress(recipe(net, arguments.budget_s), out=arguments.out / net)
        except DeployCNNError as error:
            results[net] = {"error": str(error)}
            print(f"{net:20} failed: {error}", flush=True)
            continue
        except Exception as error:  # our own bug in one net must not hide what the others do
            traceback.print_exc()
            results[net] = {"error": f"{type(error).__name__}: {error}"}
            continue
        variants = {variant["name"]: variant for variant in run.report["variants"]}
        results[net] = {"variants": variants, "problems": run.problems}
        fp32 = variants["fp32"]
        parity = fp32["parity"]["max_abs_error"] if fp32["parity"] else float("nan")
        kept = variants["pruned"]["macs"] / fp32["macs"] if variants["pruned"]["macs"] else float("nan")
        print(
            f"{net:20} {fp32['latency_ms']['1']['median']:7.2f} ms  parity {parity:.1e}  MACs x{kept:.2f}  "
            + "  ".join(f"{name} {show(variants[name])}" for name in ("int8", "pruned", "pruned_int8")),
            flush=True,
        )
    here = environment.detect()
    hardware = re.sub(r"[^a-z0-9]+", "-", here.cpu.lower()).strip("-")
    month = datetime.now().astimezone().strftime("%Y%m")
    path = arguments.out / f"torchvision-sweep_{hardware}_{month}.json"
    path.write_text(json.dumps({"environment": here.to_json(), "nets": results}, indent=1))
    print(f"raw results: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
