"""Disks in memory that outlive the process: systemd keeps their arenas for the unit's next one (sd_notify(3), FDSTORE).

An arena without a name lives as long as somebody has its descriptor. systemd has it while a unit restarts, also after a
crash, and lets it go when the unit is stopped. What was changed at run time lies in a file of the RuntimeDirectory,
which goes and stays as they do (RuntimeDirectoryPreserve=restart); without arenas it is of disks that are gone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from nbdzram.cli.supervisor import notify_supervisor
from nbdzram.errors import UserError
from nbdzram.server.sockets import ARENA_PREFIX, inherited_arenas
from nbdzram.server.state import FILE_NAME, Kept, Remembered, remembered_in

log = logging.getLogger("nbdzram.server")


class Store:
    """systemd's, of the unit's descriptors (server.state.Keeper). What it has already it takes no second time."""

    def keep(self, pool: str, descriptor: int) -> None:
        """See Keeper."""
        notify_supervisor(f"FDSTORE=1\nFDPOLL=0\nFDNAME={ARENA_PREFIX}{pool}", [descriptor])

    def drop(self, pool: str) -> None:
        """See Keeper: all of that name."""
        notify_supervisor(f"FDSTOREREMOVE=1\nFDNAME={ARENA_PREFIX}{pool}")


def kept_before(environment: Mapping[str, str], state_dir: Path | None) -> Kept:
    """What was kept from the process before this one, and who keeps ours. Raises UserError."""
    kept = Kept(arenas=inherited_arenas(environment))
    if not environment.get("NOTIFY_SOCKET"):
        return kept
    kept.keeper = Store()
    if state_dir is not None:
        for pool, descriptor in kept.arenas.items():
            log.warning("the pool %s was kept in memory; disks are in %s now, and that is let go", pool, state_dir)
            kept.keeper.drop(pool)
            os.close(descriptor)
        kept.arenas.clear()
        return kept
    directory = environment.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    if directory:
        kept.file = Path(directory, FILE_NAME)
        if kept.arenas:
            kept.remembered = _remembered(kept.file.parent)
            had = {record.pool for record in kept.remembered.exports.values() if not record.removed}
            for pool in sorted(had.difference(kept.arenas)):
                log.warning(
                    "the memory of the pool %s was not kept, as of others, and its disks are gone or empty; raise "
                    "FileDescriptorStoreMax= of the unit over the number of pools",
                    pool,
                )
    return kept


def _remembered(directory: Path) -> Remembered:
    try:
        return remembered_in(directory)
    except OSError as error:
        raise UserError(f"cannot read {directory / FILE_NAME}: {error.strerror}; give it to this user") from None
