"""An administrator's act is answered as done when the disk of the checkpoints has it, or of it what a start must know.

    the act is made ── a group of the journal tells it ── changes.json is replaced ── it is answered

The journal tells what exports are. What it does not tell lies beside it, as a state directory would have it
(state.py): what was declared when something was changed, so that a start knows whether the change still holds; what was
removed and is declared; pools that were added or changed. Without a journal a checkpoint tells what exports hold, and
the file, which is newer, who may attach and what else was said of them.

Invariants
1. What was answered is in both: the file is replaced behind the group that tells the act. One of them may know of an
   act alone that was not answered: the journal where the power fails between the two, the file where the act was
   remembered, and not made yet as the group's moment was taken. Then the journal says what exports are (restore.py).
2. It is written by one after the other, each with all that was changed before it, and by who has the directory.
3. Where a checkpoint stands it is there: written again if what was written is not there any more, as where another
   directory is at the path now (claim.py).
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from nbdzram.errors import UserError
from nbdzram.server.exports import Export
from nbdzram.server.state import FILE_NAME, FileId, Remembered, State, file_at, note_in
from nbdzram.server.syncs import Sync

SETTLE_SECONDS = 30
"""For an administrator, who can look again; the first checkpoint of a large server may take minutes."""

log = logging.getLogger("nbdzram.server")


class Settling:
    """Of one server. Used on the event loop."""

    def __init__(self, directory: Path, journal: Sync | None, is_ours: Callable[[], bool]) -> None:
        """is_ours: no other server keeps its checkpoints in the directory."""
        self._directory = directory
        self._journal = journal
        self._is_ours = is_ours
        self._memory = State(None)
        self._noted: Remembered | None = None
        self._file: FileId | None = None  # which has that
        self._writing: asyncio.Task[None] | None = None  # to its end, also when whoever began it waits no longer
        self._turn = asyncio.Lock()

    def begin(self, memory: State) -> None:
        """The server has started; `memory` is what it remembers."""
        self._memory = memory

    async def settle(self, changed: Sequence[Export] = ()) -> None:
        """Return once what was changed before outlives the power. Raises UserError: it is made, and may not.

        changed: exports whose content, or size, was. The disk has one that cannot be read as it was, or not at all.
        """
        patience = asyncio.timeout(SETTLE_SECONDS)
        try:
            async with patience, self._turn:
                await self._note()
        except OSError as error:  # a disk may say ETIMEDOUT itself, which is a TimeoutError too
            why = error.strerror or str(error)
            if patience.expired():
                why = f"the disk, or the first checkpoint, took longer than {SETTLE_SECONDS} s"
        else:
            self._require_told(changed)
            return
        when = "; `nbdzram doctor` tells when flushes are answered again" if self._journal is not None else ""
        raise UserError(
            f"it is done, and not on the disk of the checkpoints: {why}; if the power fails before a checkpoint "
            f"stands, it is undone{when}"
        )

    def _require_told(self, changed: Sequence[Export]) -> None:
        journal = self._journal
        lost = sorted(export.name for export in changed if journal is not None and journal.fails(export.disk))
        if lost:
            raise UserError(
                f"it is done, and not on the disk of the checkpoints: '{lost[0]}' cannot be read, so that has what was "
                "flushed before, and comes back if the power fails; the log names the block: write it anew"
            )

    async def follow(self) -> None:
        """A checkpoint stands: what a start or a reload changed is settled too, and all of it where it went."""
        if await asyncio.to_thread(self._found) != self._file:
            self._noted = None
        if self._noted is not self._memory.changes:
            try:
                await self.settle()
            except UserError as error:
                log.warning("what was changed last: %s", error)

    async def finish(self) -> None:
        """Nothing is written behind this, into what is then another server's."""
        if self._writing is not None:
            await asyncio.wait({self._writing})

    async def _note(self) -> None:
        changes = self._memory.changes
        if self._journal is not None:
            await self._journal.synced()
        if not self._is_ours():
            raise OSError(errno.EBUSY, "another server has their directory")
        if changes is not self._noted:
            await self.finish()  # what the one under way writes is older, and must not come last
            self._writing = asyncio.create_task(asyncio.to_thread(self._write, changes))
            self._writing.add_done_callback(lambda task: task.cancelled() or task.exception())  # also if nobody waits
            await asyncio.shield(self._writing)
            self._noted = changes

    def _write(self, changes: Remembered) -> None:
        """On a thread."""
        note_in(self._directory, changes)
        self._file = self._found()

    def _found(self) -> FileId | None:
        """On a thread: which file a start would read."""
        return file_at(self._directory / FILE_NAME)
