"""Seconds and peak memory of calibrating a model, as the number of images grows: each count in a process of its own.

    python benchmarks/calibration_cost.py resnet50.onnx --size 224 --images 512 5000

Placement, one pass over the images with histograms, all ranges by the given calibrator, and the finished graph.
Images are noise that is made as it is used, so decoding is not in the figures. Peak memory is that of the whole process
(VmHWM). Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--images", type=int, nargs="+", default=[512, 5000])
    parser.add_argument("--calibrator", default="mse")
    parser.add_argument("--target", default="onnxruntime-cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        print(json.dumps(measure(given, given.images[0])))
        return
    for count in given.images:
        command = [sys.executable, __file__, str(given.model), "--inside", "--images", str(count)]
        for option in ("size", "calibrator", "target", "threads"):
            command += [f"--{option}", str(getattr(given, option))]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


def measure(given: argparse.Namespace, count: int) -> dict[str, object]:
    from deploycnn.graph.model import load_onnx
    from deploycnn.quantization import packs
    from deploycnn.quantization.calibration import calibrate, choose_ranges, values_of
    from deploycnn.quantization.insertion import build
    from deploycnn.quantization.placement import place
    from deploycnn.quantization.preparation import prepare

    def images() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        for start in range(0, count, BATCH):
            shape = (min(BATCH, count - start), 3, given.size, given.size)
            yield rng.standard_normal(shape, dtype=np.float32)

    began = time.perf_counter()
    model = prepare(load_onnx(given.model))
    plan = place(model, packs.get(given.target))
    seen = calibrate(model, images(), values=values_of(plan), threads=given.threads)
    calibrated = time.perf_counter()
    build(model, plan, choose_ranges(plan, seen, given.calibrator))
    ended = time.perf_counter()
    return {
        "model": given.model.name,
        "images": seen.images,
        "values": len(seen.values),
        "calibrator": given.calibrator,
        "calibration_s": round(calibrated - began, 2),
        "total_s": round(ended - began, 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


if __name__ == "__main__":
    main()
