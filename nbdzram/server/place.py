"""The directory of checkpoints: whose it is, and whether what lies there may go.

One server has it at a time (claim.py). And it has the checkpoints of the same disks for as long as these live: they may
outlive the server, in a state directory or with whoever keeps their memory, and a start may find other checkpoints
than theirs at the path, where paths were mixed up, or another disk is mounted. Taken for old ones of these disks, they
would go in time. So the directory has an identity, in its changes.json, and what is remembered of the disks knows it
(Remembered.kept_in): first that, before a disk comes from there; then the directory, before a checkpoint stands in it.
Disks that come from there are others than those that went there: they give the directory a new identity, and know the
one that it had until then (came_from). So disks that lay somewhere meanwhile, and were served from the directory by
another server, as where a state directory was not mounted, do not take the newer checkpoints for old ones of theirs.
Of a directory without an identity, which an older version wrote, nobody can tell; nor of disks of which it is not
remembered where they are kept. They go on with what is there.

What comes to the path while the server runs, as a file system that is mounted late, is looked at anew before each
checkpoint. While it has files of others nothing is written there.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from nbdzram.errors import UserError
from nbdzram.server.chains import Checkpoint, checkpoints_in, segments_in
from nbdzram.server.claim import Claim
from nbdzram.server.state import Noted, State, note_in, noted_in
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
        self._identities: set[str | None] = set()  # that the directory has, or is to have, or had as the disks came
        self._noted = Noted()  # what is noted there, and the identity
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

    def belong(self, state: State, noted: Noted, *, outlived: bool) -> None:
        """From now on the disks that `state` remembers are kept here, where that is `noted`; none came yet.

        outlived: and none will, of what is here. Raises UserError: that is kept for other disks; nothing is written
        here then.
        """
        if self._path is None and not outlived:
            state.know_kept_nowhere()
        kept_in, came_from = state.changes.kept_in, state.changes.came_from
        self._kept_in, self._identities = kept_in, {kept_in, came_from}
        if not self._is_held:
            return
        there = _names_of(checkpoints_in(self._directory), segments_in(self._directory))
        theirs = noted.kept_in if there else None
        if not outlived:  # or what was theirs may come late, as where it is not mounted yet: that is not this one
            kept_in, came_from = _new_identity(), theirs or ""
        elif kept_in is not None and self._is_of_others(theirs):
            self._others = there
            raise UserError(
                f"{self._directory} has the checkpoints of other disks than those of this server ({max(there)}), and "
                "they would go in time; name the directory that has its own, or move what lies there away, and new "
                f"ones are made at once{_to_begin_from_these(state)}"
            )
        elif not kept_in:
            if theirs:
                log.warning(
                    "where the disks are kept is not remembered; the checkpoints in %s are taken for theirs",
                    self._directory,
                )
            kept_in = theirs or _new_identity()
        self._kept_in, self._identities = kept_in, {kept_in, came_from}
        try:
            state.remember_kept_in(kept_in, came_from)
        except UserError as error:  # what comes from here is remembered too, or does not come (together.py)
            log.warning("%s; until then nobody can tell whose checkpoints lie in %s", error, self._directory)

        if not outlived:
            self._noted = replace(noted, kept_in=self._kept_in)

    def take_possession(self) -> None:
        """The directory has the identity of the disks that came from there, before a checkpoint stands in it: their
        journal goes on. Raises OSError."""
        note_in(self._directory, self._noted)

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

    def _is_of_others(self, identity: str | None) -> bool:
        return bool(identity) and identity not in self._identities

    def _is_ours(self, known: Mapping[int, Checkpoint], *, came_back: bool) -> bool:
        """Whether these are what this server wrote, or a copy."""
        try:
            theirs = noted_in(self._directory).kept_in
        except (OSError, UserError):
            theirs = None
        if self._is_of_others(theirs):
            return False
        if came_back or (theirs and theirs == self._kept_in):  # of these disks, since they came to be
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
