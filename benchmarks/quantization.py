"""INT8 against its float twin and against peers: speed, accuracy, cost. One JSON and one table each.

    python benchmarks/quantization.py prepare  --work runs/quantization --nncf runs/peers/nncf/bin/python
    python benchmarks/quantization.py speed    --work runs/quantization --batch 1 --only resnet18,vgg16 --budget-s 2
    python benchmarks/quantization.py accuracy --data cifar10-jpeg.zip --weights resnet56.safetensors --net resnet56
    python benchmarks/quantization.py cost     --data cifar10-jpeg.zip --weights resnet56.safetensors --net resnet56

``prepare`` makes every file: the float model (torchvision, random weights, 224 px), ours for onnxruntime-cpu and for
openvino, each on integers throughout and as ``int8`` ships it (told to do no harm at batch 1 and 16, 2 threads),
onnxruntime's own ``quantize_static`` (U8S8, per channel) and NNCF's (``benchmarks/peers/make_nncf.sh`` makes its
environment). ``speed`` only times, all files of a net side by side in one process, interleaved; run both on an idle
machine. Ratios are float latency / latency in the same runtime, with 99% intervals; "ours / NNCF" is in OpenVINO.

``accuracy`` quantizes with ``int8`` and with ``int8: auto`` and reports drop and agreement on the test split; the
validation split (the last images of each training class) is all that anything is chosen by. ``cost`` is seconds and
peak memory of ``int8`` in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import quantization_nets as nets

import deploycnn
from deploycnn import environment
from deploycnn.core import Artifact, Facts, TensorSpec
from deploycnn.profiling.statistics import compare, summarize
from deploycnn.profiling.timing import Candidate, TimingSettings, time_interleaved
from deploycnn.runtimes.base import create

#: Label -> (file, runtime). The first of each runtime is what its others are compared with.
RACERS = {
    "ort float": ("{net}.onnx", "onnxruntime:cpu"),
    "ort ours": (f"{{net}}.{nets.OURS_ORT}.onnx", "onnxruntime:cpu"),
    "ort throughout": (f"{{net}}.{nets.OURS_ORT}-throughout.onnx", "onnxruntime:cpu"),
    "ort quantize_static": (f"{{net}}.{nets.PEER_ORT}.onnx", "onnxruntime:cpu"),
    "ov float": ("{net}.onnx", "openvino:f32"),
    "ov ours": (f"{{net}}.{nets.OURS_OPENVINO}.onnx", "openvino:f32"),
    "ov throughout": (f"{{net}}.{nets.OURS_OPENVINO}-throughout.onnx", "openvino:f32"),
    "ov nncf": (f"{{net}}.{nets.PEER_NNCF}.xml", "openvino:f32"),
    "ov ours bf16": (f"{{net}}.{nets.OURS_OPENVINO}.onnx", "openvino:bf16"),
}

#: At which ``int8`` is told to do no harm.
SETTINGS: nets.Settings = ((1, 2), (16, 2))

#: Ratios of the table: title -> (numerator's label, denominator's label) of latency.
COLUMNS = {
    "ours": ("ort float", "ort ours"),
    "throughout": ("ort float", "ort throughout"),
    "quantize_static": ("ort float", "ort quantize_static"),
    "ov ours": ("ov float", "ov ours"),
    "ov throughout": ("ov float", "ov throughout"),
    "ov nncf": ("ov float", "ov nncf"),
    "ours/nncf": ("ov nncf", "ov ours"),
    "bf16/nncf": ("ov nncf", "ov ours bf16"),
}


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    arguments.work.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = {}
    for net in arguments.nets:
        made[net] = {}
        makers: dict[str, Callable[[], Path]] = {
            **{
                f"{label}{kind}": partial(nets.make_ours, net, target, settings, arguments.work)
                for target, label in nets.LABELS.items()
                for kind, settings in (("-throughout", ()), ("", SETTINGS))
            },
            nets.PEER_ORT: partial(nets.make_onnxruntime_peer, net, arguments.work),
        }
        if arguments.nncf is not None:
            makers[nets.PEER_NNCF] = partial(nets.make_nncf_peer, net, arguments.work, arguments.nncf)
        for label, make in makers.items():
            try:
                made[net][label] = make().name
            except Exception as error:  # a peer that fails on one net must not hide the others
                detail = getattr(error, "stderr", b"") or b""
                made[net][label] = f"failed: {type(error).__name__}: {error} {detail[-300:]!r}"
            print(f"{net:20} {label:14} {made[net][label]}", flush=True)
    return made


def racers(net: str, arguments: argparse.Namespace) -> list[Candidate]:
    batch = nets.images(arguments.batch, seed=1)
    found = []
    for label, (pattern, spec) in RACERS.items():
        path = arguments.work / pattern.format(net=net)
        runtime = create(spec)
        if not path.exists() or not runtime.availability().ok:
            continue
        specs = (TensorSpec(name="images", dtype="float32", shape=(None, 3, nets.SIZE, nets.SIZE)),)
        artifact = Artifact(
            key=label, format="onnx", path=path, inputs=specs, outputs=(), parents=(), facts=Facts()
        )
        found.append(
            Candidate(
                label=label,
                runtime=spec,
                batch_size=arguments.batch,
                threads=arguments.threads,
                images_NCHW=batch,
                open=partial(runtime.open, artifact, batch_size=arguments.batch, threads=arguments.threads),
            )
        )
    return found


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    print(f"batch {arguments.batch}, {arguments.threads} threads; ratios of latency (99% interval)")
    for net in arguments.nets:
        rows = {
            row.label: row
            for row in time_interleaved(
                racers(net, arguments), TimingSettings(budget_s=arguments.budget_s, rounds=arguments.rounds)
            )
        }
        ratios = {}
        for title, (base, label) in COLUMNS.items():
            if base in rows and label in rows and rows[base].measured and rows[label].measured:
                ratios[title] = asdict(compare(rows[base], rows[label]))
        found[net] = {
            "median_ms": {label: summarize(row).median_ms for label, row in rows.items() if row.measured},
            "executed": {label: row.executed.precision for label, row in rows.items() if row.executed},
            "not_measured": {label: row.why for label, row in rows.items() if not row.measured},
            "sessions": {label: len(row.samples_ms) for label, row in rows.items()},
            "disturbance": next(iter(rows.values())).to_json()["disturbance"],
            "ratios": ratios,
        }
        cells = "  ".join(
            f"{title} {ratio['ratio']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"
            for title, ratio in ratios.items()
        )
        float_ms = found[net]["median_ms"].get("ort float", float("nan"))
        print(f"{net:20} {float_ms:8.2f} ms  {cells}", flush=True)
    return found


def cifar_recipe(arguments: argparse.Namespace, int8: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": arguments.net,
        "source": {"zoo": arguments.net, "weights": str(arguments.weights)},
        "data": {"imagefolder": {"root": str(arguments.data), "val": "last"}},
        "preprocessing": {
            "size": 32,
            "resize": "squash",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
        "target": "onnxruntime-cpu",
        "variants": {
            "fp32": ["export"],
            **{name: ["export", {"int8": options}] for name, options in int8.items()},
        },
        "profile": {"batch_sizes": [1], "threads": [1], "budget_s": arguments.budget_s, "memory": False},
    }


def accuracy(arguments: argparse.Namespace) -> dict[str, Any]:
    recipe = cifar_recipe(arguments, {"int8": {}, "int8_auto": {"mode": "auto"}})
    run = deploycnn.compress(recipe, out=arguments.work / f"accuracy-{arguments.net}")
    report: dict[str, Any] = {"problems": run.problems, "variants": run.report["variants"]}
    told = (
        "name",
        "status",
        "why",
        "top1",
        "top1_drop",
        "top1_drop_interval",
        "agreement",
        "val_top1_drop",
        "speedup",
    )
    for variant in run.report["variants"]:
        print(json.dumps({key: variant[key] for key in told}))
    return report


def cost(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak resident memory of ``int8`` alone, in a child; the float model is made before."""
    recipe = cifar_recipe(arguments, {"int8": {"calibration_images": arguments.images}})
    out = arguments.work / f"cost-{arguments.net}-{arguments.images}"
    recipe["profile"]["accuracy"] = False
    deploycnn.export({**recipe, "variants": {"fp32": ["export"]}}, out=out)
    script = (
        "import json, resource, sys, time, deploycnn\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "start = time.perf_counter()\n"
        "deploycnn.export(json.loads(sys.argv[1]), out=sys.argv[2])\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(json.dumps({'seconds': time.perf_counter() - start, 'peak_bytes': peak * 1024}))\n"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(recipe), str(out)],
        check=True,
        capture_output=True,
        text=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result |= {"images": arguments.images, "seconds_with_start": time.perf_counter() - started}
    result["own_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["prepare", "speed", "accuracy", "cost"])
    parser.add_argument(
        "--work", type=Path, default=Path("runs/quantization"), help="folder of models and results"
    )
    parser.add_argument("--only", help="nets, separated by commas")
    parser.add_argument("--nncf", type=Path, help="Python of NNCF's environment")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget-s", type=float, default=2.0, help="seconds of timing for each file")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as an image folder or a zip of one")
    parser.add_argument("--weights", type=Path, help="float weights of --net")
    parser.add_argument("--net", default="resnet56", choices=["resnet20", "resnet56"])
    parser.add_argument("--images", type=int, default=512, help="calibration images, for cost")
    arguments = parser.parse_args()
    arguments.nets = arguments.only.split(",") if arguments.only else nets.NETS
    if arguments.command in {"accuracy", "cost"} and (arguments.data is None or arguments.weights is None):
        parser.error(f"{arguments.command} needs --data and --weights")
    commands = {"prepare": prepare, "speed": speed, "accuracy": accuracy, "cost": cost}
    results = commands[arguments.command](arguments)
    here = environment.detect()
    hardware = re.sub(r"[^a-z0-9]+", "-", here.cpu.lower()).strip("-")
    now = datetime.now().astimezone()
    detail = f"-b{arguments.batch}" if arguments.command == "speed" else ""
    path = arguments.work / f"quantization-{arguments.command}{detail}_{hardware}_{now:%Y%m}.json"
    earlier = (
        json.loads(path.read_text())["results"] if path.exists() and arguments.command == "speed" else {}
    )
    document = {
        "when": now.isoformat(timespec="seconds"),
        "environment": here.to_json(),
        "settings": {key: str(value) for key, value in vars(arguments).items()},
        "results": {**earlier, **results},
    }
    path.write_text(json.dumps(document, indent=1))
    print(f"results: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
