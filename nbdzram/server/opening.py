"""Opening: what the state remembers, and every pool with what its arena holds; the first of a start, and most of it.

It waits for files and for the engine's threads, so that a process which starts imports the rest of itself meanwhile:
Opening is a thread of its own, and this module knows little that takes long to import.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Self

from nbdzram.config import Dedup, Durability, PoolConfig, ServerConfig
from nbdzram.engine import moment
from nbdzram.engine.pool import Pool
from nbdzram.errors import ArenaInUse, UserError
from nbdzram.machine import Machine
from nbdzram.server.chains import checkpoints_in
from nbdzram.server.claim import Claim
from nbdzram.server.state import ExportRecord, Kept, Noted, PoolChange, State, noted_in

IN_USE_SECONDS, IN_USE_LOOK_SECONDS = 1.0, 0.02
"""A process that is killed hangs up before it has let everything go: whoever then goes on in its place may be first."""

log = logging.getLogger("nbdzram.server")


@dataclass(frozen=True, slots=True)
class Opened:
    """What a start goes on with, and closes where it fails."""

    state: State
    claim: Claim | None  # of the directory of checkpoints
    known: Noted  # beside them, as they do not tell it
    pools: dict[str, Pool]

    def close(self) -> None:
        """Nobody goes on with it."""
        if self.claim is not None:
            self.claim.release()
        for pool in self.pools.values():
            pool.close()


class Opening:
    """An opening under way. Whoever waits for what is `opened` has it; else it is closed at the end of `with`."""

    def __init__(self, config: ServerConfig, kept: Kept | None = None) -> None:
        """Begin, with what was `kept` of the process before this one."""
        self._future: Future[Opened] | None = Future()
        self._thread = Thread(target=_open, args=(self._future, config, kept), name="opening")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        if self._future is not None and self._future.exception() is None:
            self._future.result().close()

    async def opened(self) -> Opened:
        """All of it, which is the caller's then, once. Raises UserError, and then there is nothing to close."""
        assert self._future is not None
        opened = await asyncio.shield(asyncio.wrap_future(self._future))
        self._future = None  # a pool's memory goes when nobody knows of it any more
        return opened


def _open(future: Future[Opened], config: ServerConfig, kept: Kept | None) -> None:
    try:
        future.set_result(open_everything(config, kept))
    except BaseException as error:  # noqa: BLE001 - it is raised where somebody waits
        future.set_exception(error)


def open_everything(config: ServerConfig, kept: Kept | None = None) -> Opened:
    """The state and the pools of a configuration. Raises UserError; then none stays open."""
    state = State(config.state_dir, kept)
    claim = _claim(config.checkpoint.directory, comes_back=kept is not None and kept.ours is not None)
    with contextlib.ExitStack() as closing:
        if claim is not None:
            closing.callback(claim.release)
        known = _noted_beside_checkpoints(config, state)
        state.go_on_from(known)
        opened = Opened(state, claim, known, open_pools(config.pools, state, config.checkpoint.directory, known))
        closing.pop_all()
        return opened


def durable_pools(config: ServerConfig) -> list[str]:
    """The names of those whose FLUSH is answered by a journal."""
    return [pool.name for pool in config.pools if pool.durability is Durability.FLUSH]


def _claim(directory: Path | None, *, comes_back: bool) -> Claim | None:
    """Of the directory of checkpoints, before anything there is read: a server that ends writes what it was told last.

    Waits for one that is ending. Raises UserError: another server has it; who goes on with clients does so without.
    """
    if directory is None:
        return None
    claim, until = Claim(directory), time.monotonic() + IN_USE_SECONDS
    while True:
        try:
            claim.take()
        except OSError:  # whoever needs it says so: checkpoints.py
            return claim
        except UserError:
            if comes_back:
                return claim
            if time.monotonic() >= until:
                raise
            time.sleep(IN_USE_LOOK_SECONDS)
        else:
            return claim


def _noted_beside_checkpoints(config: ServerConfig, state: State) -> Noted:
    """What they do not tell; nothing where there are none. Raises UserError: there is nothing else to begin from."""
    directory = config.checkpoint.directory
    if directory is None:
        return Noted()
    try:
        return noted_in(directory)
    except OSError as error:
        refusal = UserError(f"cannot read what was changed beside the checkpoints in {directory}: {error.strerror}")
    except UserError as error:
        refusal = error
    if not state.arenas():
        raise refusal
    log.warning("%s; what the arenas hold is served", refusal)
    return Noted()


def _require_not_lost(pools: Collection[str], state: State, noted: Noted, directory: Path) -> None:
    """Refuse to begin these pools empty beside others that have disks, where some of theirs are in checkpoints: nobody
    asks these then, and they would go in time. Raises UserError.

    noted: beside the checkpoints, of which the disks are where nothing is remembered of them.
    """
    remembered = noted if state.changes.kept_in is None else state.changes
    for name, had in sorted(remembered.exports.items()):
        if had.pool in pools and not had.removed and checkpoints_in(directory):
            is_there = state.holds_nothing(had.pool)
            what = "holds nothing, while other pools do" if is_there else "is not there, as other pools are"
            raise UserError(
                f"{state.arena_path(had.pool)} {what}, and was the pool of the export '{name}': put it back, or move "
                f"the other .pool files away too to begin from the checkpoints in {directory}; or move these away to "
                "begin it empty: they would go in time"
            )


