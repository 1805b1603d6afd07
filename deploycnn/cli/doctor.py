"""``deploycnn doctor``: what works on this machine, what does not, why, and how to mend it."""

from __future__ import annotations

import click


@click.command("doctor", short_help="Say which runtimes work here, which do not, why, and how to mend it.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON on standard output.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Check Python, packages, runtimes, execution providers and drivers.

    Exit code 1 where something is broken; what is merely not installed is no error.
    """
    from dataclasses import asdict

    from deploycnn import doctor
    from deploycnn.cli.console import echo, print_json
    from deploycnn.report.words import clean

    findings = doctor.diagnose()
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        widest = max((len(finding.name) for finding in findings), default=0)
        for finding in findings:
            echo(f"{finding.status:<8}{clean(finding.name):<{widest}}  {clean(finding.what)}".rstrip())
            for text in (finding.why, f"mend: {finding.mend}" if finding.mend else ""):
                if text:
                    echo(f"{'':<{8 + widest}}  {clean(text)}")
    if any(finding.status == "error" for finding in findings):
        ctx.exit(1)
