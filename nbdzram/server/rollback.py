"""Going back to a snapshot: an export holds a copy of what the snapshot holds, in place of what it held itself.

    a concealed copy ── remembered ── the old disk deleted ── the copy revealed ── and renamed
                           │
                           └─ true from here on: a start finishes what is left (inventory.py)

Nobody is attached meanwhile, nor can be: the caller is in Export.change.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shlex
from collections.abc import Callable

from nbdzram.engine import moment
from nbdzram.engine.disk import Disk
from nbdzram.engine.walk import Told, Walk, leaves_apart
from nbdzram.errors import EngineError, UserError
from nbdzram.server.exports import Export
from nbdzram.server.state import ExportRecord, State

SUBSTITUTE = "\x7frollback"
"""What the copy is called until it has the export's name: nothing that an export can be called."""

LEAF_BYTES = 2 << 20  # of a disk that one leaf of its table tells

NAMES_BYTES = 256  # for both names, while the one takes the other's place (engine/directory)


def require_possible(export: Export, snapshot: Export) -> None:
    """Raises UserError."""
    if snapshot is export or not snapshot.read_only:
        raise UserError(f"'{snapshot.name}' is no snapshot: clients may write it; `nbdzram snapshot` makes one")
    if snapshot.pool_name != export.pool_name or snapshot.disk.private != export.disk.private:
        raise UserError(
            f"'{snapshot.name}' shares no blocks with '{export.name}', as it lies in another pool or one of the two is "
            "private; copy its content instead"
        )
    if len(export.name.encode()) + len(SUBSTITUTE) > NAMES_BYTES:
        raise UserError(f"the name of the export '{export.name}' is too long for this; give it a shorter one first")


def require_readable(snapshot: Export) -> None:
    """Whether its table can be, down to each entry: what the export holds goes for it. Takes as long as to count who
    holds its blocks: not on an event loop.

    Raises UserError.
    """
    more_than_all = snapshot.disk.size_bytes // LEAF_BYTES + 2
    is_lost = leaves_apart(snapshot.disk, None, more_than_all) == more_than_all
    if is_lost or snapshot.disk.first_unreadable(0) is not None:
        raise UserError(
            f"parts of the snapshot '{snapshot.name}' cannot be read, and what the export holds would go for it; "
            f"`nbdzram clone {shlex.quote(snapshot.name)} NAME` offers what is left of it, `nbdzram check` says more"
        )


def require_sound(export: Export, snapshot: Export, go_on: Callable[[], None]) -> None:
    """Whether each block that would take another one's place is what was written: what both have is no worse behind it.
    Takes as long as to decode these: not on an event loop, and `go_on` is called again and again; what that raises ends
    it.

    Raises UserError.
    """
    token, copies = os.urandom(8).hex(), list[Disk]()
    try:
        copies = moment.snapshot_together([snapshot.disk, export.disk], [f"\n{token} 0", f"\n{token} 1"])
        walk = Walk(copies[0], copies[1], Told())
        while walk.step() is not None:
            go_on()
    except EngineError as error:
        raise UserError(
            f"of the snapshot '{snapshot.name}' {error}; what the export holds would go for it: `nbdzram clone "
            f"{shlex.quote(snapshot.name)} NAME` offers what is left of it"
        ) from error
    finally:
        moment.discard(copies)


async def roll_back(export: Export, snapshot: Export, record: ExportRecord, memory: State) -> None:
    """Raises UserError, and then nothing has changed."""
    record = dataclasses.replace(record, size_bytes=snapshot.disk.size_bytes)
    (copy,) = await asyncio.to_thread(
        moment.snapshot_together, [snapshot.disk], [SUBSTITUTE], read_only=record.read_only
    )

    def remember() -> None:
        moment.finish(copy)
        memory.remember_export(export.name, dataclasses.replace(record, rolled_back_from=SUBSTITUTE))

    try:
        await asyncio.to_thread(remember)
    except BaseException:
        await asyncio.to_thread(moment.discard, [copy])
        raise
    old, export.disk = export.disk, copy
    export.set_bounds(record.bounds)
    await asyncio.to_thread(put_in_place, old, copy, export.name)


def put_in_place(old: Disk | None, copy: Disk, name: str) -> None:
    """Give the copy the name of the disk that goes. Takes as long as a deletion: not on an event loop."""
    if old is not None:
        old.pool.delete(old)
    if copy.concealed:
        moment.reveal(copy)
    copy.pool.rename(copy, name)
