"""What a start, or a takeover, leaves behind that comes to nothing; and who waits for a journal that does not begin."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from nbdzram.config import Limits, TcpAddress
from nbdzram.errors import UserError
from nbdzram.server import checkpoints as checkpoints_module
from nbdzram.server import listener, segments, settling
from nbdzram.server.handover import FORMAT, KNOWS, Handover
from nbdzram.server.service import Service
from nbdzram.stream.journal import Segment
from tests.support.loop_client import WireClient
from tests.unit.engine.blocks import BLOCK, text
from tests.unit.server.house import until
from tests.unit.server.lasting import (
    ADDED,
    Gate,
    Platter,
    as_the_power_left_it,
    asked,
    begun_from,
    checkpointing,
    disk,
    files,
    flushing,
    flushing_config,
    journal,
    of,
    play,
    whole,
)
from tests.unit.server.test_goes_on import listening
from tests.wire import CMD_FLUSH, request

PATIENCE_SECONDS = 60


def given_again(ours: Handover) -> Handover:
    """What another process has of it."""
    given, taken = socket.socketpair()
    with given, taken:
        ours.give(given)
        return Handover.take(taken)


async def taken_from(service: Service) -> tuple[Handover, Handover]:
    """What it keeps to go on with, and what another process has of it."""
    service._nbd.prepare_to_hand_over()
    ours = await service.hand_over()
    return ours, given_again(ours)


def failures(service: Service) -> int:
    status = of(service).status
    assert status is not None
    return status.failures


def content(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in files(directory)}


@pytest.mark.parametrize("wrote", [False, True], ids=["which wrote nothing", "which had written"])
def test_the_journal_goes_on_behind_a_takeover_that_came_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrote: bool
) -> None:
    """No client waits for a checkpoint of whoever did not serve, nor of who goes on, unless more was written."""

    async def story() -> None:
        kept = tmp_path / "kept"
        service = Service(flushing_config(kept, unix=listening(tmp_path)))
        await service.start()
        disk(service).write(0, text(0))
        await journal(service).synced()
        async with of(service)._turn:
            pass  # and what the first checkpoint leads to has ended
        gate = Gate(monkeypatch)
        gate.opened.set()
        ours, first = await taken_from(service)
        before = content(kept)
        for theirs in [first] if wrote else [first, given_again(ours), given_again(ours)]:
            following = Service(service.config, handed=theirs)
            await following.start(listen=False, serves=False)
            if wrote:
                await journal(following).synced()
            await following.stop(served=False)
            theirs.close()
        after = content(kept)
        assert not gate.reached.is_set()
        assert before.items() <= after.items()
        back = Service(service.config, handed=ours)
        await back.start(listen=False)
        assert journal(back).status.usable != wrote
        gate.opened.clear()
        await back.listen()
        try:
            if not wrote:
                disk(back).write(BLOCK, text(1))
                await journal(back).synced()
                cut = as_the_power_left_it(kept, tmp_path / "cut")
                assert len(list(cut.glob("*.journal"))) == 2
        finally:
            gate.opened.set()
            await back.stop()
        if not wrote:
            assert (await begun_from(cut))[: 2 * BLOCK] == text(0) + text(1)

    play(story)


def test_who_cannot_go_on_behind_a_takeover_that_came_to_nothing_takes_a_last_checkpoint(tmp_path: Path) -> None:
    """As it has no thread for clients, say: what it served is nowhere else."""

    async def story() -> None:
        kept = tmp_path / "kept"
        async with checkpointing(kept, unix=listening(tmp_path)) as service:
            await service.listen()
            disk(service).write(0, text(0))
            ours, theirs = await taken_from(service)
            theirs.close()
            back = Service(service.config, handed=ours)
            await back.start(listen=False, serves=False)
            await back.stop(served=False)
            ours.close()
        async with checkpointing(kept) as following:
            assert whole(disk(following))[:BLOCK] == text(0)

    play(story)


def test_nothing_is_written_before_the_word_that_it_serves(tmp_path: Path) -> None:
    """Until then the other process may go on with the directory."""

    async def story() -> None:
        kept = tmp_path / "kept"
        service = Service(flushing_config(kept, unix=listening(tmp_path)))
        await service.start()
        disk(service).write(0, text(0))
        await journal(service).synced()
        async with of(service)._turn:
            pass
        ours, theirs = await taken_from(service)
        ours.close()
        following = Service(service.config, handed=theirs)
        await following.start(listen=False, serves=False)
        begun: list[dict[str, bytes]] = []

        def confirm() -> None:
            begun.append(content(kept))

        for _ in range(10):  # whatever is to begin by itself has begun
            await asyncio.sleep(0)
        await following._checkpoints._moments.on_the_thread(lambda: None)
        before = content(kept)
        await following.listen(confirm)
        assert begun == [before]
        (newest,) = [path for path in kept.glob("*.journal") if path.name == max(before)]
        assert not list(Segment(newest).groups())
        await until(lambda: journal(following).status.groups)  # the first checkpoint begins with one
        await following.stop()

    play(story)


@pytest.mark.parametrize("durable", [False, True], ids=["checkpoints", "with a journal"])
def test_starts_that_do_not_come_to_serve_push_no_checkpoint_out(tmp_path: Path, durable: bool) -> None:
    """A unit that is started again and again, as its port is in use, say, leaves what an operator may go back to."""
    opened: Any = flushing if durable else checkpointing

    async def story() -> None:
        kept = tmp_path / "kept"
        for number in range(2):
            async with opened(kept) as service:
                disk(service).write(number * BLOCK, text(number))
                await of(service).take()
        stood = sorted(kept.glob("*.stream"))
        config = service.config
        for _ in range(3):
            service = Service(config)
            await service.start(listen=False, serves=False)
            await service.stop(served=False)
        assert sorted(kept.glob("*.stream")) == stood
        async with opened(kept) as service:
            assert whole(disk(service))[: 2 * BLOCK] == text(0) + text(1)

    play(story)


def test_a_group_that_is_under_way_is_whole_before_its_file_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an administrator, as a start is given up, or of who was cut: another file may have its descriptor then."""

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            platter = Platter(monkeypatch)
            platter.opened.clear()
            disk(service).write(0, text(0))
            waiting = asyncio.ensure_future(journal(service).synced())
            await until(platter.reached.is_set)
            closing = asyncio.ensure_future(journal(service).close())
            for _ in range(10):  # whatever it does without waiting is done
                await asyncio.sleep(0)
            platter.opened.set()
            await asyncio.gather(waiting, closing)
            assert journal(service).status.failures == 0
            with pytest.raises(OSError, match="the server stops"):
                await journal(service).synced()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        assert (await begun_from(left))[:BLOCK] == text(0)

    play(story)


