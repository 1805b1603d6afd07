"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path)


def _recipe_names(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    """Shell completion: shipped recipes; the shell adds files by itself."""
    from deploycnn import recipes

    return [name for name in recipes.shipped() if name.startswith(incomplete)]


recipe_argument = click.argument("recipe", shell_complete=_recipe_names)
optional_recipe_argument = click.argument("recipe", required=False, shell_complete=_recipe_names)


def recipe_options(function: F) -> F:
    """``--data``, ``--weights``, ``--set`` and ``--out``."""
    for option in (
        click.option("--out", type=_PATH, help="Run directory. [default: runs/<recipe's name>]"),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change one value, e.g. variants.int8.2.int8.calibrator=mse; may be repeated.",
        ),
        click.option("--weights", type=_PATH, help="Checkpoint to use instead of the source's weights."),
        click.option(
            "--data", type=_PATH, help="Image folder, or a zip of one, to use instead of the recipe's data."
        ),
    ):
        function = option(function)
    return function


def output_options(function: F) -> F:
    """``--json``, ``--plain`` and ``--quiet``."""
    for option in (
        click.option("--quiet", "-q", is_flag=True, help="Print warnings, errors and the result only."),
        click.option("--plain", is_flag=True, help="Plain lines instead of a live display."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output."),
    ):
        function = option(function)
    return function
