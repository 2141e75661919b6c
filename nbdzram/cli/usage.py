"""A command within a command: wrong use of it is told with the lines that show how that one is used, and what stands
before it is its own."""

from __future__ import annotations

from typing import Any

import click


class Told(click.Group):
    """A group that knows whose command line was wrong: of an option without its value click does not say it."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named. Raises UsageError."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            error.ctx = error.ctx or self._context_of_the_command(ctx)
            raise

    def _context_of_the_command(self, ctx: click.Context) -> click.Context:
        name = ctx.invoked_subcommand
        command = self.get_command(ctx, name) if name is not None else None
        return ctx if command is None else click.Context(command, parent=ctx, info_name=name)


def or_before_the_command(context: click.Context, option: click.Parameter, value: Any) -> Any:
    """An option's value, or what the same option before the command has, as it was written there."""
    if value is None and context.parent is not None:  # whose own is what stands before it, in the same way
        value = context.parent.params.get(option.name or "")
    return value
