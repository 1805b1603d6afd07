"""``deploycnn recipes``: what ships, shown and copied without harm."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from deploycnn import recipes
from deploycnn.cli import main
from deploycnn.cli.recipes import command
from deploycnn.errors import ArtifactError, RecipeError, StorageError


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "small.yaml").write_text("# Small and quick.\nsource: {zoo: resnet20}\n", "utf-8")
    (folder / "bare.yaml").write_text("source: {zoo: lenet5}\n# too late\n", "utf-8")
    (folder / "README.md").write_text("no recipe", "utf-8")
    monkeypatch.setattr(recipes, "folder", lambda: folder)
    return folder


def test_list_shows_each_with_its_first_comment(shipped: Path) -> None:
    result = CliRunner().invoke(command, ["list"])
    assert result.output == "bare\nsmall  Small and quick.\n"
    listed = json.loads(CliRunner().invoke(command, ["list", "--json"]).output)
    assert listed[1] == {
        "name": "small",
        "description": "Small and quick.",
        "path": str(shipped / "small.yaml"),
    }


@pytest.mark.parametrize("name", ["small", "small.yaml"])
def test_show_prints_the_file(shipped: Path, name: str) -> None:
    assert CliRunner().invoke(command, ["show", name]).output == (shipped / "small.yaml").read_text("utf-8")


def test_an_unknown_name_tells_the_nearest(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "smal"]) == 2
    assert capsys.readouterr().err == (
        'error: no shipped recipe "smal"; did you mean "small"? Known: bare, small\n'
    )


def test_copy_into_a_folder_and_to_a_name(shipped: Path, tmp_path: Path) -> None:
    for destination, expected in (
        (tmp_path, tmp_path / "small.yaml"),
        (tmp_path / "mine.yaml", tmp_path / "mine.yaml"),
    ):
        result = CliRunner().invoke(command, ["copy", "small", str(destination)])
        assert (result.exit_code, result.output) == (0, f"{expected}\n")
        assert expected.read_bytes() == (shipped / "small.yaml").read_bytes()


def test_copy_overwrites_only_by_force(shipped: Path, tmp_path: Path) -> None:
    mine = tmp_path / "small.yaml"
    mine.write_text("my changes", "utf-8")
    with pytest.raises(RecipeError, match=r"small\.yaml exists; .*--force"):
        recipes.copy("small", tmp_path)
    assert main(["recipes", "copy", "small", str(tmp_path)]) == 2
    assert mine.read_text("utf-8") == "my changes"
    assert main(["recipes", "copy", "small", str(tmp_path), "--force"]) == 0
    assert mine.read_text("utf-8").startswith("# Small")


def test_copy_to_where_nothing_can_be_written(shipped: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere/x\.yaml: cannot be written \(No such file"):
        recipes.copy("small", tmp_path / "nowhere" / "x.yaml")


def test_an_installation_without_recipes_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "_PACKAGE", tmp_path / "deploycnn")
    with pytest.raises(ArtifactError, match="the installation is incomplete"):
        recipes.shipped()
    (tmp_path / "deploycnn" / "_recipes").mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    assert recipes.folder() == tmp_path / "deploycnn" / "_recipes", "the wheel's own come first"


def test_every_shipped_recipe_says_what_it_does() -> None:
    assert recipes.shipped()
    assert all(recipes.description(path) for path in recipes.shipped().values())


@pytest.mark.parametrize("verb", ["recipes", "inspect", "doctor"])
def test_help_loads_nothing_heavy(verb: str) -> None:
    code = (
        "import sys; from deploycnn.cli import main; main([sys.argv[1], '--help']);"
        "heavy = ('torch', 'onnxruntime', 'onnx', 'openvino', 'numpy', 'pydantic', 'rich', 'jinja2', 'yaml');"
        "print(sorted(set(heavy) & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code, verb], capture_output=True, text=True, check=True)
    assert f"Usage: deploycnn {verb}" in found.stdout
    assert found.stdout.splitlines()[-1] == "[]"
