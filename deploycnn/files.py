"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploycnn.errors import DeployCNNError, StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EROFS, errno.EPERM)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` at once, see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` at once: to a temporary name beside it, synced, then renamed.

    Raises:
        StorageError: no space or no permission.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, at once."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def sha256_of(path: Path) -> str:
    """sha256 hex of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Map "no space left", "file too large" and "permission denied" to :class:`StorageError`, naming ``path``."""
    try:
        yield
    except DeployCNNError:
        raise
    except Exception as error:
        number = _error_number(error)
        if number in _FULL:
            raise StorageError(
                f"{path}: no space left on the disk; free some and run the same command again"
            ) from error
        if number == errno.EFBIG:
            raise StorageError(
                f"{path}: larger than files may be here; raise the limit (`ulimit -f`) or choose another place"
            ) from error
        if isinstance(error, OSError) and number in _FORBIDDEN:
            raise StorageError(
                f"{path}: cannot be written ({error.strerror}); choose another place with --out"
            ) from error
        raise


def _error_number(error: BaseException) -> int | None:
    """What the operating system said, also where a library puts its own error around it or words it itself.

    PyTorch's writer fails a second time when it closes a file that it could not write, and safetensors tells
    the number in its message only.
    """
    seen: BaseException | None = error
    while seen is not None:
        told = seen.errno if isinstance(seen, OSError) else None
        if told is None and (found := re.search(r"\(os error (\d+)\)", str(seen))):
            told = int(found[1])
        if told is not None:
            return told
        seen = seen.__cause__ or seen.__context__
    return None


def sync_folder(path: Path) -> None:
    """Flush a folder's files and its own entry to the disk, so that a rename after it is a commit."""
    for item in path.rglob("*"):
        if item.is_file():
            with item.open("rb") as file:
                os.fsync(file.fileno())
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
