"""``deploycnn completion``: shell completion."""

from __future__ import annotations

import click

_SETUP = {
    "bash": 'eval "$(_DEPLOYCNN_COMPLETE=bash_source deploycnn)"',
    "zsh": 'eval "$(_DEPLOYCNN_COMPLETE=zsh_source deploycnn)"',
    "fish": "_DEPLOYCNN_COMPLETE=fish_source deploycnn | source",
}


@click.command("completion", short_help="Print the line that turns on shell completion.")
@click.argument("shell", type=click.Choice(sorted(_SETUP)))
def command(shell: str) -> None:
    """Print the line that turns on completion; add it to your shell's start-up file.

    For example: deploycnn completion bash >> ~/.bashrc
    """
    click.echo(_SETUP[shell])
