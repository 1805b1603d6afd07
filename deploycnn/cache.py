"""What was found out about datasets and this machine, kept between runs; losing it costs time, never correctness.

The folder is ``$DEPLOYCNN_CACHE``, or ``deploycnn`` in the user's cache folder. Each entry is one JSON file,
written at once, whose first line is the sha256 of the rest; anything that does not match is ignored and
rewritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def folder() -> Path:
    """Where entries, datasets that are downloaded and timings of kernels are kept; it need not exist."""
    chosen = os.environ.get("DEPLOYCNN_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "deploycnn"


def load(kind: str, identity: str) -> Any:
    """The entry stored for ``identity``; ``None`` where there is none or it is damaged."""
    path = _path(kind, identity)
    try:
        checksum, _, text = path.read_text(encoding="ascii").partition("\n")
        if hashlib.sha256(text.encode()).hexdigest() != checksum:
            log.info("%s is damaged and will be made again", path)
            return None
        return json.loads(text)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.info("%s cannot be read (%s) and will be made again", path, error)
        return None


def store(kind: str, identity: str, value: Any) -> None:
    """Keep a JSON ``value``; where the disk refuses, do without."""
    path = _path(kind, identity)
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    data = f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}".encode("ascii")
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(temporary).replace(path)
    except OSError as error:
        log.warning("%s cannot be written (%s); the next run will find it out again", path, error)
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink(missing_ok=True)


def _path(kind: str, identity: str) -> Path:
    return folder() / kind / f"{hashlib.sha256(os.fsencode(identity)).hexdigest()[:32]}.json"
