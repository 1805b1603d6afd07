"""The command line: one file per verb, loaded when it is called.

``deploycnn --help`` answers without torch, onnxruntime or numpy; a verb loads what it needs when it runs.
"""

from __future__ import annotations

import importlib
import sys

import click

from deploycnn import __version__
from deploycnn.errors import DeployCNNError

#: Verbs in the order in which people need them.
VERBS = (
    "compress", "export", "profile", "inspect", "lint", "audit", "latency-table", "recipes", "passes", "doctor",
    "completion",
)  # fmt: skip


class _Verbs(click.Group):
    """A group whose commands live in modules of the same name."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(
            f"deploycnn.cli.{cmd_name.replace('-', '_')}"
        ).command
        return command


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="deploycnn")
def cli() -> None:
    """From a CNN and a folder of images to a measured, smaller, faster model.

    Start with `deploycnn compress quickstart`, or copy a recipe with `deploycnn recipes copy`.
    """


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Exit codes: 0 done, 1 our own bug or a check that did not hold, 2 something that the user can mend, 130
    interrupted.
    """
    try:
        result = cli.main(args=arguments, prog_name="deploycnn", standalone_mode=False)
    except click.exceptions.Abort:
        return _interrupted()
    except KeyboardInterrupt:
        return _interrupted()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f"; `{context.command_path} --help` tells what it takes" if context else ""
        click.echo(f"error: {' '.join(error.format_message().split()).removesuffix('.')}{hint}", err=True)
        return error.exit_code
    except DeployCNNError as error:
        click.echo(f"error: {error}", err=True)
        return 2
    except BrokenPipeError:
        # The reader (head, less) left; Python would complain again when it flushes at exit.
        sys.stdout = None
        return 0
    return result if isinstance(result, int) else 0


def _interrupted() -> int:
    click.echo("interrupted; run the same command again to go on where it stopped", err=True)
    return 130


def entry() -> None:
    """The console script."""
    sys.exit(main())
