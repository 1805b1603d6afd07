"""Everything that runs a CNN on an NVIDIA GPU, side by side: TensorRT, TensorRT-RTX, ONNX Runtime, PyTorch.

    python benchmarks/gpu.py --out runs/gpu                               all nets, batches and precisions
    python benchmarks/gpu.py --nets resnet50 --data resnet50=IMAGENET --weights resnet50=FILE
    python benchmarks/gpu.py --nets resnet56 --batch-sizes 1,64 --budget 0.5 --rebuilds 5

Each net is one recipe: a variant for each precision and form (torch, ONNX, engine), timed interleaved in one run by
`deploycnn.compress`, on every runtime that opens it: with copies to and from the device, without them (``+device``),
and as a CUDA graph (``+graph``). What is expected is planned first (`--plan` prints it and needs no GPU); whatever has
no figure in the end is listed with its reason. Then parity of each runtime with the float64 model on the CPU, an audit
of each engine with its layers' times, and with ``--rebuilds N`` the spread of N builds of one graph.

TF32 is no type in a graph: in strongly typed networks too the builder's flag TF32 lets float32 layers use it, so the
engine `tf32` is the FP32 graph built with `build_engine: {tf32: true}`, and every other engine is built without.
PyTorch's own default for convolutions is TF32; ``+fp32`` forbids it.

Without --weights nets have random weights (the CIFAR nets are trained for a few epochs on the images at hand, else the
digits of scikit-learn): figures of time do not depend on that, accuracy and parity then say little. Results:
``gpu_<hardware>_<month>.txt`` and ``.json`` under --out. Without a GPU: exit code 2.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_engines
import gpu_plan
import gpu_results

import deploycnn
from deploycnn import environment, files
from deploycnn.engines import device
from deploycnn.errors import DeployCNNError, RecipeError, RuntimeUnavailable, nearest
from deploycnn.runtimes.base import create


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    try:
        nets = [gpu_plan.net(name) for name in options.nets]
        precisions = gpu_plan.checked(options.precisions)
        _check_without(options.without, gpu_plan.specs(gpu_plan.PRECISIONS))
        rows = [row for net in nets for row in gpu_plan.combinations(net, precisions, options.batch_sizes)]
        if options.plan:
            print(gpu_plan.text(rows))
            return 0
        device.require_gpu()
        measured = [_measure(net, precisions, options) for net in nets]
        return _write(rows, measured, options)
    except DeployCNNError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--nets", type=_list, default=list(gpu_plan.NETS), help="comma-separated")
    parser.add_argument("--precisions", type=_list, default=list(gpu_plan.PRECISIONS), help="comma-separated")
    parser.add_argument(
        "--batch-sizes", type=lambda text: [int(item) for item in _list(text)], default=[1, 8, 64, 256]
    )
    parser.add_argument("--opt-batch", type=int, default=8, help="batch size that engines are optimized for")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timing for each row")
    parser.add_argument(
        "--rebuilds", type=int, default=0, help="build each FP16 and INT8 engine so many times"
    )
    parser.add_argument(
        "--without", action="append", default=[], metavar="RUNTIME", help="leave out runtimes that begin so"
    )
    parser.add_argument("--weights", type=_pair, action="append", default=[], metavar="NET=FILE")
    parser.add_argument(
        "--data", type=_pair, action="append", default=[], metavar="NET=FOLDER", help="an image folder or zip"
    )
    parser.add_argument("--plan", action="store_true", help="print what would be measured, and stop")
    return parser.parse_args(arguments)


def _list(text: str) -> list[str]:
    return [item for item in text.split(",") if item]


def _pair(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or name not in gpu_plan.NETS:
        raise argparse.ArgumentTypeError(f"write NET=PATH with NET one of {', '.join(gpu_plan.NETS)}")
    return name, value


def _check_without(prefixes: Sequence[str], specs: Sequence[str]) -> None:
    for prefix in prefixes:
        if not any(spec.startswith(prefix) for spec in specs):
            raise RecipeError(f"--without {prefix}: no runtime begins so; {nearest(prefix, specs)}")


def _measure(net: gpu_plan.Net, precisions: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """One net: the timed run, parity, audits and rebuilds; what fails as a whole is told as the reason."""
    weights, data = dict(options.weights).get(net.name), dict(options.data).get(net.name)
    reasons = {spec: _reason(spec, options.without) for spec in gpu_plan.specs(precisions)}
    result: dict[str, Any] = {"net": net.name, "unavailable": {s: why for s, why in reasons.items() if why}}
    usable = [spec for spec, why in reasons.items() if not why]
    if not usable:
        raise RuntimeUnavailable(
            "nothing here runs on the GPU: " + "; ".join(f"{spec}: {why}" for spec, why in reasons.items())
        )
    recipe = gpu_plan.recipe(
        net,
        precisions,
        batch_sizes=options.batch_sizes,
        budget_s=options.budget,
        accuracy=data is not None or net.kind == "zoo",
        trained=weights is not None,
        runtimes=[*usable, *result["unavailable"]],
        best=options.opt_batch,
    )
    folder = options.out / net.name
    print(f"{net.name}: {len(recipe['variants'])} variants on {len(usable)} runtimes", flush=True)
    try:
        run = deploycnn.compress(recipe, out=folder, data=data, weights=weights)
    except DeployCNNError as error:
        return {**result, "failed": str(error)}
    result |= gpu_results.of_run(run)
    result["parity"] = gpu_results.parity(folder, usable)
    batch_size = min(8, max(options.batch_sizes))
    result["audits"] = gpu_engines.audits(folder, batch_size=batch_size)
    result["streams"] = gpu_engines.streams(folder, usable, batch_size)
    if options.rebuilds:
        result["rebuilds"] = gpu_engines.rebuilds(folder, options.rebuilds, options.budget, usable)
    return result


def _reason(spec: str, without: Sequence[str]) -> str:
    """Why a runtime is not measured; empty where it is."""
    for prefix in without:
        if spec.startswith(prefix):
            return f"left out as asked (--without {prefix})"
    found = create(spec).availability()
    return "" if found.ok else f"{found.why}; {found.mend}"


def _write(
    rows: Sequence[gpu_plan.Combination], measured: Sequence[dict[str, Any]], options: argparse.Namespace
) -> int:
    here = environment.detect()
    joined = gpu_results.join(rows, measured)
    text = gpu_results.table(joined, measured)
    print(text)
    hardware = re.sub(r"[^a-z0-9]+", "-", (here.gpu or here.cpu).lower()).strip("-")
    name = f"gpu_{hardware}_{datetime.now().astimezone():%Y%m}"
    options.out.mkdir(parents=True, exist_ok=True)
    files.write_text(options.out / f"{name}.txt", text + "\n")
    files.write_json(
        options.out / f"{name}.json",
        {"environment": here.to_json(), "rows": joined, "nets": list(measured)},
    )
    missing = [row for row in joined if row["status"] != "measured"]
    print(
        f"{len(joined) - len(missing)} rows measured, {len(missing)} not; {options.out / name}.txt and .json"
    )
    # what the host lacks is no failure; what nothing explains is
    return 1 if any(not row["why"] for row in missing) else 0


if __name__ == "__main__":
    sys.exit(main())
