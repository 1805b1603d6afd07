"""``deploycnn doctor``: findings printed; broken things make it fail, missing ones do not."""

from __future__ import annotations

import dataclasses
import json

import pytest
from click.testing import CliRunner

from deploycnn import doctor
from deploycnn.cli import main
from deploycnn.cli.doctor import command
from deploycnn.doctor import Finding

FINE = Finding(name="python", status="ok", what="3.11.7")
ABSENT = Finding(
    name="onnxruntime:cuda", status="warning", what="not usable", why="no such provider", mend="pip install x"
)
BROKEN = Finding(name="openvino:f32", status="error", what="does not load \x1b[31m", why="libtbb\nis missing")


def _plant(monkeypatch: pytest.MonkeyPatch, *findings: Finding) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda: list(findings))


def test_each_finding_is_printed_with_its_reason_and_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    _plant(monkeypatch, FINE, ABSENT)
    result = CliRunner().invoke(command)
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "ok      python            3.11.7",
        "warning onnxruntime:cuda  not usable",
        "                          no such provider",
        "                          mend: pip install x",
    ]


def test_something_broken_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _plant(monkeypatch, FINE, BROKEN)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "libtbb is missing" in out


def test_json_holds_every_field(monkeypatch: pytest.MonkeyPatch) -> None:
    _plant(monkeypatch, BROKEN, ABSENT)
    result = CliRunner().invoke(command, ["--json"])
    assert result.exit_code == 1
    first, second = json.loads(result.output)
    assert first == {**dataclasses.asdict(BROKEN), "mend": ""}
    assert second["mend"] == "pip install x"
