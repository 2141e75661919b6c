"""Reading the configuration again while the server runs.

    read ──> judge ──> apply ──> answer
      │        │         │
      └────────┴─────────┴─ an error: one sentence, and nothing is changed

Everything that can be wrong with a configuration is found before the first change is made: `judge` compares it with the
one in use and with what there is, and gives the steps. What is left is want of memory, or of room to remember a change:
then the steps that were taken are undone, the last one first. Growing comes last of all, as it cannot be undone without
destroying what a client may have written there by then.

Only what is declared otherwise than before is changed, value by value, so that what was changed at run time stays where
the configuration did not, as at a start (inventory.effective, opening.effective_pool). Nothing is removed: what is
declared no more stays offered until somebody removes it. What cannot change while clients are served is named in the
answer, until there was a start, and is no part of what the server runs by (without_restart).

A pool folds inline only between exports that admit the same clients (inventory.require_trust). So it begins to after
the rules have changed and ends to before; where it goes on, it rests meanwhile, as rules change one export at a time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from nbdzram.config import Dedup, Durability, ExportConfig, PoolConfig, ServerConfig, TlsMode
from nbdzram.errors import ConfigError, UserError
from nbdzram.server.changes import Changes
from nbdzram.server.exports import Export, Exports
from nbdzram.server.inventory import REMOVED_AT_RUN_TIME, only_a_start_loads, require_trust
from nbdzram.server.listener import NbdServer
from nbdzram.server.pools import PoolService
from nbdzram.server.state import ExportRecord
from nbdzram.status import ReloadReport, default_trouble, fields, limit_trouble
from nbdzram.units import format_size, format_sizes, said


@dataclass(frozen=True, slots=True)
class Step:
    """A change, what is told of it (nothing: it is a part of others), and how it is undone."""

    says: str
    make: Callable[[], Awaitable[Any]]
    undo: Callable[[], Awaitable[Any]] | None = None


APPLIED = frozenset({"exports", "pools", "maintenance", "limits", "tls", "default_export", "list_exports"})
"""Of ServerConfig: what a reload changes. All else takes effect at the next start."""

SCHEDULED = {"snapshots_seconds": "snapshots", "snapshots_keep": "snapshots_keep"}
"""Of an export's fields, those that nothing is made of: the schedule looks at them each second; and their keys."""

