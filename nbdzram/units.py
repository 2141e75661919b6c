"""Sizes in and out, as zramctl reads and prints them, and stretches of time.

K and KiB are 1024, KB is 1000; case does not matter. Arithmetic is exact; only what is no whole number of bytes, as
0.1G, is rounded down to a whole block. Output rounds to one decimal, as zramctl's does.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from fractions import Fraction

LETTERS = "KMGTPE"
BLOCK_BYTES = 4096
MAX_SIZE_BYTES = 1 << 63  # NBD counts in unsigned 64 bits; clients use signed offsets
ALLOWED = "a number with a suffix K, M, G, T (1024) or KB, MB, GB, TB (1000), such as 512M or 1.5GiB"

_SIZE = r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]*|%)"  # compiled when first used: most commands read no size
_UNIT = rf"(?P<letter>[{LETTERS}])(?P<kind>IB|B)?|B?"

SECONDS = r"(?P<number>\d{1,12}(?:\.\d+)?|\.\d+)(?P<unit>[smhd]?)"
UNIT_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_size(text: str, *, of: int | None = None) -> int:
    """The bytes that `text` names. `of` is what a percentage is taken of; None refuses percentages.

    Raises ValueError, whose text says what is allowed.
    """
    match = re.fullmatch(_SIZE, text.strip())
    if match is None:
        raise ValueError(f"'{text}' is not a size; allowed is {ALLOWED}")
    from fractions import Fraction  # noqa: PLC0415 - the same

    number = Fraction(match["number"])
    if match["unit"] == "%":
        return _share(text, number, of)
    size = number * _factor(text, match["unit"])
    if size.denominator != 1:  # 0.1G: nobody counts the bytes of that
        size = Fraction(_something(text, int(size) // BLOCK_BYTES * BLOCK_BYTES))
    if size > MAX_SIZE_BYTES:
        raise ValueError(f"'{text}' is more than the largest size, {MAX_SIZE_BYTES} bytes (8E)")
    return int(size)


def format_size(size_bytes: int) -> str:
    """The size as zramctl prints it: at most one decimal and one letter (1G, 3.9M, 74B)."""
    magnitude = abs(size_bytes)
    exponent = min(max(magnitude.bit_length() - 1, 0) // 10, len(LETTERS))
    tenths = _round_half_up(magnitude * 10, 1 << (10 * exponent))
    if tenths >= 10240 and exponent < len(LETTERS):  # 1023.97K rounds to the next unit
        exponent, tenths = exponent + 1, 10
    whole, tenth = divmod(tenths, 10)
    letter = f"{LETTERS[exponent - 1]}" if exponent else "B"
    sign = "-" if size_bytes < 0 else ""
    return f"{sign}{whole}.{tenth}{letter}" if tenth else f"{sign}{whole}{letter}"


def format_sizes(*sizes: int) -> tuple[str, ...]:
    """Sizes that are held against each other: to the byte where two that differ would read alike."""
    told = tuple(map(format_size, sizes))
    return told if len(set(told)) == len(set(sizes)) else tuple(f"{size} bytes" for size in sizes)


def counted(number: int, what: str) -> str:
    """So many, in words: 1 export, 2 exports."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def said(name: str) -> str:
    """A name in a sentence without quotes: in quotes all the same where a blank at its end would not be seen."""
    return name if name == name.strip() else repr(name)


def some_of(names: Sequence[str], most: int) -> str:
    """The first few, and how many more."""
    more = len(names) - most
    return ", ".join(map(said, names[:most])) + (f" and {more} more" if more > 0 else "")


def parse_seconds(text: str) -> float | None:
    """The time that `text` names, in seconds or with a letter behind: 90, 30s, 10m, 1.5h, 7d. None: it names none."""
    match = re.fullmatch(SECONDS, text)
    return None if match is None else float(match["number"]) * UNIT_SECONDS[match["unit"]]


def format_seconds(seconds: float) -> str:
    """A stretch of time in its two largest units: 3 d 4 h."""
    minutes, hours, days = int(seconds) // 60 % 60, int(seconds) // 3600 % 24, int(seconds) // 86400
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {int(seconds) % 60} s" if minutes else f"{int(seconds)} s"


def _share(text: str, percent: Fraction, of: int | None) -> int:
    if of is None:
        raise ValueError(f"'{text}': a percentage is not allowed here; allowed is {ALLOWED}")
    if not 0 < percent <= 100:
        raise ValueError(f"'{text}': a percentage lies above 0 and at most 100")
    return _something(text, int(percent * of / 100))


def _something(text: str, size: int) -> int:
    """What a little was rounded down to. Raises ValueError where that is nothing: of a limit 0 means that there is
    none, and who asks for the least must not get everything."""
    if not size:
        raise ValueError(f"'{text}' is less than what is counted, blocks of {BLOCK_BYTES} bytes; 0 is none at all")
    return size


def _factor(text: str, unit: str) -> int:
    match = re.fullmatch(_UNIT, unit, re.IGNORECASE)
    if match is None:
        raise ValueError(f"'{text}' has the unknown suffix '{unit}'; allowed is {ALLOWED}")
    if match["letter"] is None:
        return 1
    base = 1000 if (match["kind"] or "").upper() == "B" else 1024
    return int(base ** (LETTERS.index(match["letter"].upper()) + 1))


def _round_half_up(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)