def test_an_administrator_is_answered_before_clients_are_let_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where images are loaded first, for minutes: what he changed waits for the first checkpoint."""
    monkeypatch.setattr(settling, "SETTLE_SECONDS", 5)

    async def story() -> None:
        service = Service(flushing_config(tmp_path / "kept"))
        await service.start(listen=False, serves=False)
        await asked(service, "exports.add", name="more", size_bytes=BLOCK, **ADDED)
        left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        await service.stop(served=False)
        async with flushing(left, begun=False) as service:
            assert disk(service, "more").size_bytes == BLOCK

    play(story)


# ---- FLUSH that waits for a journal which cannot begin ----


@asynccontextmanager
async def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Service, WireClient]]:
    """A client whose FLUSH waits for a first checkpoint for which there is no room."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints_module, "_write_all", full)
    monkeypatch.setattr(listener, "REST_SECONDS", 0.05)
    limits = Limits(drain_seconds=0.05)
    tcp = (TcpAddress(host="127.0.0.1", port=0),)
    service = Service(flushing_config(tmp_path / "kept", unix=listening(tmp_path), tcp=tcp, limits=limits))
    await service.start()
    client = await (await WireClient.connect(str(tmp_path / "socket"))).go()
    client.writer.write(request(CMD_FLUSH, 0, 0))
    await until(lambda: journal(service)._next or journal(service)._running)
    try:
        yield service, client
    except BaseException:
        await service.stop()
        raise
    assert await client.at_end(), "hung up on, and told of no error"
    await client.close()


