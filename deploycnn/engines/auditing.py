"""Audit an engine that lies on disk: by what was kept when it was built, or by the engine itself on a GPU host."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deploycnn.core import MAIN_FILE, Json
from deploycnn.engines import audit, device, flavour, layers, vouch
from deploycnn.engines.settings import EngineRecord
from deploycnn.errors import ArtifactError
from deploycnn.files import sha256_of

LAYERS = "layers.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Audited:
    """An engine and its audit.

    Attributes:
        path: The engine file.
        record: What the manifest says; ``None`` for an engine that was trusted without one.
        source: "inspector" (the engine told it) or "builder log" (kept when it was built).
        audit: The audit.
    """

    path: Path
    record: EngineRecord | None
    source: str
    audit: audit.Audit

    def to_json(self) -> Json:
        """As plain values."""
        return {
            "engine": str(self.path),
            "record": None if self.record is None else self.record.to_json(),
            "source": self.source,
            **self.audit.to_json(),
        }


def engine_file(path: Path) -> Path:
    """The engine in an artifact or bundle folder, or the file itself."""
    return path / MAIN_FILE["engine"] if path.is_dir() else path


def audit_engine(
    path: Path,
    *,
    onnx: Path | None = None,
    times: Path | Mapping[str, float] | None = None,
    trust: bool = False,
) -> Audited:
    """Audit an engine.

    Args:
        path: An engine file, or the folder of an artifact or bundle.
        onnx: The graph that it was built from, where nothing beside the engine says it.
        times: Milliseconds by layer name, as they were measured here (then the engine itself tells its layers), or a
            JSON file of them.
        trust: Load an engine that no manifest vouches for.

    Raises:
        ArtifactError: a file is missing or damaged, or the engine is not vouched for.
        RuntimeUnavailable: nothing was kept of its layers, and there is no GPU to load it on.
    """
    engine = engine_file(path)
    record = vouch.read_record(engine, trust=trust)
    kept = _kept(engine)
    # Where the layers were timed here, the engine itself names them: TensorRT-RTX may make other kernels of it when it
    # is loaded than its builder logged.
    timed_here = times is not None and not isinstance(times, Path)
    if kept and not timed_here:
        source, text = kept["source"], kept["information"]
    else:
        source, text = _inspect(engine, record, trust=trust)
    if onnx is not None:
        from deploycnn.graph.model import load_onnx

        model = load_onnx(onnx)
        if record is not None and sha256_of(onnx) != record.onnx_sha256:
            raise ArtifactError(
                f"{onnx}: is not the graph that {engine.name} was built from; leave --onnx out"
            )
        asked = audit.asked_of(model)
    elif kept:
        asked = _asked(kept, engine.with_name(LAYERS))
    else:
        raise ArtifactError(
            f"{engine}: nothing beside it says what it was built from; name the graph with --onnx"
        )
    found = layers.parse(text)
    timed = _times(times)
    if isinstance(times, Path) and not timed.keys() & {layer.name for layer in found}:
        raise ArtifactError(
            f'{times}: names no layer of {engine} (its first is "{found[0].name}"); '
            "give the times of this engine, by the names that `audit --json` prints"
        )
    result = audit.audit(found, asked, timed)
    return Audited(path=engine, record=record, source=source, audit=result)


def _kept(engine: Path) -> Mapping[str, Any] | None:
    path = engine.with_name(LAYERS)
    if not path.is_file():
        return None
    vouch.check_companion(path)
    content = _json(path)
    if content.get("schema_version") != 1 or not {"source", "information", "asked"} <= set(content):
        raise ArtifactError(f"{path}: written by another version of deploycnn; build the engine anew")
    if not (isinstance(content["source"], str) and isinstance(content["information"], str)):
        raise ArtifactError(f"{path}: damaged: tells no layers; build the engine anew")
    return content


def _asked(content: Mapping[str, Any], path: Path) -> list[audit.Asked]:
    """What the graph asked for, as it was kept beside the engine."""
    try:
        return [audit.Asked(**item) for item in content["asked"]]
    except TypeError as error:
        raise ArtifactError(
            f"{path}: damaged: does not tell the graph ({error}); build the engine anew"
        ) from error


def _inspect(engine: Path, record: EngineRecord | None, *, trust: bool) -> tuple[Literal["inspector"], str]:
    gpu = device.require_gpu()
    names: tuple[flavour.Name, ...] = (record.flavour,) if record else ("tensorrt", "tensorrt-rtx")
    error: ArtifactError | None = None
    for name in names:
        if record is None and not flavour.is_installed(name):
            continue
        found = flavour.find(name)
        vouch.check_engine(engine, found, trust=trust, gpu=gpu)
        try:
            loaded = found.deserialize(
                engine.read_bytes(),
                what=str(engine),
                host_code_allowed=record is not None and record.version_compatible,
            )
        except ArtifactError as refused:
            error = refused
            continue
        return "inspector", found.inspect(loaded)
    raise error or ArtifactError(f"{engine}: no TensorRT is installed that could load it")


def _times(path: Path | Mapping[str, float] | None) -> Mapping[str, float]:
    if not isinstance(path, Path):
        return path or {}
    content = _json(path)
    if not all(_is_time(value) for value in content.values()):
        raise ArtifactError(f"{path}: should map layer names to milliseconds; write numbers of 0 or more")
    return {str(name): float(value) for name, value in content.items()}


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: damaged: {error}") from error
    if not isinstance(content, Mapping):
        raise ArtifactError(f"{path}: damaged: holds no mapping")
    return content
