"""Numbers as parameters. Apart from what client commands share, as `serve` loads nothing of that."""

from __future__ import annotations

from typing import Any

import click

from nbdzram.units import parse_seconds


class Whole(click.IntRange):
    """A whole number, which click calls an integer range where it is none. Of what there are numbers: `of`."""

    def __init__(self, low: int, high: int | None = None, *, of: str = "whole number") -> None:
        super().__init__(low, high)
        self.name = of


class Seconds(click.ParamType[float]):
    """A time, read as the configuration reads it: 90, 30s, 10m, 2h."""

    name = "time"

    def __init__(self, low: float, high: float) -> None:
        self.low = low
        self.high = high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """In seconds."""
        seconds = parse_seconds(str(value))
        if seconds is None or not self.low <= seconds <= self.high:
            allowed = f"a time from {self.low:g} to {self.high} seconds, such as 90, 10m or 2h"
            self.fail(f"'{value}' is not {allowed}", param, ctx)
        return seconds


class WholeSeconds(Seconds):
    """One that is counted in whole seconds."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """In seconds."""
        seconds = super().convert(value, param, ctx)
        if seconds % 1:
            self.fail(f"'{value}' is no whole number of seconds", param, ctx)
        return int(seconds)


SECONDS = Seconds(0.1, 3600)
