"""Numbers as parameters. Apart from what client commands share, as `serve` loads nothing of that."""

from __future__ import annotations

import math
from typing import Any

import click


class Whole(click.IntRange):
    """A whole number, which click calls an integer range where it is none. Of what there are numbers: `of`."""

    def __init__(self, low: int, high: int | None = None, *, of: str = "whole number") -> None:
        super().__init__(low, high)
        self.name = of


class Seconds(click.FloatRange):
    """Some seconds. "nan" is a number to Python, and lies in every range: it is not less than where that begins."""

    name = "number of seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Of what click takes for a number, what is one."""
        seconds = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value!r} is not a valid {self.name}.", param, ctx)
        return seconds


SECONDS = Seconds(0.1, 3600)
