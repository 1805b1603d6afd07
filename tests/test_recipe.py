"""Recipes: what is read, what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploycnn import recipe as recipes
from deploycnn.errors import RecipeError
from tests.fakes import Export, Model, Tune

pytestmark = pytest.mark.usefixtures("fake_components")

MINIMAL: dict[str, Any] = {"source": {"model": "m"}, "variants": {"fp32": ["export"]}}


def parse(changes: dict[str, Any], base: Path = Path()) -> recipes.Recipe:
    return recipes.parse({**MINIMAL, **changes}, base=base)


def test_reads_names_options_and_defaults() -> None:
    recipe = parse({"variants": {"fp32": ["export"], "tuned": [{"tune": {"amount": 3}}, "export"]}})
    assert recipe.source == ("model", Model(name="m"))
    assert recipe.baseline == "fp32"
    assert recipe.target.name == "onnxruntime-cpu"
    assert recipe.variant("tuned").passes == (("tune", Tune(amount=3)), ("export", Export()))


def test_a_value_alone_is_the_main_field() -> None:
    recipe = parse({"variants": {"fp32": ["export"], "tuned": [{"tune": 3}, "export"]}})
    assert recipe.variant("tuned").passes[0] == ("tune", Tune(amount=3))
    with pytest.raises(RecipeError, match=r"variants\.a\.0\.export: expected"):
        parse({"variants": {"a": [{"export": "auto"}]}})


def test_resolved_recipe_parses_to_itself() -> None:
    recipe = parse({"budget": {"max_top1_drop": 0.01}, "seed": 3, "target": "cpu"})
    again = recipes.parse(recipe.raw, base=Path("/nowhere"))
    assert again == recipe


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"varients": {}}, 'varients: unknown key; did you mean "variants"?'),
        ({"variants": {}}, "variants: required, but not given"),
        ({"source": None}, "source: required, but not given"),
        ({"source": {"modl": "m"}}, 'source: unknown kind "modl"; did you mean "model"?'),
        ({"source": "m"}, 'write "source: {KIND: m}"'),
        ({"source": {"model": "m", "wieghts": "x"}}, 'source.wieghts: unknown key; did you mean "weights"?'),
        ({"source": {"model": "m", "weights": "no.pt"}}, "source.weights: no such file or folder"),
        ({"variants": ["export"]}, "variants: expected a mapping NAME: [pass, ...]"),
        ({"variants": {"a/b": ["export"]}}, "a variant's name is letters"),
        ({"variants": {"a": "export"}}, "variants.a: expected a list of passes"),
        (
            {"variants": {"a": ["exprt"]}},
            'recipe: variants.a.0: unknown pass "exprt"; did you mean "export"?',
        ),
        ({"data": "digts"}, 'recipe: data: unknown data "digts"'),
        (
            {"variants": {"a": [{"tune": {"amount": -1}}, "export"]}},
            "variants.a.0.tune.amount: should be greater than",
        ),
        ({"variants": {"a": [{"tune": {}, "export": {}}]}}, "variants.a.0: expected a name"),
        ({"baseline": "b"}, 'baseline: no variant "b"'),
        ({"target": None}, 'target: expected a name such as "cpu", got None'),
        ({"target": ["cpu"]}, "target: expected a name such as \"cpu\", got ['cpu']"),
        (
            {"target": "onnxruntime-cup"},
            'recipe: target: unknown target "onnxruntime-cup"; did you mean "onnxruntime-cpu"?',
        ),
        ({"seed": -1}, "seed: should be a whole number from 0 to 4294967295, got -1"),
        ({"seed": 2**32}, "seed: should be a whole number from 0 to 4294967295, got 4294967296"),
        ({"name": "a b"}, "name: should be letters"),
        ({"task": "detection"}, "task: should be classification"),
        ({"budget": {"max_top1_drop": 2}}, "budget.max_top1_drop: should be less than or equal to 1, got 2"),
        ({"profile": {"batch_sizes": []}}, "profile.batch_sizes"),
        (
            {"profile": {"batch_sizes": [0]}},
            "profile.batch_sizes.0: should be greater than or equal to 1, got 0",
        ),
        (
            {"profile": {"runtimes": ["onnxruntim"]}},
            'unknown runtime "onnxruntim"; did you mean "onnxruntime"?',
        ),
        ({"profile": {"runtimes": ["onnxruntime:gpu"]}}, 'unknown mode "gpu"'),
    ],
)
def test_bad_recipes_name_key_value_and_mend(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(changes)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def write(folder: Path, text: str = "source: {model: m}\nvariants: {a: [tune, export]}\n") -> Path:
    path = folder / "r.yaml"
    path.write_text(text)
    return path


def test_settings_reach_into_lists_and_bare_names(tmp_path: Path) -> None:
    settings = ["variants.a.0.tune.amount=7", "seed=5", "budget.max_top1_drop=1e-2", "source.model=other"]
    recipe = recipes.load(write(tmp_path), overrides=settings)
    assert recipe.variant("a").passes[0] == ("tune", Tune(amount=7))
    assert (recipe.seed, recipe.source[1]) == (5, Model(name="other"))
    assert recipe.budget == recipes.Budget(max_top1_drop=0.01)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("seed", "expected key=value"),
        ("variants.b.0.tune.amount=1", "variants.b: no such key"),
        ("variants.a.9.tune.amount=1", '"9" should be an index from 0 to 1'),
        ("variants.a.\u00b2.tune.amount=1", '"\u00b2" should be an index from 0 to 1'),
        ("seeds=1", 'seeds: unknown key; did you mean "seed"?'),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, setting: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipes.load(write(tmp_path), overrides=[setting])
    assert expected in str(caught.value)


def test_weights_are_replaced_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w.pt").write_bytes(b"1")
    folder = tmp_path / "recipes"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = recipes.load(write(folder), weights="w.pt")
    assert recipe.source[1] == Model(name="m", weights=tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"- a", "a recipe is a mapping"), (b"\xff\xfe\x00", "cannot be read"), (b"a: [", "not valid YAML")],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=expected):
        recipes.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        recipes.load(tmp_path / "r.yaml")
