"""Columns as zramctl prints them: aligned for people, --raw and --noheadings for scripts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from nbdzram.errors import ConfigError
from nbdzram.units import format_size

BLANK = "\\x20"  # one that would be taken for the space between two cells
INDENT = "    "  # of what of a row goes on in the next line

Row = TypeVar("Row")
Cell = str | int | None


class Column(Generic[Row]):
    """One column: heading, meaning, and the cell of a row. None is an empty cell; `zero` is how people read a 0.

    `seldom`: most servers have nothing in it, and lists leave it out then.
    """

    __slots__ = ("cell", "heading", "is_size", "says", "seldom", "zero")

    def __init__(
        self,
        heading: str,
        says: str,
        cell: Callable[[Row], Cell],
        is_size: bool = False,
        *,
        zero: str = "",
        seldom: bool = False,
    ) -> None:
        self.heading = heading
        self.says = says
        self.cell = cell
        self.is_size = is_size
        self.zero = zero
        self.seldom = seldom


def choose(columns: Sequence[Column[Row]], wanted: str) -> list[Column[Row]]:
    """The columns that a comma-separated list names, in its order. Raises ConfigError."""
    known = {column.heading: column for column in columns}
    chosen = []
    for name in wanted.upper().split(","):
        if name.strip() not in known:
            raise ConfigError(f"unknown column '{name.strip()}'; there are {', '.join(known)}")
        chosen.append(known[name.strip()])
    return chosen


def render(
    columns: Sequence[Column[Row]],
    rows: Sequence[Row],
    *,
    in_bytes: bool = False,
    headings: bool = True,
    raw: bool = False,
    width: int | None = None,
) -> list[str]:
    """The table's lines. Numbers stand right, text left; raw separates by one blank and marks empty cells with '-'.

    Where rows are longer than `width` each goes on in a second line, indented, between two columns.
    """
    cells = [[_text(column, column.cell(row), in_bytes) for column in columns] for row in rows]
    if headings:
        cells.insert(0, [column.heading for column in columns])
    if raw:
        return [" ".join(text.replace(" ", BLANK) or "-" for text in line) for line in cells]
    widths = [max((_width(line[index]) for line in cells), default=0) for index in range(len(columns))]
    left = [not rows or any(isinstance(column.cell(row), str) for row in rows) for column in columns]
    padded = [
        [
            text + " " * (wide - _width(text)) if is_left else text.rjust(wide)
            for text, wide, is_left in zip(line, widths, left, strict=True)
        ]
        for line in cells
    ]
    return [line for row in padded for line in _folded(row, _breaks(widths, width))]


def screen_width() -> int | None:
    """Of the terminal that standard output is; None: it is none, and lines may be as long as they are."""
    if not sys.stdout.isatty():
        return None
    said = os.environ.get("COLUMNS", "")
    if said.isdecimal() and int(said):
        return int(said)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except OSError:
        return None


def _breaks(widths: Sequence[int], width: int | None) -> list[slice]:
    """Which columns stand in one line."""
    begins, used = [0], 0
    for index, wide in enumerate(widths):
        if width is not None and used + wide > width and index > begins[-1]:
            begins.append(index)
            used = len(INDENT)
        used += wide + 1
    return [slice(begin, end) for begin, end in zip(begins, [*begins[1:], len(widths)], strict=True)]


def _folded(row: Sequence[str], breaks: Sequence[slice]) -> Iterator[str]:
    first, *more = (" ".join(row[part]).rstrip() for part in breaks)
    yield first
    yield from (INDENT + text for text in more if text)


def _width(text: str) -> int:
    """The terminal's columns that it takes: two for a wide character, none for a mark on the one before."""
    if text.isascii():
        return len(text)
    import unicodedata  # noqa: PLC0415 - most tables have only ASCII

    return sum(0 if unicodedata.combining(one) else 1 + (unicodedata.east_asian_width(one) in "WF") for one in text)


def _text(column: Column[Row], cell: Cell, in_bytes: bool) -> str:
    if cell is None:
        return ""
    if cell == 0 and column.zero and not in_bytes:
        return column.zero
    if column.is_size and isinstance(cell, int) and not in_bytes:
        return format_size(cell)
    return legible(str(cell), sys.stdout.encoding)


def legible(text: str, encoding: str) -> str:
    """What nobody sees on a terminal, or it cannot show, as its number: blanks at an end too, as a name may have them.
    Widths are right so."""
    begin, end = len(text) - len(text.lstrip(" ")), len(text.rstrip(" "))
    inner = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text[begin:end])
    shown = BLANK * begin + inner + BLANK * (len(text) - max(begin, end))
    return shown.encode(encoding, "backslashreplace").decode(encoding)
