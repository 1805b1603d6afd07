"""What a teacher adds: a student trained for the same epochs with and without one.

    python benchmarks/distillation.py --data cifar10-jpeg.zip --teacher-weights resnet56.safetensors \
        --epochs 30 --seeds 3 --work runs/distillation --out distillation.jsonl

The student (ResNet-20, random weights) sees the same augmented images in the same order, with the same optimizer and
schedule, whatever teaches it. Val (the last 500 images of each training class) picks the method by its mean top-1
over seeds; the test split proves that one against labels alone, once. The last line has the gain with its 95%
interval over seeds, by Student's t of the paired differences. ``--train-images``, ``--val-images`` and
``--test-images`` make a pilot.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from training_runs import Bench, add_arguments, summary

from deploycnn.data.augment import Augmentation
from deploycnn.passes.distill import Distill
from deploycnn.passes.train import Train
from deploycnn.sources.zoo import Zoo

#: Options of ``distill`` by name; a teacher is added.
METHODS: dict[str, dict[str, Any]] = {
    "kd": {"method": "kd"},
    "dkd": {"method": "dkd"},
    "dist": {"method": "dist"},
    "at": {"method": "kd", "alpha": 0.0, "label_weight": 1.0, "features": "at"},
    "fitnet": {"method": "kd", "alpha": 0.0, "label_weight": 1.0, "features": "fitnet"},
    "kd+at": {"method": "kd", "features": "at"},
    "kd+fitnet": {"method": "kd", "features": "fitnet"},
    "dist+at": {"method": "dist", "features": "at"},
}
LABELS = "labels"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--teacher-weights", type=Path, required=True)
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--student-weights", type=Path, help="start from these instead of random ones")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--schedule", default="linear", choices=["cosine", "linear", "one_cycle"])
    given = parser.parse_args()
    bench = Bench(given)
    teacher = bench.make("teacher", Zoo(name=given.teacher, weights=given.teacher_weights))
    bench.tell(teacher=given.teacher, val_top1=bench.top1(teacher, bench.data.dataset.val))
    common: dict[str, Any] = {
        "epochs": given.epochs,
        "lr": given.lr,
        "schedule": given.schedule,
        "batch_size": given.batch_size,
        "reestimate_bn": False,
        "augment": Augmentation(crop_padding=4, padding="zero", horizontal_flip=True),
    }
    made = {}
    for seed in range(given.seeds):
        student = bench.make(
            f"student-{seed}", Zoo(name=given.student, weights=given.student_weights), seed=seed
        )
        for name in (LABELS, *given.methods):
            step = (
                Train(**common) if name == LABELS else Distill(teacher="teacher", **METHODS[name], **common)
            )
            key = f"{name}-{given.epochs}-{given.lr}-{given.schedule}-{len(bench.data.dataset.train)}-{seed}"
            trained = bench.make(key, step, student, seed=seed, references={"teacher": teacher})
            made[name, seed] = trained
            history = trained.facts.record["training"]
            seconds = sum(epoch["seconds"] for epoch in history["epochs"])
            bench.tell(method=name, seed=seed, val_top1=history["kept_val_top1"], seconds=round(seconds, 1))
    val = {
        name: [made[name, seed].facts.record["training"]["kept_val_top1"] for seed in range(given.seeds)]
        for name in (LABELS, *given.methods)
    }
    best = max(given.methods, key=lambda name: float(np.mean(val[name])))
    test = {
        name: [bench.top1(made[name, seed], bench.test) for seed in range(given.seeds)]
        for name in (LABELS, best)
    }
    gains = [ours - theirs for ours, theirs in zip(test[best], test[LABELS], strict=True)]
    bench.tell(
        best=best,
        epochs=given.epochs,
        train_images=len(bench.data.dataset.train),
        test_images=len(bench.test),
        seeds=given.seeds,
        test_top1=test,
        gain=summary(gains),
    )


if __name__ == "__main__":
    main()
