"""``deploycnn passes``: what can stand in a recipe, from the same declarations that validate it."""

from __future__ import annotations

import importlib
import inspect
import shutil
from typing import Any

import click

from deploycnn import registry, schema

#: Keys of a recipe, and of `train`, whose values are mappings.
_KEYS = {
    "profile": "deploycnn.recipe:Profile",
    "preprocessing": "deploycnn.data.preprocessing:Preprocessing",
    "augment": "deploycnn.data.augment:Augmentation",
}
_KINDS = {"passes": "pass", "sources": "source", "data": "data", "runtimes": "runtime"}


@click.command("passes", short_help="List passes, sources, datasets, runtimes and keys with their options.")
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """List what can stand in a recipe; with NAME, its options with types, defaults and meaning."""
    width = shutil.get_terminal_size((80, 24)).columns
    if name is None:
        for title, kind in _KINDS.items():
            click.echo(f"{title}:")
            for known in registry.names(kind):
                summary = _summary(registry.get(kind, known))
                click.echo(_wrapped(summary, width, first=f"  {known:<14} ", rest=" " * 17))
        click.echo("keys:")
        for key, path in _KEYS.items():
            click.echo(_wrapped(_summary(_load(path)), width, first=f"  {key:<14} ", rest=" " * 17))
        return
    kind = next((kind for kind in _KINDS.values() if name in registry.names(kind)), "pass")
    if name in _KEYS:
        kind, cls = "key", _load(_KEYS[name])
    else:
        cls = registry.get(kind, name)
    description = f"{name} ({kind}): {inspect.getdoc(cls)}"
    click.echo("\n\n".join(_wrapped(part, width) for part in description.split("\n\n")))
    if kind == "runtime":
        modes = f"written {name}:MODE; modes: {', '.join(cls.modes)} (the first is the default)"
        click.echo("\n" + _wrapped(modes, width, first="  ", rest="  "))
        return
    rows = schema.describe(cls)
    longest = max((len(row[0]) for row in rows), default=0)
    for field, type_, default, text in rows:
        ending = "required" if default == "required" else f"default {default}"
        indent = " " * (longest + 4)
        click.echo("\n" + _wrapped(f"{type_}, {ending}", width, first=f"  {field:<{longest}}  ", rest=indent))
        if text:
            click.echo(_wrapped(text, width, first="    ", rest="    "))


def _load(path: str) -> type[Any]:
    module, _, name = path.partition(":")
    found: type[Any] = getattr(importlib.import_module(module), name)
    return found


def _wrapped(text: str, width: int, *, first: str = "", rest: str = "") -> str:
    """Words of ``text`` in lines of ``width`` columns."""
    return click.wrap_text(" ".join(text.split()), width, initial_indent=first, subsequent_indent=rest)


def _summary(cls: type[object]) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]
