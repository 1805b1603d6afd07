"""Whether an engine file may be loaded here. An engine is executable code, so the question comes first.

A manifest beside the engine (an artifact's ``manifest.json``, a bundle's ``deploy.json``) holds its sha256 and where
it was built. That guards against mix-ups, damage and edits of the engine; it is no signature: who can replace both
files can forge both. An engine without a manifest is loaded only where the user says that it is to be trusted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploycnn.engines.device import Gpu, current_gpu
from deploycnn.engines.flavour import Flavour
from deploycnn.engines.settings import EngineRecord
from deploycnn.errors import ArtifactError
from deploycnn.files import sha256_of

#: Names of the option that lets an unknown engine pass.
TRUST = "--trust-engine"


def check_engine(
    path: Path, flavour: Flavour, *, trust: bool = False, gpu: Gpu | None = None
) -> EngineRecord | None:
    """Check an engine file before it is loaded.

    Args:
        path: The engine.
        flavour: What will load it.
        trust: Load it though no manifest vouches for it.
        gpu: The GPU that will run it; that of this machine by default.

    Returns:
        What the manifest says; ``None`` where there is none and ``trust`` is set.

    Raises:
        ArtifactError: missing, changed since it was made, not vouched for, or made for another GPU, version or
            flavour; says which.
    """
    record = read_record(path, trust=trust)
    if record is not None:
        check_fits(record, path.name, flavour, gpu if gpu is not None else current_gpu())
    return record


def read_record(path: Path, *, trust: bool = False) -> EngineRecord | None:
    """The engine's record, once its sha256 has been checked.

    Raises:
        ArtifactError: see :func:`check_engine`.
    """
    if not path.is_file():
        raise ArtifactError(
            f"{path}: no such file; name an engine file, or the folder of an artifact or of a bundle "
            "(RUN/deploy/VARIANT)"
        )
    if path.suffix == ".onnx":
        raise ArtifactError(f"{path}: an ONNX graph, not an engine; name what was built from it")
    found = _manifest(path)
    if found is None:
        if trust:
            return None
        raise ArtifactError(
            f"{path}: no manifest beside it vouches for this engine, and an engine is executable code; "
            f"build it here, or load it with {TRUST} if you know where it comes from"
        )
    manifest, sha256, record = found
    actual = sha256_of(path)
    if actual != sha256:
        raise ArtifactError(
            f"{path}: changed since it was made: its sha256 {actual[:12]} is not the {str(sha256)[:12]} of "
            f"{manifest.name}; build or copy it again"
        )
    return EngineRecord.from_json(record, str(manifest))


def check_companion(path: Path) -> None:
    """Check a file beside an engine against the manifest, where there is one.

    Raises:
        ArtifactError: the manifest does not list it, or it has changed.
    """
    for manifest in (path.with_name("manifest.json"), path.with_name("deploy.json")):
        if not manifest.is_file():
            continue
        listed = _read(manifest).get("files")
        stated = listed.get(path.name) if isinstance(listed, Mapping) else None
        if isinstance(stated, Mapping):
            stated = stated.get("sha256")
        if sha256_of(path) != stated:
            raise ArtifactError(
                f"{path}: changed since it was made (its sha256 is not that of {manifest.name}); "
                "build or copy it again"
            )
        return


def _manifest(path: Path) -> tuple[Path, Any, Any] | None:
    """The file that vouches for the engine, the sha256 that it states, and its record."""
    artifact, bundle = path.with_name("manifest.json"), path.with_name("deploy.json")
    if artifact.is_file():
        content = _read(artifact)
        try:
            sha256 = content["files"][path.name]["sha256"]
            return artifact, sha256, content["facts"]["record"]["engine"]
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{artifact}: does not vouch for {path.name}; build it anew") from error
    if bundle.is_file():
        content = _read(bundle)
        if "engine" not in content or "sha256" not in content:
            raise ArtifactError(f"{bundle}: does not vouch for {path.name}; export it anew")
        return bundle, content["sha256"], content["engine"]
    return None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: damaged: {error}; build the engine anew") from error
    if not isinstance(content, Mapping):
        raise ArtifactError(f"{path}: damaged: holds no mapping; build the engine anew")
    return content


def check_fits(record: EngineRecord, what: str, flavour: Flavour, gpu: Gpu | None) -> None:
    """Whether an engine of this record loads here.

    Raises:
        ArtifactError: another flavour, version or GPU; says both and how to mend it.
    """
    if record.flavour != flavour.name:
        raise ArtifactError(
            f"{what}: an engine of {record.flavour} {record.version}, not of {flavour.name}; "
            f"use the runtime of {record.flavour} or build it with `target: {flavour.name}`"
        )
    if record.version != flavour.version and not _version_fits(record, flavour.version):
        raise ArtifactError(
            f"{what}: built by {record.flavour} {record.version}, but {flavour.version} is installed; build it anew"
            + ("" if flavour.is_rtx else ", or once with version_compatible: true")
        )
    if gpu is not None and not _gpu_fits(record, gpu):
        made = f"{record.gpu} ({record.capability})" if record.gpu else f"compute capability {_asked(record)}"
        raise ArtifactError(
            f"{what}: built for {made}, but this GPU is {gpu.name} ({gpu.capability[0]}.{gpu.capability[1]}); "
            "build it here"
        )


def _asked(record: EngineRecord) -> str:
    return ", ".join(record.compute_capabilities) or "8.0 and newer"


def _version_fits(record: EngineRecord, version: str) -> bool:
    """Version-compatible engines load in the lean runtime of the same or a newer version."""
    return record.version_compatible and _numbers(version) >= _numbers(record.version)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdecimal() else 0 for part in version.split("."))


def _gpu_fits(record: EngineRecord, gpu: Gpu) -> bool:
    capability = f"{gpu.capability[0]}.{gpu.capability[1]}"
    if record.flavour == "tensorrt-rtx":
        if record.compute_capabilities:
            return capability in record.compute_capabilities
        return gpu.capability >= (8, 0)
    if record.hardware_compatibility == "ampere_plus":
        return gpu.capability >= (8, 0)
    if record.hardware_compatibility == "same_compute_capability":
        return capability == record.capability
    return (gpu.name, capability) == (record.gpu, record.capability)
