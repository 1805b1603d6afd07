"""``deploycnn recipes``: the recipes that ship with the package."""

from __future__ import annotations

from pathlib import Path

import click

from deploycnn import recipes


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001 - click's form
    return [name for name in recipes.shipped() if name.startswith(incomplete)]


@click.group("recipes", short_help="List, show and copy the recipes that ship with the package.")
def command() -> None:
    """List, show and copy the recipes that ship with the package.

    A shipped recipe also runs by its name: `deploycnn compress quickstart`.
    """


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print names, descriptions and paths as JSON.")
def list_recipes(as_json: bool) -> None:
    """List names and what each does."""
    from deploycnn.cli.console import echo, print_json

    known = recipes.shipped()
    if as_json:
        print_json(
            [
                {"name": name, "description": recipes.description(path), "path": str(path)}
                for name, path in known.items()
            ]
        )
        return
    widest = max((len(name) for name in known), default=0)
    for name, path in known.items():
        echo(f"{name:<{widest}}  {recipes.description(path)}".rstrip())


@command.command("show")
@click.argument("name", shell_complete=_complete)
def show_recipe(name: str) -> None:
    """Print the recipe called NAME."""
    from deploycnn.cli.console import echo

    echo(recipes.find(name).read_text(encoding="utf-8").rstrip("\n"))


@command.command("copy")
@click.argument("name", shell_complete=_complete)
@click.argument("destination", default=".", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Overwrite a file that is there.")
def copy_recipe(name: str, destination: Path, force: bool) -> None:
    """Copy the recipe called NAME to DESTINATION (a file or a folder; here by default) to change it."""
    from deploycnn.cli.console import echo

    echo(str(recipes.copy(name, destination, force=force)))
