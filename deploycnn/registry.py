"""Find passes, sources, datasets and runtimes by name without importing any of them.

A component named ``int8`` of kind ``pass`` is the one class in ``deploycnn/passes/int8.py`` that derives from
the kind's base; a file without such a class is a helper. Other distributions add theirs
through entry points of the group ``deploycnn.<kind>`` (``deploycnn.pass``, ...), whose value is
``module:Class``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import re
from pathlib import Path
from typing import Any

from deploycnn.errors import RecipeError, nearest

#: Kind -> (package that holds it, "module:Class" of its base).
KINDS = {
    "pass": ("passes", "deploycnn.core:Pass"),
    "source": ("sources", "deploycnn.core:Source"),
    "data": ("data", "deploycnn.data.base:DataSource"),
    "runtime": ("runtimes", "deploycnn.runtimes.base:Runtime"),
}


@functools.cache
def _entry_points(kind: str) -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=f"deploycnn.{kind}")}


@functools.cache
def names(kind: str) -> tuple[str, ...]:
    """Names of all components of ``kind``, sorted."""
    package, base_path = KINDS[kind]
    # Read as text, so that a component is found without loading what it needs.
    derives = re.compile(rf"^class \w+\([^)]*\b{base_path.rpartition(':')[2]}\b[^)]*\):", re.MULTILINE)
    folder = Path(__file__).parent / package
    own = {path.stem for path in folder.glob("*.py") if derives.search(path.read_text(encoding="utf-8"))}
    return tuple(sorted(own | _entry_points(kind).keys()))


@functools.cache
def get(kind: str, name: str) -> type[Any]:
    """The class called ``name``.

    Raises:
        RecipeError: there is none; names the nearest.
    """
    if name not in names(kind):
        raise RecipeError(f'unknown {kind} "{name}"; {nearest(name, names(kind))}')
    if name in _entry_points(kind):
        loaded: type[Any] = _entry_points(kind)[name].load()
        return loaded
    package, base_path = KINDS[kind]
    module = importlib.import_module(f"deploycnn.{package}.{name}")
    base_module, _, base_name = base_path.partition(":")
    base = getattr(importlib.import_module(base_module), base_name)
    found = [
        member
        for member in vars(module).values()
        if inspect.isclass(member)
        and issubclass(member, base)
        and member.__module__ == module.__name__
        and not inspect.isabstract(member)
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one {base_name}, found {len(found)}")
    return found[0]


def name_of(component: object) -> str:
    """The registry name of a component, given an instance or its class."""
    cls = component if inspect.isclass(component) else type(component)
    for kind in KINDS:
        for name, point in _entry_points(kind).items():
            if point.value == f"{cls.__module__}:{cls.__name__}":
                return name
    return cls.__module__.rpartition(".")[2]
