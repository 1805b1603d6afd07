"""What gradient-free INT8 costs in accuracy, plain and after a stress that no function notices.

    python benchmarks/quantization_accuracy.py --data cifar10-jpeg.zip r20=resnet20.onnx mnv2=mobilenetv2.onnx

For each float model and target: candidates (calibrators, equalization, bias correction) are built from the same 512
training images and ranked by the signal-to-noise ratio of their outputs on the validation split; the best one is proven
on the test split, once. With ``--stress`` each model is first rescaled channel by channel (factors log-uniform in
[1/16, 16], the same function), and MinMax alone is shown beside what recovers it. Graphs are judged in float
arithmetic (Q/DQ as they are written, no integer kernels), so that CPUs whose 8-bit products saturate count them like
those with VNNI. Writes one JSON object per row.

With ``--w4a8`` weights have 4 bits (first, last and depthwise layers 8), rounded to nearest at scales of least squared
error, and then as AdaRound learns it; both are proven on the test split.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
from onnx import ModelProto

from deploycnn.data.base import Data
from deploycnn.data.calibration import calibration_indices
from deploycnn.data.imagefolder import ImageFolder
from deploycnn.data.loader import batches
from deploycnn.data.opening import open_source
from deploycnn.errors import PassRequirementError
from deploycnn.graph.model import infer_shapes, load_onnx
from deploycnn.quantization import packs
from deploycnn.quantization.channels import channel_groups
from deploycnn.quantization.engine import Candidate, Engine
from deploycnn.quantization.equalization import equalize, rescale
from deploycnn.quantization.judge import Judge, Judgement, Labelled, val_batches
from deploycnn.quantization.packed import measure
from deploycnn.quantization.packs import RulePack
from deploycnn.quantization.preparation import prepare
from deploycnn.quantization.remedies import remedies
from deploycnn.quantization.types import Calibrator

PREPROCESSING = {
    "size": [32, 32], "resize": "squash", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
}  # fmt: skip
CALIBRATORS: tuple[Calibrator, ...] = ("minmax", "percentile", "mse", "entropy")
Z95 = 1.96


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="NAME=FILE of a float ONNX model")
    parser.add_argument(
        "--data", type=Path, required=True, help="image folder or zip; val = the last 500 of each class"
    )
    parser.add_argument("--targets", nargs="+", default=["onnxruntime-cpu", "tensorrt"])
    parser.add_argument("--images", type=int, default=512, help="calibration images")
    parser.add_argument("--val", type=int, default=2000, help="validation images that choose")
    parser.add_argument("--stress", action="store_true", help="also after rescaling all channels")
    parser.add_argument(
        "--seven-bit-weights",
        action="store_true",
        help="and this CPU's integer kernels, for CPUs without VNNI",
    )
    parser.add_argument("--w4a8", action="store_true", help="4-bit weights, nearest and learned rounding")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON lines; also on standard output")
    given = parser.parse_args()
    source = ImageFolder(root=given.data, val="last", val_per_class=500)
    data = open_source(source, PREPROCESSING)
    train = data.dataset.train
    indices = calibration_indices(train.labels, given.images, 0)
    held = [batch.images for batch in batches(train, data.preprocessing, 64, indices=indices)]
    for name, _, path in (entry.partition("=") for entry in given.models):
        for target in given.targets:
            pack = packs.get(target)
            pack = replace(pack, weight=replace(pack.weight, reduced=given.seven_bit_weights))
            # As ``int8`` prepares it: the target's rewrites are part of what is quantized.
            model = prepare(load_onnx(Path(path)), pack)
            val, test = (
                Judge(model, labelled, threads=given.threads, integers=given.seven_bit_weights)
                for labelled in (val_batches(data, given.val, 0), _test(data))
            )
            shapes = {"plain": model} | ({"stressed": stressed(model)} if given.stress else {})
            for shape, start in shapes.items():
                rows = study_w4a8 if given.w4a8 else study
                for row in rows(start, pack, held, val, test, given.threads):
                    line = json.dumps(
                        {"model": name, "target": target, "shape": shape, "fp32_top1": test.top1, **row}
                    )
                    print(line, flush=True)
                    if given.out:
                        with given.out.open("a", encoding="utf-8") as file:
                            file.write(f"{line}\n")


def stressed(model: ModelProto, seed: int = 0) -> ModelProto:
    """The same function with channels of very different size."""
    rng = np.random.default_rng(seed)
    changed = ModelProto.FromString(model.SerializeToString())
    scales = [(group, 16.0 ** rng.uniform(-1, 1, group.channels)) for group in channel_groups(model)]
    rescale(changed, scales)
    return infer_shapes(changed)


def study(
    model: ModelProto, pack: RulePack, held: list[np.ndarray], val: Judge, test: Judge, threads: int
) -> Iterator[dict[str, object]]:
    """MinMax, and the best of all candidates by val; both proven on test."""
    began = time.perf_counter()
    engine = Engine(pack, lambda: held, threads=threads)
    known = remedies(engine, seed=0, tell=lambda _done, _total, _message: None)
    plain = Candidate(model=model, calibrator="minmax")
    tried: dict[str, tuple[Candidate, Judgement]] = {}

    def attempt(name: str, make: Callable[[], Candidate]) -> None:
        try:
            candidate = make()
        except PassRequirementError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return
        tried[name] = candidate, val(engine.build(candidate))

    starts = {"": plain}
    try:
        starts["equalized "] = replace(plain, model=equalize(model, held, threads=threads))
    except PassRequirementError as error:
        print(f"equalized: {error}", file=sys.stderr)
    for prefix, start in starts.items():
        for calibrator in CALIBRATORS:
            attempt(f"{prefix}{calibrator}", partial(replace, start, calibrator=calibrator))
    best = max(tried, key=lambda name: tried[name][1].sqnr_db)
    attempt(f"{best} + bias correction", lambda: known["correct_bias"](tried[best][0]))
    best = max(tried, key=lambda name: tried[name][1].sqnr_db)
    seconds = time.perf_counter() - began
    for name in dict.fromkeys(("minmax", best)):
        candidate, on_val = tried[name]
        yield {
            "candidate": name,
            "chosen": name == best,
            "val": on_val.to_json(),
            "test": _with_interval(test(engine.build(candidate))),
            "search_s": round(seconds, 1),
        }
    yield {"all_on_val": {name: judgement.to_json() for name, (_, judgement) in tried.items()}}


def study_w4a8(
    model: ModelProto, pack: RulePack, held: list[np.ndarray], val: Judge, test: Judge, threads: int
) -> Iterator[dict[str, object]]:
    """Nearest and learned rounding of 4-bit weights, with the ranges that val prefers; both proven on test."""
    began = time.perf_counter()
    engine = Engine(packs.four_bits(pack), lambda: held, threads=threads)
    known = remedies(engine, seed=0, tell=lambda _done, _total, _message: None)
    ranges: dict[str, tuple[Candidate, Judgement]] = {}
    for calibrator in CALIBRATORS:
        candidate = Candidate(model=model, calibrator=calibrator)
        ranges[calibrator] = candidate, val(engine.build(candidate))
    best = max(ranges, key=lambda name: ranges[name][1].sqnr_db)
    tried = {f"{best}, nearest": ranges[best][0]}
    tried[f"{best}, adaround"] = known["adaround"](ranges[best][0])
    tried[f"{best}, adaround, bias correction"] = known["correct_bias"](tried[f"{best}, adaround"])
    on_val = {name: val(engine.build(candidate)) for name, candidate in tried.items()}
    chosen = max(on_val, key=lambda name: on_val[name].sqnr_db)
    size = measure(engine.build(tried[chosen]))
    for name in dict.fromkeys((f"{best}, nearest", chosen)):
        yield {
            "candidate": f"w4a8, {name}",
            "chosen": name == chosen,
            "val": on_val[name].to_json(),
            "test": _with_interval(test(engine.build(tried[name]))),
            "weights": asdict(size),
            "search_s": round(time.perf_counter() - began, 1),
        }


def _with_interval(found: Judgement) -> dict[str, object]:
    """Adds the half-width of the agreement's 95% interval (Wald's, on all images)."""
    share = found.agreement or 0.0
    return {**found.to_json(), "agreement_95": Z95 * (share * (1 - share) / found.images) ** 0.5}


def _test(data: Data) -> Callable[[], Iterator[Labelled]]:
    def make() -> Iterator[Labelled]:
        for batch in batches(data.dataset.test, data.preprocessing, 64):
            yield batch.images, batch.labels

    return make


if __name__ == "__main__":
    main()
