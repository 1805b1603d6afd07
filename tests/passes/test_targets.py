"""Options that a target cannot have are refused while the recipe is planned, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploycnn import recipe as recipes
from deploycnn.errors import RecipeError
from deploycnn.plan import plan

CHAINS: list[tuple[str, list[Any], str]] = [
    (
        "onnxruntime-cpu",
        ["train", {"prune": {"latency_ratio": 0.5, "latency_precision": "fp16"}}, "export"],
        r"variants.v.1: prune.latency_precision: fp16 is for GPUs.*use fp32",
    ),
    (
        "tensorrt",
        ["train", "export", {"int8": {"activations": "uint8"}}],
        r"variants.v.2: int8: activations: uint8 is for CPU targets, not tensorrt",
    ),
    (
        "tensorrt-rtx",
        ["train", "export", {"int8": {"weights": "int4"}}],
        r"variants.v.2: int8: weights: int4 is for CPU targets, not tensorrt-rtx",
    ),
]


def planned(target: str, chain: list[Any]) -> list[str]:
    raw = {"source": {"zoo": "resnet20"}, "data": "digits", "target": target, "variants": {"v": chain}}
    made = plan(recipes.parse(raw, base=Path()), data_fingerprint="d", environment_fingerprint="e")
    return [step.name for step in made.steps]


@pytest.mark.parametrize(("target", "chain", "message"), CHAINS)
def test_what_a_target_cannot_have_is_refused_with_its_place(
    target: str, chain: list[Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        planned(target, chain)


@pytest.mark.parametrize(
    ("target", "chain"),
    [
        ("tensorrt", CHAINS[0][1]),
        ("cpu", CHAINS[1][1]),
        ("onnxruntime-cpu", CHAINS[2][1]),
        ("tensorrt", ["train", "export", {"int8": {"rules": "onnxruntime-cpu", "activations": "uint8"}}]),
    ],
)
def test_what_it_can_have_is_planned(target: str, chain: list[Any]) -> None:
    assert planned(target, chain)[:2] == ["zoo", "train"]
