"""Make a folder that installs and tests deploycnn on a host without network, and unpack such a folder there.

Here, with network::

    python benchmarks/offline_bundle.py make bundle/ --extras gpu,tensorrt --python 3.12 --split-mib 60

There, with Python alone (``bundle.py`` is this very file)::

    python3 bundle/bundle.py run --venv /tmp/deploycnn-venv -- tensorrt_build.py --out /tmp/results

``run`` checks every file's sha256, joins what was split, makes a virtual environment, installs from the folder only
(``--no-index``), runs ``pytest -m gpu`` and then the script of ``benchmarks/`` that follows ``--``, if any.
``--host-torch`` uses the host's own torch and torchvision (the CUDA build is large): make the bundle with it as well.
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

MANIFEST = "bundle.json"
WHEELS, SOURCE = "wheels", "deploycnn.tar.gz"
#: Left to the host with --host-torch, with all of NVIDIA's wheels.
HOST_TORCH = ("torch", "torchvision", "triton")
PART = ".part"
MIB = 2**20


class BundleError(Exception):
    """Something that the user can mend."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="collect wheels and the source tree into a folder")
    make.add_argument("folder", type=Path)
    make.add_argument("--extras", default="gpu,tensorrt", help="extras of deploycnn, comma-separated")
    make.add_argument(
        "--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}", help="of the other host"
    )
    make.add_argument(
        "--platform", default="manylinux_2_28_x86_64", help="of the other host, as wheels name it"
    )
    make.add_argument("--host-torch", action="store_true", help="leave out torch: the other host has it")
    make.add_argument(
        "--split-mib", type=int, default=0, help="split files into pieces of at most so many MiB"
    )
    make.add_argument(
        "--sdist", action="append", default=[], help="a package that is taken as source (pycuda)"
    )
    for name, text in (("verify", "check every file's sha256"), ("join", "... and join what was split"),
                       ("install", "... and install into a virtual environment"),
                       ("run", "... and run the GPU tests, and a benchmark behind --")):  # fmt: skip
        command = commands.add_parser(name, help=text)
        command.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent)
        if name in ("install", "run"):
            command.add_argument("--venv", type=Path, required=True)
            command.add_argument("--host-torch", action="store_true", help="use this Python's own torch")
        if name == "run":
            command.add_argument("--pytest", default="-m gpu", help="arguments for pytest")
            command.add_argument(
                "benchmark", nargs="*", help="a script of benchmarks/ and its arguments, behind --"
            )
    options = parser.parse_args(arguments)
    try:
        return {"make": _make, "verify": _verify, "join": _join, "install": _install, "run": _run}[
            options.command
        ](options)
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


# -- here ------------------------------------------------------------------------------------------


def _make(options: argparse.Namespace) -> int:
    folder: Path = options.folder
    if folder.exists() and any(folder.iterdir()):
        raise BundleError(f"{folder}: is not empty; name another folder")
    if options.split_mib < 0:
        raise BundleError(f"--split-mib {options.split_mib}: must be above 0 (or left out)")
    root = Path(__file__).resolve().parent.parent
    wheels = folder / WHEELS
    wheels.mkdir(parents=True)
    _archive(root, folder / SOURCE)
    extras = [extra for extra in options.extras.split(",") if extra]
    _download(root, wheels, extras, options)
    shutil.copy(__file__, folder / "bundle.py")
    settings = {
        "extras": extras, "python": options.python, "platform": options.platform, "host_torch": options.host_torch,
    }  # fmt: skip
    finish(folder, settings, options.split_mib * MIB)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {len(list(wheels.iterdir()))} files in {WHEELS}/, {size / MIB:.0f} MiB in all")
    print(f"there: python{options.python} bundle.py run --venv VENV{' --host-torch' * options.host_torch}")
    return 0


def _archive(root: Path, target: Path) -> None:
    """The tracked files of the working tree, as they are now."""
    listed = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, check=False)
    if listed.returncode:
        raise BundleError(f"{root}: not a git working tree; the bundle holds its tracked files")
    with tarfile.open(target, "w:gz") as archive:
        for name in sorted(filter(None, listed.stdout.decode().split("\0"))):
            if (root / name).is_file():
                archive.add(root / name, arcname=f"deploycnn/{name}", recursive=False)


