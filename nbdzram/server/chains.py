"""The files of checkpoints and of the journal: their names, and which of them a start reads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nbdzram.errors import UserError

_NUMBER = r"(\d{8}|[1-9]\d{8,17})"  # as {:08d} writes it: beyond the eighth digit too
_NAME = re.compile(rf"{_NUMBER}-(?:full|since-{_NUMBER})(\.stream|\.damaged)")
_UNFINISHED = re.compile(rf"{_NUMBER}(?:-full|-since-{_NUMBER})?\.new")
_SEGMENT = re.compile(rf"{_NUMBER}(\.journal|\.damaged)")
DAMAGED = ".damaged"
"""What a start could not use, in the place of the rest of its name (aside.py)."""
FIRST = 1
"""The number of a checkpoint before which there was neither one nor a journal."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One file. `since`: the number of the one whose changes it holds; None: it is whole."""

    number: int
    since: int | None
    path: Path


def name_of(number: int, since: int | None) -> str:
    """Of the file."""
    return f"{number:08d}-{'full' if since is None else f'since-{since:08d}'}.stream"


def segment_name(number: int) -> str:
    """Of the file of a journal that begins at the checkpoint of this number."""
    return f"{number:08d}.journal"


def segments_in(directory: Path, suffix: str = ".journal") -> dict[int, Path]:
    """The files of the journal that are there, by the numbers of their checkpoints. Raises UserError."""
    found = {}
    for name in _names(directory):
        match = _SEGMENT.fullmatch(name)
        if match is not None and match[2] == suffix:
            found[int(match[1])] = directory / name
    return found


def unfinished_in(directory: Path) -> list[Path]:
    """Files that had their name not yet when a server was killed, or could not go on. Raises UserError."""
    names = [name for name in _names(directory) if _UNFINISHED.fullmatch(name)]
    return [path for path in (directory / name for name in names) if path.is_file()]


def next_number(directory: Path) -> int:
    """Of a checkpoint: neither one nor a journal had it before, be it damaged. Raises UserError."""
    had = [*checkpoints_in(directory), *segments_in(directory)]
    damaged = [*checkpoints_in(directory, DAMAGED), *segments_in(directory, DAMAGED)]
    return max([FIRST - 1, *had, *damaged]) + 1


def _names(directory: Path) -> list[str]:
    try:
        return sorted(path.name for path in directory.iterdir()) if directory.exists() else []
    except OSError as error:
        raise UserError(f"cannot look into {directory}: {error.strerror}") from error


def checkpoints_in(directory: Path, suffix: str = ".stream") -> dict[int, Checkpoint]:
    """Those that are there, by their numbers. Raises UserError."""
    found = {}
    for name in _names(directory):
        match = _NAME.fullmatch(name)
        if match is not None and match[3] == suffix:
            number, since = int(match[1]), int(match[2]) if match[2] else None
            found[number] = Checkpoint(number, since, directory / name)
    return found


def chains(known: Mapping[int, Checkpoint]) -> Iterator[list[Checkpoint]]:
    """The ways to begin, the newest first: a whole one, and those since, each of the one before it. One whose first is
    not whole cannot be used: what that goes on from is missing.
    """
    for number in sorted(known, reverse=True):
        chain = [known[number]]
        while (since := chain[-1].since) is not None and since in known and since < chain[-1].number:
            chain.append(known[since])
        yield chain[::-1]


def sync_directory(directory: Path) -> None:
    """What was renamed and removed in it is so, whatever the power does."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
