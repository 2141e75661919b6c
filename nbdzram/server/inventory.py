"""Which pools and disks there are when a server starts.

Three voices speak: the configuration declares, the arenas hold what was stored before, and the state remembers what
was changed at run time. The rules, in this order:

1. What an arena holds is never lost: a disk that nobody declares any more is still offered.
2. A run-time change holds until its declaration changes (state.py).
3. What is declared and not there is made. What is declared larger grows. What is declared smaller is refused: shrinking
   destroys content, and only `nbdzram exports resize --force` does that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nbdzram.config import Dedup, ExportConfig, PoolConfig
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.errors import ConfigError, UserError
from nbdzram.server.exports import Export
from nbdzram.server.state import State
from nbdzram.units import format_size

log = logging.getLogger("nbdzram.server")


@dataclass(frozen=True, slots=True)
class Placed:
    """A disk in its pool, with what clients are told of it."""

    disk: Disk
    config: ExportConfig

    def export(self) -> Export:
        """What clients are offered."""
        return Export(
            name=self.config.name,
            disk=self.disk,
            pool_name=self.config.pool,
            read_only=self.config.read_only,
            description=self.config.description,
            allow_addresses=self.config.allow_addresses,
            allow_certificates=self.config.allow_certificates,
        )


def open_pools(declared: Iterable[PoolConfig], state: State) -> dict[str, Pool]:
    """Every pool that is declared or remembered, opened. Raises UserError; then none stays open."""
    configs = {pool.name: pool for pool in declared}
    for name, change in state.changes.pools.items():
        if name not in configs or change.declared == declared_as(configs[name]):
            configs[name] = PoolConfig(name=name, mem_limit=change.mem_limit, dedup=Dedup(change.dedup))
    with contextlib.ExitStack() as opened:
        pools = {name: opened.enter_context(open_pool(config, state)) for name, config in configs.items()}
        opened.pop_all()
        return pools


def declared_as(pool: PoolConfig) -> str:
    """A pool's declaration as the state remembers it: when it reads differently, a run-time change has ended."""
    return f"mem_limit={pool.mem_limit} dedup={pool.dedup}"


def open_pool(config: PoolConfig, state: State) -> Pool:
    """One pool, with what its arena holds. Raises UserError."""
    return Pool(
        mem_limit=config.mem_limit,
        path=state.arena_path(config.name),
        inline_dedup=config.dedup is Dedup.INLINE,
    )


def place_exports(declared: Iterable[ExportConfig], pools: Mapping[str, Pool], state: State) -> list[Placed]:
    """Every disk that is to be offered, made or found. Raises UserError."""
    found = _found(pools)
    placed = []
    for config in declared:
        effective = _with_changes(config, state)
        if effective is None:
            log.info(
                "export %s is declared but was removed at run time; `nbdzram exports add` brings it back", config.name
            )
        elif config.name in found:
            placed.append(_find_again(effective, *found.pop(config.name)))
        else:
            disk = pools[config.pool].create(config.name, effective.size_bytes, read_only=effective.read_only)
            placed.append(Placed(disk, effective))
    for name, (disk, pool_name) in found.items():
        if _removed(name, state):
            pools[pool_name].delete(disk)  # the server died between remembering the removal and doing it
        else:
            placed.append(_kept(name, disk, pool_name, state))
    return placed


def _found(pools: Mapping[str, Pool]) -> dict[str, tuple[Disk, str]]:
    found: dict[str, tuple[Disk, str]] = {}
    for pool_name, pool in pools.items():
        for disk in pool.disks():
            if disk.name in found:
                raise UserError(
                    f"the export '{disk.name}' lies in the pool '{pool_name}' and in the pool '{found[disk.name][1]}'; "
                    f"move one of the two .pool files out of the state directory"
                )
            found[disk.name] = (disk, pool_name)
    return found


def _with_changes(config: ExportConfig, state: State) -> ExportConfig | None:
    """The declaration as it was changed at run time; None if that removed it."""
    change = state.changes.exports.get(config.name)
    if change is None or change.declared_size_bytes != config.size_bytes:
        return config
    return None if change.removed else dataclasses.replace(config, size_bytes=change.size_bytes)


def _find_again(config: ExportConfig, disk: Disk, pool_name: str) -> Placed:
    if pool_name != config.pool:
        raise ConfigError(
            f"the export '{config.name}' lies in the pool '{pool_name}', but is declared in '{config.pool}'; "
            f"declare it where it lies, or copy its content to an export of another name"
        )
    if config.size_bytes < disk.size_bytes:
        raise ConfigError(
            f"the export '{config.name}' has {format_size(disk.size_bytes)}, but is declared with "
            f"{format_size(config.size_bytes)}; declare its size, or shrink it with `nbdzram exports resize --force`"
        )
    if config.size_bytes > disk.size_bytes:
        disk.resize(config.size_bytes)
    return Placed(disk, config)


def _kept(name: str, disk: Disk, pool_name: str, state: State) -> Placed:
    change = state.changes.exports.get(name)
    config = ExportConfig(
        name=name,
        size_bytes=disk.size_bytes,
        pool=pool_name,
        read_only=change.read_only if change else disk.read_only,
        description=change.description if change else "",
    )
    return Placed(disk, config)


def _removed(name: str, state: State) -> bool:
    change = state.changes.exports.get(name)
    return change is not None and change.removed
