"""A recipe for another target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploycnn import recipe as recipes
from deploycnn.errors import RecipeError
from deploycnn.plan import check_chains
from deploycnn.retarget import for_target


def recipe(target: str, **variants: list[Any]) -> recipes.Recipe:
    raw = {
        "source": {"zoo": "lenet5"},
        "data": "digits",
        "target": target,
        "variants": variants,
        "profile": {"runtimes": ["onnxruntime:cpu"]},
    }
    return recipes.parse(raw, base=Path.cwd())


def passes(loaded: recipes.Recipe, variant: str) -> list[str]:
    return [name for name, _ in loaded.variant(variant).passes]


def test_onnx_variants_get_an_engine_and_others_stay() -> None:
    loaded = recipe("cpu", fp32=["export"], built=["export", {"build_engine": {"max_batch": 4}}], plain=[])
    changed = for_target(loaded, "tensorrt-rtx")
    assert passes(changed, "fp32") == ["export", "build_engine"]
    assert passes(changed, "built") == ["export", "build_engine"]
    assert changed.variant("built").passes[1][1].max_batch == 4  # type: ignore[attr-defined]
    assert passes(changed, "plain") == []
    assert changed.target.name == "tensorrt-rtx"
    assert changed.runtimes == ("tensorrt:rtx", "onnxruntime:cuda")
    assert loaded.target.name == "cpu"


def test_targets_without_engines_only_change_the_target() -> None:
    changed = for_target(recipe("cpu", fp32=["export"]), "openvino")
    assert passes(changed, "fp32") == ["export"]
    check_chains(changed)


def test_graphs_of_a_tensorrt_recipe_stay_what_they_are() -> None:
    loaded = recipe("tensorrt", int8=["export", "int8"], own=["export", {"int8": {"rules": "openvino"}}])
    changed = for_target(loaded, "tensorrt-rtx")
    assert changed.variant("int8").passes[1][1].rules == "tensorrt"  # type: ignore[attr-defined]
    assert changed.variant("own").passes[1][1].rules == "openvino"  # type: ignore[attr-defined]
    from_cpu = for_target(recipe("cpu", int8=["export", "int8"]), "tensorrt-rtx")
    assert from_cpu.variant("int8").passes[1][1].rules == "target"  # type: ignore[attr-defined]


def test_an_unknown_target_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match='did you mean "tensorrt"'):
        for_target(recipe("cpu", fp32=["export"]), "tensort")
