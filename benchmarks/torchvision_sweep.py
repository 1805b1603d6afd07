"""Prune 30 %, export, quantize and profile torchvision's CNNs with random weights; say what works and what does not.

    python benchmarks/torchvision_sweep.py [--out runs/sweep] [--only resnet18,vgg16] [--budget-s 3]

Random weights suffice for latency and parity; accuracy is not measured. They are drawn so that signals keep their size
(He et al. 2015), with batch-norm statistics of the images; else the outputs of deep nets nearly vanish, and equal
outputs would say nothing of equal graphs. Parity is given for fp32 and pruned, each as a share of the outputs' largest
value and of their spread over the images (how far one image's outputs lie from the mean of all). Timed with onnxruntime
on all cores at batch 1, all four variants of a net side by side. Ratios are FP32 latency / variant latency with their
intervals.
"""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from datetime import datetime
from pathlib import Path
from typing import Any

import deploycnn
from deploycnn import environment
from deploycnn.api import load_recipe, open_data
from deploycnn.errors import DeployCNNError
from deploycnn.files import write_json

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


def write_weights(net: str, path: Path) -> None:
    """A checkpoint of random weights with which outputs depend on the image."""
    import safetensors.torch
    import torch
    from torch import nn

    from deploycnn.sources.torchvision import Torchvision
    from deploycnn.training.batchnorm import reestimate

    data = open_data(load_recipe(recipe(net, 1.0, "random")))
    if data is None:
        raise TypeError("the recipe names data")
    torch.manual_seed(0)
    model = Torchvision.build({"name": net}, len(data.dataset.classes))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0.0, 0.2)
    train = data.dataset.train
    images = [torch.from_numpy(data.preprocessing.apply(train.decode(index))) for index in range(16)]
    reestimate(model, [torch.stack(images)])
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), path)


def recipe(net: str, budget_s: float, weights: Path | str) -> dict[str, Any]:
    return {
        "name": net,
        "source": {"torchvision": net, "weights": str(weights)},
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


def sweep(net: str, out: Path, budget_s: float) -> dict[str, Any]:
    """What became of a net, which is also printed."""
    try:
        weights = out / "weights" / f"{net}.safetensors"
        write_weights(net, weights)
        run = deploycnn.compress(recipe(net, budget_s, weights.absolute()), out=out / net)
    except DeployCNNError as error:
        print(f"{net:20} failed: {error}", flush=True)
        return {"error": str(error)}
    except Exception as error:  # our own bug in one net must not hide what the others do
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    variants = {variant["name"]: variant for variant in run.report["variants"]}
    fp32 = variants["fp32"]
    parity = [
        f"{variants[name]['parity'][kind]:.0e}"
        for name in ("fp32", "pruned")
        for kind in ("max_rel_error", "max_spread_error")
        if variants[name]["parity"]
    ]
    kept = variants["pruned"]["macs"] / fp32["macs"] if variants["pruned"]["macs"] else float("nan")
    print(
        f"{net:20} {fp32['latency_ms']['1']['median']:7.2f} ms  parity {' '.join(parity)}  MACs x{kept:.2f}  "
        + "  ".join(f"{name} {show(variants[name])}" for name in ("int8", "pruned", "pruned_int8")),
        flush=True,
    )
    return {"variants": variants, "problems": run.problems}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/torchvision-sweep"))
    parser.add_argument("--only", help="nets, separated by commas")
    parser.add_argument("--budget-s", type=float, default=3.0)
    arguments = parser.parse_args()
    here = environment.detect()
    hardware = re.sub(r"[^a-z0-9]+", "-", here.cpu.lower()).strip("-")
    month = datetime.now().astimezone().strftime("%Y%m")
    path = arguments.out / f"torchvision-sweep_{hardware}_{month}.json"
    results: dict[str, Any] = {}
    for net in arguments.only.split(",") if arguments.only else NETS:
        results[net] = sweep(net, arguments.out, arguments.budget_s)
        # After each net: what is broken off keeps what it has.
        write_json(path, {"environment": here.to_json(), "nets": results})
    print(f"raw results: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