KEYS = dict.fromkeys(("tcp", "unix", "vsock"), "listen")
"""Those of its fields that have another key in the configuration."""

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
        self._settling: asyncio.Task[None] | None = None
        self._soon: asyncio.Task[None] | None = None
        self._asked = False  # since the last one began

    async def now(self) -> ReloadReport:
        """Read, judge, apply. Raises UserError; a ConfigError, and nothing was changed."""
        async with self._lock:
            self._changes.require_begun()
            if self._reread is None:
                raise UserError("this server was started without a configuration that could be read again")
            wanted = await asyncio.to_thread(self._reread)
            old, new = self.config, without_restart(self.config, wanted)
            certificates = None if wanted.tls.mode is TlsMode.OFF else self._nbd.read_certificates(wanted.tls)
            steps = list(self._judge(new))
            self._changes.declare(new)
            for index, step in enumerate(steps):
                try:
                    await step.make()
                except UserError as error:  # the next reload tries it again
                    self._changes.declare(old)
                    left = "; ".join([says async for says in _undo(steps[:index])]) or "nothing"
                    what = f"{step.says}: {error}" if step.says else str(error)
                    raise UserError(f"{what}; changed is {left}") from error
            changed = [step.says for step in steps if step.says]
            self.config = new
            self._nbd.adopt(new, certificates)
            now = asyncio.get_running_loop().time()
            for service in self._pools.values():
                service.adopt(new.maintenance, now)
            keys = [name for name in _differing(old, new) if name in {"maintenance", "default_export", "list_exports"}]
            keys += [f"limits.{name}" for name in _differing(old.limits, new.limits) if name not in FIXED_LIMITS]
            keys += [f"tls.{name}" for name in _differing(old.tls, new.tls) if name != "mode"]
            keys += _schedules(old, new)
            changed += [f"{key} changed" for key in keys]
            trouble = default_trouble(new.default_export, [export.name for export in self._exports])
            if trouble is not None and "default_export" in keys:
                changed += ["; ".join(trouble)]
            changed += [
                f"export {said(export.name)} stays private, as it was made" for export in self._opened(old, new)
            ]
            return ReloadReport(
                changed=tuple(changed),
                kept=tuple(self._no_more_declared(old, new)),
                restart=tuple(needs_restart(old, wanted)),
            )

    def _no_more_declared(self, old: ServerConfig, new: ServerConfig) -> Iterator[str]:
        """Of what is there: what was removed, or has another name, does not stay by this one."""
        exports, pools = {export.name for export in new.exports}, {pool.name for pool in new.pools}
        gone = [export.name for export in old.exports if export.name not in exports]
        yield from (f"export {said(name)}" for name in gone if name in self._exports)
        yield from (f"pool {pool.name}" for pool in old.pools if pool.name not in pools and pool.name in self._pools)

    def soon(self) -> None:
        """Nobody waits for it. Asked again while one is under way, there is another: it may have read the file before
        that was changed."""
        self._asked = True
        if self._soon is None or self._soon.done():
            self._soon = asyncio.create_task(self._as_asked())

    async def _as_asked(self) -> None:
        while self._asked:
            self._asked = False
            await self._now_and_tell()

    async def _now_and_tell(self) -> None:
        """The same where nobody waits for it: what came of it is logged, and outlives the power in a moment."""
        try:
            report = await self.now()
        except UserError as error:
            log.warning("the configuration was not reloaded: %s", error)
        else:
            log.info("the configuration was reloaded: %s", "; ".join(report.lines()))
            self._settling = asyncio.create_task(self._settle())

    async def _settle(self) -> None:
        try:
            await self._changes.settled()
        except UserError as error:
            log.warning("what was reloaded: %s", error)

    def _judge(self, new: ServerConfig) -> Iterator[Step]:
        """The steps from what there is to `new`. Raises ConfigError for what cannot be."""
        known = {pool.name: pool for pool in self.config.pools}
        added = [pool for pool in new.pools if pool.name not in self._pools]
        otherwise = [pool for pool in new.pools if pool.name in self._pools and pool != known.get(pool.name)]
        changed = [pool for pool in map(self._changes.pool_to_be, otherwise) if pool != self._as_it_is(pool)]
        declared = {export.name: export for export in self.config.exports}
        exports = [export for export in new.exports if export != declared.get(export.name)]
        exports = [export for export in exports if not self._stays_removed(export)]
        for pool in changed:
            self._require_limit(pool)
        for export in exports:
            self._require_possible(export)
        self._require_trust({pool.name: pool for pool in (*added, *changed)}, exports)
        # The pools in which rules may change while they fold inline
        resting = [name for name in {export.pool: None for export in exports} if self._folds_inline(name)]
        inline = [pool for pool in changed if pool.dedup is Dedup.INLINE]
        yield from map(self._add_pool, added)
        yield from map(self._rest, resting)
        yield from (self._change_pool(pool) for pool in changed if pool not in inline)
        for export in exports:
            yield from self._change_rules(export) if export.name in self._exports else (self._add_export(export),)
        yield from map(self._change_pool, inline)
        yield from (self._go_on(name) for name in resting if name not in {pool.name for pool in changed})
        yield from chain.from_iterable(self._grow(export) for export in exports if export.name in self._exports)
        if otherwise or exports:  # also where that is what was changed at run time already
            yield Step("", lambda: self._changes.remember_as_declared(exports))

    # ---- what cannot be ----

    def _opened(self, old: ServerConfig, new: ServerConfig) -> Iterator[ExportConfig]:
        """Exports that were declared private, and are no more."""
        private = {export.name for export in old.exports if export.private}
        opened = (export for export in new.exports if export.name in private and not export.private)
        return (
            export for export in opened if export.name in self._exports and self._exports.get(export.name).disk.private
        )

    def _stays_removed(self, wanted: ExportConfig) -> bool:
        if wanted.name in self._exports or not self._changes.to_be(wanted).removed:
            return False
        log.info(REMOVED_AT_RUN_TIME, wanted.name)
        return True

    def _folds_inline(self, pool: str) -> bool:
        return pool in self._pools and self._pools[pool].pool.inline_dedup

    def _require_limit(self, wanted: PoolConfig) -> None:
        try:
            self._pools[wanted.name].pool.require_limit(wanted.mem_limit)
        except UserError as error:
            raise ConfigError(f"the pool '{wanted.name}': {error}") from None

    def _require_possible(self, wanted: ExportConfig) -> None:
        if wanted.name not in self._exports:
            if wanted.image is None:
                return
            raise only_a_start_loads(wanted.name)
        there, name = self._exports.get(wanted.name), wanted.name
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
        if self._changes.to_be(wanted).size_bytes < there.disk.size_bytes:
            has, declared = format_sizes(there.disk.size_bytes, wanted.size_bytes)
            raise ConfigError(
                f"the export '{name}' has {has}, but is declared with {declared}; declare its size, "
                "or shrink it with `nbdzram exports resize`"
            )

    def _require_trust(self, pools: Mapping[str, PoolConfig], exports: Iterable[ExportConfig]) -> None:
        """Whether all pools that will fold inline may, with the rules that their exports will have."""
        rules = {one.name: (one.pool_name, one.access) for one in self._exports if not one.disk.private}
        for one in exports:
            if not one.private and (one.name in rules or one.name not in self._exports):
                rules[one.name] = (one.pool, self._changes.to_be(one).access)
        for name in {pool for pool, _ in rules.values()}:
            inline = pools[name].dedup is Dedup.INLINE if name in pools else self._folds_inline(name)
            if not inline:
                continue
            tells = pools[name].tell_sharing if name in pools else self._pools[name].pool.tells_sharing
            try:
                require_trust(name, [access for pool, access in rules.values() if pool == name], tells_sharing=tells)
            except UserError as error:
                raise ConfigError(str(error)) from None

    # ---- the steps ----

    def _add_pool(self, pool: PoolConfig) -> Step:
        return Step(
            f"pool {pool.name} added",
            lambda: self._changes.declare_pool(pool),
            lambda: self._changes.remove_pool(pool.name),
        )

    def _change_pool(self, wanted: PoolConfig) -> Step:
        before = self._as_it_is(wanted)

        async def become(config: PoolConfig) -> None:
            await self._changes.change_pool(
                config.name,
                config.mem_limit,
                config.dedup.value,
                verify=config.verify,
                tell_sharing=config.tell_sharing,
            )

        trouble = limit_trouble(wanted.name, wanted.mem_limit, self._pools[wanted.name].pool.stats().memory_used)
        warned = "" if trouble is None or before.mem_limit == wanted.mem_limit else f": {trouble[0]}; {trouble[1]}"
        return Step(
            f"pool {wanted.name} changed{_what(before, wanted)}{warned}",
            partial(become, wanted),
            partial(become, before),
        )

    def _as_it_is(self, wanted: PoolConfig) -> PoolConfig:
        """The pool of that name, with what cannot change now as wanted."""
        pool = self._pools[wanted.name].pool
        return dataclasses.replace(
            wanted,
            mem_limit=pool.mem_limit,
            dedup=Dedup.INLINE if pool.inline_dedup else Dedup.FOLD,
            verify=pool.verify,
            tell_sharing=pool.tells_sharing,
        )

    def _rest(self, name: str) -> Step:
        return Step("", partial(self._fold_inline, name, False), partial(self._fold_inline, name, True))

    def _go_on(self, name: str) -> Step:
        return Step("", partial(self._fold_inline, name, True), partial(self._fold_inline, name, False))

    async def _fold_inline(self, name: str, on: bool) -> None:
        self._pools[name].pool.inline_dedup = on

    def _add_export(self, export: ExportConfig) -> Step:
        return Step(
            f"export {said(export.name)} added",
            lambda: self._changes.add_export(  # what is not given is as it is declared by now, or was changed last
                export.name,
                export.size_bytes,
                pool=export.pool,
                read_only=None,
                description=None,
                allow_addresses=None,
                allow_certificates=None,
            ),
            lambda: self._changes.remove_export(export.name, force=False),
        )

    def _change_rules(self, wanted: ExportConfig) -> Iterator[Step]:
        there, to_be = self._exports.get(wanted.name), self._changes.to_be(wanted)
        before, access = self._changes.rules_of(wanted.name), to_be.access
        if _rules(to_be) != _rules(there):
            stays = access == there.access  # also where nobody is admitted, which no list says
            yield Step(
                f"export {said(wanted.name)} changed{_what(_as_declared(there, wanted), _as_declared(to_be, wanted))}",
                lambda: self._changes.change_export(
                    wanted.name,
                    read_only=to_be.read_only,
                    description=to_be.description,
                    allow_addresses=None if stays else access.addresses,
                    allow_certificates=None if stays else access.certificates,
                    bounds=fields(to_be.bounds),
                ),
                lambda: self._changes.restore_rules(wanted.name, before),
            )

    def _grow(self, wanted: ExportConfig) -> Iterator[Step]:
        size_bytes = self._changes.to_be(wanted).size_bytes
        if size_bytes > self._exports.get(wanted.name).disk.size_bytes:
            yield Step(
                f"export {said(wanted.name)} grown to {format_size(size_bytes)}",
                lambda: self._changes.resize_export(wanted.name, size_bytes, yes=False, force=False),
            )


