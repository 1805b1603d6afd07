"""Does what is trained equal what runs? Logits of the fake-quantized module against onnxruntime's, on real images.

Quantizes a float ONNX classifier for CPUs with and without 8-bit dot products (8- and 7-bit weights), imports both
through the bridge and compares logits on test images, in steps of the logits' own quantizer or, where the logits
are left in float, in steps that 8 bits would have over their range. 8-bit graphs are run unfused where
this CPU's integer kernels saturate. The bridge computes in float32 between roundings, and as the integer
kernels do (``IntegerKernels``), which is what fused graphs are to be held against.

    python benchmarks/bridge_int8.py model.onnx --data cifar10-jpeg.zip [--images 1000] [--calibration-images 256]
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, numpy_helper
from torch.fx import GraphModule

from deploycnn import api
from deploycnn.data.base import Data
from deploycnn.data.loader import batches
from deploycnn.graph.bridge import to_torch
from deploycnn.graph.bridge.integer_kernels import IntegerKernels
from deploycnn.graph.cleanup import simplify
from deploycnn.graph.model import infer_shapes, load_onnx
from deploycnn.graph.names import name_nodes
from deploycnn.graph.parity import cpu_session
from deploycnn.graph.probe import calibration_batches
from deploycnn.quantization import packs
from deploycnn.quantization.calibration import calibrate, choose_ranges, values_of
from deploycnn.quantization.insertion import build
from deploycnn.quantization.isa import Isa, detect_isa
from deploycnn.quantization.placement import place

Logits = npt.NDArray[np.float32]


def quantize(model: ModelProto, data: Data, isa: Isa, count: int) -> ModelProto:
    plan = place(model, packs.get("cpu", isa))
    calibration = calibrate(model, calibration_batches(data, count, 0), values=values_of(plan), threads=2)
    return build(model, plan, choose_ranges(plan, calibration))


def logits_of(
    run: Callable[[npt.NDArray[np.float32]], Logits], data: Data, count: int
) -> tuple[Logits, npt.NDArray[np.int64]]:
    found, labels = [], []
    for batch in batches(data.dataset.test, data.preprocessing, 50, limit=count):
        found.append(run(batch.images))
        labels.append(batch.labels)
    return np.concatenate(found), np.concatenate(labels)


def step_of(model: ModelProto, logits: Logits) -> float:
    """One step of the logits' quantizer; of 8 bits over their range where they are float."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    last = next(node for node in model.graph.node if model.graph.output[0].name in node.output)
    if last.op_type == "DequantizeLinear":
        return float(tensors[last.input[1]])
    return float(logits.max() - logits.min()) / 255


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--calibration-images", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(2)
    recipe = {
        "source": {"onnx": str(options.model)},
        "data": {"imagefolder": {"root": str(options.data)}},
        "preprocessing": {
            "size": 32, "resize": "squash", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
        },
        "variants": {"fp32": []},
    }  # fmt: skip
    data = api.open_data(api.load_recipe(recipe))
    if data is None:
        raise SystemExit("no data")
    model = simplify(load_onnx(options.model))
    name_nodes(model)
    model = infer_shapes(model)
    for name, isa in (
        ("8-bit weights", Isa(name="avx512_vnni", saturates=False)),
        ("7-bit weights", Isa(name="x86 without VNNI", saturates=True)),
    ):
        quantized = quantize(model, data, isa, options.calibration_images)
        bridge = to_torch(quantized)

        def by_torch(images: npt.NDArray[np.float32], module: torch.nn.Module = bridge.module) -> Logits:
            with torch.no_grad():
                found: Logits = module(torch.from_numpy(images)).numpy()
            return found

        def by_integers(images: npt.NDArray[np.float32], module: GraphModule = bridge.module) -> Logits:
            found: Logits = IntegerKernels(module)(torch.from_numpy(images)).numpy()
            return found

        plain, labels = logits_of(by_torch, data, options.images)
        integers, _ = logits_of(by_integers, data, options.images)
        for arithmetic, fused in itertools.product(("float32", "integers"), (False, True)):
            ours = plain if arithmetic == "float32" else integers
            if fused and detect_isa().saturates and not isa.saturates:
                continue
            session = cpu_session(quantized, threads=2, optimize=fused)

            def by_onnxruntime(images: npt.NDArray[np.float32], session: Any = session) -> Logits:
                found: Logits = session.run(None, {session.get_inputs()[0].name: images})[0]
                return found

            theirs, _ = logits_of(by_onnxruntime, data, options.images)
            step = step_of(quantized, theirs)
            apart = np.abs(ours - theirs)
            print(json.dumps({
                "weights": name, "bridge": arithmetic, "onnxruntime": "fused" if fused else "unfused",
                "images": len(labels),
                "within_one_step": float((apart <= 1.001 * step).mean()), "step": step,
                "max_abs": float(apart.max()), "bit_equal": float((apart == 0).mean()),
                "top1_agreement": float((ours.argmax(1) == theirs.argmax(1)).mean()),
                "top1_bridge": float((ours.argmax(1) == labels).mean()),
                "top1_onnxruntime": float((theirs.argmax(1) == labels).mean()),
            }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
