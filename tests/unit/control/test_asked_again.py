"""Who looks at a server that another process takes over sees the one, and then the other."""

from __future__ import annotations

import asyncio
import os
import pty
import socket
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdzram.control import messages
from nbdzram.control.client import ControlClient
from nbdzram.control.methods import method_table
from nbdzram.control.server import ControlServer
from nbdzram.errors import ServerUnreachable
from nbdzram.ready import readable
from tests.unit.cli.conftest import NBDZRAM
from tests.unit.control.test_control import RecordedOperations

TAKEOVERS = 100


async def taken_over(server: ControlServer, operations: RecordedOperations) -> ControlServer:
    following = ControlServer(server.path, method_table(operations, operations), listening=server.surrender())
    await server.stop()
    await following.start()
    return following


@pytest.mark.parametrize("look", ["status", "clients", "runs", "streams", "usage"])
def test_a_look_is_answered_by_whoever_took_over(tmp_path: Path, look: str) -> None:
    """`top` goes on through an upgrade."""
    operations = RecordedOperations()

    async def act() -> None:
        server = ControlServer(tmp_path / "c", method_table(operations, operations))
        await server.start()
        with await asyncio.to_thread(ControlClient, tmp_path / "c") as client:
            for _ in range(2):
                before = await asyncio.to_thread(client.call, look)
                server = await taken_over(server, operations)
                assert await asyncio.to_thread(client.call, look) == before
        await server.stop()

    asyncio.run(act())


@pytest.mark.parametrize(("method", "times"), [("run", 1), ("clients", 2)])
def test_what_was_read_is_asked_for_again_if_it_is_a_look(tmp_path: Path, method: str, times: int) -> None:
    """Of an act nobody knows how much is done."""
    came = 0
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "c"))
        server.listen()
        with ThreadPoolExecutor(1) as threads, ControlClient(tmp_path / "c") as client:
            params: dict[str, Any] = {"kind": "fold"} if method == "run" else {}
            asked = threads.submit(client.call, method, **params)
            while not asked.done():
                if readable(server.fileno(), seconds=0.01):
                    came += 1
                    with server.accept()[0] as connection:
                        connection.recv(1 << 16)
            with pytest.raises(ServerUnreachable, match="went away"):
                asked.result()
    assert came == times


def test_what_a_server_that_ends_has_read_is_answered(tmp_path: Path) -> None:
    """It has come whole, and nobody could tell that it is not done."""
    operations = RecordedOperations()

    async def act() -> bytes:
        server = ControlServer(tmp_path / "c", method_table(operations, operations))
        await server.start()
        reader, writer = await asyncio.open_unix_connection(tmp_path / "c")
        while not server._conversations:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        (conversation,) = server._conversations.values()
        conversation.reader.feed_data(messages.request("clients", {}, 1))  # as it comes just now
        await server.stop()
        answer = await reader.readline()
        writer.close()
        await writer.wait_closed()
        return answer

    assert b'"result"' in asyncio.run(act())


def test_an_act_is_done_once_whoever_takes_over_meanwhile(tmp_path: Path) -> None:
    """What a server that hung up had not read is asked of the next; what it had read it has answered."""
    operations = RecordedOperations()
    ended = threading.Event()
    names: list[str] = []

    def ask() -> None:
        while not ended.is_set():
            with ControlClient(tmp_path / "c") as client:
                for _ in range(2):
                    names.append(f"{len(names)}")
                    client.call("exports.rename", name="disk", new_name=names[-1])

    async def act() -> None:
        server = ControlServer(tmp_path / "c", method_table(operations, operations))
        await server.start()
        asking = asyncio.create_task(asyncio.to_thread(ask))
        for _ in range(TAKEOVERS):
            before = len(operations.asked)
            server = await taken_over(server, operations)
            while len(operations.asked) == before and not asking.done():  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0)
        ended.set()
        await asking
        await server.stop()

    asyncio.run(act())
    assert operations.asked == [("disk", name) for name in names]


@asynccontextmanager
async def asked(*words: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """A command that asks somebody, and the terminal where he answers."""
    ours, theirs = pty.openpty()
    pipe = asyncio.subprocess.PIPE
    command = await asyncio.create_subprocess_exec(*NBDZRAM, *words, stdin=theirs, stdout=pipe, stderr=pipe)
    os.close(theirs)
    try:
        yield command, ours
    finally:
        os.close(ours)
        await command.wait()


@pytest.mark.parametrize("goes_on", [True, False])
def test_who_thinks_while_another_process_takes_over_is_asked_again(tmp_path: Path, goes_on: bool) -> None:
    """He agreed to what the one before would have destroyed; it ended with "went away", whatever that was."""
    operations = RecordedOperations()

    async def act() -> tuple[int, bytes]:
        server = ControlServer(tmp_path / "c", method_table(operations, operations))
        await server.start()
        async with asked("exports", "resize", "disk", "4096", "--control", str(server.path)) as (command, terminal):
            assert command.stderr is not None
            told = await command.stderr.readuntil(b"[y/N]: ")
            if goes_on:
                server = await taken_over(server, operations)
            else:
                await server.stop()
            os.write(terminal, b"y\ny\n")
            told += await command.stderr.read()
        await server.stop()
        return await command.wait(), told

    code, told = asyncio.run(act())
    assert told.count(b"to shrink disk destroys 4K of content; go on?") == 1 + goes_on
    assert (code, operations.asked) == ((0, [("disk", 4096, True, False)]) if goes_on else (3, []))
    assert (b"another server answers" if goes_on else b"no server answers") in told