def open_pools(
    declared: Iterable[PoolConfig], state: State, checkpoints: Path | None = None, noted: Noted | None = None
) -> dict[str, Pool]:
    """Every pool that is declared or remembered, opened. Raises UserError; then none stays open.

    checkpoints: the directory where they are, `noted` beside them; no arena is made before those that are there are
    known.
    """
    configs = {pool.name: pool for pool in declared}
    for name, change in state.changes.pools.items():
        config = configs.get(name)
        configs[name] = _as_changed(PoolConfig(name=name), change) if config is None else effective_pool(config, change)
    there = state.arenas()
    for name in sorted(there - configs.keys()):
        log.warning(
            "%s holds the pool '%s', which is neither declared nor remembered; its disks are not offered until it is: "
            "[pools.%s], or `nbdzram pools add %s`",
            *("memory" if state.directory is None else "the state directory", name, name, name),
        )
    with contextlib.ExitStack() as opened:
        lasting = {name for name in there if not state.holds_nothing(name)}
        pools = {name: opened.enter_context(open_pool(configs[name], state)) for name in configs if name in lasting}
        if checkpoints is not None and state.directory is not None and any(pool.disks() for pool in pools.values()):
            _require_not_lost(configs.keys() - lasting, state, noted or Noted(), checkpoints)
        for name in [name for name in configs if name not in lasting]:
            pools[name] = opened.enter_context(open_pool(configs[name], state))
        opened.pop_all()
        return {name: pools[name] for name in configs}


def effective_pool(config: PoolConfig, change: PoolChange | None) -> PoolConfig:
    """The declaration, with what was changed at run time and has not been declared otherwise since, value by value."""
    if change is None or change.declared is None:  # nobody declared it then
        return config
    then, now = _values(change.declared), _values(declared_as(config))
    otherwise = {key for key in then.keys() | now.keys() if then.get(key) != now.get(key)}
    return _as_changed(config, change, but=otherwise)


def remember_as_declared(declared: Iterable[PoolConfig], state: State) -> None:
    """What was declared otherwise since a change holds from here on, also where it is declared as it was then again.

    Writes and syncs a file: not on an event loop. Raises UserError.
    """
    for config in declared:
        change = state.changes.pools.get(config.name)
        if change is not None and change.declared != declared_as(config):
            state.remember_pool(config.name, change_of(effective_pool(config, change), declared_as(config)))


def change_of(config: PoolConfig, declared: str | None) -> PoolChange:
    """What a pool is, as the state remembers it. `declared`: as declared_as says; None: nobody declares it."""
    return PoolChange(
        mem_limit=config.mem_limit,
        dedup=config.dedup,
        verify=config.verify,
        tell_sharing=config.tell_sharing,
        declared=declared,
    )


def _as_changed(config: PoolConfig, change: PoolChange, *, but: Collection[str] = ()) -> PoolConfig:
    said: dict[str, Any] = {
        "mem_limit": change.mem_limit,
        "dedup": Dedup(change.dedup),
        "verify": change.verify,
        "tell_sharing": change.tell_sharing,
    }
    return dataclasses.replace(config, **{key: now for key, now in said.items() if now is not None and key not in but})


def _values(declared: str) -> dict[str, str]:
    """What declared_as wrote, by key; a key that is not there has its default."""
    return dict(word.split("=", 1) for word in declared.split() if "=" in word)


def declared_as(pool: PoolConfig) -> str:
    """A pool's declaration as the state remembers it: where a value reads differently, a run-time change has ended."""
    seldom = f"{'' if pool.verify else ' verify=False'}{' tell_sharing=True' if pool.tell_sharing else ''}"
    return f"mem_limit={pool.mem_limit} dedup={pool.dedup}{seldom}"


def open_pool(config: PoolConfig, state: State) -> Pool:
    """One pool, with what its arena holds. Waits for a process that is ending to let go of it. Raises UserError."""
    state.require_arena(config.name)
    until = time.monotonic() + IN_USE_SECONDS
    while True:
        try:
            pool = _pool(config, state)
        except ArenaInUse:
            if time.monotonic() >= until:
                raise
            time.sleep(IN_USE_LOOK_SECONDS)
        else:
            state.opened_arena(config.name)
            break
    with contextlib.ExitStack() as closing:
        closing.enter_context(pool)
        _reveal_remembered(config.name, pool, state)
        closing.pop_all()
    return pool


def _pool(config: PoolConfig, state: State) -> Pool:
    return Pool(
        mem_limit=config.mem_limit,
        path=state.arena_path(config.name),
        memory=state.arena_memory(config.name),
        inline_dedup=config.dedup is Dedup.INLINE,
        verify=config.verify,
        tell_sharing=config.tell_sharing,
        clock=int(time.time()),
        together=_on_all_processors,
    )


def _on_all_processors(functions: Sequence[Callable[[], None]]) -> None:
    """Each once, by this thread and as many others as there are processors, and as the system gives."""
    left = list(reversed(functions))

    def work() -> None:
        while True:
            try:
                function = left.pop()
            except IndexError:
                return
            function()

    others = min(len(functions), Machine().processors()) - 1
    with ThreadPoolExecutor(max(others, 1), thread_name_prefix="opening") as threads:
        helping = []
        with contextlib.suppress(RuntimeError):  # a limit on threads: then with fewer
            for _ in range(others):
                helping.append(threads.submit(work))
        work()
        for ended in helping:
            ended.result()


def _reveal_remembered(pool_name: str, pool: Pool, state: State) -> None:
    """The server ended while it offered several disks together: all of them if they are remembered, or none."""
    for disk in moment.concealed(pool):
        known = state.changes.exports.get(disk.name) or _rolled_back_from(disk.name, state)
        if known is not None and not known.removed and known.pool == pool_name:
            moment.reveal(disk)
        else:
            log.info("the export '%s' is not offered: the server ended before those that belong with it", disk.name)
            pool.delete(disk)


def _rolled_back_from(name: str, state: State) -> ExportRecord | None:
    return next((known for known in state.changes.exports.values() if known.rolled_back_from == name), None)
