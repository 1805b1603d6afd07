"""Make a folder that installs and tests deploycnn on a host without network.

Here, with network::

    python benchmarks/offline_bundle.py make bundle/ --extras gpu,tensorrt --python 3.12 --split-mib 60

There, with Python alone (``bundle.py`` is ``offline_install.py``, which tells what it does)::

    python3 bundle/bundle.py run --venv /tmp/deploycnn-venv -- tensorrt_build.py --out /tmp/results

``--host-torch`` leaves torch and torchvision to the host (the CUDA build is large): give it there as well. What can be
done there can be done here too, with ``--folder``.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import offline_install
from offline_install import MIB, SOURCE, WHEELS, BundleError

#: Left to the host with --host-torch, with all of NVIDIA's wheels.
HOST_TORCH = ("torch", "torchvision", "triton")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="collect wheels and the source tree into a folder")
    make.set_defaults(function=_make)
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
    offline_install.add_commands(commands)
    return offline_install.call(parser, arguments)


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
    shutil.copy(offline_install.__file__, folder / "bundle.py")
    settings = {
        "extras": extras, "python": options.python, "platform": options.platform, "host_torch": options.host_torch,
    }  # fmt: skip
    offline_install.finish(folder, settings, options.split_mib * MIB)
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
    [name] = re.findall(r"^[a-z0-9-]+", requirement.replace("_", "-").lower())
    nvidia = name.startswith(("nvidia-", "cuda-")) and name != "nvidia-ml-py"
    return nvidia or name in HOST_TORCH


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


if __name__ == "__main__":
    sys.exit(main())
