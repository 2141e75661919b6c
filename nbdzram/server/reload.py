"""Reading the configuration again while the server runs.

    read ──> judge ──> apply ──> answer
      │        │
      └────────┴─ an error: one sentence, and nothing was changed

Everything that can be wrong with a configuration is found before the first change is made: `judge` compares it with the
one in use and with what there is, and gives the steps. Only what is declared otherwise than before is changed, so that
what was changed at run time stays where the configuration did not (state.py). Nothing is removed: what is declared no
more stays offered until somebody removes it. What cannot change while clients are served is named in the answer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from nbdzram.config import ExportConfig, PoolConfig, ServerConfig, TlsMode
from nbdzram.errors import ConfigError, UserError
from nbdzram.server.changes import Changes
from nbdzram.server.exports import Export, Exports
from nbdzram.server.listener import NbdServer
from nbdzram.server.pools import PoolService
from nbdzram.status import ReloadReport
from nbdzram.units import format_size

Step = tuple[str, Callable[[], Awaitable[Any]]]
"""What is told of a change, and the change."""

APPLIED = frozenset({"exports", "pools", "maintenance", "limits", "tls", "default_export", "list_exports"})
"""Of ServerConfig: what a reload changes. All else takes effect at the next start."""

FIXED_LIMITS = frozenset({"total_bytes"})  # what all connections together have been granted from

log = logging.getLogger("nbdzram.server")


class Reload:
    """Reads the configuration again on request. Lives on the event loop."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        reread: Callable[[], ServerConfig] | None,
        changes: Changes,
        pools: dict[str, PoolService],
        exports: Exports,
        nbd: NbdServer,
    ) -> None:
        self.config = config
        self._reread = reread
        self._changes = changes
        self._pools = pools
        self._exports = exports
        self._nbd = nbd
        self._lock = asyncio.Lock()

    async def now(self) -> ReloadReport:
        """Read, judge, apply. Raises UserError; a ConfigError, and nothing was changed."""
        async with self._lock:
            if self._reread is None:
                raise UserError("this server was started without a configuration that could be read again")
            new = await asyncio.to_thread(self._reread)
            steps = list(self._judge(new))
            old = self.config
            self._changes.declare(new)
            changed: list[str] = []
            for says, step in steps:
                try:
                    await step()
                except UserError as error:  # no memory, or no room to remember it: the next reload tries it again
                    self._changes.declare(old)
                    told = "; ".join(changed) or "nothing"
                    raise UserError(f"{says}: {error}; changed before it: {told}") from error
                changed.append(says)
            self.config = new
            self._nbd.adopt(new)
            now = asyncio.get_running_loop().time()
            for service in self._pools.values():
                service.adopt(new.maintenance, now)
            changed += [
                name for name in _differing(old, new) if name in {"maintenance", "default_export", "list_exports"}
            ]
            changed += [f"limits.{name}" for name in _differing(old.limits, new.limits) if name not in FIXED_LIMITS]
            changed += [f"tls.{name}" for name in _differing(old.tls, new.tls) if name != "mode"]
            return ReloadReport(
                changed=tuple(changed), kept=tuple(_no_more_declared(old, new)), restart=tuple(_needs_restart(old, new))
            )

    def _judge(self, new: ServerConfig) -> Iterator[Step]:
        """The steps from what there is to `new`. Raises ConfigError for what cannot be."""
        if new.tls.mode is not TlsMode.OFF:
            self._nbd.try_certificates(new.tls)
        known = {pool.name: pool for pool in self.config.pools}
        for pool in new.pools:
            if pool.name not in self._pools:
                yield self._add_pool(pool)
            elif _without_sharing(pool) != _without_sharing(known.get(pool.name)):
                yield self._change_pool(pool)
        declared = {export.name: export for export in self.config.exports}
        there = {export.name: export for export in self._exports}
        for export in new.exports:
            if export == declared.get(export.name):
                continue
            if export.name in there:
                yield from self._change_export(export, there[export.name])
            else:
                yield self._add_export(export)

    def _add_pool(self, pool: PoolConfig) -> Step:
        return f"pool {pool.name} added", lambda: self._changes.declare_pool(pool)

    def _change_pool(self, pool: PoolConfig) -> Step:
        async def change() -> None:
            await self._changes.change_pool(pool.name, pool.mem_limit, pool.dedup.value)
            self._pools[pool.name].pool.verify = pool.verify

        return f"pool {pool.name} changed", change

    def _add_export(self, export: ExportConfig) -> Step:
        return f"export {export.name} added", lambda: self._changes.add_export(
            export.name,
            export.size_bytes,
            pool=export.pool,
            read_only=export.read_only,
            description=export.description,
            allow_addresses=export.access.addresses,
            allow_certificates=export.access.certificates,
        )

    def _change_export(self, wanted: ExportConfig, there: Export) -> Iterator[Step]:
        name, size = wanted.name, there.disk.size_bytes
        if wanted.pool != there.pool_name:
            raise ConfigError(
                f"the export '{name}' lies in the pool '{there.pool_name}', but is declared in '{wanted.pool}'; "
                "declare it where it lies, or copy its content to an export of another name"
            )
        if wanted.private and not there.disk.private:
            raise ConfigError(
                f"the export '{name}' is declared private, but was made without: its blocks may be shared already; "
                "remove and add it, or copy its content to a private export"
            )
        if wanted.size_bytes < size:
            raise ConfigError(
                f"the export '{name}' has {format_size(size)}, but is declared with {format_size(wanted.size_bytes)}; "
                "declare its size, or shrink it with `nbdzram exports resize`"
            )
        if wanted.size_bytes > size:
            yield (
                f"export {name} grown to {format_size(wanted.size_bytes)}",
                lambda: self._changes.resize_export(name, wanted.size_bytes, yes=False, force=False),
            )
        rules = (wanted.read_only, wanted.description, wanted.access)
        if rules != (there.read_only, there.description, there.access):
            yield (
                f"export {name} changed",
                lambda: self._changes.change_export(
                    name,
                    read_only=wanted.read_only,
                    description=wanted.description,
                    allow_addresses=wanted.access.addresses,
                    allow_certificates=wanted.access.certificates,
                ),
            )


def _differing(old: Any, new: Any) -> Iterator[str]:
    """The names of the fields in which two records differ."""
    return (field.name for field in dataclasses.fields(old) if getattr(old, field.name) != getattr(new, field.name))


def _no_more_declared(old: ServerConfig, new: ServerConfig) -> Iterator[str]:
    exports, pools = {export.name for export in new.exports}, {pool.name for pool in new.pools}
    yield from (f"export {export.name}" for export in old.exports if export.name not in exports)
    yield from (f"pool {pool.name}" for pool in old.pools if pool.name not in pools)


def _needs_restart(old: ServerConfig, new: ServerConfig) -> Iterator[str]:
    yield from (name for name in _differing(old, new) if name not in APPLIED)
    yield from (f"limits.{name}" for name in _differing(old.limits, new.limits) if name in FIXED_LIMITS)
    yield from ("tls.mode" for _ in range(old.tls.mode is not new.tls.mode))
    before = {pool.name: pool.tell_sharing for pool in old.pools}
    yield from (
        f"pools.{pool.name}.tell_sharing"
        for pool in new.pools
        if pool.tell_sharing != before.get(pool.name, pool.tell_sharing)
    )


def _without_sharing(pool: PoolConfig | None) -> PoolConfig | None:
    """A declaration without what only a restart changes."""
    return pool and dataclasses.replace(pool, tell_sharing=False)
