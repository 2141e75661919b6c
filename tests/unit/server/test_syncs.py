"""FLUSH and FUA on an arena that lies on a disk: answered once it is there, by few syncs, and never on the loop."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from nbdzram.config import EVERYONE
from nbdzram.engine.pool import Pool
from nbdzram.machine import Machine
from nbdzram.nbd.constants import Error
from nbdzram.server.exports import Export
from nbdzram.server.syncs import ArenaSync, Syncs
from tests.unit.server.conftest import Play, Stage
from tests.unit.server.house import UNCHANGED, House
from tests.wire import CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES

BLOCK, MIB = 4096, 1 << 20
FUA = 1


class Disk:
    """Stands for fdatasync: a gate that opens when the test says so, and counts who went through."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.began = threading.Semaphore(0)
        self.count = 0
        self.error = 0
        self.threads: set[str] = set()

    def fdatasync(self, descriptor: int) -> None:
        assert os.fstat(descriptor).st_size > 0
        self.count += 1
        self.threads.add(threading.current_thread().name)
        self.began.release()
        assert self.gate.wait(60)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk()
    monkeypatch.setattr(os, "fdatasync", made.fdatasync)
    return made


@pytest.fixture
def on_disk(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """A stage whose export `lasting` lies in a file that counts as one on a disk."""
    monkeypatch.setattr(Machine, "keeps_in_memory", lambda *_: False)
    with Pool(path=str(tmp_path / "arena")) as pool:
        lasting = pool.create("lasting", 16 * MIB)
        stage.exports.add(Export(name="lasting", disk=lasting, pool_name="default", access=EVERYONE, read_only=False))
        yield stage


async def began(disk: Disk) -> None:
    """Wait for the next sync to begin, off the loop."""
    assert await asyncio.to_thread(disk.began.acquire, timeout=60)


@pytest.mark.usefixtures("on_disk")
def test_a_flush_is_answered_after_the_sync_and_others_are_served_meanwhile(play: Play, disk: Disk) -> None:
    async def story(stage: Stage) -> None:
        client, other = await stage.client(b"lasting"), await stage.client(b"lasting")
        await client.write(0, b"a" * BLOCK)
        flush = asyncio.ensure_future(client.call(CMD_FLUSH, 0, 0))
        await began(disk)
        assert await other.read(0, BLOCK) == b"a" * BLOCK  # the loop does not wait
        assert not flush.done()
        disk.gate.set()
        assert (await flush).error == 0
        assert disk.count == 1
        assert all(name.startswith("nbdzram-sync") for name in disk.threads)
        await client.close()
        await other.close()

    play(story)


@pytest.mark.usefixtures("on_disk")
@pytest.mark.parametrize(
    ("command", "length"),
    [(CMD_WRITE, BLOCK), (CMD_WRITE, MIB), (CMD_TRIM, BLOCK), (CMD_TRIM, 8 * MIB), (CMD_WRITE_ZEROES, 8 * MIB)],
)
def test_fua_waits_for_the_disk_small_and_large(play: Play, disk: Disk, command: int, length: int) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client(b"lasting")
        payload = b"a" * length if command == CMD_WRITE else b""
        asked = asyncio.ensure_future(client.call(command, 0, length, flags=FUA, payload=payload))
        await began(disk)
        assert not asked.done()
        disk.gate.set()
        assert (await asked).error == 0
        assert (await client.call(command, 0, length, payload=payload)).error == 0
        await client.call(CMD_READ, 0, BLOCK, flags=FUA)
        assert disk.count == 1
        await client.close()

    play(story)


@pytest.mark.usefixtures("on_disk")
def test_a_sync_that_failed_is_told_and_no_later_one_claims_success(play: Play, disk: Disk) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client(b"lasting")
        disk.error = errno.EIO
        disk.gate.set()
        assert (await client.call(CMD_FLUSH, 0, 0)).error == Error.EIO
        disk.error = 0
        assert (await client.call(CMD_FLUSH, 0, 0)).error == Error.EIO
        assert all(name.startswith("nbdzram-sync") for name in disk.threads)
        assert (await client.call(CMD_WRITE, 0, BLOCK, payload=b"b" * BLOCK)).error == 0
        assert await client.read(0, BLOCK) == b"b" * BLOCK
        await client.close()

    play(story)


@pytest.mark.usefixtures("on_disk")
def test_a_client_that_leaves_while_its_flush_waits_is_forgotten(play: Play, disk: Disk) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client(b"lasting")
        client.ask(CMD_FLUSH, 0, 0)
        await began(disk)
        await client.close()
        disk.gate.set()
        other = await stage.client(b"lasting")
        assert (await other.call(CMD_FLUSH, 0, 0)).error == 0
        await other.close()

    play(story)


def test_in_memory_nobody_waits(play: Play, disk: Disk) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client(b"disk")
        assert (await client.call(CMD_FLUSH, 0, 0)).error == 0
        assert (await client.call(CMD_WRITE, 0, BLOCK, flags=FUA, payload=b"a" * BLOCK)).error == 0
        assert disk.count == 0
        await client.close()

    play(story)


def test_however_many_ask_one_sync_runs_and_one_waits(tmp_path: Path, disk: Disk) -> None:
    file = tmp_path / "arena"
    file.write_bytes(b"x")

    async def story() -> None:
        sync = ArenaSync(file)
        first = asyncio.ensure_future(sync.synced())
        await began(disk)
        late = [asyncio.ensure_future(sync.synced()) for _ in range(100)]
        await asyncio.sleep(0)
        assert not any(one.done() for one in late), "the sync under way may have passed their pages already"
        disk.gate.set()
        await asyncio.gather(first, *late)
        assert disk.count == 2
        sync.close()

    uvloop.run(story())


def test_a_pool_made_anew_under_the_same_name_is_synced_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "keeps_in_memory", lambda *_: False)
    file, syncs = tmp_path / "arena", Syncs()
    file.write_bytes(b"x")
    old = syncs.of("lasting", str(file))
    assert syncs.of("lasting", str(file)) is old
    kept = file.rename(tmp_path / "old")  # so that its number is not used again
    file.write_bytes(b"y")
    assert syncs.of("lasting", str(file)) is not old
    syncs.close()
    for thread in threading.enumerate():
        if thread.name.startswith("nbdzram-sync"):
            thread.join()
    held = {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    assert not held & {str(kept), str(file)}, "who asked for syncs of a file that is gone keeps it"


def test_a_pool_that_is_removed_takes_no_room_on_the_disk_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that somebody has open keeps all of it until the server ends."""
    monkeypatch.setattr(Machine, "keeps_in_memory", lambda *_: False)

    def is_open() -> bool:
        files = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return any("second.pool" in name for name in files)

    async def story() -> None:
        house = House(tmp_path)
        async with house.open() as changes:
            await changes.add_pool("second", MIB, "fold")
            await changes.add_export("brief", MIB, **UNCHANGED, pool="second")
            client = await house.client(b"brief")
            assert (await client.call(CMD_FLUSH, 0, 0)).error == 0
            await client.close()
            await changes.remove_export("brief", force=True)
            await changes.remove_pool("second")
            for _ in range(10000):  # a thread closes it, behind whatever sync is under way
                if not is_open():
                    break
                await asyncio.to_thread(int)
            assert not is_open()

    uvloop.run(story())


def test_where_a_file_lies_is_read_from_the_mounts(tmp_path: Path) -> None:
    def machine(kind: str, device: Callable[[os.stat_result], str]) -> Machine:
        place = tmp_path / kind
        place.mkdir()
        (place / "mountinfo").write_text(f"30 23 {device(place.stat())} / /x rw - {kind} {kind} rw\n")
        return Machine(place)

    def here(found: os.stat_result) -> str:
        return f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}"

    assert machine("tmpfs", here).keeps_in_memory(tmp_path)
    assert not machine("ext4", here).keeps_in_memory(tmp_path)
    assert not machine("ramfs", lambda _: "99:99").keeps_in_memory(tmp_path), "unknown counts as a disk"


@pytest.mark.usefixtures("on_disk")
def test_a_sync_that_cannot_begin_is_an_answer_and_not_a_client_that_waits_for_ever(
    play: Play, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No thread can be started, say: the FLUSH fails, the next one is tried, and the client leaves as ever."""

    async def story(stage: Stage) -> None:
        told: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        client = await stage.client(b"lasting")
        with monkeypatch.context() as broken:

            async def refuse(_: ArenaSync) -> None:
                raise RuntimeError("can't start new thread")

            broken.setattr(ArenaSync, "synced", refuse)
            async with asyncio.timeout(20):
                assert (await client.call(CMD_FLUSH, 0, 0)).error == Error.EIO
        assert len(told) == 1
        disk.gate.set()
        assert (await client.call(CMD_FLUSH, 0, 0)).error == 0
        await client.close()

    play(story)
