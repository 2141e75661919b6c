"""The whole service: pools, exports, the NBD server and maintenance, from start to drain.

Everything here runs on the event loop; what may take long (deleting, resizing, maintenance) goes to threads. Changes
at run time take one lock, so that two of them never interleave. A removed export leaves the registry first, so that
no client finds it while its blocks are freed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time

from nbdzram import __version__
from nbdzram.config import DEFAULT_POOL, Dedup, ExportConfig, PoolConfig, ServerConfig, Trigger
from nbdzram.engine.stats import DiskUsage
from nbdzram.errors import ExportExists, NoSuchExport, UserError
from nbdzram.server.counts import LATENCY_BOUNDS_SECONDS
from nbdzram.server.exports import Export, Exports
from nbdzram.server.inventory import Placed, declared_as, open_pool, open_pools, place_exports
from nbdzram.server.listener import NbdServer
from nbdzram.server.maintenance import Progress
from nbdzram.server.policy import STARTS, Reason, gained
from nbdzram.server.pools import PoolService, automatic_options
from nbdzram.server.state import ExportChange, PoolChange, State
from nbdzram.server.usage import Usages
from nbdzram.status import (
    ExportStatus,
    PoolStatus,
    RunOptions,
    RunReport,
    ServerStatus,
)
from nbdzram.units import format_size
from nbdzram.values import export_name, export_size, memory, pool_name

TICK_SECONDS = 1.0  # the policy's pulse, the engine's clock for idle tracking, and the sample of event-loop lag

log = logging.getLogger("nbdzram.server")


class Service:
    """A running server. start() and stop() once; between them the operations that control offers."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._declared = {export.name: export.size_bytes for export in config.exports}
        self._declared_pools = {pool.name: declared_as(pool) for pool in config.pools}
        self._state = State(None)
        self._pools: dict[str, PoolService] = {}
        self._exports = Exports(config.default_export)
        self._nbd = NbdServer(self._exports, config)
        self._usages = Usages(self._exports)
        self._changing = asyncio.Lock()
        self._pulse: asyncio.Task[None] | None = None
        self._started_at = 0.0
        self._started = 0.0
        self._lag_seconds = 0.0
        self._requests_seen = 0
        self._draining = False

    async def start(self, *, listen: bool = True) -> None:
        """Open pools, offer exports, listen. Raises UserError, and then nothing is left open."""
        config = self._config
        self._state = State(config.state_dir)
        loop = asyncio.get_running_loop()
        self._started_at, self._started = time.time(), loop.time()
        pools = await asyncio.to_thread(open_pools, config.pools, self._state)
        try:
            for name, pool in pools.items():
                pool.set_clock(int(loop.time()))
                self._pools[name] = PoolService(name, pool, config.maintenance, loop.time())
            for placed in place_exports(config.exports, pools, self._state):
                self._exports.add(_export(placed))
            if listen:
                await self._nbd.start()
        except BaseException:
            for pool in pools.values():
                pool.close()
            raise
        self._pulse = asyncio.create_task(self._beat())

    async def serve_socket(self, client: socket.socket) -> None:
        """Serve one connected client until it leaves."""
        await self._nbd.serve_socket(client)

    async def stop(self) -> None:
        """Drain: answer what is under way, end maintenance at its next slice, close the pools."""
        self._draining = True
        if self._pulse is not None:
            self._pulse.cancel()
        await self._nbd.drain()
        await self._usages.stop()
        for service in self._pools.values():
            await service.close()

    def reload(self) -> None:
        """What can be renewed without a restart: TLS files."""
        self._nbd.renew_certificates()

    def status(self) -> ServerStatus:
        """Everything, at this moment."""
        now = asyncio.get_running_loop().time()
        return ServerStatus(
            version=__version__,
            pid=os.getpid(),
            started_at=self._started_at,
            uptime_seconds=now - self._started,
            uris=tuple(self._nbd.uris),
            draining=self._draining,
            connections=self._nbd.connections,
            connections_total=self._nbd.connections_accepted,
            handshake_failures=dict(self._nbd.handshake_failures),
            protocol_errors=self._nbd.protocol_errors,
            event_loop_lag_seconds=self._lag_seconds,
            latency_bounds_seconds=LATENCY_BOUNDS_SECONDS,
            pools=tuple(service.status(now) for service in self._pools.values()),
            exports=tuple(_export_status(export) for export in self._exports),
        )

    async def usage(self) -> dict[str, DiskUsage]:
        """What each export's blocks cost, by name: from a walk, or one that is still fresh."""
        return await self._usages.now()

    async def run(
        self, kind: str, options: RunOptions, *, pool: str | None, cpu_percent: int, progress: Progress
    ) -> tuple[RunReport, ...]:
        """One maintenance run on one pool, or on each in turn. Raises UserError."""
        if not 1 <= cpu_percent <= 100:
            raise UserError(f"the processor budget is {cpu_percent} percent; it lies from 1 to 100")
        services = list(self._pools.values()) if pool is None else [self._pool(pool)]
        return tuple(
            [
                await service.maintenance.run(kind, options, cpu_percent=cpu_percent, progress=progress)
                for service in services
            ]
        )

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
            return _export_status(export)

    async def reset_export(self, name: str, *, force: bool) -> ExportStatus:
        """Turn every block into a hole, as zram's reset does. Raises NoSuchExport, UserError."""
        async with self._changing:
            export = self._exports.get(name)
            _require_detached(export, "reset", force=force)
            await self._nbd.detach(export)
            await asyncio.to_thread(export.disk.trim, 0, export.disk.size_bytes)
            return _export_status(export)

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
        export = _export(placed)
        try:
            self._remember(export)
        except UserError:
            placed.disk.pool.delete(placed.disk)
            raise
        self._exports.add(export)
        return _export_status(export)

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

    async def _beat(self) -> None:
        """The pulse: engine clock, lag, policies."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            now = loop.time()
            self._lag_seconds = max(now - due, 0.0)
            requests = sum(export.traffic.total_requests() for export in self._exports)
            rate, self._requests_seen = (requests - self._requests_seen) / TICK_SECONDS, requests
            for service in self._pools.values():
                service.pool.set_clock(int(now))
                service.tell_refusals(now)
                self._consider(service, now, rate)

    def _consider(self, service: PoolService, now: float, requests_per_second: float) -> None:
        """Start the first run that a policy asks for, unless one is under way."""
        busy = service.automatic is not None and not service.automatic.done()
        if (
            busy
            or service.maintenance.running
            or all(policy.trigger is Trigger.OFF for policy in service.policies.values())
        ):
            return
        stats = service.pool.stats()
        for kind, policy in service.policies.items():
            reason = policy.decide(now, stats, requests_per_second)
            if reason in STARTS:
                assert reason is not None
                expected = policy.expected_gain(stats)
                service.automatic = asyncio.create_task(self._run_automatic(service, kind, reason, expected))
                return

    async def _run_automatic(self, service: PoolService, kind: str, reason: Reason, expected: int) -> None:
        loop, policy, freed = asyncio.get_running_loop(), service.policies[kind], 0
        try:
            wishes = self._config.maintenance
            options = automatic_options(kind, wishes)
            report = await service.maintenance.run(kind, options, cpu_percent=wishes.cpu_percent, reason=reason)
            freed = gained(report.result)
        except UserError as error:
            log.warning("automatic %s", error)
        policy.learn(loop.time(), expected, freed)


def _export(placed: Placed) -> Export:
    config = placed.config
    return Export(
        name=config.name,
        disk=placed.disk,
        pool_name=config.pool,
        read_only=config.read_only,
        description=config.description,
        allow_addresses=config.allow_addresses,
        allow_certificates=config.allow_certificates,
    )


def _export_status(export: Export) -> ExportStatus:
    stats, io_stat = export.disk.stats(), export.traffic.io_stat()
    return ExportStatus(
        name=export.name,
        pool=export.pool_name,
        size_bytes=stats.size,
        read_only=export.read_only,
        description=export.description,
        stored_bytes=stats.stored,
        same_filled_bytes=stats.same_filled,
        connections=len(export.connections),
        failed_reads=io_stat.failed_reads,
        failed_writes=io_stat.failed_writes,
        invalid_io=io_stat.invalid_io,
        notify_free=io_stat.notify_free,
        operations=export.traffic.operations(),
    )


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