@pytest.mark.parametrize("how", ["stop", "remove"])
def test_who_is_cut_waits_for_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Nor does who stops the server, or removes the export: a full directory would keep them for ever."""

    async def story() -> None:
        async with waiting(tmp_path, monkeypatch) as (service, _):
            if how == "remove":
                removing = service.changes.remove_export("disk", force=True)
                await asyncio.wait_for(removing, PATIENCE_SECONDS)
                assert not list(service._exports)
            await asyncio.wait_for(service.stop(), PATIENCE_SECONDS)

    play(story)


def test_whose_connection_broke_waits_for_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or who comes again and again would have all places for connections."""

    async def story() -> None:
        async with waiting(tmp_path, monkeypatch) as (service, _):
            (port,) = [urlsplit(uri).port for uri in service._nbd.uris if uri.startswith("nbd://")]
            other = await (await WireClient.over(await asyncio.open_connection("127.0.0.1", port))).go()
            other.writer.write(request(CMD_FLUSH, 0, 0))
            await until(lambda: [client.in_flight for client in service.clients()] == [1, 1])
            line = other.writer.get_extra_info("socket")
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            other.writer.transport.abort()
            await until(lambda: len(service.clients()) == 1, PATIENCE_SECONDS)
            await service.stop()

    play(story)


def test_clients_of_a_takeover_wait_for_nobody_who_waits_for_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with waiting(tmp_path, monkeypatch) as (service, _):
            other = await (await WireClient.connect(str(tmp_path / "socket"))).go()
            await until(lambda: len(service.clients()) == 2)
            service._nbd.prepare_to_hand_over()
            handed = await asyncio.wait_for(service.hand_over(), PATIENCE_SECONDS)
            assert [client.number for client in handed.clients] == [2]
            handed.close()
            await other.close()

    play(story)


def test_nothing_is_taken_over_while_clients_would_be_hung_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with waiting(tmp_path, monkeypatch) as (service, _):
            await until(lambda: failures(service))
            with pytest.raises(UserError, match="waits for a first checkpoint, which failed"):
                await service.takeover(str(tmp_path / "nobody"), os.getpid(), FORMAT, KNOWS, "", unit="")
            assert not service.taken_over.is_set()
            await service.stop()

    play(story)


# ---- copies by links ----


def test_what_a_copy_by_links_has_too_is_written_by_nobody(tmp_path: Path) -> None:
    """`cp -al`, or what backups make: two servers that use one file again would write over each other's journal."""

    async def story() -> None:
        kept, copy = tmp_path / "kept", tmp_path / "copy"
        async with flushing(kept) as service:
            disk(service).write(0, text(0))
            await of(service).take()
            assert (kept / segments.SPARE).exists()
            shutil.copytree(kept, copy, copy_function=os.link)
            disk(service).write(BLOCK, text(1))
            await of(service).take()  # its journal of before ends with this, by either name
            disk(service).write(2 * BLOCK, text(2))
            async with flushing(copy, begun=False) as other:
                await of(other).take()
                disk(other).write(3 * BLOCK, text(3))
                await journal(other).synced()
                await journal(service).synced()
                left = [as_the_power_left_it(one, tmp_path / f"left-{one.name}") for one in (kept, copy)]
        assert (await begun_from(left[0]))[: 4 * BLOCK] == text(0) + text(1) + text(2) + bytes(BLOCK)
        assert (await begun_from(left[1]))[: 4 * BLOCK] == text(0) + text(1) + bytes(BLOCK) + text(3)

    play(story)
