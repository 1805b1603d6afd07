"""``deploycnn passes``: what can stand in a recipe, from the same declarations that validate it."""

from __future__ import annotations

import inspect

import click

from deploycnn import registry, schema

_KINDS = {"passes": "pass", "sources": "source", "data": "data", "runtimes": "runtime"}


@click.command("passes", short_help="List passes, sources, datasets and runtimes with their options.")
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """List what can stand in a recipe; with NAME, its options with types, defaults and meaning."""
    if name is None:
        for title, kind in _KINDS.items():
            click.echo(f"{title}:")
            for known in registry.names(kind):
                click.echo(f"  {known:<14} {_summary(registry.get(kind, known))}")
        return
    kind = next((kind for kind in _KINDS.values() if name in registry.names(kind)), "pass")
    cls = registry.get(kind, name)
    click.echo(f"{name} ({kind}): {inspect.getdoc(cls)}")
    if kind == "runtime":
        click.echo(f"\n  written {name}:MODE; modes: {', '.join(cls.modes)} (the first is the default)")
        return
    rows = schema.describe(cls)
    width = max((len(row[0]) for row in rows), default=0)
    for field, type_, default, text in rows:
        ending = "required" if default == "required" else f"default {default}"
        click.echo(f"\n  {field:<{width}}  {type_}, {ending}")
        if text:
            click.echo(click.wrap_text(text, width=78, initial_indent="    ", subsequent_indent="    "))


def _summary(cls: type[object]) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]
