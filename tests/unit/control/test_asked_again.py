"""Who looks at a server that another process takes over sees the one, and then the other."""

from __future__ import annotations

import asyncio
import os
import pty
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdzram.control.client import ControlClient
from nbdzram.control.methods import method_table
from nbdzram.control.server import ControlServer
from nbdzram.errors import ServerUnreachable
from tests.unit.cli.conftest import NBDZRAM
from tests.unit.control.test_control import RecordedOperations


async def taken_over(server: ControlServer, operations: RecordedOperations) -> ControlServer:
    following = ControlServer(server.path, method_table(operations, operations), listening=server.surrender())
    await server.stop()
    await following.start()
    return following


@pytest.mark.parametrize("look", ["status", "clients", "runs", "streams", "usage"])
def test_a_look_is_answered_by_whoever_took_over_and_what_acts_is_not_asked_for_again(
    tmp_path: Path, look: str
) -> None:
    """`top` goes on through an upgrade; and nobody knows how much of an act that was cut off is done."""
    operations = RecordedOperations()

    async def act() -> None:
        server = ControlServer(tmp_path / "c", method_table(operations, operations))
        await server.start()
        with await asyncio.to_thread(ControlClient, tmp_path / "c") as client:
            for _ in range(2):
                before = await asyncio.to_thread(client.call, look)
                server = await taken_over(server, operations)
                assert await asyncio.to_thread(client.call, look) == before
            server = await taken_over(server, operations)
            with pytest.raises(ServerUnreachable, match="went away"):
                await asyncio.to_thread(client.call, "run", kind="fold")
        await server.stop()

    asyncio.run(act())
    assert not operations.asked


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
