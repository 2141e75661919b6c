"""What a journal holds beyond a checkpoint, made true behind it when a server starts.

    checkpoint 7 ── groups of 00000007.journal ── groups of 00000008.journal ── ... ── up to the last whole group

A checkpoint that was being written when the power failed is not there; its journal is, and goes on where the one before
it ended. Journals with a smaller number than the checkpoint's are older than it.

A group that is not whole ends the journal: it was never answered. Only if later ones stand behind it, or a journal
begins at a moment that was not reached, something is lost that was answered, and that is an error in the log.

A journal may have been begun and given up, as its directory could not be synced; the one before it went on, and if the
power takes its removal it is there again. It has no group, and begins at a moment that was passed: nobody needs it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from nbdzram.errors import StreamError, UserError
from nbdzram.server.chains import segments_in
from nbdzram.stream.journal import Group, Segment

log = logging.getLogger("nbdzram.server")


class JournalRefused(UserError):
    """Groups that are whole cannot be applied: a server that began without them would have lost what was flushed."""


def groups_since(directory: Path, number: int, identity: bytes) -> Iterator[Group]:
    """The groups that follow the checkpoint of this number, whose moment is `identity`, in order.

    What is missing is told in the log. Raises JournalRefused for a file that cannot be read.
    """
    try:
        yield from _groups_since(directory, number, identity)
    except OSError as error:
        raise JournalRefused(f"cannot read the journal in {directory}: {error.strerror}") from error


def _groups_since(directory: Path, number: int, identity: bytes) -> Iterator[Group]:
    passed: set[bytes] = set()
    for found, path in sorted(segments_in(directory).items()):
        if found < number:
            continue
        try:
            segment = Segment(path)
        except StreamError as error:
            _tell_loss(path, str(error))
            return
        if segment.head.since in passed and _is_without_groups(segment):
            continue
        if segment.head.since != identity:
            _tell_loss(path, "it begins at a moment that neither the checkpoint nor the journal before it has")
            return
        for group in segment.groups():
            if group.head.since != identity:
                _tell_loss(path, f"its group {group.head.sequence} does not follow the one before it")
                return
            yield group
            passed.add(identity)
            identity = group.head.identity
        lost = segment.lost()
        if lost:
            _tell_loss(path, f"a group at byte {segment.end} is not what was written, and {lost} follow it")
            return


def _is_without_groups(segment: Segment) -> bool:
    """None is whole, and none ever was."""
    return next(segment.groups(), None) is None and not segment.lost()


def _tell_loss(path: Path, why: str) -> None:
    kept = path.with_suffix(".damaged")
    log.error(
        "the journal %s is damaged, and what was flushed from there on is lost: %s. The exports are as they were "
        "before; %s is kept for whoever looks into it",
        *(path, why, kept.name),
    )
    with contextlib.suppress(FileExistsError):  # a link: until the next checkpoint stands a start reads it as it is
        kept.hardlink_to(path)


def apply_all(groups: Iterator[Group], apply: Callable[[Group], None]) -> int:
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
        count += 1
    return count
