"""`benchmarks/offline_bundle.py` without pip and network: pieces, their sums, and what is asked of the index."""

from __future__ import annotations

import hashlib
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("the benchmarks are not part of this distribution")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("offline_bundle", "offline_install"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("offline_bundle")


@pytest.fixture
def folder(script: ModuleType, tmp_path: Path) -> Path:
    """A bundle of a small file, and of one that is two and a half pieces long."""
    made = tmp_path / "bundle"
    (made / "wheels").mkdir(parents=True)
    (made / "wheels" / "small.whl").write_bytes(b"wheel")
    (made / "wheels" / "large.whl").write_bytes(bytes(range(250)))
    script.offline_install.finish(
        made, {"python": "3.0", "extras": ["gpu"], "host_torch": False}, piece_bytes=100
    )
    return made


def test_pieces_are_no_larger_than_asked_and_join_to_the_same_file(script: ModuleType, folder: Path) -> None:
    parts = sorted((folder / "wheels").glob("large.whl.part*"))
    assert [part.stat().st_size for part in parts] == [100, 100, 50]
    assert not (folder / "wheels" / "large.whl").exists()
    assert script.main(["verify", "--folder", str(folder)]) == 0
    assert script.main(["join", "--folder", str(folder)]) == 0
    assert (folder / "wheels" / "large.whl").read_bytes() == bytes(range(250))
    assert not list((folder / "wheels").glob("*.part*"))
    assert script.main(["join", "--folder", str(folder)]) == 0, "again, with nothing left to join"


@pytest.mark.parametrize("name", ["small.whl", "large.whl.part001"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_or_missing_piece_is_named(
    script: ModuleType, folder: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "wheels" / name
    if damage == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[0] ^= 1
        path.write_bytes(content)
    for command in ("verify", "join"):
        assert script.main([command, "--folder", str(folder)]) == 2
        error = capsys.readouterr().err
        assert f"{path}: {'damaged' if damage == 'changed' else 'missing'}" in error
        assert error.count("\n") == 1


def test_another_python_is_refused(
    script: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["install", "--folder", str(folder), "--venv", str(tmp_path / "venv")]) == 2
    assert "made for Python 3.0" in capsys.readouterr().err
    assert not (tmp_path / "venv").exists()


def test_what_is_taken_along_needs_nothing_beside_it(
    script: ModuleType, folder: Path, tmp_path: Path
) -> None:
    alone = folder / "bundle.py"
    alone.write_bytes(Path(script.offline_install.__file__).read_bytes())
    isolated = [sys.executable, "-I", "-S", str(alone)]
    done = subprocess.run([*isolated, "join"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "whole and joined" in done.stdout


def test_an_installation_that_was_broken_off_is_made_again(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = []
    monkeypatch.setattr(script.offline_install, "_install", lambda options: installed.append(options.venv))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0))
    venv = tmp_path / "venv"
    (venv / "src" / "deploycnn").mkdir(parents=True)
    assert script.main(["run", "--venv", str(venv)]) == 0
    assert installed == [venv]
    (venv / script.offline_install.INSTALLED).touch()
    assert script.main(["run", "--venv", str(venv)]) == 0
    assert installed == [venv], "once"


def test_what_is_asked_of_the_index(script: ModuleType) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = script.requirements(project, ["gpu", "tensorrt"], host_torch=False)
    names = {item.partition(">")[0].partition("=")[0].partition(";")[0].strip() for item in asked}
    assert {
        "torch",
        "torchvision",
        "torch-pruning",
        "onnxruntime-gpu",
        "tensorrt",
        "pytest",
        "hatchling",
    } <= names
    assert "onnxruntime" not in names, "it would break onnxruntime-gpu"
    lent = script.requirements(project, ["gpu", "tensorrt"], host_torch=True)
    assert set(asked) - set(lent) == {item for item in asked if item.startswith(("torch>", "torchvision"))}, (
        "only torch itself is lent, not what is built on it"
    )
    with pytest.raises(script.BundleError, match="--extras gpus"):
        script.requirements(project, ["gpus"], host_torch=False)


def test_older_platforms_are_taken_too(script: ModuleType) -> None:
    tags = script._platforms("manylinux_2_28_x86_64")
    assert tags[0] == "manylinux_2_28_x86_64"
    assert {"manylinux_2_17_x86_64", "manylinux2014_x86_64", "linux_x86_64"} <= set(tags)


def test_the_archive_holds_the_benchmarks_and_the_tests(script: ModuleType, tmp_path: Path) -> None:
    import tarfile

    try:
        script._archive(ROOT, tmp_path / "source.tar.gz")
    except script.BundleError as error:
        pytest.skip(str(error))
    with tarfile.open(tmp_path / "source.tar.gz") as archive:
        names = set(archive.getnames())
    assert {
        "deploycnn/benchmarks/gpu.py",
        "deploycnn/tests/gpu/on_gpu.py",
        "deploycnn/pyproject.toml",
    } <= names


def test_sums_are_of_the_content(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    assert script.offline_install.digest(path) == hashlib.sha256(b"content").hexdigest()
