"""`serve --restore FILE`: what a stream holds, in pools that are empty, before anything is offered."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from nbdzram.config import ExportConfig
from nbdzram.engine.pool import Pool
from nbdzram.errors import NoSuchExport, UserError
from nbdzram.server.inventory import declared_export
from nbdzram.server.received import place_in, received_record, valid_name
from nbdzram.server.state import ExportRecord, State
from nbdzram.server.together import reveal_together
from nbdzram.stream.receiving import Place, Received, Receiver

log = logging.getLogger("nbdzram.server")


def restore(path: Path, declared: Iterable[ExportConfig], pools: Mapping[str, Pool], state: State) -> None:
    """Receive the stream in a file, all of it or nothing; what is declared of its exports holds, not what it says.

    Pools that hold a disk already are left alone: then a server started again has what it had. Raises UserError. Not on
    an event loop.
    """
    holding = [name for name, pool in pools.items() if pool.disks()]
    if holding:
        log.info("%s is not restored: the pool %s holds disks already", path, holding[0])
        return

    def place(name: str) -> Place:
        if name not in pools:
            raise NoSuchExport(
                f"cannot restore {path}: its exports lay in the pool '{name[:80]}', and no such pool is declared"
            )
        return place_in(name, pools[name])

    receiver = Receiver(place, lambda part: valid_name("", part))
    try:
        with path.open("rb") as file:
            received = receiver.receive(file.read)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UserError as error:
        raise type(error)(f"cannot restore {path}: {error}") from error
    known = {export.name: export for export in declared}
    records = {one.name: _record(one, known.get(one.name)) for one in received}
    reveal_together([one.disk for one in received], records, state)
    log.info("%d exports restored from %s", len(received), path)


def _record(received: Received, config: ExportConfig | None) -> ExportRecord:
    if config is None:
        return received_record(received, None)
    declared = declared_export(config)
    return ExportRecord(
        pool=received.place.name,
        size_bytes=max(received.disk.size_bytes, declared.size_bytes),
        read_only=declared.read_only,
        description=declared.description,
        access=declared.access,
        removed=False,
        declared=declared,
    )
