"""A small model as an artifact, as a source would leave it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from deploycnn.core import Artifact, Draft, Facts, TensorSpec
from deploycnn.data.augment import Augmentation
from deploycnn.data.base import Data
from deploycnn.models import zoo
from deploycnn.models.artifact import architecture, save_model
from tests.training.support import CLASSES, make_data

DATA = make_data(side=32)

#: Training that takes a second.
QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 16, "lr": 0.05, "augment": Augmentation(crop_padding=1)}


def make_artifact(
    folder: Path, *, seed: int = 0, classes: int = len(CLASSES), facts: Facts | None = None
) -> Artifact:
    folder.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = zoo.build("lenet5", num_classes=classes)
    save_model(model, folder, architecture("zoo", {"name": "lenet5", "in_channels": 3}, classes))
    return Artifact(
        key=f"key-{seed}",
        format="torch",
        path=folder / "model.safetensors",
        inputs=(TensorSpec(name="images", dtype="float32", shape=(None, 3, 32, 32)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=(None, classes)),),
        parents=(),
        facts=facts or Facts(params=1, macs=2),
    )


def as_artifact(draft: Draft, folder: Path) -> Artifact:
    return Artifact(
        key="trained",
        format=draft.format,
        path=folder / "model.safetensors",
        inputs=draft.inputs,
        outputs=draft.outputs,
        parents=(),
        facts=draft.facts,
    )


def other_size(data: Data) -> Any:
    return dataclasses.replace(data.preprocessing, scale="signed").to_json()
