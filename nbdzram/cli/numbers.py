"""Numbers as parameters. Apart from what client commands share, as `serve` loads nothing of that."""

from __future__ import annotations

import click


class Whole(click.IntRange):
    """A whole number, which click calls an integer range where it is none. Of what there are numbers: `of`."""

    def __init__(self, low: int, high: int | None = None, *, of: str = "whole number") -> None:
        super().__init__(low, high)
        self.name = of


SECONDS = click.FloatRange(0.1, 3600)
SECONDS.name = "number of seconds"