async def _undo(steps: Sequence[Step]) -> AsyncIterator[str]:
    """Take steps back, the last one first; what is told of those that stay."""
    for step in reversed(steps):
        try:
            if step.undo is not None:
                await step.undo()
                continue
        except UserError as error:
            log.warning("%s, and cannot be undone: %s", step.says, error)
        if step.says:
            yield step.says


def _rules(one: ExportRecord | Export) -> tuple[Any, ...]:
    return one.read_only, one.description, one.access, one.bounds


def _as_declared(there: ExportRecord | Export, like: ExportConfig) -> ExportConfig:
    """What a declaration of the rules that an export has, or is to have, would be."""
    bounds = there.bounds
    return dataclasses.replace(
        like,
        read_only=there.read_only,
        description=there.description,
        allow_addresses=there.access.addresses,
        allow_certificates=there.access.certificates,
        quota=bounds.quota_bytes,
        iops=bounds.iops,
        iops_burst=bounds.iops_burst,
        bandwidth=bounds.bandwidth_bytes,
        bandwidth_burst=bounds.bandwidth_burst_bytes,
    )


def _what(old: Any, new: Any) -> str:
    """The keys of two declarations that differ, behind what was changed."""
    keys = ", ".join(_differing(old, new))
    return f" ({keys})" if keys else ""


