"""How much of a drop two epochs of quantization-aware training win back.

    python benchmarks/qat_recovery.py resnet20.onnx --data cifar10-jpeg.zip [--train-images 40000] [--per-channel]

Weights get 4 bits, rounded to nearest, with one scale for each layer unless ``--per-channel``, and activations their
widest ranges: a drop that is plain to see. The graph is then trained as the pass ``qat`` does it at its defaults (the
float graph teaches, LSQ learns scales). The validation split (the last 500 of each class) picks the epoch; top-1 before
and after is of the test split, in float arithmetic as the graph is written. The recovered share is 1 - drop after /
drop before; its interval is of a bootstrap over the test images. ``--train-images`` trains on fewer images, evenly over
the classes, where a whole epoch takes too long.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto
from training_runs import PREPROCESSING, part

from deploycnn.core import Context
from deploycnn.data.base import Data
from deploycnn.data.calibration import calibration_indices
from deploycnn.data.imagefolder import ImageFolder
from deploycnn.data.loader import batches
from deploycnn.data.opening import open_source
from deploycnn.graph.model import load_onnx
from deploycnn.graph.parity import evaluator
from deploycnn.passes.qat import Qat
from deploycnn.quantization import packs
from deploycnn.quantization.engine import Candidate, Engine
from deploycnn.quantization.packed import packed
from deploycnn.quantization.preparation import prepare
from deploycnn.quantization.qat import fine_tune
from deploycnn.training.losses import Distillation
from deploycnn.training.teacher import graph_teacher

RESAMPLES = 2000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a float ONNX classifier of 32 x 32 images")
    parser.add_argument("--data", type=Path, required=True, help="image folder or zip")
    parser.add_argument("--train-images", type=int, help="train on so many; all by default")
    parser.add_argument("--val-images", type=int, help="pick the epoch on so many; all by default")
    parser.add_argument("--per-channel", action="store_true", help="a milder drop")
    parser.add_argument("--lr", type=float, help="the pass's own by default")
    parser.add_argument("--fixed-scales", action="store_true", help="train weights and biases only")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    data = open_source(ImageFolder(root=given.data, val="last", val_per_class=500), PREPROCESSING)
    train, val = part(data.dataset.train, given.train_images), part(data.dataset.val, given.val_images)
    training = replace(data, dataset=replace(data.dataset, train=train, val=val))
    full = prepare(load_onnx(given.model))
    pack = replace(packs.four_bits(packs.get("onnxruntime-cpu")), per_channel=given.per_channel)
    indices = calibration_indices(data.dataset.train.labels, 512, 0)
    held = [batch.images for batch in batches(data.dataset.train, data.preprocessing, 64, indices=indices)]
    engine = Engine(pack, lambda: held, threads=given.threads)
    quantized = engine.build(Candidate(model=full, calibrator="minmax"))
    right = {
        name: hits(model, data, given.threads) for name, model in (("fp32", full), ("before", quantized))
    }
    print(json.dumps({name: round(float(found.mean()), 4) for name, found in right.items()}), flush=True)
    settings = Qat(epochs=given.epochs, lr=given.lr, learn_scales=not given.fixed_scales)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        ctx = Context(output=Path(folder), scratch=Path(folder), threads=given.threads, progress=tell)
        tuned = fine_tune(
            packed(quantized),
            full,
            training,
            settings,
            loss=Distillation(teacher=graph_teacher(full, ctx), method=settings.method, **settings.weights),
            ctx=ctx,
            learn_scales=settings.learn_scales,
            parity_count=64,
        )  # fmt: skip
    seconds = time.perf_counter() - began
    right["after"] = hits(tuned.model, data, given.threads)
    print(json.dumps({
        "model": given.model.name, "weights": f"int4, per {'channel' if given.per_channel else 'layer'}",
        "epochs": given.epochs, "lr": settings.peak_lr, "max_grad_norm": settings.max_grad_norm,
        "fixed_scales": given.fixed_scales,
        "train_images": len(training.dataset.train),
        "val_images": len(training.dataset.val), "test_images": len(right["fp32"]),
        **{f"top1_{name}": float(found.mean()) for name, found in right.items()},
        **recovered(right), "training_kept": tuned.kept, "agreement": asdict(tuned.agreement),
        "seconds": round(seconds),
    }))  # fmt: skip


def tell(done: float, total: float, message: str = "") -> None:
    print(f"{done:.2f}/{total} {message}", flush=True)


def hits(model: ModelProto, data: Data, threads: int) -> npt.NDArray[np.bool_]:
    """Which test images are told right."""
    run: Callable[[npt.NDArray[np.float32]], list[npt.NDArray[np.float32]]] = evaluator(
        packed(model), threads=threads, integers=False
    )

    def each() -> Iterator[npt.NDArray[np.bool_]]:
        for batch in batches(data.dataset.test, data.preprocessing, 100):
            yield run(batch.images)[0].argmax(axis=1) == batch.labels

    return np.concatenate(list(each()))


def recovered(right: dict[str, npt.NDArray[np.bool_]]) -> dict[str, object]:
    """Drop before and after, and the recovered share with its 95% interval."""
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(RESAMPLES):
        index = rng.integers(0, len(right["fp32"]), len(right["fp32"]))
        full, before, after = (right[name][index].mean() for name in ("fp32", "before", "after"))
        if full > before:
            shares.append((after - before) / (full - before))
    full, before, after = (float(right[name].mean()) for name in ("fp32", "before", "after"))
    return {
        "drop_before": full - before,
        "drop_after": full - after,
        "recovered": (after - before) / (full - before) if full > before else None,
        "recovered_95": [float(bound) for bound in np.quantile(shares, (0.025, 0.975))] if shares else None,
    }


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
