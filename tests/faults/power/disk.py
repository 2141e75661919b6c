"""A disk under one directory, as recorder.c saw it used, and what it may hold when the power fails.

Promised is what was synced: a file's content by fsync or fdatasync of it, its name by fsync of the directory. Of the
rest anything may be there: of the writes any, in any order, each only in part, by sectors of 512 bytes; of the names a
first part of what was done to them, as a file system's own journal leaves it. What a sync failed for is doubtful for
ever: a later one that succeeds says nothing of it.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

SECTOR = 512
HEAD = struct.Struct("<IIQQQII")
SURVIVES = 0.5
"""The share of doubtful writes that are on the disk all the same."""
MARKS = ".marks"
"""A file of the directory that the story writes its progress to: no part of the disk, in order with all the rest."""


class Act(IntEnum):
    """As recorder.c has them."""

    OPENED = 1
    WRITTEN = 2
    SYNCED = 3
    RENAMED = 4
    UNLINKED = 5
    ALLOCATED = 6
    TRUNCATED = 7
    LINKED = 8


@dataclass(frozen=True, slots=True)
class Event:
    """One act of the process. `first`: offset, new size, or whether a file is new."""

    act: Act
    error: int
    file: int
    first: int
    length: int
    name: str
    other: str
    content: bytes


def recorded(log: Path) -> Iterator[Event]:
    """What a recorder wrote."""
    with log.open("rb") as file:
        while head := file.read(HEAD.size):
            act, error, inode, first, length, name, other = HEAD.unpack(head)
            names = file.read(name).decode(), file.read(other).decode()
            content = file.read(length) if act == Act.WRITTEN else b""
            yield Event(Act(act), error, inode, first, length, *names, content)


@dataclass(slots=True, eq=False)
class File:
    """`synced`: writes that are on the disk, or may be where a sync of them failed (the last word); `pending`: those
    that may be."""

    synced: list[tuple[int, bytes, bool]] = field(default_factory=list)
    pending: list[tuple[int, bytes]] = field(default_factory=list)
    synced_size: int = 0
    size: int = 0


class Disk:
    """Takes events, and gives out what the power may leave."""

    def __init__(self) -> None:
        self._by_inode: dict[int, File] = {}
        self._names: dict[str, File] = {}  # as the process sees them
        self._synced_names: dict[str, File] = {}
        self._pending_names: list[dict[str, File]] = []  # after each act since

    def take(self, event: Event) -> None:
        """One more."""
        getattr(self, f"_{event.act.name.lower()}")(event)

    def lay_out(self, directory: Path, dice: random.Random) -> None:
        """Make the directory as the power may have left the disk."""
        directory.mkdir()
        names = dice.choice([self._synced_names, *self._pending_names[-3:], *self._pending_names])
        way = dice.choice(["nothing", "everything", "sectors", "torn", "torn"])
        for name, file in names.items():
            kept = [one[:2] for one in file.synced if not one[2] or dice.random() < SURVIVES]
            kept += _left(file.pending, way, dice)
            size = max(file.synced_size, *(position + len(content) for position, content in kept), 0)
            if way == "everything":
                size = file.size
            descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT, 0o600)
            os.ftruncate(descriptor, size)
            for position, content in kept:
                os.pwrite(descriptor, content, position)
            os.close(descriptor)

    def _opened(self, event: Event) -> None:
        if event.first:
            self._names = {**self._names, event.name: File()}
            self._by_inode[event.file] = self._names[event.name]
            self._pending_names.append(self._names)
        elif event.length:  # what was left where something failed
            file = self._by_inode[event.file]
            file.pending.append((0, bytes(file.size)))
            file.size = 0

    def _written(self, event: Event) -> None:
        file = self._by_inode[event.file]
        file.pending.append((event.first, event.content))
        file.size = max(file.size, event.first + event.length)

    def _allocated(self, event: Event) -> None:
        file = self._by_inode[event.file]
        file.size = max(file.size, event.first + event.length)

    def _truncated(self, event: Event) -> None:
        """What lay behind may be there for ever: nobody waits until it is not."""

    def _synced(self, event: Event) -> None:
        if not event.name:
            if not event.error:
                self._synced_names, self._pending_names = self._names, []
            return
        file = self._by_inode[event.file]
        file.synced.extend((position, content, event.error != 0) for position, content in file.pending)
        file.pending.clear()
        if not event.error:
            file.synced_size = file.size
            file.synced = [  # what lay behind the end is gone with it
                (position, content[: file.size - position], doubtful)
                for position, content, doubtful in file.synced
                if position < file.size
            ]

    def _renamed(self, event: Event) -> None:
        names = dict(self._names)
        names[event.other] = names.pop(event.name)
        self._pending_names.append(names)
        self._names = names

    def _linked(self, event: Event) -> None:
        self._names = {**self._names, event.other: self._names[event.name]}
        self._pending_names.append(self._names)

    def _unlinked(self, event: Event) -> None:
        self._names = {name: file for name, file in self._names.items() if name != event.name}
        self._pending_names.append(self._names)


def _left(pending: list[tuple[int, bytes]], way: str, dice: random.Random) -> list[tuple[int, bytes]]:
    """What is on the disk of writes that were not synced."""
    if way == "nothing" or not pending:
        return []
    if way == "everything":
        return pending
    if way == "torn":  # the first ones, and of one more its first sectors
        count = dice.randrange(len(pending))
        position, content = pending[count]
        sectors = dice.randrange(-(-len(content) // SECTOR) + 1)
        return [*pending[:count], (position, content[: sectors * SECTOR])]
    kept = []
    share = dice.choice([0.1, 0.5, 0.9])
    for position, content in pending:
        for at in range(0, len(content), SECTOR):
            if dice.random() < share:
                kept.append((position + at, content[at : at + SECTOR]))
    return kept
