"""The directory of checkpoints: whose it is, and whether what lies there may go.

One server has it at a time (claim.py). And it has the checkpoints of the same disks for as long as these live: they may
outlive the server, in a state directory or with whoever keeps their memory, and a start may find other checkpoints
than theirs at the path, where paths were mixed up, or another disk is mounted. Taken for old ones of these disks, they
would go in time. So the directory has an identity, in its changes.json, and what is remembered of the disks knows it
(Remembered.kept_in): first that, before a disk comes from there; then the directory, before a checkpoint stands in it.
Disks that come from there are others than those that went there: they give the directory a new identity, and know the
one that it had until then, until it has theirs (came_from). So disks that lay somewhere meanwhile, and were served from
the directory by another server, as where a state directory was not mounted, do not take the newer checkpoints for old
ones of theirs. Nor do those that came from a copy of a directory take what the original goes on with.

A state directory may be an older copy of itself, which was put back. So each start gives the directory a new identity,
before the first checkpoint of that start stands there, and the disks know those that it had before (kept_before): what
has one of which they do not know is newer than they, or others'. A takeover is no start: whoever gave the disks away
may go on with them.

Of a directory without an identity, which an older version wrote, nobody can tell; nor of disks of which it is not
remembered where they are kept. They go on with what is there.

What comes to the path while the server runs, as a file system that is mounted late, is looked at anew before each
checkpoint. While it has files of others nothing is written there.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from nbdzram.errors import UserError
from nbdzram.server.chains import Checkpoint, checkpoints_in, segments_in
from nbdzram.server.claim import Claim
from nbdzram.server.state import FILE_NAME, Noted, State, note_in, noted_in
from nbdzram.stream.reading import identity_of

IDENTITY_BYTES = 8
BEFORE_MOST = 64
"""Identities that disks know, beside the one that their directory has. One that lay aside for more starts is not theirs
any more."""

log = logging.getLogger("nbdzram.server")


class Place:
    """Of one server. Its methods block."""

    def __init__(self, directory: Path | None) -> None:
        """None: no checkpoints are kept, and there is nothing to have."""
        self.wrote = b""
        """The identity of the last checkpoint that this server wrote."""
        self._path = directory
        self._claim: Claim | None = None
        self._kept_in: str | None = None  # the identity that the directory has, or is to have
        self._before: tuple[str, ...] = ()  # those that it had
        self._came_from = ""  # the one that it had as the disks came
        self._state = State(None)  # which knows all that, too
        self._is_to_be_new = False  # the identity, with what is noted next
        self._noted = Noted()  # what is noted there, and the identity
        self._read: tuple[int, ...] = ()  # the file with what was noted there last
        self._theirs: str | None = None  # the identity in that
        self._others: set[str] = set()  # files that are there now, and none of ours

    @property
    def _directory(self) -> Path:
        assert self._path is not None
        return self._path

    def have(self, claim: Claim | None) -> None:
        """It is ours to release from now on."""
        self._claim = claim

    def release(self) -> None:
        """Another server may have the directory."""
        if self._claim is not None:
            self._claim.release()

    def prepare(self) -> None:
        """Have it, and be able to write there. Raises UserError, OSError."""
        assert self._claim is not None
        was_read = self._claim.is_held
        if self._claim.take() and was_read:
            raise UserError(f"{self._directory} is another directory than a moment before; start it again")
        if not os.access(self._directory, os.W_OK | os.X_OK):  # one that is full is no reason not to start
            raise UserError(
                f"cannot keep checkpoints in {self._directory}: it may not be written by user {os.geteuid()}, or its "
                "file system is read-only; give it to that user, mount it writable, or name another"
            )

    def belong(self, state: State, noted: Noted, *, outlived: bool, was_served: bool = False) -> None:
        """From now on the disks that `state` remembers are kept here, where that is `noted`; none came yet.

        outlived: and none will, of what is here. was_served: by another process until now, which may go on with them.
        Raises UserError: that is kept for other disks, or newer; nothing is written here then.
        """
        if self._path is None and not outlived:
            state.know_kept_nowhere()
        self._state, known = state, state.changes
        self._kept_in, self._came_from, self._before = known.kept_in, known.came_from, known.kept_before
        if not self._is_held:
            return
        there = _names_of(checkpoints_in(self._directory), segments_in(self._directory))
        theirs = noted.kept_in if there else None
        if not outlived:  # or what was theirs may come late, as where it is not mounted yet: that is not this one
            self._kept_in, self._came_from, self._before = _new_identity(), theirs or "", ()
        elif self._kept_in is not None and self._is_of_others(theirs):
            self._others = there
            raise UserError(
                f"{self._directory} has the checkpoints of other disks than those of this server, or newer ones than "
                f"these ({max(there)}), and they would go in time; name the directory that has its own, put back the "
                "disks that were served last, or move what lies there away, and new ones are made at once"
                f"{_to_begin_from_these(state)}"
            )
        elif not self._kept_in:
            if theirs:
                log.warning(
                    "where the disks are kept is not remembered; the checkpoints in %s are taken for theirs",
                    self._directory,
                )
            self._kept_in = theirs or _new_identity()
        elif theirs == self._kept_in:
            self._came_from = ""
        self._is_to_be_new = outlived and not was_served
        try:
            state.remember_kept_in(self._kept_in, self._came_from, self._before)
        except UserError as error:  # what comes from here is remembered too, or does not come (together.py)
            log.warning("%s; until then nobody can tell whose checkpoints lie in %s", error, self._directory)
        if not outlived:
            self._noted = replace(noted, kept_in=self._kept_in)

    def take_possession(self) -> None:
        """The directory has the identity of the disks that came from there, before a checkpoint stands in it: their
        journal goes on. Raises OSError."""
        self.note(self._noted)

    def note(self, noted: Noted) -> None:
        """Beside the checkpoints, which are those of the disks from then on. Raises OSError, where that is not ours to
        write to, too.
        """
        self.require_ours()
        known = self._state.changes
        if self._is_to_be_new and known.kept_in:
            kept_in, before = _new_identity(), self._newest((*known.kept_before, known.kept_in))
            with contextlib.suppress(UserError):  # or it stays what it was, until the next is noted
                self._state.remember_kept_in(kept_in, known.came_from, before)
                self._kept_in, self._before, self._is_to_be_new = kept_in, before, False
            known = self._state.changes
        gets_theirs = known.came_from and known.came_from == self._found()
        note_in(self._directory, replace(noted, kept_in=known.kept_in))
        if gets_theirs and known.kept_in:
            with contextlib.suppress(UserError):  # or the next start does
                self._state.remember_kept_in(known.kept_in, "", known.kept_before)

    def _newest(self, had: tuple[str, ...]) -> tuple[str, ...]:
        """As many as disks know, and among them the one that the directory has: of a full one it is as old as that."""
        found = self._found()
        return (*[one for one in had[:-BEFORE_MOST] if one == found], *had[-BEFORE_MOST:])

    @property
    def may_be_ours(self) -> bool:
        """Nothing of others was seen there."""
        return self._is_held and not self._others

    def require_ours(self) -> None:
        """Raises OSError: what is there is not ours to write to."""
        if self._claim is None or not self._claim.is_held:
            raise OSError(errno.EBUSY, "another server has their directory")
        if self._others or not self._claim.has_what_is_there():
            raise OSError(errno.ESTALE, "another directory is there than it was")

    def look(self) -> dict[int, Checkpoint]:
        """What is there now, by numbers. Raises UserError: checkpoints of others, or another server has it; OSError."""
        assert self._claim is not None
        is_another = self._claim.take()
        known = checkpoints_in(self._directory)
        there = _names_of(known, segments_in(self._directory))
        if is_another:
            log.warning("%s is another directory than it was; the next checkpoint is a whole one", self._directory)
            self._others = set() if self._is_ours(known, came_back=self._claim.came_back) else there
        elif self._is_of_others(self._found()):  # somebody put them there, in the place of ours
            self._others = there
        self._others &= there
        if self._others:
            raise UserError(
                f"{self._directory} is another directory than it was, and this server did not begin from what lies "
                f"there ({min(self._others)}), which would go in time; start it again to begin from that, or move "
                "that away"
            )
        return known

    @property
    def _is_held(self) -> bool:
        return self._claim is not None and self._claim.is_held

    def _found(self) -> str | None:
        """The identity that is noted there now; None, where nobody can tell. Read once: there may be thousands of
        exports.
        """
        try:
            file = (self._directory / FILE_NAME).stat()
            which = (file.st_dev, file.st_ino, file.st_mtime_ns, file.st_size)
            if which != self._read:
                self._read, self._theirs = which, noted_in(self._directory).kept_in
        except (OSError, UserError):
            return None
        return self._theirs

    def _is_of_others(self, identity: str | None) -> bool:
        return bool(identity) and identity not in {self._kept_in, self._came_from, *self._before}

    def _is_ours(self, known: Mapping[int, Checkpoint], *, came_back: bool) -> bool:
        """Whether these are what this server wrote, or a copy."""
        theirs = self._found()
        if self._is_of_others(theirs):
            return False
        if came_back or (theirs and theirs in {self._kept_in, *self._before}):  # of these disks, since they came to be
            return True
        newest = known.get(max(known, default=0))
        return newest is not None and self.wrote != b"" and identity_of(newest.path) == self.wrote


def is_same(state_dir: Path | None, directory: Path) -> bool:
    """By another path or a bind mount, too."""
    if state_dir is None:
        return False
    try:
        return state_dir.samefile(directory)
    except OSError:  # one is not there yet
        return os.path.realpath(state_dir) == os.path.realpath(directory)


def _new_identity() -> str:
    return os.urandom(IDENTITY_BYTES).hex()


def _to_begin_from_these(state: State) -> str:
    return "" if state.directory is None else f"; to begin from these, move the .pool files out of {state.directory}"


def _names_of(checkpoints: Mapping[int, Checkpoint], segments: Mapping[int, Path]) -> set[str]:
    """Of all files that a start would read."""
    return {path.name for path in (*(one.path for one in checkpoints.values()), *segments.values())}
