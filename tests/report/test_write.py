"""Writing and reading: whole files or none, and light to import."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploycnn.errors import ArtifactError
from deploycnn.report import read_report, words, write_reports
from tests.report.example import example_report


def test_three_files_and_the_json_reads_back(tmp_path: Path) -> None:
    paths = write_reports(tmp_path, example_report())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    assert read_report(paths["json"]) == read_report(tmp_path) == example_report()
    assert paths["md"].read_text("utf-8").startswith("# digits-resnet20\n")


def test_a_bad_report_leaves_nothing(tmp_path: Path) -> None:
    report: Any = dict(example_report())
    report["variants"][0]["macs"] = "many"
    with pytest.raises(ArtifactError, match=r"variants\.0\.macs"):
        write_reports(tmp_path, report)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_reports(tmp_path, example_report())
    before = (tmp_path / "report.html").read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(Exception, match="no space left"):
        write_reports(tmp_path, {**example_report(), "name": "another"})
    assert (tmp_path / "report.html").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("text", ["", "{", '{"schema_version": 9}', "[1]", "\ufffd"])
def test_damaged_files_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text, "utf-8")
    with pytest.raises(ArtifactError, match=r"report\.json: "):
        read_report(tmp_path)


def test_a_missing_report_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="run `deploycnn compress` first"):
        read_report(tmp_path)


def test_the_examples_in_docstrings_hold() -> None:
    assert doctest.testmod(words).failed == 0


def test_rendering_needs_no_heavy_library(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps(example_report()), "utf-8")
    code = (
        "import sys, json; from pathlib import Path; from deploycnn.report import write_reports, read_report;"
        "write_reports(Path(sys.argv[1]) / 'out', read_report(Path(sys.argv[1]) / 'in.json'));"
        "print([m for m in ('torch', 'onnxruntime', 'onnx', 'numpy') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
