"""One walk serves everyone who asks while it is fresh, and a new export is found by the next."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nbdzram.config import EVERYONE
from nbdzram.engine.pool import Pool
from nbdzram.server.exports import Export, Exports
from nbdzram.server.usage import REST, Usages

BLOCK = bytes(range(256)) * 16


def offered(pool: Pool, *names: str) -> Exports:
    """New disks of 1 MiB, which admit everyone."""
    exports = Exports()
    for name in names:
        disk = pool.create(name, 1 << 20)
        exports.add(Export(name=name, disk=disk, pool_name="default", access=EVERYONE, read_only=False))
    return exports


def test_a_walk_tells_what_each_exports_blocks_cost() -> None:
    async def act() -> None:
        with Pool() as pool:
            exports = offered(pool, "one", "two")
            exports.get("one").disk.write(0, BLOCK + bytes(4096))
            found = await Usages(exports).now()
            assert found == {export.name: export.disk.usage() for export in exports}
            assert found["one"].stored == 8192
            assert found["one"].same_filled == 4096

    asyncio.run(act())


def test_askers_share_a_walk_and_none_starts_after_stop() -> None:
    async def act() -> None:
        with Pool() as pool:
            exports = offered(pool, "disk")
            usages = Usages(exports)
            first, second = await asyncio.gather(usages.now(), usages.now())
            assert first is second  # whoever waited got the walk that was under way
            await usages.stop()
            exports.get("disk").disk.write(0, BLOCK)
            assert (await usages.now())["disk"].stored == 0

    asyncio.run(act())


def test_an_export_that_is_new_has_its_figures_at_once() -> None:
    """A clone shares what was its source's alone: the walk before it would be wrong of both."""

    async def act() -> None:
        with Pool() as pool:
            exports = offered(pool, "disk")
            disk = exports.get("disk").disk
            disk.write(0, BLOCK)
            usages = Usages(exports)
            assert (await usages.now())["disk"].unique > 0
            clone = pool.clone(disk, "clone")
            exports.add(Export(name="clone", disk=clone, pool_name="default", access=EVERYONE, read_only=False))
            found = await usages.now()
            assert found["clone"].stored == 4096
            assert found["disk"].unique == 0
            await usages.stop()

    asyncio.run(act())


def test_who_cannot_wait_gets_the_last_walk_with_its_age_and_the_next_begins() -> None:
    async def act() -> None:
        with Pool() as pool:
            exports = offered(pool, "disk")
            usages = Usages(exports)
            assert usages.so_far() == ({}, None)
            while usages.so_far()[1] is None:  # noqa: ASYNC110 - nothing but time passes between two looks
                await asyncio.sleep(0)
            found, age = usages.so_far()
            assert found["disk"].stored == 0
            assert age is not None
            assert age >= 0
            await usages.stop()

    asyncio.run(act())


def test_a_walk_is_followed_by_a_rest_for_what_it_took_of_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds are: three minutes. Then the next one begins."""
    real, passed_seconds, spent_seconds = time.monotonic, [0.0], itertools.count(0, 10)
    monkeypatch.setattr(time, "monotonic", lambda: real() + passed_seconds[0])
    monkeypatch.setattr(time, "thread_time", lambda: next(spent_seconds))

    async def act() -> None:
        with Pool() as pool:
            exports = offered(pool, "disk")
            usages = Usages(exports)
            assert (await usages.now())["disk"].stored == 0
            exports.get("disk").disk.write(0, BLOCK)
            passed_seconds[0] += 10 * (REST - 1)
            assert (await usages.now())["disk"].stored == 0
            passed_seconds[0] += 10
            assert (await usages.now())["disk"].stored == 4096
            await usages.stop()

    asyncio.run(act())


def test_a_walk_that_had_to_wait_is_followed_by_no_longer_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a walk of a millisecond waited a second for its thread, and nobody looked for twenty more."""
    real, passed_seconds = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + passed_seconds[0])

    async def act() -> None:
        with Pool() as pool, ThreadPoolExecutor(1) as threads:
            asyncio.get_running_loop().set_default_executor(threads)
            exports = offered(pool, "disk")
            usages = Usages(exports)
            free = threading.Event()
            threads.submit(free.wait)  # the only thread is somebody else's
            waiting = asyncio.create_task(usages.now())
            for _ in ("the asker", "its walk"):  # each has its turn, and then waits: the walk for the thread
                await asyncio.sleep(0)
            passed_seconds[0] += 1000
            free.set()
            assert (await waiting)["disk"].stored == 0
            exports.get("disk").disk.write(0, BLOCK)
            passed_seconds[0] += 500  # a walk of an empty disk takes no processor for so long
            assert (await usages.now())["disk"].stored == 4096
            await usages.stop()

    asyncio.run(act())


def test_who_looks_without_waiting_starts_no_walk_either_once_it_is_to_end() -> None:
    async def act() -> None:
        with Pool() as pool:
            usages = Usages(offered(pool, "disk"))
            await usages.stop()
            before = len(asyncio.all_tasks())
            assert usages.so_far() == ({}, None)
            assert len(asyncio.all_tasks()) == before

    asyncio.run(act())
