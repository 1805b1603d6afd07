"""``deploycnn compress``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploycnn.cli.options import optional_recipe_argument, output_options, recipe_options

if TYPE_CHECKING:
    from deploycnn.api import Run


@click.command("compress", short_help="Make, measure and compare the variants of a recipe.")
@optional_recipe_argument
@recipe_options
@click.option("--dry-run", is_flag=True, help="Print the plan, with what is there already, and stop.")
@output_options
def command(
    recipe: str | None,
    out: Path | None,
    overrides: tuple[str, ...],
    weights: Path | None,
    data: Path | None,
    dry_run: bool,
    as_json: bool,
    plain: bool,
    quiet: bool,
) -> int:
    """Make every variant of RECIPE, measure each on this machine, and name the fastest within the budget.

    RECIPE is a YAML file or the name of a shipped one (`deploycnn recipes list`); quickstart by default. A
    run that was interrupted goes on where it stopped; what has been made is not made again.
    """
    from deploycnn import api
    from deploycnn.cli.console import Console

    recipe = recipe or api.DEFAULT_RECIPE
    options: dict[str, Any] = {"out": out, "overrides": overrides, "data": data, "weights": weights}
    if dry_run:
        _print_plan(api.dry_run(recipe, **options), as_json)
        return 0
    with Console(plain=plain or None, quiet=quiet) as console:
        run = api.compress(recipe, events=console, **options)
    return show(run, as_json=as_json, plain=plain)


def show(run: Run, *, as_json: bool, plain: bool) -> int:
    """Print a run's report, and what went wrong although there is one; the exit code."""
    from deploycnn.cli.console import echo, print_json, print_report

    if as_json:
        print_json(run.report)
    else:
        print_report(run.report, plain=plain)
        echo(f"\nreport: {run.path / 'report.html'}")
    for problem in run.problems:
        click.echo(f"error: {problem}", err=True)
    return 2 if run.problems else 0


def _print_plan(rows: list[Any], as_json: bool) -> None:
    from deploycnn import schema
    from deploycnn.cli.console import echo, print_json

    if as_json:
        print_json([schema.to_json(row) for row in rows])
        return
    width = max(len(row.variant) for row in rows)
    for row in rows:
        echo(f"{row.variant:<{width}}  {row.step:<12}  {row.key[:12]}  {row.state}")
    misses = len({row.key for row in rows if row.state == "miss"})
    echo(f"{misses} of {len({row.key for row in rows})} steps to run")
