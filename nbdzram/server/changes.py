"""What is changed while the server runs: exports and pools, added, changed and removed.

Everything here runs on the event loop; what may take long (deleting, resizing) goes to threads. Changes take one lock,
so that two of them never interleave. A removed export leaves the registry first, so that no client finds it while its
blocks are freed.
"""

from __future__ import annotations

import asyncio

from nbdzram.config import DEFAULT_POOL, Dedup, ExportConfig, PoolConfig, ServerConfig
from nbdzram.errors import ExportExists, NoSuchExport, UserError
from nbdzram.server.exports import Export, Exports
from nbdzram.server.inventory import Placed, declared_as, open_pool
from nbdzram.server.listener import NbdServer
from nbdzram.server.pools import PoolService
from nbdzram.server.state import ExportChange, PoolChange, State
from nbdzram.status import ExportStatus, PoolStatus
from nbdzram.units import format_size
from nbdzram.values import export_name, export_size, memory, pool_name


class Changes:
    """The operations that control offers beside looking (control.methods.Changes). Made by Service."""

    def __init__(self, config: ServerConfig, pools: dict[str, PoolService], exports: Exports, nbd: NbdServer) -> None:
        self._config = config
        self._declared = {export.name: export.size_bytes for export in config.exports}
        self._declared_pools = {pool.name: declared_as(pool) for pool in config.pools}
        self._pools = pools
        self._exports = exports
        self._nbd = nbd
        self._state = State(None)
        self._changing = asyncio.Lock()

    def begin(self, state: State) -> None:
        """The server has started; from now on changes are remembered in `state`."""
        self._state = state

    async def add_pool(self, name: str, mem_limit: int, dedup: str) -> PoolStatus:
        """Open a new, empty pool. Raises UserError."""
        async with self._changing:
            if name in self._pools:
                raise UserError(f"there is a pool '{name}' already; choose another name or remove it first")
            config = _pool_config(name, mem_limit, dedup)
            pool = await asyncio.to_thread(open_pool, config, self._state)
            try:
                self._remember_pool(config)
            except UserError:
                pool.close()
                raise
            now = asyncio.get_running_loop().time()
            pool.set_clock(int(now))
            self._pools[name] = PoolService(name, pool, self._config.maintenance, now)
            return self._pools[name].status(now)

    async def change_pool(self, name: str, mem_limit: int | None, dedup: str | None) -> PoolStatus:
        """Set a pool's limit, which leaves what is stored as it is, or when equal blocks meet. Raises UserError."""
        async with self._changing:
            service = self._pool(name)
            pool = service.pool
            now_inline = "inline" if pool.inline_dedup else "fold"
            config = _pool_config(name, pool.mem_limit if mem_limit is None else mem_limit, dedup or now_inline)
            self._remember_pool(config)
            pool.mem_limit, pool.inline_dedup = config.mem_limit, config.dedup is Dedup.INLINE
            return service.status(asyncio.get_running_loop().time())

    async def remove_pool(self, name: str) -> None:
        """Close a pool that holds no export, and remove its file. Raises NoSuchExport, UserError."""
        async with self._changing:
            service = self._pool(name)
            if name in self._declared_pools:
                raise UserError(f"the pool '{name}' is declared in the configuration; remove it there and restart")
            holding = [export.name for export in self._exports if export.pool_name == name]
            if holding:
                raise UserError(f"the pool '{name}' holds the export '{holding[0]}'; remove its exports first")
            self._state.remember_pool(name, None)
            del self._pools[name]
            await service.close()
            self._state.remove_arena(name)

    async def add_export(
        self, name: str, size_bytes: int, *, pool: str | None, read_only: bool, description: str
    ) -> ExportStatus:
        """Make a new, empty export and offer it. Raises UserError, ExportExists."""
        async with self._changing:
            self._require_free_name(name)
            _require_size(size_bytes)
            service = self._pool(pool or DEFAULT_POOL)
            disk = service.pool.create(name, size_bytes, read_only=read_only)
            config = ExportConfig(
                name=name, size_bytes=size_bytes, pool=service.name, read_only=read_only, description=description
            )
            return self._offer(Placed(disk, config))

    async def remove_export(self, name: str, *, force: bool) -> None:
        """Stop offering an export and free what nobody else holds. Raises NoSuchExport, UserError."""
        async with self._changing:
            export = self._exports.get(name)
            _require_detached(export, "remove", force=force)
            self._remember(export, removed=True)
            self._exports.remove(name)
            await self._nbd.detach(export)
            await asyncio.to_thread(self._pools[export.pool_name].pool.delete, export.disk)
            if name not in self._declared:
                self._state.remember_export(name, None)

    async def resize_export(self, name: str, size_bytes: int, *, force: bool) -> ExportStatus:
        """Grow, or with `force` shrink, an export. Raises NoSuchExport, UserError."""
        async with self._changing:
            export = self._exports.get(name)
            _require_size(size_bytes)
            if size_bytes < export.disk.size_bytes:
                if not force:
                    raise UserError(
                        f"the export '{name}' has {format_size(export.disk.size_bytes)}; shrinking it to "
                        f"{format_size(size_bytes)} destroys what lies behind, which only --force does"
                    )
                _require_detached(export, "shrink", force=False)
            await asyncio.to_thread(export.disk.resize, size_bytes)
            self._remember(export)
            return export.status()

    async def reset_export(self, name: str, *, force: bool) -> ExportStatus:
        """Turn every block into a hole, as zram's reset does. Raises NoSuchExport, UserError."""
        async with self._changing:
            export = self._exports.get(name)
            _require_detached(export, "reset", force=force)
            await self._nbd.detach(export)
            await asyncio.to_thread(export.disk.trim, 0, export.disk.size_bytes)
            return export.status()

    async def copy_export(self, source: str, name: str, *, read_only: bool) -> ExportStatus:
        """Offer a clone, or a snapshot if read_only, of an export. Raises NoSuchExport, ExportExists, UserError."""
        async with self._changing:
            original = self._exports.get(source)
            self._require_free_name(name)
            disk = self._pools[original.pool_name].pool.clone(original.disk, name, read_only=read_only)
            config = ExportConfig(
                name=name,
                size_bytes=disk.size_bytes,
                pool=original.pool_name,
                read_only=read_only,
                description=f"{'snapshot' if read_only else 'clone'} of {source}",
            )
            return self._offer(Placed(disk, config))

    def _offer(self, placed: Placed) -> ExportStatus:
        """Once the change is remembered; else the disk, which is empty or shares all that it has, is gone again."""
        export = placed.export()
        try:
            self._remember(export)
        except UserError:
            placed.disk.pool.delete(placed.disk)
            raise
        self._exports.add(export)
        return export.status()

    def _remember(self, export: Export, *, removed: bool = False) -> None:
        change = ExportChange(
            pool=export.pool_name,
            size_bytes=export.disk.size_bytes,
            read_only=export.read_only,
            description=export.description,
            removed=removed,
            declared_size_bytes=self._declared.get(export.name),
        )
        self._state.remember_export(export.name, change)

    def _remember_pool(self, config: PoolConfig) -> None:
        declared = self._declared_pools.get(config.name)
        change = PoolChange(mem_limit=config.mem_limit, dedup=config.dedup, declared=declared)
        self._state.remember_pool(config.name, change)

    def _pool(self, name: str) -> PoolService:
        if name not in self._pools:
            raise NoSuchExport(f"there is no pool '{name}'; there are: {', '.join(sorted(self._pools))}")
        return self._pools[name]

    def _require_free_name(self, name: str) -> None:
        try:
            export_name(name)
        except ValueError as error:
            raise UserError(str(error)) from None
        if any(export.name == name for export in self._exports):
            raise ExportExists(f"there is an export '{name}' already; choose another name or remove it first")


def _pool_config(name: str, mem_limit: int, dedup: str) -> PoolConfig:
    try:
        return PoolConfig(name=pool_name(name), mem_limit=memory(mem_limit), dedup=Dedup(dedup))
    except ValueError as error:
        raise UserError(str(error)) from None


def _require_detached(export: Export, verb: str, *, force: bool) -> None:
    count = len(export.connections)
    if count and not force:
        clients = "1 client is" if count == 1 else f"{count} clients are"
        raise UserError(f"cannot {verb} the export '{export.name}': {clients} attached; detach first")


def _require_size(size_bytes: int) -> None:
    try:
        export_size(size_bytes)
    except ValueError as error:
        raise UserError(str(error)) from None