def _differing(old: Any, new: Any) -> Iterator[str]:
    """The names of the fields in which two records differ."""
    return (field.name for field in dataclasses.fields(old) if getattr(old, field.name) != getattr(new, field.name))


def _schedules(old: ServerConfig, new: ServerConfig) -> Iterator[str]:
    """The keys of snapshots by the clock that are others than they were."""
    before = {export.name: export for export in old.exports}
    for export in new.exports:
        differing = _differing(before.get(export.name, export), export)
        yield from (f"exports.{export.name}.{SCHEDULED[name]}" for name in differing if name in SCHEDULED)


def needs_restart(old: ServerConfig, new: ServerConfig) -> Iterator[str]:
    """The keys of what a reload does not change."""
    yield from dict.fromkeys(KEYS.get(name, name) for name in _differing(old, new) if name not in APPLIED)
    yield from (f"limits.{name}" for name in _differing(old.limits, new.limits) if name in FIXED_LIMITS)
    yield from ("tls.mode" for _ in range(old.tls.mode is not new.tls.mode))
    durable = _durability(old)
    yield from (f"pools.{pool.name}.durability" for pool in new.pools if pool.durability is not durable[pool.name])


def without_restart(old: ServerConfig, new: ServerConfig) -> ServerConfig:
    """What a server with `old` runs by from now on: `new`, but for what takes effect at the next start.

    Whoever takes it over, or goes on where that fails, has to know where its disks lie, and not where they will.
    """
    waits = {name: getattr(old, name) for name in _differing(old, new) if name not in APPLIED}
    durable = _durability(old)
    offered = TlsMode.OFF not in (old.tls.mode, new.tls.mode)  # before and after; else there are no files to exchange
    return dataclasses.replace(
        new,
        **waits,
        limits=dataclasses.replace(new.limits, **{name: getattr(old.limits, name) for name in FIXED_LIMITS}),
        tls=dataclasses.replace(new.tls, mode=old.tls.mode) if offered else old.tls,
        pools=tuple([dataclasses.replace(pool, durability=durable[pool.name]) for pool in new.pools]),
    )


def _durability(config: ServerConfig) -> Mapping[str, Durability]:
    """Of its pools, and of those that come while it runs: a journal knows its pools from the start."""
    known = {pool.name: pool.durability for pool in config.pools}
    return defaultdict(lambda: Durability.CHECKPOINT, known)
