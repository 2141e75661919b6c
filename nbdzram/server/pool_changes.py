"""Changes at run time take turns; and those of pools: added, changed and removed.

Those of exports, and what holds for all of them, are in changes.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Callable, Collection, Coroutine
from typing import Any, TypeVar

from nbdzram.config import Access, Dedup, PoolConfig, ServerConfig
from nbdzram.engine.pool import Pool
from nbdzram.errors import EngineError, NoSuchExport, UserError
from nbdzram.server.exports import Exports
from nbdzram.server.inventory import Placed, place_exports, require_trust
from nbdzram.server.listener import NbdServer
from nbdzram.server.opening import change_of, declared_as, effective_pool, open_pool
from nbdzram.server.pools import PoolService
from nbdzram.server.runs import REMOVED, STOPS
from nbdzram.server.settling import Settling, is_roomier
from nbdzram.server.state import State
from nbdzram.server.wanted import pool_config
from nbdzram.status import PoolStatus, limit_trouble

log = logging.getLogger("nbdzram.server")

STARTS = "the server is starting, and has not opened all of its disks yet; ask again when it runs"

Outcome = TypeVar("Outcome")


class PoolChanges:
    """The operations of pools, and the turns that all changes take."""

    def __init__(
        self,
        config: ServerConfig,
        pools: dict[str, PoolService],
        exports: Exports,
        nbd: NbdServer,
        run_numbers: itertools.count[int],
    ) -> None:
        self._config = config
        self._declared = {export.name: export for export in config.exports}
        self._declared_pools = {pool.name: declared_as(pool) for pool in config.pools}
        self._pools = pools
        self._exports = exports
        self._nbd = nbd
        self._run_numbers = run_numbers
        self._held_by: Callable[[Pool], str | None] = lambda _: None
        self._memory = State(None)
        self._settling: Settling | None = None
        self._refusal: str | None = STARTS  # None between `begin` and `stop`
        self._lock = asyncio.Lock()

    # ---- for the service ----

    def begin(self, state: State, settling: Settling | None = None) -> None:
        """The server has started; changes are made from now on, remembered in `state`, and settled behind a journal."""
        self._memory = state
        self._settling = settling
        self._refusal = None

    def require_begun(self) -> None:
        """Of a server that has not opened its disks yet nothing is said, and nothing changed. Raises UserError."""
        if self._refusal is not None:
            raise UserError(self._refusal)

    def declare(self, config: ServerConfig) -> None:
        """From now on this is what the configuration says: what changes are remembered against."""
        self._config = config
        self._declared = {export.name: export for export in config.exports}
        self._declared_pools = {pool.name: declared_as(pool) for pool in config.pools}

    def pool_to_be(self, config: PoolConfig) -> PoolConfig:
        """What a pool is to be once it is declared so, and no more as it was declared before."""
        known = self._memory.changes.pools.get(config.name)
        if known is None:
            return config
        return effective_pool(config, dataclasses.replace(known, declared=self._declared_pools.get(config.name)))

    def ask_before_removal(self, held_by: Callable[[Pool], str | None]) -> None:
        """`held_by` says, to whoever wants to remove a pool, what beside exports lies in it, if anything does."""
        self._held_by = held_by

    async def settled(self, changed: Collection[str] = ()) -> None:
        """Return once what was changed before outlives the power, if there is a journal. Raises UserError.

        changed: names of exports whose content, or size, was.
        """
        if self._settling is not None:
            await self._settling.settle([export for export in self._exports if export.name in changed])

    async def stop(self, why: str = STOPS) -> None:
        """Refuse changes, and wait for the one under way."""
        self._refusal = why
        async with self._lock:
            pass

    # ---- pools ----

    async def add_pool(
        self, name: str, mem_limit: int, dedup: str, *, verify: bool = True, tell_sharing: bool = False
    ) -> PoolStatus:
        """Open a pool: a new, empty one, or with what its arena in the state directory holds. Raises UserError."""
        return await self.declare_pool(pool_config(name, mem_limit, dedup, verify=verify, tell_sharing=tell_sharing))

    async def declare_pool(self, config: PoolConfig) -> PoolStatus:
        """The same, with all that a declaration says. Raises UserError."""
        return await self._alone(self._add_pool(config))

    async def change_pool(
        self,
        name: str,
        mem_limit: int | None,
        dedup: str | None,
        *,
        verify: bool | None = None,
        tell_sharing: bool | None = None,
    ) -> PoolStatus:
        """Set a pool's limit, when equal blocks meet, whether what is read is checked, what clients may find out.

        What is not given stays, and so does what is stored. Raises UserError.
        """
        return await self._alone(self._change_pool(name, mem_limit, dedup, verify, tell_sharing))

    async def remove_pool(self, name: str) -> None:
        """Close a pool that holds no export, and remove its file. Raises NoSuchExport, UserError."""
        await self._alone(self._remove_pool(name))

    def lose_pool(self, name: str) -> None:
        """Raises what `remove_pool` would raise now, and changes nothing."""
        self.require_begun()
        pool = self._pool(name).pool
        if name in self._declared_pools:
            raise UserError(f"the pool '{name}' is declared in the configuration; remove it there and restart")
        holding = [export.name for export in self._exports if export.pool_name == name]
        if holding:
            raise UserError(f"the pool '{name}' holds the export '{holding[0]}'; remove its exports first")
        held = self._held_by(pool)
        if held is not None:
            raise UserError(f"the pool '{name}' holds {held}")

    async def _add_pool(self, config: PoolConfig) -> PoolStatus:
        name = config.name
        if name in self._pools:
            raise UserError(f"there is a pool '{name}' already; choose another name or remove it first")
        await self._remember_pool(config)
        try:
            pool, placed = await asyncio.to_thread(self._open_pool, config)
        except BaseException:
            await self._forget_pool(name)
            raise
        for part in placed:
            self._exports.add(part.export())
        now = asyncio.get_running_loop().time()
        self._pools[name] = PoolService(name, pool, self._config.maintenance, now, self._run_numbers)
        return self._pools[name].status(now)

    def _open_pool(self, config: PoolConfig) -> tuple[Pool, list[Placed]]:
        """On a thread. A pool that was forgotten comes back with its disks and the rules that they had."""
        with contextlib.ExitStack() as closing:
            closing.callback(self._memory.forget_arena, config.name)
            pool = closing.enter_context(open_pool(config, self._memory))
            for disk in pool.disks():
                if any(export.name == disk.name for export in self._exports):
                    raise UserError(
                        f"the pool '{config.name}' holds an export '{disk.name}', and there is one of that name "
                        "already; remove that, or choose another name for the pool"
                    )
            removed = {
                name: known
                for name, known in self._memory.changes.exports.items()
                if known.removed and name in self._declared
            }
            placed = place_exports((), {config.name: pool}, self._memory, removed=removed)
            closing.pop_all()
            return pool, placed

    async def _change_pool(
        self, name: str, mem_limit: int | None, dedup: str | None, verify: bool | None, tell_sharing: bool | None
    ) -> PoolStatus:
        service = self._pool(name)
        pool = service.pool
        now_inline = "inline" if pool.inline_dedup else "fold"
        config = pool_config(
            name,
            pool.mem_limit if mem_limit is None else mem_limit,
            dedup or now_inline,
            verify=pool.verify if verify is None else verify,
            tell_sharing=pool.tells_sharing if tell_sharing is None else tell_sharing,
        )
        if config.dedup is Dedup.INLINE:
            self._require_trust(name, tells_sharing=config.tell_sharing)
        before = self._memory.changes.pools.get(name)
        await self._remember_pool(config)
        try:
            pool.mem_limit, pool.inline_dedup = config.mem_limit, config.dedup is Dedup.INLINE
            pool.verify, pool.tells_sharing = config.verify, config.tell_sharing
        except UserError:
            await asyncio.to_thread(self._memory.remember_pool, name, before)
            raise
        trouble = limit_trouble(name, pool.mem_limit, pool.stats().memory_used)
        if mem_limit is not None and trouble is not None:
            log.warning("%s; %s", *trouble)
        return service.status(asyncio.get_running_loop().time())

    async def _remove_pool(self, name: str) -> None:
        service = self._pool(name)
        self.lose_pool(name)
        forgotten = await self._forget_pool(name)
        del self._pools[name]
        await service.close(REMOVED)
        self._nbd.let_go_of_arena(service.pool.path)
        await asyncio.to_thread(self._memory.remove_arena, name)
        if not forgotten and not await self._forget_pool(name):
            log.warning("the pool %s is removed, but remembered: the next start makes it again, empty", name)

    async def _remember_pool(self, config: PoolConfig) -> None:
        """Raises UserError; then it is not."""
        change = change_of(config, self._declared_pools.get(config.name))
        before = self._memory.changes.pools.get(config.name)
        await asyncio.to_thread(self._memory.remember_pool, config.name, change)
        try:
            await self._settle_ahead(config)
        except OSError as error:
            await asyncio.to_thread(self._memory.remember_pool, config.name, before)
            raise UserError(
                f"it cannot be noted beside the checkpoints, so that a start would not know of it: "
                f"{error.strerror or 'the disk takes too long'}"
            ) from error

    async def _settle_ahead(self, config: PoolConfig) -> None:
        """Where the journal may soon have what a start could not place else. Raises OSError."""
        known = self._pools.get(config.name)
        if self._settling is not None and (known is None or is_roomier(config.mem_limit, known.pool.mem_limit)):
            await self._settling.know_pool(config.name)

    async def _forget_pool(self, name: str) -> bool:
        try:
            await asyncio.to_thread(self._memory.remember_pool, name, None)
        except UserError as error:
            log.warning("the pool %s: %s", name, error)
            return False
        return True

    def _require_trust(
        self, pool_name: str, name: str | None = None, *accesses: Access, tells_sharing: bool | None = None
    ) -> None:
        """Whether a pool that folds inline may, with an export's rules as they are to be. Raises UserError."""
        pool = self._pools[pool_name].pool
        others = [export for export in self._exports if export.pool_name == pool_name and export.name != name]
        rules = [export.access for export in others if not export.disk.private]
        if pool.inline_dedup or name is None:
            tells = pool.tells_sharing if tells_sharing is None else tells_sharing
            require_trust(pool_name, [*rules, *accesses], tells_sharing=tells)

    # ---- turns ----

    async def alone(self, change: Coroutine[Any, Any, Outcome]) -> Outcome:
        """Make what somebody else puts together as a change, in turn with all others. Raises UserError."""
        return await self._alone(change)

    async def _alone(self, change: Coroutine[Any, Any, Outcome]) -> Outcome:
        """A task of its own: an asker who goes away ends the waiting, not the change."""
        return await asyncio.shield(asyncio.create_task(self._in_turn(change)))

    async def _in_turn(self, change: Coroutine[Any, Any, Outcome]) -> Outcome:
        try:
            async with self._lock:
                self.require_begun()
                return await change
        except EngineError as error:
            raise UserError(f"the engine refuses: {error}") from error
        finally:
            change.close()  # one that never had its turn

    def _pool(self, name: str) -> PoolService:
        if name not in self._pools:
            raise NoSuchExport.among(sorted(self._pools), name, "pool")
        return self._pools[name]
