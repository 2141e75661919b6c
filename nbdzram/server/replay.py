"""What a journal holds beyond a checkpoint, made true behind it when a server starts.

    checkpoint 7 ── groups of 00000007.journal ── groups of 00000008.journal ── ... ── up to the last whole group

A checkpoint that was being written when the power failed is not there; its journal is, and goes on where the one before
it ended. Journals with a smaller number than the checkpoint's are older than it.

A group that is not whole ends the journal: it was never answered. Only if later ones stand behind it, or a journal
begins at a moment that was not reached, something is lost that was answered, and that is an error in the log.

A journal may have been begun and given up, as its directory could not be synced; the one before it went on, and if the
power takes its removal it is there again. It has no group, and begins at a moment that was passed: nobody needs it.

A server that begins from what came goes on with the journal, in a file of its own behind these, if nothing is missing.
What came may be in the kernel's memory alone: of a server that was killed, or whose sync failed, and then no later sync
says anything of it (fsync(2), "EIO"). So what came is written once more first (segments.write_again).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nbdzram.errors import StreamError, UnknownFormat, UserError
from nbdzram.server.chains import segments_in
from nbdzram.stream.journal import Group, Segment

log = logging.getLogger("nbdzram.server")


class JournalRefused(UserError):
    """Groups that are whole cannot be applied: a server that began without them would have lost what was flushed."""


class Replay:
    """The groups that follow the checkpoint of `number`, whose moment is `identity`, in order; iterate once, then ask.

    What is missing is told in the log. Raises JournalRefused for a file that cannot be read.
    """

    def __init__(self, directory: Path, number: int, identity: bytes) -> None:
        self.identity = identity
        """Of the moment that was reached."""
        self.is_whole = False
        """Behind the last group: all that was answered came."""
        self.came: list[tuple[Path, int]] = []
        """The files that groups came from, and where the last of each ends."""
        self.without_groups: list[int] = []
        """Files that nobody needs, if it is whole, by their numbers."""
        self._directory = directory
        self._number = number
        self._passed: set[bytes] = set()

    def __iter__(self) -> Iterator[Group]:
        try:
            for number, path in sorted(segments_in(self._directory).items()):
                if number < self._number:
                    continue
                before, segment = self.identity, Segment(path)
                yield from self._groups_of(segment)
                if self.identity == before:
                    self.without_groups.append(number)
                else:
                    self.came.append((path, segment.end))
            self.is_whole = True
        except OSError as error:
            raise JournalRefused(f"cannot read the journal in {self._directory}: {error.strerror}") from error
        except UnknownFormat as error:
            raise JournalRefused(
                f"cannot read the journal in {self._directory}, which a later version wrote: {error}; start that, or "
                f"move {path.name} away to begin without what was flushed there"
            ) from error
        except StreamError as error:
            _tell_loss(path, str(error))

    def _groups_of(self, segment: Segment) -> Iterator[Group]:
        """Raises StreamError: something is missing."""
        if segment.head.since in self._passed and is_without_groups(segment):
            return
        if segment.head.since != self.identity:
            raise StreamError("it begins at a moment that neither the checkpoint nor the journal before it has")
        for group in segment.groups():
            if group.head.since != self.identity:
                raise StreamError(f"its group {group.head.sequence} does not follow the one before it")
            yield group
            self._passed.add(self.identity)
            self.identity = group.head.identity
        lost = segment.lost()
        if lost:
            raise StreamError(f"a group at byte {segment.end} is not what was written, and {lost} follow it")


def require_nothing_flushed(directory: Path) -> None:
    """No checkpoint is there, and a journal begins behind one. Raises JournalRefused where that went alone."""
    for path in segments_in(directory).values():
        try:
            if is_without_groups(Segment(path)):
                continue
            why = "has what was flushed behind a checkpoint, and none is there"
        except OSError as error:
            raise JournalRefused(f"cannot read the journal in {directory}: {error.strerror}") from error
        except StreamError as error:
            why = f"may have what was flushed, and no checkpoint is there: {error}"
        raise JournalRefused(
            f"the journal {path} {why}; put back the checkpoints, or move the journal away too to begin with empty "
            "disks"
        )


def is_without_groups(segment: Segment) -> bool:
    """None is whole, and none ever was."""
    return next(segment.groups(), None) is None and not segment.lost()


def _tell_loss(path: Path, why: str) -> None:
    kept = path.with_suffix(".damaged")
    becomes = f"{kept.name} is kept for whoever looks into it"
    try:
        kept.hardlink_to(path)  # until the next checkpoint stands a start reads it as it is
    except FileExistsError:
        pass
    except OSError as error:  # of a file system that has no links, or no room
        becomes = f"it goes when a checkpoint stands, as no {kept.name} can be made: {error.strerror}"
    log.error(
        "the journal %s is damaged, and what was flushed from there on is lost: %s. The exports are as they were "
        "before; %s",
        *(path, why, becomes),
    )


def apply_all(groups: Iterable[Group], apply: Callable[[Group], None]) -> int:
    """How many there were. Raises JournalRefused."""
    count = 0
    for group in groups:
        try:
            apply(group)
        except UserError as error:
            raise JournalRefused(
                f"group {group.head.sequence} of the journal {group.path} cannot be applied, and without it flushed "
                f"writes would be lost: {error}"
            ) from error
        except OSError as error:  # it could be a moment before; the checkpoint, or one before it, is no remedy
            raise JournalRefused(
                f"cannot read group {group.head.sequence} of the journal {group.path}: {error.strerror}"
            ) from error
        count += 1
    return count
