"""`nbdzram completion`: a shell's completion script."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

BASH = r"""_nbdzram_completion() {
    local line=${COMP_LINE:0:COMP_POINT} word=${COMP_WORDS[COMP_CWORD]} before type value
    [[ $line == *[[:space:]] ]] && line+="''"  # an empty word, of which the rest is asked for
    before=${line##*[[:space:]]}
    before=${before%"${before##*[:=@]}"}  # bash completes what stands behind these, and an @ with it; names have them
    before=${before%@}

    while IFS=, read -r type value; do
        case $type in
        dir) compopt -o dirnames ;;
        file) compopt -o default ;;
        plain)
            value=${value#"$before"}
            [[ $word == [\"\']* ]] || printf -v value %q "$value"
            value=${value//\\,/,}  # which is none of the shell's, and lists of columns have them
            COMPREPLY+=("$value")
            ;;
        esac
    done < <(COMP_WORDS=$line COMP_CWORD=-1 _NBDZRAM_COMPLETE=bash_complete "$1")
}

complete -o nosort -F _nbdzram_completion nbdzram
"""
"""click's own inserts names as they are, so that a blank, a quote or a dollar in one is the shell's, and leaves the
splitting to bash, which does it at an @: each snapshot of `snapshot --all` has one in its name."""


@click.command(
    "completion",
    epilog="\b\nExamples:\n  source <(nbdzram completion bash)    # bash, this shell alone\n"
    "  mkdir -p ~/.local/share/bash-completion/completions\n"
    "  nbdzram completion bash > ~/.local/share/bash-completion/completions/nbdzram\n"
    '  nbdzram completion zsh > "${fpath[1]}/_nbdzram"\n'
    "  mkdir -p ~/.config/fish/completions\n"
    "  nbdzram completion fish > ~/.config/fish/completions/nbdzram.fish",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(context: click.Context, *, shell: str) -> None:
    """Print the completion script of SHELL. Put it where the shell looks for it, and start a new shell."""
    if shell == "bash":
        return click.echo(BASH, nl=False)
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(context.find_root().command, {}, "nbdzram", "_NBDZRAM_COMPLETE").source()
    # click separates kind and value by a comma and lets fish split at every one: an export's name may have more.
    return click.echo(script.replace('string split "," $completion', 'string split -m 1 "," $completion'))
