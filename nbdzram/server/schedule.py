"""Snapshots by the clock, and how many of them are kept.

They are exports as any other, named EXPORT@auto-20261127T163000Z: by that name a start finds out when the next one is
due, and which are to go. An interval has none where the last one is there and holds what there is: what clients wrote
is a change, and so is what a reset, a resize or a rollback did.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from nbdzram.config import ExportConfig
from nbdzram.engine import moment
from nbdzram.errors import UserError
from nbdzram.server.changes import Changes
from nbdzram.server.exports import Export, Exports

STAMP = "auto-%Y%m%dT%H%M%SZ"

log = logging.getLogger("nbdzram.server")


class Schedule:
    """Takes and removes the snapshots that the configuration asks for. Lives on the event loop."""

    def __init__(self, exports: Exports, changes: Changes) -> None:
        self._exports = exports
        self._changes = changes
        self._last: dict[str, datetime] | None = (
            None  # by export's name: the last one, or when there was no need for it
        )
        self._newest: dict[str, datetime] = {}  # when the last was taken
        self._task: asyncio.Task[None] | None = None

    def consider(self, wanted: Iterable[ExportConfig], now: datetime) -> None:
        """Called every second: begin with what is due, unless the last is still under way."""
        if self._task is not None and not self._task.done():
            return
        due = [export for export in wanted if export.snapshots_seconds and self._is_due(export, now)]
        if due:
            self._task = asyncio.create_task(self._take(due, now))

    async def stop(self) -> None:
        """Wait for what is under way."""
        if self._task is not None:
            await self._task

    def _is_due(self, wanted: ExportConfig, now: datetime) -> bool:
        export = self._find(wanted.name)
        if export is None:
            return False
        if self._last is None:  # once, and for all in one go: there may be thousands
            self._last = {name: max(moments) for name, moments in self._taken().items()}
            self._newest = dict(self._last)
        last = self._last.get(wanted.name)
        if last is None:
            return export.disk.stats().stored > 0
        return not timedelta() <= now - last < timedelta(seconds=wanted.snapshots_seconds)  # a clock may be set back

    async def _take(self, due: list[ExportConfig], now: datetime) -> None:
        for wanted in due:
            name, export = wanted.name, self._find(wanted.name)
            if export is None:
                continue
            assert self._last is not None
            self._last[name] = now
            if self._is_held(export):
                continue
            try:
                await self._changes.copy_export(name, called(name, now), read_only=True)
            except UserError as error:
                log.warning("no snapshot of the export '%s' was taken: %s", name, error)
                continue
            self._newest[name] = now
            await self._prune(name, wanted.snapshots_keep, now)

    def _is_held(self, export: Export) -> bool:
        """Whether the last one is there, and holds what the export does."""
        newest = self._newest.get(export.name)
        snapshot = None if newest is None else self._find(called(export.name, newest))
        return snapshot is not None and snapshot.read_only and moment.are_alike(export.disk, snapshot.disk)

    async def _prune(self, name: str, keep: int, now: datetime) -> None:
        """Those of a clock that was set back since were taken before all others."""
        for taken in sorted(self._taken().get(name, ()), key=lambda taken: (taken <= now, taken))[:-keep]:
            try:
                await self._changes.remove_export(called(name, taken), force=False)
            except UserError as error:  # somebody is attached to it: the next time, then
                log.warning("a snapshot beyond the %d that are kept stays: %s", keep, error)

    def _taken(self) -> dict[str, list[datetime]]:
        """When the snapshots were taken that there are, by their exports' names. One that clients may write is none."""
        found: dict[str, list[datetime]] = {}
        for export in self._exports:
            name, _, stamp = export.name.rpartition("@")
            if export.read_only and name and stamp.startswith("auto-"):
                with contextlib.suppress(ValueError):  # somebody else's name
                    found.setdefault(name, []).append(datetime.strptime(stamp, STAMP).replace(tzinfo=UTC))
        return found

    def _find(self, name: str) -> Export | None:
        return self._exports.get(name) if name in self._exports else None


def called(name: str, taken: datetime) -> str:
    """The snapshot of an export of that moment."""
    return f"{name}@{taken.strftime(STAMP)}"
