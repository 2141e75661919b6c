"""What a start passed over, kept beside as *.damaged: its disk's owner may still read more of it than a server does.

    00000003-since-00000002.stream   ──>   00000003-since-00000002.damaged, a second name of the same file
    00000003.journal                 ──>   00000003.damaged (replay.py)

Until a whole checkpoint stands, a start tries again what has its first name too: what a disk could not read a moment
before it may read now. Then the first name goes as that of any old checkpoint, and the second stays. A checkpoint that
cannot be read is told from others, which are worth nothing without it, nor it without them: these are kept with it. As
many chains are as of those that can be read, and no more: a disk that damages one after another would be full of them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path

from nbdzram.server.chains import DAMAGED, Checkpoint, checkpoints_in, segments_in, sync_directory
from nbdzram.units import counted

log = logging.getLogger("nbdzram.server")


def set_aside(directory: Path, passed_over: Iterable[Checkpoint]) -> None:
    """Give them their second name, durably, before the first may go. What cannot be kept is told."""
    paths = sorted({one.path for one in passed_over})
    if not paths:
        return
    try:
        for path in paths:
            with contextlib.suppress(FileExistsError):  # a start before this one did so
                path.with_suffix(DAMAGED).hardlink_to(path)
        sync_directory(directory)
    except OSError as error:  # of a file system that has no links, or no room
        log.error(
            "what cannot be used in %s goes with old checkpoints, as no *%s can be made of it: %s; copy it elsewhere "
            "first if somebody may still read it",
            *(directory, DAMAGED, error.strerror),
        )
        return
    log.warning(
        "%s in %s that cannot be used, or belong to such, are kept as *%s, also when newer ones stand: repair the disk "
        "and put them back under their names, or remove them when nobody wants them",
        *(counted(len(paths), "checkpoint"), directory, DAMAGED),
    )


def take_back(used: Iterable[Checkpoint]) -> None:
    """The newest can be read after all, so nothing of it is damaged."""
    for path in [one.path for one in used]:
        aside = path.with_suffix(DAMAGED)
        with contextlib.suppress(OSError):
            if aside.samefile(path):
                aside.unlink()


def beyond(known: Iterable[Checkpoint], keep: int) -> list[Checkpoint]:
    """Those that are older than so many whole ones, the newest first: what is left without them can be read."""
    newest_first = sorted(known, key=lambda one: -one.number)
    wholes = [one.number for one in newest_first if one.since is None]
    oldest = wholes[:keep][-1] if wholes else 0
    return [one for one in newest_first if one.number < oldest]


def forget_aside(directory: Path, keep: int) -> None:
    """Away with more than so many chains. Raises OSError, UserError."""
    gone = beyond(checkpoints_in(directory, DAMAGED).values(), keep)
    for one in gone:
        one.path.unlink(missing_ok=True)
    if gone:
        log.warning("%s is gone from %s: more was damaged since", gone[0].path.name, directory)


def count_aside(directory: Path) -> int:
    """Files, of the journal too. Raises UserError."""
    return len(checkpoints_in(directory, DAMAGED)) + len(segments_in(directory, DAMAGED))
