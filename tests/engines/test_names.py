"""Every name of TensorRT that this package uses exists in each flavour.

``names/*.json`` are the classes and their members in the real bindings of one version each. The bindings of TensorRT
10 and 11 load without a GPU and without the library itself (their module needs nine functions of it, and none of them
to define its classes), so these lists were read from the modules, not from documentation.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from deploycnn import engines
from deploycnn.engines import names

NAMES = Path(__file__).parent / "names"
TENSORRT = ("tensorrt-10.16.1.11", "tensorrt-11.4.0.106")
RTX = "tensorrt-rtx-1.7.1.116"


def names_of(version: str) -> dict[str, set[str]]:
    content = json.loads((NAMES / f"{version}.json").read_text())
    return {name: set(members.split()) for name, members in content["classes"].items()}


def missing(used: dict[str, tuple[str, ...]], known: dict[str, set[str]]) -> list[str]:
    return [
        f"{name}.{member}"
        for name, members in used.items()
        for member in members
        if member not in known.get(name, set())
    ]


@pytest.mark.parametrize("version", [*TENSORRT, RTX])
def test_what_all_flavours_are_asked_for_exists(version: str) -> None:
    assert not missing(dict(names.USED), names_of(version))


@pytest.mark.parametrize("version", TENSORRT)
def test_what_tensorrt_is_asked_for_exists(version: str) -> None:
    assert not missing(dict(names.USED_TENSORRT), names_of(version))


def test_what_rtx_is_asked_for_exists_and_only_there() -> None:
    assert not missing(dict(names.USED_RTX), names_of(RTX))
    gone = missing(dict(names.USED_RTX), names_of(TENSORRT[1]))
    assert "IBuilderConfig.set_compute_capability" in gone
    assert "IRuntimeConfig.set_runtime_cache" in gone


def test_the_recorded_names_are_those_of_the_installed_library() -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    content = json.loads((NAMES / f"{RTX}.json").read_text())
    if trt.__version__ not in content["source"]:
        pytest.skip(f"{trt.__version__} is installed, {content['source']} was recorded")
    for name, members in names_of(RTX).items():
        assert members <= set(dir(getattr(trt, name))), name


def used_in(path: Path) -> set[str]:
    return {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}


def test_no_name_is_used_that_is_not_listed() -> None:
    """Attributes in the source that are TensorRT's by name stand in ``USED`` (or are also our own or Python's)."""
    listed = {
        member
        for used in (names.USED, names.USED_TENSORRT, names.USED_RTX)
        for name, members in used.items()
        for member in (name, *members)
    }
    theirs = {
        member
        for version in (*TENSORRT, RTX)
        for name, members in names_of(version).items()
        for member in (name, *members)
    }
    ours = {"append", "builder", "logger", "pop", "refittable", "start"}
    folder = Path(engines.__file__).parent
    for name in ("flavour.py", "building.py", "progress.py", "log.py", "layer_times.py"):
        path = folder / name
        assert not (used_in(path) & theirs) - listed - ours, path.name
    lane = {"allocate", "float32", "itemsize", "set_input"}  # of devices, of NumPy, and its own
    assert not (used_in(folder.parent / "gpu" / "lane.py") & theirs) - listed - ours - lane


def test_removed_flags_are_not_used() -> None:
    """Weak typing is gone in 11, so nothing here may lean on it."""
    before, now = (names_of(version)["BuilderFlag"] for version in TENSORRT)
    removed = before - now
    assert {"FP16", "INT8", "BF16", "OBEY_PRECISION_CONSTRAINTS"} <= removed
    assert not removed & {member for members in names.USED.values() for member in members} - {
        "BF16",  # of DataType
        "FP8",
        "INT4",
        "INT8",
    }
