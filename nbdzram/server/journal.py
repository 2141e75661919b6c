"""The journal: FLUSH and FUA are answered when what changed has reached the disk, whatever becomes of the power.

    FLUSH ─┐                       group under way: moment ── what changed since the last ── fdatasync ──> its answers
    FLUSH ─┼─> the next group: its moment is taken when that one has ended, and it answers all who came meanwhile
    FUA   ─┘

A group is a stream, told from the copies of the moment before it: writes, trims, resizes, clones, removals, rules are
in it as they are in a checkpoint. Groups are appended to a segment (segments.py), which begins at the moment of a
checkpoint and has its number; a checkpoint that is durable lets the segments before it go.

    BEGINNING   no checkpoint of this server stands yet: FLUSH waits for it, unless the server began from what the
                journal has, and so goes on with it
    OPEN        groups are appended
    DEAD        a write or a sync failed, so nobody knows what is on the disk: FLUSH is EIO; also where rot keeps the
                first checkpoint from standing

From BEGINNING and DEAD a checkpoint leads to OPEN, whose moment was taken in that stage and which stands: a new segment
begins at its moment.

Invariants
1. A request is answered by a group whose moment was taken after it came (Sync), or because nothing changed since a
   group that is on the disk.
2. Each group begins where the one before it ended, across segments and servers: a start applies them until one is not
   whole.
3. A segment goes only when a checkpoint of its end, or of a later moment, is durable.
4. A segment of which a write or a sync failed is never written again: the kernel forgets what it could not write
   (fsync(2), "EIO"), so a later sync that succeeded would prove nothing.
5. An export whose blocks are not what was written keeps nobody else from the disk: it is told as it was, and its own
   FLUSH alone fails (Moments.write_readable). That holds for the checkpoint behind stage DEAD too: the last moment that
   is on the disk is kept until it stands.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from nbdzram import __version__
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.errors import EngineError, StreamError, UserError, reason_of
from nbdzram.server.chains import DAMAGED, checkpoints_in, next_number, segments_in
from nbdzram.server.moments import Moment, Moments, Reached
from nbdzram.server.replay import is_without_groups
from nbdzram.server.restore import GoesOn
from nbdzram.server.segments import SegmentFile, begin_segment, retire_segments, write_again
from nbdzram.server.steadily import Patience
from nbdzram.server.syncs import Sync
from nbdzram.status import JournalStatus
from nbdzram.stream.journal import GroupHead, Segment
from nbdzram.stream.sending import Progress, send
from nbdzram.units import format_size

LONG_BYTES = 256 << 20
"""Of a segment: a start reads so much in about a second. From then on a checkpoint is due."""

log = logging.getLogger("nbdzram.server")


class Journal(Sync):
    """Of one server. begin_checkpoint() and stands() come from Checkpoints, one pair after another."""

    def __init__(self, directory: Path, moments: Moments, pools: Sequence[str]) -> None:
        """`pools`: those whose FLUSH waits for it, for people."""
        super().__init__()
        self._directory = directory
        self._moments = moments
        self._pools = tuple(pools)
        self._segment: SegmentFile | None = None  # in stage OPEN
        self._last: Moment | None = None  # what its last group, or its beginning, is of; also in stage DEAD
        self._dead = ""  # why, in stage DEAD
        self._decided = asyncio.Event()  # in another stage than BEGINNING
        self._turn = asyncio.Lock()  # one group, and one change of the segment, after another
        self._patience = Patience(f"FLUSH waits for the disk of the journal in {directory}")
        self._mending = b""  # identity of the moment of the checkpoint that began while there was no segment
        self._stood = 0  # number of the last checkpoint that stands
        self._sequence = 0
        self._groups = self._bytes = self._failures = 0
        self._seconds = 0.0

    @property
    def status(self) -> JournalStatus:
        """At this moment."""
        return JournalStatus(
            pools=self._pools,
            usable=self._segment is not None,
            trouble=self._dead or (self._patience.what if self._patience.is_over else ""),
            groups=self._groups,
            group_bytes=self._bytes,
            segment_bytes=self._segment.end if self._segment is not None else 0,
            seconds=self._seconds,
            failures=self._failures,
            held_back=tuple(self._last.names_behind()) if self._last is not None and self._segment is not None else (),
        )

    @property
    def wants_checkpoint(self) -> bool:
        """Without one FLUSH waits or fails, or a start would have to read much."""
        return self._segment is None or self._segment.end > LONG_BYTES

    def fails(self, disk: Disk) -> bool:
        """Whether the last group does not have what this disk holds, or nobody knows any more."""
        return self._segment is None or self._last is None or disk in self._last.behind

    @property
    def has_begun(self) -> bool:
        """It answers FLUSH, be it that it failed. Until then FLUSH waits."""
        return self._decided.is_set()

    def require_answers(self) -> None:
        """Raises UserError: its disk gives none, so whoever ends now, or gives all away, waits for one."""
        if self._patience.is_over:
            raise UserError(
                f"{self._patience.what}, which gives no answer, and nothing could be given away before; ask again once "
                "it does"
            )

    def require_readable(self) -> None:
        """Raises UserError: of an export what was flushed is known here alone, as whoever takes over cannot read it."""
        if self.status.held_back:
            raise UserError(
                f"its export '{self.status.held_back[0]}' cannot be read, so no checkpoint of another process would "
                "stand, and all of its FLUSH fail; the log names the block: write it anew, or remove the export"
            )

    @property
    def as_it_was(self) -> Moment | None:
        """For the checkpoint that is to mend it: what the last whole group is of. None: for any other, whose moment is
        the journal's own; groups go on from what that has, so nothing else takes its place.
        """
        return self._last if self._mending else None

    async def close(self) -> None:
        """The last checkpoint was taken, if one is. Who waits yet, an administrator or one who was cut, has his group
        if it is under way, and none is begun any more.
        """
        self._decided.set()
        async with self._turn:
            if self._segment is not None:
                self._segment.close()
                self._segment = None
            last, self._last = self._last, None
            await self._moments.release(last)

    # ---- for checkpoints ----

    async def go_on_from(self, begun: GoesOn) -> None:
        """What clients are about to change is that; its moment is held for this. Where it cannot, FLUSH waits for a
        checkpoint.
        """
        async with self._turn:
            try:
                self._segment = await self._moments.on_the_thread(lambda: self._begin_behind(begun))
            except (OSError, UserError) as error:
                log.warning(
                    "the journal in %s does not go on, so FLUSH waits for a whole checkpoint: %s",
                    *(self._directory, reason_of(error)),
                )
                await self._moments.release(begun.moment)
                return
            self._last = self._moments.adopted(begun.moment)
            self._decided.set()

    def _begin_behind(self, begun: GoesOn) -> SegmentFile:
        unneeded = begun.unneeded if begun.place is None else self._begun_in_vain(begun.place)
        for path, end in begun.came:
            write_again(path, end)
        retire_segments(self._directory, unneeded)  # servers that begin again and again would leave a file each
        return begin_segment(self._directory, next_number(self._directory), begun.moment.identity)

    def _begun_in_vain(self, place: tuple[int, ...]) -> list[int]:
        """The files of processes that went on from there, and then did not serve. Raises UserError: more was written
        than these, or elsewhere.
        """
        found, (device, inode, following) = self._directory.stat(), place
        begun = {number: path for number, path in segments_in(self._directory).items() if number >= following}
        others = [*checkpoints_in(self._directory), *checkpoints_in(self._directory, DAMAGED)]
        others += segments_in(self._directory, DAMAGED)
        if (
            (found.st_dev, found.st_ino) != (device, inode)
            or max(others, default=0) >= following
            or not all(is_without_groups(Segment(path)) for path in begun.values())
        ):
            raise UserError("it is another directory, or another server wrote there meanwhile")
        return list(begun)

    async def reached(self) -> Reached | None:
        """Everything that was stored is in it, and nobody changes anything any more. None: it is not."""
        with contextlib.suppress(OSError, UserError):
            async with self._turn:
                if self._segment is not None:
                    await self._commit()
                if self._segment is not None and self._last is not None and not self._last.behind:
                    return Reached.of(self._last, await self._moments.on_the_thread(self._place))
        return None

    def _place(self) -> tuple[int, ...]:
        found = self._directory.stat()
        return found.st_dev, found.st_ino, next_number(self._directory)

    async def begin_checkpoint(self, number: int, standing: Moment | None) -> Moment:
        """The moment of a checkpoint, held; what comes after it goes to a segment of its own, unless it is `standing`:
        that of the last checkpoint, whose files are all there. Raises UserError, EngineError, OSError.
        """
        async with self._turn:
            if self._segment is not None:
                await self._commit()
            if self._segment is None:
                taken = await self._moments.take(self._last)
                self._mending = taken.identity
                return taken
            self._mending = b""
            assert self._last is not None
            head = self._segment.head
            if self._last is not standing or head.since != self._last.identity or head.number != self._stood:
                fresh = await self._moments.on_the_thread(self._begin_segment(number, self._last))
                self._segment.close(lingers=head.number != self._stood)
                self._segment = fresh
            return self._moments.hold(self._last)

    async def give_way(self, full: Collection[Pool]) -> None:
        """Writes find no room in these pools. In stage OPEN a group makes all copies anew; in stage DEAD what nobody is
        held back for goes.
        """
        async with self._turn:
            if self._segment is None and self._last is not None:
                self._last = await self._moments.without(self._last, full)

    def cannot_begin(self, error: Exception) -> None:
        """Until somebody writes a block there is no checkpoint, so nobody waits for the first one."""
        if not self._decided.is_set():
            self._dead = f"the journal in {self._directory} cannot begin: {error}"
            log.error("%s: FLUSH and FUA are I/O errors until a checkpoint stands", self._dead)
            self._decided.set()

    async def stands(self, number: int, moment: Moment) -> None:
        """The checkpoint is durable, whatever the power does. Raises OSError: it is the first, and the journal cannot
        begin yet; nobody was promised anything, so FLUSH waits for another one.
        """
        async with self._turn:
            if self._segment is None and self._mending == moment.identity:
                try:
                    self._segment = await self._moments.on_the_thread(self._begin_segment(number, moment))
                except OSError as error:
                    if not self._decided.is_set():
                        raise
                    await self._die(error)
                    return
                goes_on = "goes on: FLUSH is answered again" if self._dead else "begins: FLUSH is answered"
                log.info("the journal in %s %s", self._directory, goes_on)
                last, self._last, self._dead = self._last, self._moments.hold(moment), ""
                await self._moments.release(last)
                self._decided.set()
            self._stood = number
            try:
                await self._moments.on_the_thread(lambda: self._retire(number))
            except (OSError, UserError) as error:
                log.warning("old journals in %s stay until the next checkpoint: %s", self._directory, reason_of(error))

    def _begin_segment(self, number: int, moment: Moment) -> Callable[[], SegmentFile]:
        return lambda: begin_segment(self._directory, number, moment.identity)

    def _retire(self, number: int) -> None:
        retire_segments(self._directory, [known for known in segments_in(self._directory) if known < number])

    # ---- groups ----

    async def _sync(self) -> None:
        await self._decided.wait()
        with self._patience:
            async with self._turn:
                await self._commit_or_fail()

    async def _commit_or_fail(self) -> None:
        if self._segment is not None:
            await self._commit()
        if self._segment is None:
            raise OSError(errno.EIO, self._dead or "the server stops")

    async def _commit(self) -> None:
        """Append what changed, if anything did. The journal may die of it. Raises OSError for a group that could not be
        made; then the next one tells what it would have.
        """
        assert self._segment is not None
        assert self._last is not None
        began, last = time.monotonic(), self._last
        try:
            moment = await self._moments.take(last)
        except (EngineError, UserError, MemoryError) as error:
            raise self._failed(error) from error
        if moment is last:
            await self._moments.release(moment)
            return
        try:
            moment, progress = await self._moments.write_readable(moment, self._append, lambda: last)
        except (StreamError, EngineError, MemoryError) as error:
            raise self._failed(error) from error
        except OSError as error:
            await self._die(error)
            return
        self._last = moment
        await self._moments.release(last)
        self._groups += 1
        self._bytes += progress.bytes_written
        self._seconds = time.monotonic() - began

    async def _append(self, moment: Moment) -> Progress:
        """The group."""
        assert self._segment is not None
        assert self._last is not None
        self._sequence += 1  # also of one that fails: what it left must not look like the next one
        progress = Progress()
        await self._moments.on_the_thread(partial(self._write_group, self._segment, moment, self._last, progress))
        return progress

    def _write_group(self, segment: SegmentFile, moment: Moment, last: Moment, progress: Progress) -> None:
        """On the thread."""
        all_exports = not last.has_told(moment.roster)
        told = moment.told_since(last, changed_alone=not all_exports)
        head = GroupHead(
            sequence=self._sequence, since=last.identity, identity=moment.identity, all_exports=all_exports
        )

        def write_stream(write: Callable[[bytes], None], salt: int) -> None:
            program = f"nbdzram {__version__}"
            send(told, moment.taken_ns, program, write, progress, identity=moment.identity, salt=salt)

        segment.append(head, write_stream)

    def _failed(self, error: Exception) -> OSError:
        self._failures += 1
        reason = reason_of(error)
        log.error("FLUSH fails: what changed could not be written to the journal: %s", reason)
        return OSError(errno.EIO, reason)

    async def _die(self, error: OSError) -> None:
        """Until a checkpoint stands. What lies on the disk stays there: a start may need it."""
        self._failures += 1
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += f"; make room there, {format_size(LONG_BYTES)} and that of a whole checkpoint"
        self._dead = f"the journal in {self._directory} failed ({reason})"
        log.error("%s: FLUSH and FUA are I/O errors until a new checkpoint stands, which is tried at once", self._dead)
        if self._segment is not None:
            self._segment.close()
            self._segment = None
        self._decided.set()