def requirements(project: dict[str, object], extras: Sequence[str], host_torch: bool) -> list[str]:
    """What is asked of the index: dependencies of the project, its extras and its tests, resolved by pip.

    Raises:
        BundleError: no such extra.
    """
    known: dict[str, list[str]] = project["optional-dependencies"]  # type: ignore[assignment]
    found = list(project["dependencies"])  # type: ignore[call-overload]
    for extra in extras:
        if extra not in known:
            raise BundleError(f"--extras {extra}: there is none; known: {', '.join(sorted(known))}")
        found += known[extra]
    # what the tests need, without the runtimes that `dev` brings
    found += [item for item in known["dev"] if not item.startswith(("deploycnn[", "hadolint"))]
    found += ["hatchling>=1.25", "editables", "setuptools", "wheel", "pip"]
    return [item for item in found if not (host_torch and _is_host_torch(item))]


def _is_host_torch(requirement: str) -> bool:
    name = requirement.replace("_", "-").lower()
    return (name.startswith(("nvidia-", "cuda-")) and not name.startswith("nvidia-ml-py")) or any(
        name.startswith(known) and not name[len(known) :].startswith("-") for known in HOST_TORCH[:3]
    )


def _download(root: Path, wheels: Path, extras: Sequence[str], options: argparse.Namespace) -> None:
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    asked = requirements(project, extras, options.host_torch)
    sources = set(options.sdist) | ({"pycuda"} if "pycuda" in extras else set())
    plain = [item for item in asked if not any(item.lower().startswith(name) for name in sources)]
    target = ["--python-version", options.python, "--only-binary", ":all:"]
    for tag in _platforms(options.platform):
        target += ["--platform", tag]
    pinned = [item for item in _resolved(target, plain) if not (options.host_torch and _is_host_torch(item))]
    _pip("download", "--dest", str(wheels), "--no-deps", *target, *pinned)
    for name in sorted(sources):
        _pip(
            "download",
            "--dest",
            str(wheels),
            "--no-deps",
            "--no-binary",
            ":all:",
            "--no-build-isolation",
            name,
        )


def _resolved(target: Sequence[str], asked: Sequence[str]) -> list[str]:
    """``name==version`` of everything that pip would install there; nothing is downloaded yet."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        _pip(
            "install",
            "--dry-run",
            "--ignore-installed",
            "--target",
            folder,
            "--report",
            str(report),
            *target,
            *asked,
        )
        found = json.loads(report.read_text())["install"]
    return sorted(f"{item['metadata']['name']}=={item['metadata']['version']}" for item in found)


def _platforms(tag: str) -> list[str]:
    """The tag and older ones of the same kind: pip takes a wheel only where its tag is named."""
    head, _, rest = tag.partition("_2_")
    minor, _, machine = rest.partition("_")
    if head != "manylinux" or not minor.isdecimal():
        return [tag]
    older = [f"manylinux_2_{number}_{machine}" for number in range(int(minor), 4, -1)]
    return [
        *older,
        f"manylinux2014_{machine}",
        f"manylinux2010_{machine}",
        f"manylinux1_{machine}",
        f"linux_{machine}",
    ]


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    if subprocess.run(command, check=False).returncode:
        raise BundleError(f"pip {arguments[0]} failed; see its message above")


# -- both ------------------------------------------------------------------------------------------


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


def manifest(folder: Path) -> dict[str, dict[str, dict[str, object]]]:
    try:
        content: dict[str, dict[str, dict[str, object]]] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder / MANIFEST}: cannot be read ({error}); copy the whole folder") from error
    return content


# -- there -----------------------------------------------------------------------------------------


def verify(folder: Path, *, join: bool) -> None:
    """Check every file or its pieces against the manifest; with ``join``, put pieces together."""
    for name, entry in manifest(folder)["files"].items():
        path = folder / name
        if not path.exists() and "parts" in entry:
            parts: list[dict[str, str]] = entry["parts"]  # type: ignore[assignment]
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
    extras: list[str] = settings["extras"]  # type: ignore[assignment]
    source = f"{venv / 'src' / 'deploycnn'}[{','.join(extras)}]"
    # no isolation: a build environment would look for hatchling on an index
    _must([*pip, "--no-build-isolation", *tests, source])
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
    if not (options.venv / "src").exists():
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
