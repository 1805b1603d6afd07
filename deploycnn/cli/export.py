"""``deploycnn export``: deploy bundles without measuring."""

from __future__ import annotations

from pathlib import Path

import click

from deploycnn.cli.options import output_options, recipe_argument, recipe_options


@click.command("export", short_help="Make variants and write their deploy bundles, without measuring.")
@recipe_argument
@click.option(
    "--variant", "variants", multiple=True, metavar="NAME", help="Which one; may be repeated. [default: all]"
)
@click.option(
    "--target",
    metavar="NAME",
    help="Deploy there instead of the recipe's target, e.g. tensorrt-rtx: then engines are built.",
)
@recipe_options
@output_options
def command(
    recipe: str,
    variants: tuple[str, ...],
    target: str | None,
    out: Path | None,
    overrides: tuple[str, ...],
    weights: Path | None,
    data: Path | None,
    as_json: bool,
    plain: bool,
    quiet: bool,
) -> None:
    """Make the variants of RECIPE and write a deploy bundle of each: model, preprocessing, classes and a script.

    Steps that `compress` has made are not made again, and the other way round.
    """
    from deploycnn import api
    from deploycnn.cli.console import Console, echo, print_json

    with Console(plain=plain or None, quiet=quiet) as console:
        bundles = api.export(
            recipe,
            variants=variants,
            target=target,
            out=out,
            overrides=overrides,
            data=data,
            weights=weights,
            events=console,
        )
    if as_json:
        print_json({name: str(path) for name, path in bundles.items()})
        return
    for name, path in bundles.items():
        echo(f"{name}: {path}")
