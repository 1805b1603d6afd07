"""Engines that may be loaded here, and all that may not."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from deploycnn.engines import vouch
from deploycnn.engines.device import Gpu
from deploycnn.engines.flavour import Flavour
from deploycnn.engines.settings import EngineRecord
from deploycnn.errors import ArtifactError

H100 = Gpu(name="NVIDIA H100 80GB HBM3", capability=(9, 0), driver_cuda="13.0")
A100 = Gpu(name="NVIDIA A100-SXM4-80GB", capability=(8, 0), driver_cuda="13.0")
T4 = Gpu(name="Tesla T4", capability=(7, 5), driver_cuda="13.0")
TRT = Flavour("tensorrt", ModuleType("tensorrt"), "11.4.0.106")
RTX = Flavour("tensorrt-rtx", ModuleType("tensorrt_rtx"), "1.7.1.116")

BUILT = EngineRecord(
    flavour="tensorrt",
    version="11.4.0.106",
    gpu=H100.name,
    capability="9.0",
    compute_capabilities=(),
    hardware_compatibility="none",
    version_compatible=False,
    weight_stripped=False,
    batch=(1, 8, 64),
    onnx_sha256="0" * 64,
)
AHEAD = replace(BUILT, flavour="tensorrt-rtx", version="1.7.1.116", gpu="", capability="")


def engine(folder: Path, record: EngineRecord = BUILT, *, bundle: bool = False) -> Path:
    path = folder / "model.engine"
    path.write_bytes(b"plan")
    (folder / "layers.json").write_text("{}")
    digests = {
        name: {"sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
        for name in ("model.engine", "layers.json")
    }
    if bundle:
        content: dict[str, Any] = {
            "sha256": digests["model.engine"]["sha256"],
            "engine": record.to_json(),
            "files": digests,
        }
        (folder / "deploy.json").write_text(json.dumps(content))
    else:
        content = {"files": digests, "facts": {"record": {"engine": record.to_json()}}}
        (folder / "manifest.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("bundle", [False, True])
def test_an_engine_made_here_is_let_pass(bundle: bool, tmp_path: Path) -> None:
    path = engine(tmp_path, bundle=bundle)
    assert vouch.check_engine(path, TRT, gpu=H100) == BUILT
    vouch.check_companion(path.with_name("layers.json"))


@pytest.mark.parametrize("listed", [None, [1], {}, {"layers.json": 5}])
def test_a_manifest_that_lists_no_files_vouches_for_none(listed: Any, tmp_path: Path) -> None:
    path = engine(tmp_path, bundle=True).with_name("deploy.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": listed}))
    with pytest.raises(ArtifactError, match="changed since it was made"):
        vouch.check_companion(tmp_path / "layers.json")


@pytest.mark.parametrize("bundle", [False, True])
def test_a_tampered_engine_is_refused(bundle: bool, tmp_path: Path) -> None:
    path = engine(tmp_path, bundle=bundle)
    path.write_bytes(b"plam")
    with pytest.raises(ArtifactError, match="changed since it was made: its sha256"):
        vouch.check_engine(path, TRT, trust=True, gpu=H100)  # trust does not cover damage
    path.with_name("layers.json").write_text('{"a": 1}')
    with pytest.raises(ArtifactError, match=r"layers.json: changed"):
        vouch.check_companion(path.with_name("layers.json"))


def test_an_engine_without_a_manifest_needs_trust(tmp_path: Path) -> None:
    path = tmp_path / "found.engine"
    path.write_bytes(b"plan")
    with pytest.raises(ArtifactError, match=r"executable code.*--trust-engine"):
        vouch.check_engine(path, TRT, gpu=H100)
    assert vouch.check_engine(path, TRT, trust=True, gpu=H100) is None


def test_a_manifest_of_something_else_does_not_vouch(tmp_path: Path) -> None:
    path = engine(tmp_path)
    other = tmp_path / "other.engine"
    other.write_bytes(b"plan")
    with pytest.raises(ArtifactError, match=r"does not vouch for other.engine"):
        vouch.check_engine(other, TRT, gpu=H100)
    for text in ("{", "[]", '{"files": {}}'):
        path.with_name("manifest.json").write_text(text)
        with pytest.raises(ArtifactError, match="manifest.json"):
            vouch.check_engine(path, TRT, gpu=H100)


def test_a_missing_engine(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        vouch.check_engine(tmp_path / "x.engine", TRT, gpu=H100)


def test_a_graph_is_no_engine(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"graph")
    with pytest.raises(ArtifactError, match=r"model\.onnx: an ONNX graph, not an engine"):
        vouch.check_engine(tmp_path / "model.onnx", TRT, gpu=H100)


@pytest.mark.parametrize(
    ("record", "flavour", "gpu", "why"),
    [
        (BUILT, RTX, H100, "of tensorrt 11.4.0.106, not of tensorrt-rtx"),
        (AHEAD, TRT, H100, "of tensorrt-rtx 1.7.1.116, not of tensorrt"),
        (BUILT, replace(TRT, version="11.3.0.99"), H100, "but 11.3.0.99 is installed"),
        (
            replace(BUILT, version_compatible=True),
            replace(TRT, version="11.3.0.99"),
            H100,
            "11.3.0.99 is installed",
        ),
        (AHEAD, replace(RTX, version="1.8.0.1"), A100, "1.8.0.1 is installed"),
        (BUILT, TRT, A100, r"built for NVIDIA H100 80GB HBM3 \(9.0\), but this GPU is NVIDIA A100"),
        (replace(BUILT, hardware_compatibility="ampere_plus"), TRT, T4, "this GPU is Tesla T4"),
        (
            replace(BUILT, hardware_compatibility="same_compute_capability"),
            TRT,
            A100,
            "this GPU is NVIDIA A100",
        ),
        (AHEAD, RTX, T4, "compute capability 8.0 and newer, but this GPU is Tesla T4"),
        (replace(AHEAD, compute_capabilities=("8.6", "8.9")), RTX, A100, "compute capability 8.6, 8.9, but"),
    ],
)
def test_engines_from_elsewhere_are_refused(
    record: EngineRecord, flavour: Flavour, gpu: Gpu, why: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=why):
        vouch.check_engine(engine(tmp_path, record), flavour, gpu=gpu)


@pytest.mark.parametrize(
    ("record", "flavour", "gpu"),
    [
        (replace(BUILT, version_compatible=True), replace(TRT, version="11.5.0.1"), H100),
        (replace(BUILT, hardware_compatibility="ampere_plus"), TRT, A100),
        (
            replace(BUILT, hardware_compatibility="same_compute_capability"),
            TRT,
            replace(H100, name="NVIDIA H200"),
        ),
        (AHEAD, RTX, A100),
        (replace(AHEAD, compute_capabilities=("8.0",)), RTX, A100),
    ],
)
def test_engines_that_were_made_for_more_than_one_place(
    record: EngineRecord, flavour: Flavour, gpu: Gpu, tmp_path: Path
) -> None:
    assert vouch.check_engine(engine(tmp_path, record), flavour, gpu=gpu) == record


def test_the_record_survives_json_and_nothing_else_does() -> None:
    assert EngineRecord.from_json(json.loads(json.dumps(AHEAD.to_json())), "m") == AHEAD
    for wrong in (
        None,
        {},
        {**AHEAD.to_json(), "more": 1},
        {**AHEAD.to_json(), "batch": [1]},
        {**AHEAD.to_json(), "gpu": 3},
        {**AHEAD.to_json(), "batch": 3},
        {**AHEAD.to_json(), "batch": ["a", "b", "c"]},
        {**AHEAD.to_json(), "flavour": "tensorflow"},
        {**AHEAD.to_json(), "flavour": ["tensorrt"]},
        {**AHEAD.to_json(), "compute_capabilities": 8},
        {**AHEAD.to_json(), "hardware_compatibility": "all"},
        {**AHEAD.to_json(), "version_compatible": "no"},
    ):
        with pytest.raises(ArtifactError, match="m: says nothing usable"):
            EngineRecord.from_json(wrong, "m")
