"""Files that are whole or absent, and what a full disk is called."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from deploycnn import files
from deploycnn.errors import ArtifactError, StorageError


def plain(number: int) -> None:
    raise OSError(number, "said by the system")


def wrapped(number: int) -> None:
    """As PyTorch's writer does: closing the file fails in its own words."""
    try:
        plain(number)
    finally:
        raise RuntimeError("unexpected pos 264832 vs 264720")


def worded(number: int) -> None:
    """As safetensors does: the number stands in the message only."""
    raise ValueError(f"Error while serializing: I/O error: no room (os error {number})")


@pytest.mark.parametrize("fail", [plain, wrapped, worded])
@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "no space left on the disk; free some"),
        (errno.EDQUOT, "no space left on the disk; free some"),
        (errno.EFBIG, "larger than files may be here; raise the limit"),
    ],
)
def test_a_disk_without_room_is_the_users_to_mend(
    fail: Callable[[int], None], number: int, expected: str
) -> None:
    with pytest.raises(StorageError, match=f"^run: {re.escape(expected)}"), files.storage_errors(Path("run")):
        fail(number)


def test_a_folder_that_is_not_writable_is_named() -> None:
    with pytest.raises(StorageError, match="run: cannot be written"), files.storage_errors(Path("run")):
        plain(errno.EROFS)


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "broken"), RuntimeError("ours"), ArtifactError("damaged (os error 28)")]
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, files.storage_errors(Path("run")):
        raise error
    assert caught.value is error
