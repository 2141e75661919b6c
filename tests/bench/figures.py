"""What a measurement is worth: a figure, what is required of it, and the verdict, as a line of a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table."""

    what: str
    measured: float
    required: float
    at_least: bool
    detail: str

    @property
    def reached(self) -> bool:
        return self.measured >= self.required if self.at_least else self.measured <= self.required


def print_table(figures: Iterable[Figure]) -> None:
    for figure in figures:
        sign = ">=" if figure.at_least else "<="
        verdict = "ok" if figure.reached else "NOT REACHED"
        print(
            f"{figure.what:52} {figure.measured:8.2f}  {sign} {figure.required:<6.4g} {verdict:12} {figure.detail}",
            flush=True,
        )
