"""``--weights`` and the sources that take none."""

from __future__ import annotations

import pytest

from deploycnn import overrides
from deploycnn import recipe as recipes
from deploycnn.errors import RecipeError


def test_weights_for_a_source_that_takes_none_are_refused() -> None:
    values = {"source": {"onnx": "m.onnx"}, "variants": {"a": []}}
    with pytest.raises(RecipeError, match=r"--weights w\.pt: a source of kind onnx takes no weights"):
        recipes.load_values(values, weights="w.pt")


@pytest.mark.parametrize(
    ("source", "key"),
    [({"zoo": "lenet5"}, "weights"), ({"checkpoint": "a.pt", "architecture": "zoo:lenet5"}, "checkpoint")],
)
def test_weights_take_the_place_of_the_sources(source: dict[str, str], key: str) -> None:
    raw = {"source": dict(source), "variants": {"a": []}}
    overrides.apply(raw, [], data=None, weights="/w.pt")
    assert raw["source"] == {**source, key: "/w.pt"}
