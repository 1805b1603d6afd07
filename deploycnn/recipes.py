"""The recipes that ship with the package; standard library only.

In a wheel they lie in ``deploycnn/_recipes``; in a checkout in ``recipes/`` beside the package.
"""

from __future__ import annotations

from pathlib import Path

from deploycnn.errors import ArtifactError, RecipeError, StorageError, nearest

_PACKAGE = Path(__file__).parent


def folder() -> Path:
    """Where the shipped recipes lie.

    Raises:
        ArtifactError: the installation holds none.
    """
    for candidate in (_PACKAGE / "_recipes", _PACKAGE.parent / "recipes"):
        if candidate.is_dir():
            return candidate
    raise ArtifactError(
        f"no recipes in {_PACKAGE / '_recipes'}: the installation is incomplete; reinstall deploycnn"
    )


def shipped() -> dict[str, Path]:
    """Name -> file of every shipped recipe, sorted by name.

    Raises:
        ArtifactError: the installation holds none.
    """
    return {path.stem: path for path in sorted(folder().glob("*.yaml"))}


def find(name: str) -> Path:
    """The file of the shipped recipe called ``name`` (with or without ``.yaml``).

    Raises:
        RecipeError: there is none; names the nearest.
        ArtifactError: the installation holds no recipes.
    """
    known = shipped()
    stem = name.removesuffix(".yaml")
    if stem not in known:
        raise RecipeError(f'no shipped recipe "{name}"; {nearest(stem, known)}')
    return known[stem]


def description(path: Path) -> str:
    """The first comment line of a recipe, without its ``#``; empty where it has none."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("#"):
            return text.lstrip("#").strip()
        if text and text != "---":
            break
    return ""


def copy(name: str, destination: Path, *, force: bool = False) -> Path:
    """Copy a shipped recipe to ``destination`` (a file, or a folder) and return the copy's path.

    Raises:
        RecipeError: there is no such recipe, or the destination exists and ``force`` is false.
        StorageError: it cannot be written.
    """
    source = find(name)
    target = destination / source.name if destination.is_dir() else destination
    try:
        # "x" asks the file system, so that a file made in the meantime is not overwritten either.
        with target.open("w" if force else "x", encoding="utf-8") as stream:
            stream.write(source.read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise RecipeError(f"{target} exists; choose another name, or overwrite it with --force") from error
    except OSError as error:
        raise StorageError(f"{target}: cannot be written ({error.strerror})") from error
    return target
