"""The directory of checkpoints, had by one server alone for as long as it runs.

Two servers in one directory would give the same numbers to different files, and each sweeps away what it takes for old.
So the directory itself is locked (flock(2)): a kill lets it go, and nothing is left behind. One that was removed, or
hidden by what was mounted over it, is told by its inode: files in it have no name any more that a start would find.
A file system that several machines share may know of a directory's lock on each of them alone (NFS).
"""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

from nbdzram.errors import UserError

log = logging.getLogger("nbdzram.server")


class Claim:
    """Of one path. Its methods block."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        self._had: set[tuple[int, int]] = set()  # device and inode
        self.came_back = False
        """It is one that was had before, as where a file system is mounted again; or the first."""

    def take(self) -> bool:
        """Have the directory that is there now, made if there is none; whether it is another than before.

        Raises UserError: another server has it; OSError.
        """
        self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._descriptor >= 0 and os.path.samestat(os.fstat(self._descriptor), self._path.stat()):
            return False
        descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(
                f"another server keeps its checkpoints in {self._path}; stop it, or give this one a directory of its "
                "own"
            ) from None
        except OSError as error:
            log.warning(
                "the file system of %s has no locks (%s): see to it that no other server keeps its checkpoints there: "
                "each would take away what the other needs",
                *(self._path, error.strerror),
            )
        self.release()
        self._descriptor = descriptor
        found = os.fstat(descriptor)
        self.came_back = not self._had or (found.st_dev, found.st_ino) in self._had
        self._had.add((found.st_dev, found.st_ino))
        return True

    def has_what_is_there(self) -> bool:
        """Whether that is the directory at the path now. Raises OSError."""
        return self.is_held and os.path.samestat(os.fstat(self._descriptor), self._path.stat())

    @property
    def is_held(self) -> bool:
        """Nobody else has the directory that was there last."""
        return self._descriptor >= 0

    def release(self) -> None:
        """Another server may have it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
