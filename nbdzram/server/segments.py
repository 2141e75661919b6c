"""The files of a journal, as they are written: made ready, appended to, synced, and away when a checkpoint stands.

A file is made, or taken from what an earlier one left, under another name, with room for its first groups and its head
synced; then it is renamed, and the directory synced. So what has its name has its head. Room is allocated ahead, so
that a sync has no size to write, and a full disk is found before a group begins.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from nbdzram.errors import StreamError
from nbdzram.server.chains import segment_name, segments_in, sync_directory
from nbdzram.stream.journal import (
    HEAD_BYTES,
    MAGIC,
    GroupHead,
    Segment,
    SegmentHead,
    aligned,
    group_head,
    salt_of,
    segment_head,
)

ROOM_BYTES = 16 << 20
"""Allocated ahead: some thousand small groups."""
WRITE_AT_ONCE_BYTES = 1 << 20
SPARE = "spare"
"""The name of a file that waits to be used again."""


class SegmentFile:
    """One that is being written. Its methods block."""

    def __init__(self, path: Path, descriptor: int, head: SegmentHead) -> None:
        self.head = head
        self.path = path
        self.end = HEAD_BYTES
        """Behind the last group that was synced."""
        self._descriptor = descriptor
        self._room = os.fstat(descriptor).st_size

    def append(self, head: GroupHead, write_stream: Callable[[Callable[[bytes], None], int], None]) -> None:
        """Write a group and sync it; `write_stream` is given where to write and the salt. What it raises leaves the
        segment as it was before. Raises OSError: then nobody knows what is on the disk, and it is used no more.
        """
        group = _Growing(self, group_head(head, self.head))
        write_stream(group.write, salt_of(self.head.salt, head.sequence))
        end = group.flush()
        os.fdatasync(self._descriptor)
        self._require_name()
        self.end = aligned(end)

    def _require_name(self) -> None:
        """A start finds it: syncing a file that was removed, or whose directory was, succeeds too."""
        if not self.path.exists() or not os.path.samestat(self.path.stat(), os.fstat(self._descriptor)):
            raise OSError(f"{self.path.name} is not there any more: something removed or hides it")

    def write_at(self, position: int, content: bytes) -> None:
        """All of it. Raises OSError."""
        missing = position + len(content) - self._room
        if missing > 0:
            more = max(missing, ROOM_BYTES)
            os.posix_fallocate(self._descriptor, self._room, more)
            self._room += more
        view = memoryview(content)
        while view:
            written = os.pwrite(self._descriptor, view, position)
            position, view = position + written, view[written:]

    def close(self, *, lingers: bool = False) -> None:
        """It is written no more. `lingers`: the checkpoint that it begins at does not stand, so that it is needed for a
        while: without the room that was ahead, or each that fails would take as much.
        """
        if lingers:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self.end)
        os.close(self._descriptor)


class _Growing:
    """A group that is being written, a large piece at a time."""

    def __init__(self, file: SegmentFile, head: bytes) -> None:
        self._file = file
        self._position = file.end
        self._pending = bytearray(head)

    def write(self, content: bytes) -> None:
        self._pending += content
        if len(self._pending) >= WRITE_AT_ONCE_BYTES:
            self.flush()

    def flush(self) -> int:
        """Where it ends so far."""
        self._file.write_at(self._position, bytes(self._pending))
        self._position += len(self._pending)
        self._pending.clear()
        return self._position


def begin_segment(directory: Path, number: int, since: bytes) -> SegmentFile:
    """A segment that is there, empty, whatever the power does. Raises OSError; then it is not."""
    head = SegmentHead(number=number, salt=int.from_bytes(os.urandom(8), "little"), since=since)
    path = directory / segment_name(number)
    fresh = path.with_suffix(".new")
    if _has_spare(directory):
        spare = directory / SPARE
        if spare.stat().st_nlink > 1:  # a copy by links has it too, and may be another server's directory
            spare.unlink()
        else:
            spare.rename(fresh)
    descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, ROOM_BYTES)
        file = SegmentFile(path, descriptor, head)
        file.write_at(0, segment_head(head))
        os.fsync(descriptor)
        fresh.rename(path)
        sync_directory(directory)
    except BaseException:
        os.close(descriptor)
        for left in (fresh, path):
            with contextlib.suppress(OSError):
                left.unlink()
        raise
    return file


def write_again(path: Path, end: int) -> None:
    """Have the disk hold the groups of a segment, up to `end`, whatever it held of them: in a file of its own, which
    takes the name of the other. The directory is to be synced then. Raises OSError; then the other is as it was.
    """
    fresh = path.with_suffix(".new")
    try:
        with path.open("rb") as source, fresh.open("wb") as target:
            left = end
            while left and (piece := source.read(min(left, WRITE_AT_ONCE_BYTES))):
                target.write(piece)
                left -= len(piece)
            target.flush()
            os.fdatasync(target.fileno())
        written = Segment(fresh)
        for _ in written.groups():
            pass
        if written.end != end:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fresh.rename(path)
    except StreamError as error:
        raise OSError(errno.EIO, str(error)) from error
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink()


def forget_journal(directory: Path, before: int) -> bool:
    """Away with one that goes on no more, and what lies beside it: a checkpoint of this number stands. Whether anything
    was there. Raises OSError, UserError.
    """
    segments = [path for number, path in segments_in(directory).items() if number < before]
    left = [*segments, *([directory / SPARE] if _has_spare(directory) else [])]
    if left:
        for path in left:
            path.unlink(missing_ok=True)
        sync_directory(directory)
    return bool(left)


def _has_spare(directory: Path) -> bool:
    """A file that was a segment; one of that name which somebody put there is none. Raises OSError."""
    spare = directory / SPARE
    if not spare.is_file():
        return False
    with spare.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def retire_segments(directory: Path, numbers: Iterable[int]) -> None:
    """Away with these, but for a file that is used again. Raises OSError, UserError."""
    known = segments_in(directory)
    for path in [known[number] for number in sorted(numbers) if number in known]:  # or who took it away did so
        spare = directory / SPARE
        found = path.stat()
        if spare.exists() or found.st_size > ROOM_BYTES or found.st_nlink > 1:  # a damaged one is kept (replay.py)
            path.unlink()
        else:
            path.rename(spare)
    sync_directory(directory)
