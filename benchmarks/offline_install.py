"""Check, join, install and run a folder that ``offline_bundle.py`` made, on a host without network.

The folder holds this file as ``bundle.py``. It needs Python alone and nothing beside it::

    python3 bundle/bundle.py run --venv /tmp/deploycnn-venv -- tensorrt_build.py --out /tmp/results

``run`` checks every file's sha256, joins what was split, makes a virtual environment, installs from the folder only
(``--no-index``), runs ``pytest -m gpu`` and then the script of ``benchmarks/`` that follows ``--``, if any.
``--host-torch`` uses the host's own torch and torchvision.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MANIFEST = "bundle.json"
WHEELS, SOURCE = "wheels", "deploycnn.tar.gz"
PART = ".part"
#: Written into the virtual environment when all is installed: what was broken off is installed again.
INSTALLED = "deploycnn-installed"
MIB = 2**20


class BundleError(Exception):
    """Something that the user can mend."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_commands(parser.add_subparsers(dest="command", required=True))
    return call(parser, arguments)


def add_commands(commands: Any) -> None:
    """What can be done with a folder that was made."""
    for name, text, function in (
        ("verify", "check every file's sha256", _verify),
        ("join", "... and join what was split", _join),
        ("install", "... and install into a virtual environment", _install),
        ("run", "... and run the GPU tests, and a benchmark behind --", _run),
    ):
        command = commands.add_parser(name, help=text)
        command.set_defaults(function=function)
        command.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent)
        if name in ("install", "run"):
            command.add_argument("--venv", type=Path, required=True)
            command.add_argument("--host-torch", action="store_true", help="use this Python's own torch")
        if name == "run":
            command.add_argument("--pytest", default="-m gpu", help="arguments for pytest")
            command.add_argument(
                "benchmark", nargs="*", help="a script of benchmarks/ and its arguments, behind --"
            )


def call(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Do what the arguments say; what the user can mend is one line and exit code 2."""
    options = parser.parse_args(arguments)
    try:
        code: int = options.function(options)
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


def finish(folder: Path, settings: dict[str, object], piece_bytes: int = 0) -> None:
    """Write the manifest, and split files that are larger than ``piece_bytes`` (0: none)."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        entry: dict[str, object] = {"sha256": digest(path), "bytes": path.stat().st_size}
        if piece_bytes and path.stat().st_size > piece_bytes:
            entry["parts"] = [
                {"name": part.relative_to(folder).as_posix(), "sha256": digest(part)}
                for part in split(path, piece_bytes)
            ]
            path.unlink()
        files[name] = entry
    (folder / MANIFEST).write_text(json.dumps({"settings": settings, "files": files}, indent=1) + "\n")


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split(path: Path, piece_bytes: int) -> Iterator[Path]:
    """Write ``path`` in pieces beside it, ``NAME.part000`` and so on."""
    with path.open("rb") as file:
        for number, start in enumerate(range(0, path.stat().st_size, piece_bytes)):
            part = path.with_name(f"{path.name}{PART}{number:03d}")
            with part.open("wb") as target:
                left = min(piece_bytes, path.stat().st_size - start)
                while left:
                    left -= target.write(file.read(min(left, 4 * MIB)))
            yield part


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Settings, and what is known of each file."""
    try:
        content: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder / MANIFEST}: cannot be read ({error}); copy the whole folder") from error
    return content


def verify(folder: Path, *, join: bool) -> None:
    """Check every file or its pieces against the manifest; with ``join``, put pieces together."""
    for name, entry in manifest(folder)["files"].items():
        path = folder / name
        if not path.exists() and "parts" in entry:
            parts: list[dict[str, str]] = entry["parts"]
            for part in parts:
                _check(folder / part["name"], part["sha256"])
            if not join:
                continue
            whole = path.with_name(path.name + ".joining")
            with whole.open("wb") as target:
                for part in parts:
                    with (folder / part["name"]).open("rb") as source:
                        shutil.copyfileobj(source, target, 4 * MIB)
            _check(whole, str(entry["sha256"]))
            whole.rename(path)
            for part in parts:
                (folder / part["name"]).unlink()
        _check(path, str(entry["sha256"]))


def _check(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise BundleError(f"{path}: missing; copy it again")
    if digest(path) != sha256:
        raise BundleError(f"{path}: damaged (its sha256 is not the manifest's); copy it again")


def _verify(options: argparse.Namespace) -> int:
    verify(options.folder, join=False)
    print(f"{options.folder}: all files are whole")
    return 0


def _join(options: argparse.Namespace) -> int:
    verify(options.folder, join=True)
    print(f"{options.folder}: all files are whole and joined")
    return 0


def _install(options: argparse.Namespace) -> int:
    settings = manifest(options.folder)["settings"]
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if settings["python"] != here:
        raise BundleError(
            f"made for Python {settings['python']}, this is {here}; run it with python{settings['python']}"
        )
    if settings["host_torch"] and not options.host_torch:
        raise BundleError(
            "made without torch; run it with --host-torch, by a Python that has torch and torchvision"
        )
    verify(options.folder, join=True)
    venv: Path = options.venv
    _must([sys.executable, "-m", "venv", str(venv)])
    if options.host_torch:
        _lend_torch(venv, here)
    with tarfile.open(options.folder / SOURCE) as archive:
        archive.extractall(venv / "src", filter="data")
    python, wheels = venv / "bin" / "python", str(options.folder / WHEELS)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--find-links",
           wheels]  # fmt: skip
    _must([*pip, "hatchling", "editables", "setuptools", "wheel"])
    tests = ["pytest", "hypothesis"]
    extras: list[str] = settings["extras"]
    source = f"{venv / 'src' / 'deploycnn'}[{','.join(extras)}]"
    # no isolation: a build environment would look for hatchling on an index
    _must([*pip, "--no-build-isolation", *tests, source])
    (options.venv / INSTALLED).touch()
    print(
        f"{venv}: deploycnn[{','.join(extras)}] is installed; source and tests in {venv / 'src' / 'deploycnn'}"
    )
    return 0


def _lend_torch(venv: Path, python: str) -> None:
    """Let the new environment see this Python's packages, behind its own: pip then takes torch as installed."""
    import importlib.util

    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None or importlib.util.find_spec("torchvision") is None:
        raise BundleError(
            f"{sys.executable}: has no torch and torchvision to lend; run it by the Python that has them"
        )
    sites = venv / "lib" / f"python{python}" / "site-packages"
    (sites / "host-torch.pth").write_text(f"{Path(found.origin).parent.parent}\n")


def _run(options: argparse.Namespace) -> int:
    if not (options.venv / INSTALLED).exists():
        _install(options)
    python, source = (options.venv / "bin" / "python").absolute(), options.venv / "src" / "deploycnn"
    tests = subprocess.run(
        [str(python), "-m", "pytest", *options.pytest.split()], cwd=source, check=False
    ).returncode
    print(f"pytest {options.pytest}: exit code {tests}")
    if not options.benchmark:
        return tests
    script, *arguments = options.benchmark
    bench = subprocess.run(
        [str(python), str((source / "benchmarks" / script).absolute()), *arguments], check=False
    ).returncode
    print(f"benchmarks/{script}: exit code {bench}")
    return tests or bench


def _must(command: Sequence[str]) -> None:
    if subprocess.run(list(command), check=False).returncode:
        raise BundleError(f"{' '.join(command[:6])} ... failed; see its message above")


if __name__ == "__main__":
    sys.exit(main())
