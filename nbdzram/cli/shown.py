"""Options whose values a shell completes as their help shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

PLACES = {"FILE": "file", "DIR": "dir", "PATH": "file"}


class AsShown(click.types.StringParamType):
    """A text that the configuration judges, so that flag, variable and file have one judge; completed as help shows it:
    words by themselves, and places by what lies there.
    """

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002
        """Of `auto|SECONDS|off` the two that are words."""
        from click.shell_completion import CompletionItem  # noqa: PLC0415 - only a shell that completes asks

        shown = (param.metavar or "").split("|")
        words = [CompletionItem(word) for word in shown if word.islower() and word.startswith(incomplete)]
        return words + [CompletionItem(incomplete, type=PLACES[part]) for part in shown if part in PLACES]
