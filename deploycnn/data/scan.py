"""Look at every file once: what it contains, and whether it is a usable image.

Findings are cached by each file's name, size and time of change, so that an unchanged dataset opens at once
and a changed one is checked only where it changed.
"""

from __future__ import annotations

import hashlib
import logging
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import PIL

from deploycnn import cache
from deploycnn.data.decoding import UnusableImage, check_header, decode
from deploycnn.data.folders import Entry, Tree
from deploycnn.data.loader import default_threads

log = logging.getLogger(__name__)

Verify = Literal["full", "header"]

#: Bump when files may be judged otherwise. Pillow's version counts too.
_VERSION = f"1 {PIL.__version__}"
_CHUNK = 128
#: A larger file is no image that a classifier looks at, and is not read into memory to find that out.
_MAX_BYTES = 1 << 29


class Finding(NamedTuple):
    """What is known of a file: sha256 hex of its content, and why it is not usable (or ``None``)."""

    sha256: str
    problem: str | None


def scan(tree: Tree, entries: Sequence[Entry], verify: Verify) -> list[Finding]:
    """Findings of ``entries``, in their order.

    Args:
        tree: That they belong to.
        entries: Files to look at.
        verify: ``full`` decodes every image; ``header`` finds no damage behind an image's first bytes.
    """
    identity = f"{tree.root.resolve()}\n{verify}"
    known = _load(identity)
    findings = [known.get((entry.name, entry.stamp)) for entry in entries]
    fresh = [position for position, finding in enumerate(findings) if finding is None]
    if fresh:
        started = time.perf_counter()
        log.info("%s: checking %d files", tree.root, len(fresh))
        chunks = [fresh[start : start + _CHUNK] for start in range(0, len(fresh), _CHUNK)]
        # The filter is process-wide, so it is set around the threads and not inside them.
        with warnings.catch_warnings(), ThreadPoolExecutor(default_threads()) as pool:
            warnings.simplefilter("ignore")
            looked = pool.map(lambda chunk: [_look(tree, entries[at], verify) for at in chunk], chunks)
            for chunk, results in zip(chunks, looked, strict=True):
                for position, finding in zip(chunk, results, strict=True):
                    findings[position] = finding
        log.info("%s: checked in %.1f s", tree.root, time.perf_counter() - started)
    complete = [finding for finding in findings if finding is not None]
    if fresh:
        _store(identity, entries, complete)
    return complete


def _look(tree: Tree, entry: Entry, verify: Verify) -> Finding:
    if entry.problem is not None:
        return Finding("", entry.problem)
    if entry.stamp[0] > _MAX_BYTES:
        return Finding("", f"too large for an image ({entry.stamp[0]} bytes)")
    try:
        data = tree.read(entry)
    except OSError as error:
        return Finding("", f"cannot be read ({error.strerror or error})")
    digest = hashlib.sha256(data).hexdigest()
    try:
        if verify == "full":
            decode(data)
        else:
            check_header(data)
    except UnusableImage as error:
        return Finding(digest, str(error))
    return Finding(digest, None)


def _load(identity: str) -> dict[tuple[str, tuple[int, ...]], Finding]:
    value: Any = cache.load("scans", identity)
    if not isinstance(value, dict) or value.get("version") != _VERSION:
        return {}
    columns = (value["names"], value["stamps"], value["sha256"], value["problems"])
    return {
        (name, tuple(stamp)): Finding(sha256, problem)
        for name, stamp, sha256, problem in zip(*columns, strict=True)
    }


def _store(identity: str, entries: Sequence[Entry], findings: Sequence[Finding]) -> None:
    # What could not be read has no content to recognize it by: look again next time.
    kept = [(entry, finding) for entry, finding in zip(entries, findings, strict=True) if finding.sha256]
    value = {
        "version": _VERSION,
        "names": [entry.name for entry, _ in kept],
        "stamps": [entry.stamp for entry, _ in kept],
        "sha256": [finding.sha256 for _, finding in kept],
        "problems": [finding.problem for _, finding in kept],
    }
    cache.store("scans", identity, value)
