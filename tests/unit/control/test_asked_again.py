"""Who looks at a server that another process takes over sees the one, and then the other."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nbdzram.control.client import ControlClient
from nbdzram.control.methods import method_table
from nbdzram.control.server import ControlServer
from nbdzram.errors import ServerUnreachable
from tests.unit.control.test_control import RecordedOperations


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
                server = await taken_over(server)
                assert await asyncio.to_thread(client.call, look) == before
            server = await taken_over(server)
            with pytest.raises(ServerUnreachable, match="went away"):
                await asyncio.to_thread(client.call, "run", kind="fold")
        await server.stop()

    async def taken_over(server: ControlServer) -> ControlServer:
        following = ControlServer(server.path, method_table(operations, operations), listening=server.surrender())
        await server.stop()
        await following.start()
        return following

    asyncio.run(act())
    assert not operations.asked
