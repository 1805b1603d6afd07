"""Prune torchvision's and timm's CNNs; say what works, what was left alone and what is refused.

    nice -n 19 python benchmarks/pruning_coverage.py [--out runs/pruning-coverage] [--only resnet18,...] [--side 64]
    python benchmarks/pruning_coverage.py --latency 0.7 --out runs/pruning-latency        on an idle machine

For each net, with random weights drawn so that outputs depend on the image: `prune: {macs_ratio: 0.5, scope: global}`,
or with `--latency` `prune: {latency_ratio}` of onnxruntime on the CPU (batch 1, one thread), measured there; the same
artifact loaded in a fresh process (bit for bit, one thread), exported to ONNX with parity on noise, checked by onnx,
and run by onnxruntime. Images are smaller than usual (`--side`), because channels do not depend on pixels.
What is in results.json of an earlier run stays, but for the nets that are run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TORCHVISION = (
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "shufflenet_v2_x1_0",
    "densenet121", "vgg16", "googlenet", "squeezenet1_1", "alexnet",
)  # fmt: skip
TIMM = (
    "resnet26d", "resnext26ts", "seresnet50", "ecaresnet26t", "skresnet18", "res2net50_26w_4s", "regnetx_008",
    "regnety_008", "mobilenetv3_small_100", "mobilenetv4_conv_small", "efficientnet_b1", "efficientnetv2_rw_t",
    "ghostnet_100", "mixnet_s", "mnasnet_100", "dla34", "cspresnet50", "vovnet39a", "convnext_atto", "hardcorenas_a",
)  # fmt: skip
#: Sides that nets need at least.
LEAST_SIDES = {"alexnet": 96, "vgg16": 64}

RELOAD = """
import sys, numpy, torch
torch.set_num_threads(1)
from deploycnn.models.artifact import load_model
with torch.no_grad():
    numpy.save(sys.argv[3], load_model(sys.argv[1])(torch.from_numpy(numpy.load(sys.argv[2]))).numpy())
"""


def one(kind: str, net: str, side: int, latency: float | None, folder: Path) -> dict[str, Any]:
    """Prune one net and prove it."""
    import numpy as np
    import onnx
    import torch

    from deploycnn import registry, schema
    from deploycnn.core import MAIN_FILE, Artifact, Context
    from deploycnn.models.artifact import get_architecture, load_model, save_model
    from deploycnn.profiling.stopwatch import RuntimeStopwatch
    from deploycnn.pruning.surgery import randomized

    stopwatch = RuntimeStopwatch(runtime="onnxruntime:cpu", image_shape=(3, side, side))

    def step(where: str, name: str, options: dict[str, Any], source: Artifact | None) -> Artifact:
        for part in ("output", "scratch"):
            (folder / where / part).mkdir(parents=True)
        ctx = Context(
            output=folder / where / "output",
            scratch=folder / where / "scratch",
            threads=2,
            target="onnxruntime-cpu",
            stopwatch=stopwatch,
        )
        component = schema.build(registry.get("pass" if source else "source", name), options, name)
        draft = component.run(source, ctx) if source else component.run(ctx)
        values = {field.name: getattr(draft, field.name) for field in fields(draft)}
        return Artifact(key=where, path=ctx.output / MAIN_FILE[draft.format], parents=(), **values)

    source = step("source", kind, {"name": net, "input_size": [side, side]}, None)
    model = load_model(source.path)
    images = torch.randn((2, 3, side, side), generator=torch.Generator().manual_seed(1))
    lively = randomized(model, images, 0).float().eval()
    save_model(lively, source.path.parent, get_architecture(model))
    goal = {"macs_ratio": 0.5, "scope": "global"} if latency is None else {"latency_ratio": latency}
    pruned = step("pruned", "prune", goal, source)
    torch.set_num_threads(1)
    np.save(folder / "images.npy", images.numpy())
    arguments = [pruned.path, folder / "images.npy", folder / "logits.npy"]
    subprocess.run([sys.executable, "-c", RELOAD, *map(str, arguments)], check=True, capture_output=True)
    with torch.no_grad():
        exact = bool(np.array_equal(np.load(folder / "logits.npy"), load_model(pruned.path)(images).numpy()))
    exported = step("onnx", "export", {}, pruned)
    onnx.checker.check_model(str(exported.path), full_check=True)
    record = pruned.facts.record["pruning"]
    reasons: dict[str, int] = {}
    for kept in record["protected"]:
        reasons[kept["reason"]] = reasons.get(kept["reason"], 0) + kept["channels"]
    reasons.pop("these are the model's outputs", None)
    return {
        "latency_ratio": record["latency"]["measured_ratio"] if latency is not None else None,
        "table_error": record["latency"]["table"]["error"] if latency is not None else None,
        "macs_ratio": record["macs_ratio"],
        "params_ratio": record["params_after"] / record["params_before"],
        "reload_exact": exact,
        "parity_max_abs_error": exported.facts.record["parity"]["max_abs_error"],
        "left_alone": reasons,
    }


def main() -> None:
    """Run all nets, one process each, and write results.json and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/pruning-coverage"))
    parser.add_argument("--only", default="")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--latency", type=float, help="share of the dense latency, instead of half the MACs")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        from deploycnn.errors import DeployCNNError

        kind, net = arguments.one
        with TemporaryDirectory() as folder:
            try:
                found = one(
                    kind, net, max(arguments.side, LEAST_SIDES.get(net, 0)), arguments.latency, Path(folder)
                )
            except DeployCNNError as error:
                found = {"refused": str(error)}
        print(json.dumps(found))
        return
    wanted = set(filter(None, arguments.only.split(",")))
    nets = [("torchvision", net) for net in TORCHVISION] + [("timm", net) for net in TIMM]
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    for kind, net in nets:
        if wanted and net not in wanted:
            continue
        started = time.monotonic()
        command = [sys.executable, __file__, "--side", str(arguments.side), "--one", kind, net]
        if arguments.latency is not None:
            command += ["--latency", str(arguments.latency)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        failed = {"failed": done.stderr.strip().splitlines()[-1:] or ["killed"]}
        results[f"{kind}/{net}"] = json.loads(lines[-1]) if done.returncode == 0 and lines else failed
        results[f"{kind}/{net}"]["seconds"] = round(time.monotonic() - started, 1)
        path.write_text(json.dumps(results, indent=1))
        print(row(f"{kind}/{net}", results[f"{kind}/{net}"]), flush=True)


def row(name: str, found: dict[str, Any]) -> str:
    """A line of the table."""
    for key in ("refused", "failed"):
        if key in found:
            return f"| {name} | {key}: {found[key]} | | | | | |"
    left = "; ".join(f"{reason} ({count} channels)" for reason, count in found["left_alone"].items())
    latency = "" if found["latency_ratio"] is None else f"{found['latency_ratio']:.3f}"
    exact = "yes" if found["reload_exact"] else "NO"
    return (
        f"| {name} | {latency} | {found['macs_ratio']:.3f} | {found['params_ratio']:.3f} | {exact} | "
        f"{found['parity_max_abs_error']:.1e} | {left} |"
    )


if __name__ == "__main__":
    main()
