"""``--weights`` and the sources that take none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("key", ["weights", "latency_table"])
def test_files_on_the_command_line_are_relative_to_the_working_directory(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    raw: dict[str, Any] = {"variants": {"v": [{"p": {}}]}}
    overrides.apply_setting(raw, f"variants.v.0.p.{key}=file.json")
    assert raw["variants"]["v"][0]["p"][key] == str(tmp_path / "file.json")
