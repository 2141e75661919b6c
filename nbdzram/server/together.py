"""Disks that are offered together, or none of them: copies of one moment, and what a stream brought.

They are concealed until all are remembered (engine/moment). That is the store which makes it true: a server that is
killed before deletes them on its next start, and one that is killed behind it reveals them (inventory.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from nbdzram.engine import moment
from nbdzram.engine.disk import Disk
from nbdzram.server.exports import Export, Exports
from nbdzram.server.inventory import Placed
from nbdzram.server.state import ExportRecord, State


def reveal_together(disks: Sequence[Disk], records: Mapping[str, ExportRecord], memory: State) -> None:
    """Remember concealed disks, and make them exports. Raises UserError; then none is, and they are there no more.

    Writes and syncs a file: not on an event loop.
    """
    try:
        for disk in disks:
            moment.finish(disk)
        memory.remember_exports({**memory.changes.exports, **records})
    except BaseException:
        moment.discard(disks)
        raise
    for disk in disks:
        moment.reveal(disk)


async def offer_together(
    disks: Sequence[Disk], records: Mapping[str, ExportRecord], memory: State, exports: Exports
) -> list[Export]:
    """The same, and offer them; their names are free. Raises UserError."""
    await asyncio.to_thread(reveal_together, disks, records, memory)
    offered = [Placed(name=disk.name, disk=disk, record=records[disk.name]).export() for disk in disks]
    for export in offered:
        exports.add(export)
    return offered
