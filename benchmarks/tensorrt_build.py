"""Build an engine of every zoo model and of torchvision's CNNs in four precisions: time, size, and what was built.

    python benchmarks/tensorrt_build.py [--out runs/tensorrt-build] [--only lenet5,resnet50] [--target tensorrt]

Random weights: sizes, build times and the audit do not depend on training. By default TensorRT-RTX builds ahead of
time, which needs no GPU; with --target tensorrt the GPU at hand is built for. INT8 graphs are placed by the rules of
`tensorrt` in both cases, and `deploycnn lint --target tensorrt` must find nothing in them. Build times are wall-clock,
and the processor time of this process beside them: the latter hardly depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import traceback
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import deploycnn
from deploycnn import environment
from deploycnn.engines import building
from deploycnn.errors import DeployCNNError
from deploycnn.models.zoo import BUILDERS, INPUT_SIZE

TORCHVISION = (
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "shufflenet_v2_x1_0",
    "densenet121", "vgg16", "googlenet", "squeezenet1_1", "alexnet",
)  # fmt: skip
INT8 = {"int8": {"calibration_images": 16, "rules": "tensorrt"}}
CHAINS: dict[str, list[Any]] = {
    "fp32": ["export"],
    "fp16": ["export", "fp16"],
    "int8": ["export", INT8],
    # Random weights make logits so even that half precision moves them far; this is no statement on accuracy.
    "int8_fp16": ["export", INT8, {"fp16": {"relative_tolerance": 1.0}}],
}


def recipe(kind: str, net: str, precision: str, level: int) -> dict[str, Any]:
    build = {"build_engine": {"optimization_level": level, "max_batch": 64}}
    return {
        "name": f"{kind}-{net}",
        "source": {kind: net},
        "data": "digits",
        "preprocessing": {"size": INPUT_SIZE if kind == "zoo" else 224},
        "variants": {precision: [*CHAINS[precision], build]},
    }


class Processor:
    """Processor seconds of the engine that was built last; ``None`` where it lay there already."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        self._build = building.build

    def build(self, *arguments: Any, **named: Any) -> building.Built:
        """As ``building.build``, whose place it takes."""
        begin = time.process_time()
        try:
            return self._build(*arguments, **named)
        finally:
            self.seconds = time.process_time() - begin


def build(
    kind: str, net: str, precision: str, arguments: argparse.Namespace, processor: Processor
) -> dict[str, Any]:
    processor.seconds = None
    bundles = deploycnn.export(
        recipe(kind, net, precision, arguments.level),
        target=arguments.target,
        out=arguments.out / f"{kind}-{net}",
    )
    folder = (bundles[precision].parents[1] / "variants" / precision).resolve()
    manifest = json.loads((folder / "manifest.json").read_text())
    parents = {path.parent: json.loads(path.read_text()) for path in folder.parent.glob("*/manifest.json")}
    place, source = next(item for item in parents.items() if item[1]["key"] == manifest["parents"][0])
    return {
        "lint": lint(place / "model.onnx") if precision.startswith("int8") else None,
        "seconds": manifest["seconds"],
        "cpu_seconds": processor.seconds,
        "engine_bytes": manifest["files"]["model.engine"]["bytes"],
        "onnx_bytes": source["files"]["model.onnx"]["bytes"],
        "audit": manifest["facts"]["record"]["audit"],
        "engine": manifest["facts"]["record"]["engine"],
    }


def lint(path: Path) -> dict[str, int]:
    """What `deploycnn lint` finds in the graph that the engine was built from: rule -> places; notes do not count."""
    report = deploycnn.lint(path, "tensorrt")
    return dict(Counter(item.rule for item in report.findings if item.severity != "note"))


def row(net: str, precision: str, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"{net:22} {precision:10} failed: {result['error']}"
    spent = "     " if result["cpu_seconds"] is None else f"{result['cpu_seconds']:5.1f}"
    size, onnx = result["engine_bytes"] / 2**20, result["onnx_bytes"] / 2**20
    return (
        f"{net:22} {precision:10} {result['seconds']:7.1f} s  cpu {spent} s  engine {size:7.2f} MiB  "
        f"onnx {onnx:7.2f} MiB  "
        f"{result['audit']['census']}{linted(result['lint'])}"
    )


def linted(found: dict[str, int] | None) -> str:
    if found is None:
        return ""
    return "; lint: " + (", ".join(f"{rule} x{count}" for rule, count in found.items()) or "clean")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tensorrt-build"))
    parser.add_argument("--only", help="nets, separated by commas")
    parser.add_argument("--target", choices=("tensorrt", "tensorrt-rtx"), default="tensorrt-rtx")
    parser.add_argument("--level", type=int, default=3, help="optimization level, 0 to 5")
    arguments = parser.parse_args()
    nets = [("zoo", net) for net in BUILDERS] + [("torchvision", net) for net in TORCHVISION]
    wanted = arguments.only.split(",") if arguments.only else None
    results: dict[str, dict[str, Any]] = {}
    processor = Processor()
    building.build = processor.build
    for kind, net in nets:
        if wanted and net not in wanted:
            continue
        for precision in CHAINS:
            try:
                result = build(kind, net, precision, arguments, processor)
            except DeployCNNError as error:
                result = {"error": str(error)}
            except Exception as error:  # our own bug in one net must not hide what the others do
                traceback.print_exc()
                result = {"error": f"{type(error).__name__}: {error}"}
            results.setdefault(f"{kind}/{net}", {})[precision] = result
            print(row(f"{kind}/{net}", precision, result), flush=True)
    here = environment.detect()
    hardware = re.sub(r"[^a-z0-9]+", "-", (here.gpu or here.cpu).lower()).strip("-")
    month = datetime.now().astimezone().strftime("%Y%m")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"tensorrt-build_{hardware}_{month}.json"
    path.write_text(json.dumps({"environment": here.to_json(), "nets": results}, indent=1) + "\n")
    failed = sum("error" in result for net in results.values() for result in net.values())
    print(
        f"{sum(len(net) for net in results.values()) - failed} engines, {failed} failed; raw results: {path}"
    )
    unclean = [
        f"{net} {precision}"
        for net, found in results.items()
        for precision, result in found.items()
        if result.get("lint")
    ]
    if unclean:
        print(f"lint finds something in {', '.join(unclean)}")
    return 1 if failed or unclean else 0


if __name__ == "__main__":
    sys.exit(main())
