"""Latency tables and steps that were measured on this machine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from deploycnn.errors import ArtifactError
from deploycnn.files import write_json
from deploycnn.latency.model import LatencyTable, load_table


def folder() -> Path:
    """``$XDG_CACHE_HOME/deploycnn/latency`` or ``~/.cache/deploycnn/latency``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "deploycnn" / "latency"


def path_of(identity: Mapping[str, object]) -> Path:
    """Where what is identified so lies."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    return folder() / f"{digest}.json"


def read_table(identity: Mapping[str, object]) -> LatencyTable | None:
    """The stored table; ``None`` where there is none that can be read."""
    path = path_of(identity)
    if not path.is_file():
        return None
    try:
        return load_table(path)
    except ArtifactError:
        return None  # damaged or of another version: it is measured again


def write_table(identity: Mapping[str, object], table: LatencyTable) -> None:
    """Store a table."""
    path = path_of(identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.save(path)


def read_step(identity: Mapping[str, object]) -> int | None:
    """The stored step; ``None`` where there is none that can be read."""
    try:
        return int(json.loads(path_of(identity).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # as above


def write_step(identity: Mapping[str, object], step: int) -> None:
    """Store a step."""
    path = path_of(identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"step": step})
