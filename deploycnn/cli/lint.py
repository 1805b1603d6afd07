"""``deploycnn lint``: a Q/DQ file against the rules of the target that it is meant for."""

from __future__ import annotations

import itertools
import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from deploycnn.quantization.lint import LintReport

#: Places named for a rule; ``--json`` has all of them.
_PLACES = 5


@click.command("lint", short_help="Check a quantized ONNX file against the placement rules of a target.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True, metavar="TARGET", help="Whose rules apply.")
@click.option(
    "--ignore", multiple=True, metavar="RULE", help="Leave a rule out, e.g. QDQ006; may be repeated."
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON on standard output.")
@click.pass_context
def command(ctx: click.Context, model: Path, target: str, ignore: tuple[str, ...], as_json: bool) -> None:
    """Check MODEL, an ONNX file with Q/DQ nodes, whoever made it.

    TARGET is cpu, onnxruntime-cpu, openvino, onnxruntime-cuda, tensorrt or tensorrt-rtx. docs/quantization.md
    lists the rules.

    Exit code 0 where nothing is wrong (notes do not count), 1 where there are errors or warnings, 2 where the
    file cannot be checked.
    """
    from deploycnn.cli.console import echo, print_json
    from deploycnn.quantization.lint import lint_model

    report = lint_model(model, target, ignore=ignore)
    if as_json:
        print_json(report.to_json())
    else:
        for line in render(report, min(shutil.get_terminal_size((80, 24)).columns, 100)):
            echo(line)
    if not report.clean:
        ctx.exit(1)


def render(report: LintReport, width: int) -> list[str]:
    """The findings as lines, by rule."""
    from deploycnn.quantization.lint_rules import RULES
    from deploycnn.report.words import clean

    lines: list[str] = []
    for identifier, group in itertools.groupby(report.findings, key=lambda finding: finding.rule):
        findings = list(group)
        count = f" ({len(findings)} places)" if len(findings) > 1 else ""
        lines += _wrap(
            f"{identifier} {findings[0].severity}: {RULES[identifier].title}{count}", width, "", "    "
        )
        for finding in findings[:_PLACES]:
            lines += _wrap(f"{clean(finding.node)}: {clean(finding.what)}", width, "    ", "        ")
        if len(findings) > _PLACES:
            lines.append(f"    ... and {len(findings) - _PLACES} more; --json names them all")
        lines += [*_wrap(f"mend: {findings[0].mend}", width, "    ", "          "), ""]
    where = f"{report.target} ({report.isa})" if report.isa else report.target
    counts = ", ".join(
        f"{number} {name}{'s' if number != 1 else ''}"
        for name in ("error", "warning", "note")
        if (number := report.count(name))
    )
    lines += _wrap(f"{clean(report.model)} for {where}: {counts or 'clean'}", width, "", "    ")
    return [*lines, *(_wrap(f"note: {report.note}", width, "", "    ") if report.note else [])]


def _wrap(text: str, width: int, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
