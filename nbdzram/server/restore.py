"""What fills empty pools before anything is offered: a stream (`serve --restore`), or the newest checkpoint."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from nbdzram.config import ExportConfig
from nbdzram.engine import moment
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.errors import NoSuchExport, UserError
from nbdzram.server.chains import chains, checkpoints_in
from nbdzram.server.inventory import declared_export
from nbdzram.server.received import place_in, received_record, valid_name
from nbdzram.server.state import ExportRecord, State
from nbdzram.server.together import reveal_together
from nbdzram.stream.layout import ExportPart
from nbdzram.stream.receiving import Place, Received, Receiver

log = logging.getLogger("nbdzram.server")


class Restore:
    """Into the pools of a server that starts. Its methods take long: not on an event loop."""

    def __init__(self, declared: Iterable[ExportConfig], pools: Mapping[str, Pool], state: State) -> None:
        self._declared = {export.name: export for export in declared}
        self._pools = pools
        self._state = state

    def from_file(self, path: Path) -> None:
        """All that the stream in a file holds, or nothing; what is declared of its exports holds, not what it says.

        Pools that hold a disk already are left alone: a server that is started again has what it had. Raises UserError.
        """
        if not self._are_empty(path):
            return
        try:
            count, _ = self._receive([path])
        except UserError as error:
            raise type(error)(f"cannot restore {path}: {error}") from error
        log.info("%d exports restored from %s", count, path)

    def from_newest(self, directory: Path) -> int | None:
        """The newest checkpoint that is whole, and its moment in nanoseconds since the epoch. Raises UserError.

        None: there is none, or the pools hold disks. A damaged one is told and passed over; where there are only such
        ones the server does not start, as it would begin with empty disks.
        """
        known = checkpoints_in(directory)
        if not known or not self._are_empty(directory):
            return None
        refused: UserError | None = None
        for chain in chains(known):
            try:
                count, moment_ns = self._receive([one.path for one in chain])
            except UserError as error:
                log.warning("the checkpoint %s cannot be used: %s", chain[-1].path, error)
                refused = error
                continue
            taken = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment_ns / 1e9))
            log.info("%d exports restored from the checkpoint of %s, %s", count, taken, chain[-1].path.name)
            return moment_ns
        raise UserError(
            f"no checkpoint in {directory} can be used: {refused or 'the whole ones are missing'}; repair them, or "
            "move them away to begin with empty disks"
        )

    def _are_empty(self, source: Path) -> bool:
        holding = [name for name, pool in self._pools.items() if pool.disks()]
        if holding:
            log.info("%s is not restored: the pool %s holds disks already", source, holding[0])
        return not holding

    def _receive(self, paths: Sequence[Path]) -> tuple[int, int]:
        """A stream, and those that hold what changed since the one before: how many exports, and of which moment."""
        token = os.urandom(8).hex()
        before: list[Received] = []
        moment_ns = 0
        try:
            for number, path in enumerate(paths):
                last = number == len(paths) - 1

                def name(part: ExportPart, number: int = number, *, last: bool = last) -> str:
                    return valid_name("", part) if last else f"\n{token} {number} {part.number}"

                receiver = Receiver(self._place_among({one.part.identity: one.disk for one in before}), name)
                with path.open("rb") as file:
                    received = receiver.receive(file.read)
                moment.discard([one.disk for one in before])
                before = received
                assert receiver.header is not None
                moment_ns = receiver.header.moment_ns
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except BaseException:
            moment.discard([one.disk for one in before])
            raise
        records = {one.name: self._record(one) for one in before}
        reveal_together([one.disk for one in before], records, self._state)
        return len(before), moment_ns

    def _place_among(self, bases: Mapping[int, Disk]) -> Callable[[str], Place]:
        def place(name: str) -> Place:
            if name not in self._pools:
                raise NoSuchExport(f"exports lay in the pool '{name[:80]}', and no such pool is declared")
            return replace(place_in(name, self._pools[name]), find_base=bases.get)

        return place

    def _record(self, received: Received) -> ExportRecord:
        config = self._declared.get(received.name)
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
