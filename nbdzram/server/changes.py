"""What is changed while the server runs: exports, added, changed and removed; pools are in pool_changes.py.

Everything here runs on the event loop; what may take long (deleting, resizing, syncing a file) goes to threads.

Invariants
1. One change after another, each from its beginning to its end, also when whoever asked for it goes away. `stop` waits
   for the one under way: no thread of a change is in a pool that is being closed.
2. A change is remembered before it is made; where making it fails, what was remembered is undone. So a server that is
   killed between the two starts again, and tells what it finds (inventory.py).
3. A removal needs no room: where it cannot be remembered it is made all the same, which frees some, and remembered
   then.
4. What destroys (removing, resetting, shrinking) comes behind Export.change: nobody attaches any more, and those who
   were attached have been ended, before the first block goes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from nbdzram import values
from nbdzram.config import DEFAULT_POOL, EVERYONE, ExportConfig
from nbdzram.engine import moment
from nbdzram.engine.disk import Disk
from nbdzram.errors import ExportExists, UserError
from nbdzram.server import rollback
from nbdzram.server.exports import Export
from nbdzram.server.inventory import (
    Placed,
    declared_export,
    effective,
)
from nbdzram.server.opening import remember_as_declared
from nbdzram.server.pool_changes import PoolChanges
from nbdzram.server.received import as_declared, received_record
from nbdzram.server.state import Declared, ExportRecord
from nbdzram.server.together import offer_together
from nbdzram.server.usage import stored_behind
from nbdzram.server.wanted import Wanted, valid
from nbdzram.status import ExportLoss, ExportRenaming, ExportStatus
from nbdzram.stream.receiving import Received
from nbdzram.units import format_sizes

DETACH = "detach, or end what is attached with --force"

NEW_EXPORT = ExportRecord(
    pool=DEFAULT_POOL, size_bytes=0, read_only=False, description="", access=EVERYONE, removed=False, declared=None
)
"""What is not said of an export that is added: it admits everyone who reaches the server, or whom one of this name that
is gone admitted (state.Remembered.former)."""

AS_THEY_ARE: Mapping[str, int | None] = MappingProxyType({})

log = logging.getLogger("nbdzram.server")


class Changes(PoolChanges):
    """The operations that control offers beside looking (control.methods.Changes). Made by Service."""

    # ---- exports ----

    async def add_export(
        self,
        name: str,
        size_bytes: int,
        *,
        pool: str | None,
        read_only: bool | None,
        description: str | None,
        allow_addresses: Sequence[str] | None,
        allow_certificates: Sequence[str] | None,
        bounds: Mapping[str, int | None] = AS_THEY_ARE,
        private: bool | None = None,
    ) -> ExportStatus:
        """Make a new, empty export and offer it. Raises UserError, ExportExists.

        Of a name that the configuration knows, what is not given is as it is declared, or was changed last; of another,
        whom it admitted last. So removing an export and adding it again opens it to nobody new.
        """
        wanted = Wanted(read_only, description, allow_addresses, allow_certificates, bounds)
        return await self._alone(self._add_export(name, size_bytes, pool, wanted, private=private))

    def unloaded(self) -> list[ExportConfig]:
        """What is declared with an image, is not there, and was not removed at run time."""
        offered = {export.name for export in self._exports}
        return [
            export
            for export in self._declared.values()
            if export.image is not None
            and export.name not in offered
            and not effective(export, self._memory.changes.exports.get(export.name)).removed
        ]

    async def load_export(self, config: ExportConfig, fill: Callable[[Disk], Awaitable[None]]) -> ExportStatus:
        """Make a declared export and offer it once `fill` has filled its disk; if that fails there is none.

        Raises UserError.
        """
        return await self._alone(self._load_export(config, fill))

    async def copy_export(self, source: str, name: str, *, read_only: bool) -> ExportStatus:
        """Offer a clone, or a snapshot if read_only, of an export, with its rules.

        Raises NoSuchExport, ExportExists, UserError.
        """
        return await self._alone(self._copy_export(source, name, read_only=read_only))

    async def take_moment(self, name: str) -> tuple[ExportStatus, ...]:
        """Offer EXPORT@NAME for each export that clients may write, all of one moment, or none. Raises UserError."""
        return await self._alone(self._take_moment(name))

    async def change_export(
        self,
        name: str,
        *,
        read_only: bool | None,
        description: str | None,
        allow_addresses: Sequence[str] | None,
        allow_certificates: Sequence[str] | None,
        bounds: Mapping[str, int | None] = AS_THEY_ARE,
    ) -> ExportStatus:
        """Set who may attach to an export and how, what it may take, and what clients are told of it.

        What is not given stays.

        Who is attached and no longer qualifies is ended, once what it has under way is answered. Raises NoSuchExport,
        UserError.
        """
        wanted = Wanted(read_only, description, allow_addresses, allow_certificates, bounds)
        return await self._alone(self._change_export(name, wanted))

    async def rename_export(self, name: str, new_name: str) -> ExportRenaming:
        """Offer an export under another name; who is attached goes on. Raises NoSuchExport, ExportExists, UserError."""
        return await self._alone(self._rename_export(name, new_name))

    def rules_of(self, name: str) -> ExportRecord:
        """An export's rules as they are, for restore_rules. Raises NoSuchExport."""
        return self._record(self._exports.get(name))

    def to_be(self, config: ExportConfig) -> ExportRecord:
        """What an export is to be once it is declared so, and no more as it was declared before."""
        known = self._memory.changes.exports.get(config.name)
        if config.name in self._exports:
            known = self._record(self._exports.get(config.name))
        return effective(config, known)

    async def remember_as_declared(self, declared: Iterable[ExportConfig]) -> None:
        """What is declared from now on is what was changed at run time already, or ends that: also where it is declared
        as it was before, once more (opening.remember_as_declared, and for pools the same). Raises UserError."""
        await self._alone(self._remember_as_declared(declared))

    async def restore_rules(self, name: str, record: ExportRecord) -> None:
        """Give an export back the rules that it had, also that nobody is admitted. Raises NoSuchExport, UserError."""
        await self._alone(self._set_rules(self._exports.get(name), record))

    async def resize_export(self, name: str, size_bytes: int, *, yes: bool, force: bool) -> ExportStatus:
        """Grow, or with `yes` or `force` shrink, an export. Raises NoSuchExport, UserError."""
        return await self._alone(self._resize_export(name, valid(values.export_size, size_bytes), yes, force))

    async def reset_export(self, name: str, *, force: bool) -> ExportStatus:
        """Turn every block into a hole, as zram's reset does. Raises NoSuchExport, UserError."""
        return await self._alone(self._reset_export(name, force=force))

    async def rollback_export(self, name: str, snapshot: str, *, force: bool) -> ExportStatus:
        """Let an export hold what a snapshot holds, and no more what it held. Raises NoSuchExport, UserError."""
        return await self._alone(self._rollback_export(name, snapshot, force=force))

    async def remove_export(self, name: str, *, force: bool) -> None:
        """Stop offering an export and free what nobody else holds. Raises NoSuchExport, UserError."""
        await self._alone(self._remove_export(name, force=force))

    async def lose_export(self, name: str, size_bytes: int, snapshot: str | None = None) -> ExportLoss:
        """What shrinking an export to `size_bytes`, or to nothing, would destroy, or going back to a snapshot.

        Nothing is changed; nobody is asked about what could not be done. Raises NoSuchExport, UserError.
        """
        return await self._alone(self._loss(name, size_bytes, snapshot))

    async def _add_export(
        self, name: str, size_bytes: int, pool: str | None, wanted: Wanted, *, private: bool | None
    ) -> ExportStatus:
        self._require_free_name(name)
        base = dataclasses.replace(NEW_EXPORT, access=self._memory.changes.former.get(name, EVERYONE))
        if name in self._declared:
            base = effective(self._declared[name], self._memory.changes.exports.get(name))
        size = valid(values.export_size, size_bytes)
        record = wanted.applied_to(dataclasses.replace(base, removed=False, pool=pool or base.pool, size_bytes=size))
        arena = self._pool(record.pool).pool
        alone = (name in self._declared and self._declared[name].private) if private is None else private
        self.require_privacy(name, private=alone)
        if not alone:
            self._require_trust(record.pool, name, record.access)

        def make() -> Disk:
            return arena.create(name, size, read_only=record.read_only, private=alone)

        return await self._make(name, record, make)

    async def _load_export(self, config: ExportConfig, fill: Callable[[Disk], Awaitable[None]]) -> ExportStatus:
        self._require_free_name(config.name)
        record = effective(config, self._memory.changes.exports.get(config.name))
        pool = self._pool(record.pool).pool
        disk = await asyncio.to_thread(
            lambda: moment.prepare(
                pool, config.name, config.size_bytes, read_only=record.read_only, private=config.private
            )
        )
        try:
            await fill(disk)
        except BaseException:
            await asyncio.to_thread(moment.discard, [disk])
            raise
        (export,) = await self._offer_together([disk], {config.name: record})
        return export.status()

    async def _copy_export(self, source: str, name: str, *, read_only: bool) -> ExportStatus:
        original = self._exports.get(source)
        self._require_free_name(name)
        self.require_privacy(name, private=original.disk.private)
        pool = self._pools[original.pool_name].pool
        record = self._copy_record(original, name, read_only=read_only)
        return await self._make(name, record, lambda: pool.clone(original.disk, name, read_only=read_only))

    def _copy_record(self, original: Export, name: str, *, read_only: bool) -> ExportRecord:
        return dataclasses.replace(
            self._record(original),
            read_only=read_only,
            description=f"{'snapshot' if read_only else 'clone'} of {original.name}",
            declared=self._declaration(name),
        )

    async def _take_moment(self, name: str) -> tuple[ExportStatus, ...]:
        originals = {f"{export.name}@{name}": export for export in self._exports if not export.read_only}
        if not originals:
            raise UserError("there is no export that clients may write, so there is nothing to take a snapshot of")
        for fresh in originals:
            self._require_free_name(fresh)
        records = {fresh: self._copy_record(export, fresh, read_only=True) for fresh, export in originals.items()}
        sources = [export.disk for export in originals.values()]
        disks = await asyncio.to_thread(moment.snapshot_together, sources, list(originals))
        return tuple(export.status() for export in await self._offer_together(disks, records))

    async def offer_received(self, received: Sequence[Received]) -> None:
        """Offer the disks of a stream, all or none, as a part of `alone`. Raises UserError; then they are gone."""
        disks = [one.disk for one in received]
        try:
            for one in received:
                self._require_free_name(one.name)
            records = {one.name: self._received(one) for one in received}
            for pool in {one.place.name for one in received}:
                lies_there = [one for one in received if one.place.name == pool and not one.disk.private]
                self._require_trust(pool, "", *(records[one.name].access for one in lies_there))
        except BaseException:
            await asyncio.to_thread(moment.discard, disks)
            raise
        await self._offer_together(disks, records)

    def _received(self, one: Received) -> ExportRecord:
        record = received_record(one, self._declaration(one.name))
        if one.name not in self._declared:
            return record
        known = self._memory.changes.exports.get(one.name)
        wanted = as_declared(record, effective(self._declared[one.name], known))
        if wanted != record:
            log.warning(
                "of the export '%s' holds as declared, and not as it was sent: who may attach, or how", one.name
            )
        return wanted

    async def _offer_together(self, disks: Sequence[Disk], records: Mapping[str, ExportRecord]) -> list[Export]:
        return await offer_together(disks, records, self._memory, self._exports)

    async def _make(self, name: str, record: ExportRecord, make: Callable[[], Disk]) -> ExportStatus:
        """Remember, make and offer a disk."""
        before = self._memory.changes.exports.get(name)
        await self._remember(name, record)
        try:
            disk = await asyncio.to_thread(make)  # it may have to ask the file system for pages
        except BaseException:
            await self._undo(name, before)
            raise
        export = Placed(name=name, disk=disk, record=record).export()
        self._exports.add(export)
        return export.status()

    async def _change_export(self, name: str, wanted: Wanted) -> ExportStatus:
        export = self._exports.get(name)
        record = wanted.applied_to(self._record(export))
        if not export.disk.private:
            self._require_trust(export.pool_name, name, record.access)
        await self._set_rules(export, record)
        return export.status()

    async def _set_rules(self, export: Export, record: ExportRecord) -> None:
        await self._remember(export.name, record)
        export.set_rules(access=record.access, read_only=record.read_only, description=record.description)
        export.set_bounds(record.bounds)
        await self._nbd.end(export.unqualified())

    async def _rename_export(self, name: str, new_name: str) -> ExportRenaming:
        export = self._exports.get(name)
        self._require_free_name(new_name)
        self.require_privacy(new_name, private=export.disk.private)
        record = self._record(export)
        declared = name in self._declared
        renamed = dataclasses.replace(record, declared=self._declaration(new_name))
        of_old = dataclasses.replace(record, removed=True) if declared else None
        before = self._memory.changes.exports
        await asyncio.to_thread(self._memory.remember_renaming, new_name, renamed, name, of_old)
        try:
            await asyncio.to_thread(self._pools[export.pool_name].pool.rename, export.disk, new_name)
        except BaseException:
            await asyncio.to_thread(self._memory.remember_exports, before)
            raise
        self._exports.rename(name, new_name)
        await self._try_to_remember(new_name, renamed)  # or the next change does, or the next start
        remembered = self._memory.directory is not None or self._config.checkpoint.directory is not None
        return ExportRenaming(name, export.status(), old_name_declared=declared, remembered=remembered)

    async def _remember_as_declared(self, declared: Iterable[ExportConfig]) -> None:
        known = self._memory.changes.exports
        records = {config.name: self.to_be(config) for config in declared if config.name in known}
        await asyncio.to_thread(self._memory.remember_exports, {**known, **records})
        await asyncio.to_thread(remember_as_declared, self._config.pools, self._memory)

    async def _resize_export(self, name: str, size_bytes: int, yes: bool, force: bool) -> ExportStatus:
        export = self._exports.get(name)
        before = export.disk.size_bytes
        record = dataclasses.replace(self._record(export), size_bytes=size_bytes)
        if size_bytes >= before:
            await self._resize(export, record)
            return export.status()
        if not yes and not force:
            has, less = format_sizes(before, size_bytes)
            raise UserError(
                f"the export '{name}' has {has}; shrinking it to {less} destroys "
                "what lies behind, which only --yes or --force does"
            )
        with export.change("resized"):
            await self._end_clients(export, "shrink", force=force)
            await self._resize(export, record)
        return export.status()

    async def _resize(self, export: Export, record: ExportRecord) -> None:
        before = self._record(export)
        await self._remember(export.name, record)
        export.disk.identify(0)  # it is other content from here on, and may be where resizing fails
        try:
            await asyncio.to_thread(export.disk.resize, record.size_bytes)
        except BaseException:
            await self._undo(export.name, before)
            raise

    async def _reset_export(self, name: str, *, force: bool) -> ExportStatus:
        export = self._exports.get(name)
        with export.change("reset"):
            await self._end_clients(export, "reset", force=force)
            export.disk.identify(0)
            await asyncio.to_thread(export.disk.clear)
        return export.status()

    async def _rollback_export(self, name: str, snapshot: str, *, force: bool) -> ExportStatus:
        export, source = self._exports.get(name), self._exports.get(snapshot)
        rollback.require_possible(export, source)
        await asyncio.to_thread(rollback.require_readable, source)
        if not force:
            export.require_detached("roll back", remedy=DETACH)
        await asyncio.to_thread(rollback.require_sound, export, source, self.require_begun)
        with export.change("rolled back"):
            await self._end_clients(export, "roll back", force=force)
            await rollback.roll_back(export, source, self._record(export), self._memory)
        await self._try_to_remember(name, self._record(export))  # that it is done; or the next change does
        return export.status()

    async def _remove_export(self, name: str, *, force: bool) -> None:
        export = self._exports.get(name)
        with export.change("removed"):
            await self._end_clients(export, "remove", force=force)
            # The arena itself remembers the end of a disk that is not declared.
            record = dataclasses.replace(self._record(export), removed=True) if name in self._declared else None
            remember = partial(self._memory.remember_removal, name, record, export.access)
            remembered = record is not None and await self._try(name, remember)
            self._exports.remove(name)
            await asyncio.to_thread(self._pools[export.pool_name].pool.delete, export.disk)
            if not remembered and not await self._try(name, remember) and record is not None:
                log.warning(
                    "the export '%s' is removed, but declared, and that could not be remembered: the next start makes "
                    "it again, empty",
                    name,
                )

    async def _loss(self, name: str, size_bytes: int, snapshot: str | None) -> ExportLoss:
        export = self._exports.get(name)
        if snapshot is not None:
            rollback.require_possible(export, self._exports.get(snapshot))
            await asyncio.to_thread(rollback.require_readable, self._exports.get(snapshot))
        stored = await asyncio.to_thread(stored_behind, export.disk, size_bytes)
        # Copies of a moment, for a checkpoint or a stream, hold blocks that are nowhere else once they go.
        known = bool(stored) and not size_bytes and not moment.concealed(export.disk.pool)
        alone = (await asyncio.to_thread(export.disk.usage)).unique if known else None
        return ExportLoss(
            name=name,
            size_bytes=export.disk.size_bytes,
            stored_bytes=stored,
            alone_bytes=alone,
            clients=tuple(export.clients()),
        )

    async def _end_clients(self, export: Export, verb: str, *, force: bool) -> None:
        """Nobody is attached when this returns, nor can be, in Export.change. Raises UserError without force."""
        assert export.changing is not None
        if not force:
            export.require_detached(verb, remedy=DETACH)
        await self._nbd.end(list(export.connections))
        assert not export.connections

    # ---- memory ----

    def _record(self, export: Export) -> ExportRecord:
        """The export as it is."""
        known = self._memory.changes.exports.get(export.name)
        return ExportRecord(
            pool=export.pool_name,
            size_bytes=export.disk.size_bytes,
            read_only=export.read_only,
            description=export.description,
            access=export.access,
            bounds=export.bounds,
            removed=False,
            declared=self._declaration(export.name) or (known.declared if known else None),
        )

    def _declaration(self, name: str) -> Declared | None:
        return declared_export(self._declared[name]) if name in self._declared else None

    async def _remember(self, name: str, record: ExportRecord | None) -> None:
        await asyncio.to_thread(self._memory.remember_export, name, record)

    async def _try_to_remember(self, name: str, record: ExportRecord | None) -> bool:
        return await self._try(name, partial(self._memory.remember_export, name, record))

    async def _try(self, name: str, remember: Callable[[], None]) -> bool:
        try:
            await asyncio.to_thread(remember)
        except UserError as error:
            log.warning("the export '%s': %s", name, error)
            return False
        return True

    async def _undo(self, name: str, before: ExportRecord | None) -> None:
        """What is remembered was not made. If this cannot be remembered either, the next start tells and forgets it."""
        await self._try_to_remember(name, before)

    def require_privacy(self, name: str, *, private: bool) -> None:
        """Whether a disk that is private, or is not, may have this name. Any thread. Raises UserError."""
        declared = self._declared.get(name)
        if declared is not None and declared.private and not private:
            raise UserError(
                f"the export '{name}' is declared private, and the blocks of this disk may be shared with other "
                "exports; give it another name, or declare it otherwise"
            )

    def _require_free_name(self, name: str) -> None:
        valid(values.export_name, name)
        if any(export.name == name for export in self._exports):
            raise ExportExists(f"there is an export '{name}' already; choose another name or remove it first")
