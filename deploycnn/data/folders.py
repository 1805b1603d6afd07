"""A folder, or a zip of one, as a list of files with paths inside it. A zip is read in place."""

from __future__ import annotations

import os
import struct
import unicodedata
import weakref
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploycnn.errors import DataError

#: What systems leave behind in folders; with everything that begins with a dot.
_LITTER = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN"})
_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file.

    Attributes:
        name: Path inside the folder, "/" between its parts, in Unicode's composed form, for all systems
            alike.
        stamp: Changes whenever the content does, as far as can be told without reading it; begins with the
            size in bytes, and is empty where there is a problem.
        handle: How the tree finds it.
        problem: Why it cannot be read at all, if so.
    """

    name: str
    stamp: tuple[int, ...]
    handle: Any
    problem: str | None = None


class Tree(ABC):
    """Files and folders below a root, without what systems leave behind.

    Attributes:
        root: The folder or the zip.
        entries: Files, sorted by name.
        folders: Paths of the folders, empty ones too (a zip need not list those).
    """

    root: Path
    entries: list[Entry]
    folders: frozenset[str]

    @abstractmethod
    def read(self, entry: Entry) -> bytes:
        """The content of a file. Safe to call from several threads.

        Raises:
            OSError: it cannot be read, or is damaged.
        """


def open_tree(root: Path) -> Tree:
    """List what is below ``root``.

    Raises:
        DataError: it is missing, or neither a folder nor a readable zip.
    """
    try:
        if root.is_dir():
            return _Folder(root)
        if not root.exists():
            raise DataError(f"{root}: no such folder or zip; set data.imagefolder.root, or use --data PATH")
        if not zipfile.is_zipfile(root):
            raise DataError(f"{root}: neither a folder nor a (complete) zip file")
        return _Zip(root)
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, struct.error) as error:
        raise DataError(f"{root}: cannot be read: {error}") from error


class _Folder(Tree):
    def __init__(self, root: Path) -> None:
        self.root = root
        folders: list[str] = []
        found = list(_walk(str(root), "", folders, ()))
        self.entries = sorted(found, key=lambda entry: (entry.name, entry.handle))
        self.folders = frozenset(folders)

    def read(self, entry: Entry) -> bytes:
        with Path(entry.handle).open("rb") as file:
            return file.read()


def _walk(path: str, prefix: str, folders: list[str], above: tuple[tuple[int, int], ...]) -> Iterator[Entry]:
    """Files below ``path``, links followed; ``above`` guards against links that lead in a circle."""
    with os.scandir(path) as items:
        for item in items:
            if _hidden(item.name):
                continue
            name = prefix + _name(item.name)
            try:
                stat = item.stat()
            except OSError as error:
                yield Entry(name, (), item.path, f"cannot be read ({error.strerror})")
                continue
            if item.is_dir():
                if (stat.st_dev, stat.st_ino) not in above:
                    folders.append(name)
                    yield from _walk(item.path, f"{name}/", folders, (*above, (stat.st_dev, stat.st_ino)))
            elif item.is_file():
                yield Entry(name, (stat.st_size, stat.st_mtime_ns), item.path)
            else:
                yield Entry(name, (), item.path, "not a regular file")


class _Zip(Tree):
    """Entries are read with ``pread`` from one descriptor, which several threads may do at a time.

    ``zipfile`` would need a handle, and with it the directory parsed anew, for each thread.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._file = os.open(root, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        modified = os.fstat(self._file).st_mtime_ns
        entries: dict[str, Entry] = {}
        folders: set[str] = set()
        with zipfile.ZipFile(root) as archive:
            infos = archive.infolist()
        for info in infos:
            # Some Windows programs write backslashes, against the specification (4.4.17).
            raw = info.filename if "/" in info.filename else info.filename.replace("\\", "/")
            parts = [part for part in raw.split("/") if part]
            if not parts or any(_hidden(part) for part in parts):
                continue
            above = parts if raw.endswith("/") else parts[:-1]
            folders.update(_name("/".join(above[:depth])) for depth in range(1, len(above) + 1))
            if not raw.endswith("/"):
                name = _name("/".join(parts))
                entries[name] = Entry(name, (info.file_size, info.CRC, modified), info, _obstacle(info))
        self.entries = sorted(entries.values(), key=lambda entry: entry.name)
        self.folders = frozenset(folders)

    def read(self, entry: Entry) -> bytes:
        info: zipfile.ZipInfo = entry.handle
        header = os.pread(self._file, _LOCAL_HEADER.size, info.header_offset)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
            raise OSError("the zip has no entry where its directory says")
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        start = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        data = os.pread(self._file, info.compress_size, start)
        if info.compress_type == zipfile.ZIP_DEFLATED:
            try:
                # No more than announced, so that a zip bomb ends as a damaged entry.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, info.file_size + 1)
            except zlib.error as error:
                raise OSError(f"damaged in the zip ({error})") from error
        if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
            raise OSError("damaged in the zip (checksum)")
        return data


def _obstacle(info: zipfile.ZipInfo) -> str | None:
    if info.flag_bits & 1:
        return "encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"compressed by method {info.compress_type}; zip with deflate"
    return None


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in _LITTER


def _name(name: str) -> str:
    """The same text on every system: composed, and printable whatever bytes the file system holds."""
    if name.isascii() and name.isprintable():
        return name
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    text = unicodedata.normalize("NFC", text)
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
