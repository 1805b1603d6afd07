"""Pruning for latency: how well latency is predicted, how good the solver is, how fast the result.

    python benchmarks/pruning.py model-error --net resnet56 --precision int8     50 random width configurations
    python benchmarks/pruning.py solver      --net resnet56                       gap and seconds
    python benchmarks/pruning.py speed       --work runs/r56 --weights W --data D ResNet-56 to half its latency

``model-error`` measures a table, then races other random configurations as whole models, twice, and compares: a
prediction cannot be nearer than two races are to each other. ``speed`` runs a
recipe (prune, export, int8) and races what it made with the dense FP32 graph, interleaved, at batch 1 and 64 and 1 and
2 threads, in onnxruntime and OpenVINO. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import deploycnn
from deploycnn.api import load_recipe
from deploycnn.graph.model import save_onnx
from deploycnn.latency.measure import Bench
from deploycnn.latency.model import LatencyTable
from deploycnn.latency.samples import widths_after
from deploycnn.latency_tables import load
from deploycnn.profiling.stopwatch import RuntimeStopwatch
from deploycnn.pruning import importance
from deploycnn.pruning.allocation import Ladder, ladders
from deploycnn.pruning.groups import ChannelGroup
from deploycnn.pruning.latency_problem import draw, posed_problem
from deploycnn.pruning.solver import integer_optimum, solve
from deploycnn.pruning.structure import analyse, shrunk
from deploycnn.pruning.surgery import Removals

#: Short names of the nets that the bars name.
NETS = {
    "resnet56": "zoo:resnet56",
    "resnet50": "torchvision:resnet50",
    "mobilenet_v2": "torchvision:mobilenet_v2",
}


def prepared(
    arguments: argparse.Namespace,
) -> tuple[Bench, tuple[ChannelGroup, ...], list[Ladder], LatencyTable]:
    net, shape = load(NETS.get(arguments.net, arguments.net))
    net.eval()
    images = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
    bench = Bench(
        model=net,
        images=images,
        stopwatch=RuntimeStopwatch(runtime="onnxruntime:cpu", image_shape=shape),
        precision=arguments.precision,
        batch_size=arguments.batch,
        threads=arguments.threads,
        target="onnxruntime-cpu",
        budget_s=arguments.budget_s,
    )
    groups = analyse(net, shrunk(net, images)).groups
    scores = importance.magnitude(net, groups, power=2)
    found = ladders(groups, scores, round_to=bench.step(), max_ratio=0.9, ratios=[None] * len(groups))
    return bench, groups, found, bench.table(lambda generator: draw(groups, found, generator))


def model_error(arguments: argparse.Namespace) -> dict[str, Any]:
    bench, groups, found, table = prepared(arguments)

    def predicted_ms(cuts: Removals) -> float:
        kept = widths_after(bench.layers(), bench.model, cuts)
        return sum(float(table.cost(layer.key, *kept[layer.name])) for layer in bench.layers())

    generator = np.random.default_rng(10_000)  # other configurations than the table's
    cuts = {str(index): draw(groups, found, generator) for index in range(arguments.configs)}
    with tempfile.TemporaryDirectory() as folder:
        paths = {"dense": Path(folder) / "dense.onnx"} | {
            name: Path(folder) / f"{name}.onnx" for name in cuts
        }
        for name, path in paths.items():
            save_onnx(bench.at(cuts.get(name, {})), path)
        races = [bench.race(paths) for _ in range(2)]
    # Shares of the dense latency are what a goal is about; the table's milliseconds are of another minute.
    rows: list[dict[str, Any]] = [
        {
            "predicted": predicted_ms(cut) / table.dense_ms,
            "measured": [race[name] / race["dense"] for race in races],
            "widths": {"/".join(str(part) for part in place): len(removed) for place, removed in cut.items()},
        }
        for name, cut in cuts.items()
    ]
    if arguments.rows is not None:
        arguments.rows.write_text(json.dumps(rows))
    # In logarithms, where above and below count alike.
    signed = [np.log(row["predicted"]) - np.log(row["measured"]).mean() for row in rows]
    errors = [abs(np.expm1(error)) for error in signed]
    apart = [abs(row["measured"][0] / row["measured"][1] - 1) for row in rows]
    return {
        "net": arguments.net,
        "precision": arguments.precision,
        "step": table.step,
        "configs": len(errors),
        "median": float(np.median(errors)),
        "p95": float(np.percentile(errors, 95)),
        "bias": float(np.expm1(np.median(signed))),
        "two_races": {"median": float(np.median(apart)), "p95": float(np.percentile(apart, 95))},
        "stated": table.to_json()["error"],
    }


def solver(arguments: argparse.Namespace) -> dict[str, Any]:
    bench, groups, found, table = prepared(arguments)
    posed = posed_problem(bench.model, bench.layers(), groups, found, table)
    dense = table.dense_ms
    rows: list[dict[str, Any]] = []
    for ratio in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
        start = time.perf_counter()
        solution = solve(posed, ratio * dense)
        seconds = time.perf_counter() - start
        if solution is None:
            rows.append({"ratio": ratio, "seconds": seconds, "gap": None})
            continue
        row = {
            "ratio": ratio,
            "seconds": seconds,
            "cost": solution.cost / dense,
            "proven_gap": solution.loss / solution.bound - 1,
        }
        if arguments.reference_s:
            exact = integer_optimum(posed, ratio * dense, seconds=arguments.reference_s)
            if exact is not None:
                row |= {
                    "against_ilp": solution.loss / exact.loss - 1,
                    "ilp_proven_gap": exact.loss / max(exact.bound, solution.bound) - 1,
                }
        rows.append(row)
        print(row, flush=True)
    return {"net": arguments.net, "ladders": len(found), "rows": rows}


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    def variant(precision: str) -> list[Any]:
        goal = {"latency_ratio": arguments.ratio, "latency_precision": precision, "importance": "taylor"}
        return [{"prune": goal}, "export", *(["int8"] if precision == "int8" else [])]

    recipe = load_recipe(
        "cifar10-resnet56",
        data=arguments.data,
        weights=arguments.weights,
        overrides=["data.imagefolder.val=last", "profile.batch_sizes=[1]", "profile.threads=[1]"],
    ).raw
    recipe = {
        **recipe,
        "target": "onnxruntime-cpu",
        "variants": {"fp32": ["export"], "pruned": variant("fp32"), "pruned_int8": variant("int8")},
    }
    deploycnn.export(recipe, out=arguments.work)
    paths = {
        name: arguments.work / "variants" / name / "model.onnx" for name in ("fp32", "pruned", "pruned_int8")
    }
    result: dict[str, Any] = {}
    for batch in (1, 64):
        for threads in (1, 2):
            for runtime in ("onnxruntime:cpu", "openvino:f32"):
                watch = RuntimeStopwatch(runtime=runtime)
                speeds = watch.race(paths, batch_size=batch, threads=threads, budget_s=arguments.budget_s)
                for name, found in speeds.items():
                    key = f"{runtime} b{batch} t{threads} {name}"
                    result[key] = {
                        "ms": found.median_ms,
                        "ratio": found.ratio,
                        "low": found.low,
                        "high": found.high,
                    }
                    print(
                        f"{key:40} {found.median_ms:9.3f} ms  {found.ratio:.2f} ({found.low:.2f}-{found.high:.2f})"
                    )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["model-error", "solver", "speed"])
    parser.add_argument("--net", default="resnet56", help="resnet56, resnet50, mobilenet_v2 or source:name")
    parser.add_argument("--precision", choices=["fp32", "int8"], default="fp32")
    parser.add_argument("--configs", type=int, default=50)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget-s", type=float, default=0.6, help="seconds of timing for each model")
    parser.add_argument(
        "--reference-s",
        type=float,
        default=60,
        help="for solver: seconds of the whole integer program; 0: none",
    )
    parser.add_argument(
        "--rows", type=Path, help="for model-error: also write what was predicted and measured"
    )
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the dense latency, for speed")
    parser.add_argument("--work", type=Path, default=Path("runs/pruning"))
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    commands = {"model-error": model_error, "solver": solver, "speed": speed}
    print(json.dumps(commands[arguments.command](arguments), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
