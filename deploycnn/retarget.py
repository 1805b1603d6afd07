"""A recipe for another target: what `deploycnn export --target` does to it."""

from __future__ import annotations

import copy
from typing import Any

from deploycnn import recipe as recipes
from deploycnn import targets
from deploycnn.recipe import Recipe


def for_target(recipe: Recipe, name: str) -> Recipe:
    """The same recipe for the target ``name``; where that deploys engines, ONNX variants end in `build_engine`.

    Raises:
        RecipeError: there is no such target.
    """
    target = targets.get(name)
    raw = copy.deepcopy(dict(recipe.raw))
    raw["target"] = name
    # Runtimes that were asked for belong to the target that was given up.
    if isinstance(raw.get("profile"), dict):
        raw["profile"].pop("runtimes", None)
    if (recipe.target.name, name) == ("tensorrt", "tensorrt-rtx"):
        _keep_int8_rules(raw["variants"])
    if target.engines:
        for variant in recipe.variants:
            produced = variant.passes[-1][1].produces if variant.passes else recipe.source[1].produces
            if produced == "onnx":
                raw["variants"][variant.name] = [*raw["variants"][variant.name], "build_engine"]
    return recipes.load_values(raw)


def _keep_int8_rules(variants: dict[str, Any]) -> None:
    """Let `int8` place Q/DQ by the rules of `tensorrt` still: another builder, the same graphs.

    TensorRT-RTX's own rules leave convolutions in float, so there would be no INT8 engine to look at.
    """
    for steps in variants.values():
        for index, step in enumerate(steps):
            options = step.get("int8") if isinstance(step, dict) else {} if step == "int8" else None
            if isinstance(options, dict):
                steps[index] = {
                    "int8": {"rules": "tensorrt"} | {k: v for k, v in options.items() if v != "target"}
                }
