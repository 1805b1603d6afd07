"""Does what is trained equal what runs? Logits of the fake-quantized module against onnxruntime's, on real images.

Quantizes a float ONNX classifier for CPUs with and without 8-bit dot products (8- and 7-bit weights), imports both
through the bridge and compares logits on test images, in steps of the logits' own quantizer or, where the logits
are left in float, in steps that 8 bits would have over their range. 8-bit graphs are run unfused where
this CPU's integer kernels saturate. The bridge computes in float32 between roundings, and as the integer
kernels do (``IntegerKernels``), which is what fused graphs are to be held against. ``--noise`` takes files that have
their Q/DQ already, as ``benchmarks/quantization.py prepare`` writes them, and images of noise, of which the file's
input says the size.

    python benchmarks/bridge_int8.py model.onnx --data cifar10-jpeg.zip [--images 1000] [--calibration-images 256]
    python benchmarks/bridge_int8.py --noise [--images 8] net.ours-ort.onnx ...
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto

from deploycnn import api
from deploycnn.data.base import Data
from deploycnn.data.loader import batches
from deploycnn.graph.bridge import to_torch
from deploycnn.graph.bridge.integer_kernels import IntegerKernels
from deploycnn.graph.cleanup import simplify
from deploycnn.graph.model import infer_shapes, load_onnx
from deploycnn.graph.names import name_nodes
from deploycnn.graph.observe import image_input
from deploycnn.graph.parity import evaluator
from deploycnn.graph.probe import calibration_batches
from deploycnn.quantization import packs
from deploycnn.quantization.agreement import output_scale, saturates_here
from deploycnn.quantization.calibration import calibrate, choose_ranges, values_of
from deploycnn.quantization.insertion import build
from deploycnn.quantization.isa import Isa
from deploycnn.quantization.placement import place

Images = npt.NDArray[np.float32]
Logits = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

THREADS = 2
BATCH = 50


def quantize(model: ModelProto, data: Data, isa: Isa, count: int) -> ModelProto:
    plan = place(model, packs.get("cpu", isa))
    calibration = calibrate(
        model, calibration_batches(data, count, 0), values=values_of(plan), threads=THREADS
    )
    return build(model, plan, choose_ranges(plan, calibration))


def test_images(data: Data, count: int) -> tuple[Images, Labels]:
    found = list(batches(data.dataset.test, data.preprocessing, BATCH, limit=count))
    return np.concatenate([batch.images for batch in found]), np.concatenate(
        [batch.labels for batch in found]
    )


def logits_of(run: Callable[[Images], Logits], images: Images, size: int) -> Logits:
    return np.concatenate([run(images[start : start + size]) for start in range(0, len(images), size)])


def step_of(model: ModelProto, logits: Logits) -> float:
    """One step of the logits' quantizer; of 8 bits over their range where they are float."""
    scale = output_scale(model)
    return float(logits.max() - logits.min()) / 255 if scale is None else scale


def compare(name: str, quantized: ModelProto, images: Images, labels: Labels | None, threads: int) -> None:
    """Print a line for each arithmetic of the bridge and each of onnxruntime."""
    module = to_torch(quantized).module.eval()
    size = image_input(quantized)[1][0] or BATCH
    runs: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "float32": module, "integers": IntegerKernels(module),
    }  # fmt: skip

    def logits(run: Callable[[torch.Tensor], torch.Tensor]) -> Logits:
        with torch.no_grad():
            return logits_of(lambda batch: run(torch.from_numpy(batch)).numpy(), images, size)

    ours = {arithmetic: logits(run) for arithmetic, run in runs.items()}
    for integers in (False, True):
        if integers and saturates_here(quantized):
            continue
        run = evaluator(quantized, threads=threads, integers=integers)
        theirs = logits_of(lambda batch, run=run: run(batch)[0], images, size)  # type: ignore[misc]
        step = step_of(quantized, theirs)
        for arithmetic, found in ours.items():
            apart = np.abs(found - theirs)
            print(json.dumps({
                "model": name, "bridge": arithmetic, "onnxruntime": "fused" if integers else "unfused",
                "images": len(images),
                "within_one_step": float((apart <= 1.001 * step).mean()), "step": step,
                "max_abs": float(apart.max()), "bit_equal": float((apart == 0).mean()),
                "top1_agreement": float((found.argmax(1) == theirs.argmax(1)).mean()),
                **({} if labels is None else {
                    "top1_bridge": float((found.argmax(1) == labels).mean()),
                    "top1_onnxruntime": float((theirs.argmax(1) == labels).mean()),
                }),
            }), flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path)
    source.add_argument("--noise", action="store_true")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--calibration-images", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    for path in options.models:
        if options.noise:
            quantized = load_onnx(path)
            shape = [size for size in image_input(quantized)[1][1:] if size is not None]
            if len(shape) != 3:
                raise SystemExit(f"{path}: its input does not say the size of images")
            images = np.random.default_rng(0).standard_normal((options.images, *shape)).astype(np.float32)
            compare(path.name, quantized, images, None, THREADS)
        else:
            on_data(path, options)


def on_data(path: Path, options: argparse.Namespace) -> None:
    recipe = {
        "source": {"onnx": str(path)},
        "data": {"imagefolder": {"root": str(options.data)}},
        "preprocessing": {
            "size": 32, "resize": "squash", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
        },
        "variants": {"fp32": []},
    }  # fmt: skip
    data = api.open_data(api.load_recipe(recipe))
    if data is None:
        raise SystemExit("no data")
    images, labels = test_images(data, options.images)
    model = simplify(load_onnx(path))
    name_nodes(model)
    model = infer_shapes(model)
    for name, isa in (
        ("8-bit weights", Isa(name="avx512_vnni", saturates=False)),
        ("7-bit weights", Isa(name="x86 without VNNI", saturates=True)),
    ):
        quantized = quantize(model, data, isa, options.calibration_images)
        compare(f"{path.name}, {name}", quantized, images, labels, THREADS)


if __name__ == "__main__":
    main()
