"""``deploycnn inspect``: layers and totals of files, artifacts and named models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from deploycnn.cli import main
from deploycnn.cli.inspect import command, render
from deploycnn.models.inspection import LayerRow, ModelTable


def _json(*arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found: dict[str, object] = json.loads(result.output)
    return found


def test_a_zoo_model_by_name_has_the_published_totals() -> None:
    # He et al. 2016, table 6: 0.27 M parameters; 40.6 M MACs of the convolutions and the classifier.
    found = _json("zoo:resnet20")
    assert found["name"] == "zoo:resnet20"
    assert found["input_shape"] == [3, 32, 32]
    assert 0.269e6 < float(str(found["params"])) < 0.273e6
    assert 40.5e6 < float(str(found["macs"])) < 41.0e6


def test_another_image_size_changes_macs_not_params() -> None:
    small, large = _json("zoo:resnet20"), _json("zoo:resnet20", "--input-size", "64x32")
    assert large["input_shape"] == [3, 64, 32]
    assert large["params"] == small["params"]
    assert float(str(large["macs"])) > 1.9 * float(str(small["macs"]))


def test_the_text_ends_with_the_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = CliRunner().invoke(command, ["zoo:resnet20"]).output.splitlines()
    assert lines[0].split() == ["layer", "kind", "output", "params", "MACs", "field", "memory"]
    totals = " ".join(lines[lines.index("") + 1 :])
    assert re.match(r"zoo:resnet20: 269,722 params, 40\.\d M MACs, .*; one 3x32x32 image$", totals)
    assert max(len(line) for line in lines) <= 100


@pytest.mark.parametrize("width", [60, 80, 140, 200])
def test_the_table_keeps_to_the_width_and_shows_the_end_of_names(width: int) -> None:
    row = LayerRow(
        name="backbone.features.stage4.block11.conv2.depthwise.convolution",
        kind="Conv2d",
        input_shape=(1, 512, 14, 14),
        output_shape=(1, 512, 14, 14),
        params=2_359_296,
        macs=None,
        receptive_field=(427, 427),
        activation_bytes=401_408,
    )
    table = ModelTable(
        name="x\x1b[31m", rows=(row,), input_shape=(3, 224, 224), params=1, macs=None, activation_bytes=1,
        peak_activation_bytes=1,
    )  # fmt: skip
    lines = render(table, width)
    assert all(len(line) <= max(width, 75) for line in lines[:-1])
    assert "convolution " in lines[2]
    assert ("input" in lines[0]) == (width >= 140)
    assert "MACs unknown" in " ".join(lines[lines.index("") :])
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("size", ["0", "3y5", "1x2x3x4", "-3", "3.5", ""])
def test_a_size_that_is_none_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "zoo:resnet20", "--input-size", size]) == 2
    assert "write 224, HxW (240x320) or CxHxW (1x28x28)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("zoo:resnet21", 'did you mean "resnet'),
        ("zo:resnet20", 'unknown source "zo"; did you mean "zoo"?'),
        ("missing.onnx", "missing.onnx"),
        ("notes.txt", "inspect takes .onnx files"),
    ],
)
def test_what_cannot_be_inspected_is_one_line(
    model: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("no model", "utf-8")
    assert main(["inspect", model]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
