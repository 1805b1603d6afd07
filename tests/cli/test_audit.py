"""`deploycnn audit` on engines that were really built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploycnn import bundle
from deploycnn.cli import main
from deploycnn.core import Artifact
from deploycnn.passes.build_engine import BuildEngine
from tests.engines import graphs
from tests.passes.onnx_support import context
from tests.passes.test_build_engine import onnx_artifact

pytest.importorskip("tensorrt_rtx_bindings", reason='needs pip install "deploycnn[tensorrt-rtx]"')


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of an engine in half precision."""
    root = tmp_path_factory.mktemp("audit")
    ctx = context(root, None, target="tensorrt-rtx")
    draft = BuildEngine().run(onnx_artifact(graphs.net(dtype="float16"), root, "fp16"), ctx)
    artifact = Artifact(
        key="k",
        format="engine",
        path=ctx.output / "model.engine",
        inputs=draft.inputs,
        outputs=draft.outputs,
        parents=(),
        facts=draft.facts,
    )
    bundle.write_bundle(root / "bundle", artifact, variant="fp16", runtime=None, evidence={})
    return root / "bundle"


def test_the_table_and_the_census(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "100% of MACs ran FP16" in out
    assert "conv2" in out
    assert "as the builder logged it" in out


def test_thresholds_decide_the_exit_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = str(folder / "model.engine")
    assert main(["audit", engine, "--fail-on", "fp16_macs<0.9", "--fail-on", "unmatched>0"]) == 0
    assert main(["audit", engine, "--fail-on", "int8_macs<0.9", "--json"]) == 1
    printed = capsys.readouterr().out
    content = json.loads(printed[printed.index("\n{") if "\n{" in printed else 0 :])
    assert content["failed"] == ["int8_macs<0.9 (it is 0)"]
    assert content["source"] == "builder log"


def test_times_are_shown(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(folder), "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["layers"]]
    times = tmp_path / "times.json"
    times.write_text(json.dumps(dict.fromkeys(names, 0.25)))
    assert main(["audit", str(folder), "--times", str(times), "--fail-on", "time_ms>0.1"]) == 1
    assert f"(it is {0.25 * len(names):.4g})" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("times", "why"),
    [
        ({"another engine's layer": 0.5}, "names no layer of"),
        ({}, "names no layer of"),
        ({"conv1": float("inf")}, "should map layer names"),
        ({"conv1": True}, "should map layer names"),
    ],
)
def test_times_that_are_not_of_this_engine_are_refused(
    times: dict[str, float], why: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "times.json"
    path.write_text(json.dumps(times))
    assert main(["audit", str(folder), "--times", str(path)]) == 2
    error = capsys.readouterr().err
    assert why in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ({"information": 3, "asked": []}, "tells no layers"),
        ({"information": '[{"Name": "a"}]', "asked": 4}, "does not tell the graph"),
        ({"information": '[{"Name": "a"}]', "asked": [{"z": 1}]}, "does not tell the graph"),
    ],
)
def test_damaged_layers_beside_a_trusted_engine(
    layers: dict[str, object], why: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.engine").write_bytes((folder / "model.engine").read_bytes())
    (tmp_path / "layers.json").write_text(json.dumps({"schema_version": 1, "source": "inspector", **layers}))
    assert main(["audit", str(tmp_path), "--trust-engine"]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'layers.json'}: damaged" in error
    assert why in error


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["{folder}", "--fail-on", "int8<"], "write a metric"),
        (["{folder}", "--fail-on", "nothing>1"], 'no metric "nothing"'),
        (["{folder}", "--times", "{folder}/missing.json"], "no such file"),
        (["{folder}", "--onnx", "{folder}/missing.onnx"], "missing.onnx"),
        (["{folder}", "--times", "t.json", "--measure", "1"], "--times and --measure"),
        (["{folder}/nothing.engine"], "no such file"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], why: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", *(text.format(folder=folder) for text in arguments)]) == 2
    error = capsys.readouterr().err
    assert why in error
    assert error.count("\n") == 1


def test_a_tampered_engine_and_a_stray_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = bytearray((folder / "model.engine").read_bytes())
    stray = tmp_path / "stray.engine"
    stray.write_bytes(plan)
    assert main(["audit", str(stray)]) == 2
    assert "--trust-engine" in capsys.readouterr().err
    plan[len(plan) // 2] ^= 1
    (tmp_path / "model.engine").write_bytes(plan)
    (tmp_path / "deploy.json").write_text((folder / "deploy.json").read_text())
    assert main(["audit", str(tmp_path)]) == 2
    assert "changed since it was made" in capsys.readouterr().err
