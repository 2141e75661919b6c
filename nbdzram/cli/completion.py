"""`nbdzram completion`: a shell's completion script."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command(
    "completion",
    epilog="\b\nExamples:\n  nbdzram completion bash > ~/.local/share/bash-completion/completions/nbdzram\n"
    '  nbdzram completion zsh > "${fpath[1]}/_nbdzram"\n'
    "  nbdzram completion fish > ~/.config/fish/completions/nbdzram.fish",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(context: click.Context, *, shell: str) -> None:
    """Print the completion script of SHELL. Put it where the shell looks for it, and start a new shell."""
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(context.find_root().command, {}, "nbdzram", "_NBDZRAM_COMPLETE").source()
    # click separates kind and value by a comma and lets fish split at every one: an export's name may have more.
    click.echo(script.replace('string split "," $completion', 'string split -m 1 "," $completion'))
