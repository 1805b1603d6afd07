"""``deploycnn latency-table`` on a target whose times are known exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from deploycnn.cli import main
from deploycnn.cli.latency_table import command
from deploycnn.latency.reading import load_table
from tests.pruning.test_latency_goal import Exact


@pytest.fixture(autouse=True)
def _exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPLOYCNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("deploycnn.latency.samples.CONFIGS", 16)
    monkeypatch.setattr("deploycnn.profiling.stopwatch.RuntimeStopwatch", lambda **_: Exact())


def test_a_table_is_measured_written_and_read(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    result = CliRunner().invoke(command, ["zoo:resnet20", "--round-to", "2", "-o", str(out)])
    assert result.exit_code == 0, result.output
    table = load_table(out)
    assert (table.runtime, table.precision, table.batch_size, table.threads) == (
        "onnxruntime:cpu",
        "fp32",
        1,
        1,
    )
    assert f"{out}: {len(table.samples)} layer times, steps of {table.step} channels" in result.output
    assert "error for whole models: 0." in result.output
    # The target takes 1 us a node and 1 ms for a million multiply-accumulates.
    name, kind = next((name, kind) for name, kind in table.layers.items() if name == "conv1")
    assert float(table.cost(kind, 3, 16)) == pytest.approx(0.001 + 32 * 32 * 3 * 16 * 9 / 1e6, rel=0.05), name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["zoo:resnet20", "--target", "nowhere"], 'unknown target "nowhere"'),
        (["zoo:resnet20", "--target", "tensorrt"], "cannot be timed here"),
        (["resnet8"], "neither an artifact's folder nor source:name"),
        (["zoo:resnet9000"], "resnet9000"),
    ],
)
def test_what_cannot_be_timed_is_one_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    out = tmp_path / "table.json"
    assert main(["latency-table", *arguments, "-o", str(out)]) == 2
    captured = capfd.readouterr()
    assert says in " ".join((captured.out + captured.err).split())
    assert "Traceback" not in captured.err
    assert not out.exists()


def test_a_folder_that_is_missing_is_told_before_minutes_of_timing(tmp_path: Path) -> None:
    out = tmp_path / "missing" / "table.json"
    result = CliRunner().invoke(command, ["zoo:resnet20", "-o", str(out)])
    assert result.exit_code == 2
    assert "missing" in result.output
