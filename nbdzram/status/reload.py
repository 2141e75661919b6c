"""Of reading the configuration again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReloadReport:
    """What came of reading the configuration again."""

    changed: tuple[str, ...]  # what is otherwise from now on
    kept: tuple[str, ...]  # exports and pools that are declared no more, and stay until they are removed
    restart: tuple[str, ...]  # keys whose new value takes effect at the next start

    def lines(self) -> Iterator[str]:
        """As a person reads it."""
        yield from self.changed or ("nothing is declared otherwise than before",)
        yield from (f"{name} is declared no more, and stays until it is removed" for name in self.kept)
        yield from (f"{name} takes effect at the next start" for name in self.restart)
