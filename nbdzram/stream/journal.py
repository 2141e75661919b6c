"""The format of a journal: groups of changes, appended one behind the other. docs/reference/stream.md says the same.

    segment    head, 512 bytes | group | group | ...        a file; what lies behind its last group is old, or nothing
    group      head, 64 bytes | stream, salted | zeroes to the next 512

Each group is a stream of what changed since the moment before it, ended by its end record. A segment begins at a
moment whose checkpoint has the segment's number. Files are used again, so old groups may lie behind new ones: every
checksum of a group is seeded with its own salt, which is made of the segment's random one and the group's sequence
number. What does not agree with it was never written, or not wholly: there the journal ends.

Groups are synced one after another. So one that is not whole, and behind which a later one's head is, did not end with
the power: it was damaged afterwards.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nbdzram.engine.codec import digest_of
from nbdzram.errors import StreamError, UnknownFormat
from nbdzram.stream.layout import CHECKSUM
from nbdzram.stream.reading import Counted, records

MAGIC = b"NBDZRAMJ"
GROUP_MAGIC = b"NBDZRAMG"
VERSION = 1
ALIGNMENT = 512
"""Of groups: the sector is what a disk writes wholly, and looking for heads is quick."""
HEAD_BYTES = ALIGNMENT
SEGMENT_HEAD = struct.Struct("<8sIIQQ16s")
GROUP_HEAD = struct.Struct("<8sQ16s16sII")
ALL_EXPORTS = 1
"""Flag of a group: exports that it does not tell are gone. Without it they are as they were."""
LOOK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentHead:
    """`since`: identity of the moment at which it begins; `number`: of the checkpoint of that moment."""

    number: int
    salt: int
    since: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupHead:
    """What changed from the moment `since` to the moment `identity`."""

    sequence: int
    since: bytes
    identity: bytes
    all_exports: bool


@dataclass(frozen=True, slots=True)
class Group:
    """One that is whole, at `start` of its file."""

    head: GroupHead
    salt: int  # of its records
    path: Path
    start: int

    def open(self) -> BinaryIO:
        """Its stream, and what lies behind it. Raises OSError."""
        file = self.path.open("rb")
        file.seek(self.start + GROUP_HEAD_BYTES)
        return file


def salt_of(segment_salt: int, sequence: int) -> int:
    """Of a group's records."""
    return digest_of(struct.pack("<Q", sequence), segment_salt)


def segment_head(head: SegmentHead) -> bytes:
    """What a segment begins with."""
    body = SEGMENT_HEAD.pack(MAGIC, VERSION, 0, head.number, head.salt, head.since).ljust(
        HEAD_BYTES - CHECKSUM.size, b"\0"
    )
    return body + CHECKSUM.pack(digest_of(body, 0))


def read_segment_head(path: Path) -> SegmentHead:
    """Raises StreamError, OSError."""
    with path.open("rb") as file:
        found = file.read(HEAD_BYTES)
    body, checksum = found[: HEAD_BYTES - CHECKSUM.size], found[HEAD_BYTES - CHECKSUM.size :]
    if len(found) < HEAD_BYTES or body[:8] != MAGIC or checksum != CHECKSUM.pack(digest_of(body, 0)):
        raise StreamError(f"{path} is no journal, or its head is damaged")
    _, version, features, number, salt, since = SEGMENT_HEAD.unpack_from(body)
    if version != VERSION or features:
        raise UnknownFormat(f"the journal {path} has version {version}, this program reads {VERSION}; use a later one")
    return SegmentHead(number=number, salt=salt, since=since)


def group_head(head: GroupHead, segment: SegmentHead) -> bytes:
    """What a group begins with."""
    flags = ALL_EXPORTS * head.all_exports
    body = GROUP_HEAD.pack(GROUP_MAGIC, head.sequence, head.since, head.identity, flags, 0)
    return body + CHECKSUM.pack(digest_of(body, segment.salt))


GROUP_HEAD_BYTES = GROUP_HEAD.size + CHECKSUM.size


def read_group_head(found: bytes, segment: SegmentHead) -> GroupHead | None:
    """None: it is none of this segment. Raises UnknownFormat."""
    body, checksum = found[: GROUP_HEAD.size], found[GROUP_HEAD.size : GROUP_HEAD_BYTES]
    if not found.startswith(GROUP_MAGIC) or checksum != CHECKSUM.pack(digest_of(body, segment.salt)):
        return None
    _, sequence, since, identity, flags, nothing = GROUP_HEAD.unpack(body)
    if flags & ~ALL_EXPORTS or nothing:
        raise UnknownFormat(
            f"group {sequence} says what this program does not know (flags {flags:#x}); use a later one"
        )
    return GroupHead(sequence=sequence, since=since, identity=identity, all_exports=bool(flags & ALL_EXPORTS))


def aligned(position: int) -> int:
    """Where the next group begins behind one that ends there."""
    return -(-position // ALIGNMENT) * ALIGNMENT


class Segment:
    """One file, read. Raises StreamError, OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.head = read_segment_head(path)
        self.end = HEAD_BYTES
        """Behind the last group that groups() gave out."""

    def groups(self) -> Iterator[Group]:
        """Up to the first that is not whole. Raises OSError; UnknownFormat, for one that may be."""
        sequence = 0
        with self.path.open("rb") as file:
            while True:
                file.seek(self.end)
                head = read_group_head(file.read(GROUP_HEAD_BYTES), self.head)
                if head is None or head.sequence <= sequence:
                    return
                counted, salt = Counted(), salt_of(self.head.salt, head.sequence)
                try:
                    for _ in records(file.read, counted, salt=salt, alone=False):
                        pass
                except UnknownFormat:
                    raise
                except StreamError:
                    return
                group = Group(head, salt, self.path, self.end)
                sequence, self.end = head.sequence, aligned(self.end + GROUP_HEAD_BYTES + counted.bytes_read)
                yield group

    def lost(self) -> int:
        """How many groups stood behind the one that ended groups(), which then was whole once. Raises OSError."""
        found: set[int] = set()
        with self.path.open("rb") as file:
            position = self.end + ALIGNMENT
            file.seek(position)
            while part := file.read(LOOK_BYTES):
                for at in range(0, len(part), ALIGNMENT):
                    head = read_group_head(part[at : at + GROUP_HEAD_BYTES], self.head)
                    if head is not None:
                        found.add(head.sequence)
        return len(found)
