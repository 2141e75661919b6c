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

A state directory may be an older copy of itself, which was put back. So the starts of disks are counted, in it, and in
the directory before a checkpoint of that start stands there: those of a later start than the disks know are newer than
they. A takeover is no start: whoever gave the disks away may go on with them.

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
        self._came_from = ""  # the one that it had as the disks came
        self._starts = 0  # of the disks, with this one, as soon as they are known
        self._state = State(None)  # which knows that too
        self._had_starts: int | None = None  # before this one
        self._noted = Noted()  # what is noted there, and the identity
        self._read: tuple[int, ...] = ()  # the file with what was noted there last
        self._there = Noted()  # which is that
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
        self._had_starts = known.starts
        self._kept_in, self._came_from, self._starts = known.kept_in, known.came_from, known.starts or 0
        if not self._is_held:
            return
        there = _names_of(checkpoints_in(self._directory), segments_in(self._directory))
        theirs = noted if there else Noted()
        if outlived:
            self._require_known(theirs, there)
            kept_in, came_from, starts = known.kept_in, known.came_from, known.starts
            if not kept_in:
                if theirs.kept_in:
                    log.warning(
                        "where the disks are kept is not remembered; the checkpoints in %s are taken for theirs",
                        self._directory,
                    )
                kept_in, starts = theirs.kept_in or _new_identity(), theirs.starts
            elif theirs.kept_in == kept_in:
                came_from = ""
            if not was_served and not came_from:  # or else none of their checkpoints stands yet
                starts = (starts or 0) + 1
        else:  # what was theirs may come late, as where it is not mounted yet: that is not this one
            kept_in, came_from, starts = _new_identity(), theirs.kept_in or "", (theirs.starts or 0) + 1
        try:
            state.remember_kept_in(kept_in, came_from, starts)
        except UserError as error:  # what comes from here is remembered too, or does not come (together.py)
            untold = "whose checkpoints lie" if kept_in != known.kept_in else "an older copy of the disks from these"
            log.warning("%s; until then nobody can tell %s in %s", error, untold, self._directory)
        self._kept_in, self._came_from, self._starts = kept_in, came_from, starts or 0
        if not outlived:
            self._noted = replace(noted, kept_in=kept_in, starts=starts)

    def _require_known(self, theirs: Noted, there: set[str]) -> None:
        """Raises UserError: they are others' checkpoints, or newer than the disks."""
        if self._state.changes.kept_in is None:
            return
        if self._is_of_others(theirs):
            self._others = there
            raise UserError(
                f"{self._directory} has the checkpoints of other disks than those of this server ({max(there)}), and "
                "they would go in time; name the directory that has its own, or move what lies there away, and new "
                f"ones are made at once{_to_begin_from_these(self._state)}"
            )
        if self._is_newer(theirs, self._had_starts):
            self._others = there
            raise UserError(
                f"{self._directory} has newer checkpoints of the same disks than those that lie in "
                f"{self._state.directory or 'memory'} ({max(there)}), as where an older copy of these was put back, "
                "and they would go in time; put back the disks that were served last, or move what lies there away"
                f"{_to_begin_from_these(self._state)}"
            )

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
        gets_theirs = known.came_from and noted.kept_in == known.kept_in and known.came_from == self._found().kept_in
        note_in(self._directory, noted)
        if gets_theirs and known.kept_in is not None:
            with contextlib.suppress(UserError):  # or the next start does
                self._state.remember_kept_in(known.kept_in, "", known.starts)

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

    def _found(self) -> Noted:
        """What is noted there now; nothing, where nobody can tell. Read once, as there may be thousands of exports."""
        try:
            file = (self._directory / FILE_NAME).stat()
            which = (file.st_dev, file.st_ino, file.st_mtime_ns, file.st_size)
            if which != self._read:
                self._read, self._there = which, noted_in(self._directory)
            return self._there
        except (OSError, UserError):
            return Noted()

    def _is_newer(self, theirs: Noted, starts: int | None) -> bool:
        """Than the disks, which had so many."""
        known = self._state.changes.kept_in
        if not known or theirs.kept_in != known or starts is None or theirs.starts is None:
            return False
        return theirs.starts > starts

    def _is_of_others(self, theirs: Noted) -> bool:
        if theirs.kept_in == self._came_from:  # which whoever had it before may have gone on with
            return bool(self._came_from) and theirs.starts is not None and theirs.starts >= self._starts > 0
        return bool(theirs.kept_in) and theirs.kept_in != self._kept_in

    def _is_ours(self, known: Mapping[int, Checkpoint], *, came_back: bool) -> bool:
        """Whether these are what this server wrote, or a copy."""
        theirs = self._found()
        starts = self._state.changes.starts if came_back else self._had_starts  # or else this one was not there
        if self._is_of_others(theirs) or self._is_newer(theirs, starts):
            return False
        if came_back or (theirs.kept_in and theirs.kept_in == self._kept_in):  # of these disks, since they came to be
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
