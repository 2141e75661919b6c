"""Clients that another process gave away: what they were told holds, and what their new server requires."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdzram.config import ExportConfig, Limits, ServerConfig, TlsConfig, TlsMode, UnixAddress
from nbdzram.errors import UserError
from nbdzram.server.handover import reach
from nbdzram.server.service import Service
from tests.support.loop_client import WireClient
from tests.support.pki import Pki
from tests.unit.server.house import tell
from tests.unit.server.test_handover import give_back
from tests.wire import CMD_READ, CMD_WRITE, request

MIB = 1 << 20


def served_at(path: Path) -> ServerConfig:
    return ServerConfig(
        tcp=(), unix=(UnixAddress(path=path),), exports=(ExportConfig(name="disk", size_bytes=4 * MIB),)
    )


async def following(config: ServerConfig, before: Service) -> Service:
    service = Service(config, handed=await give_back(before))
    await service.start(listen=False)
    await service.listen()
    return service


def test_a_client_that_was_told_how_much_it_may_send_at_once_may_go_on_to(tmp_path: Path) -> None:
    """As behind a reload: less holds for whoever connects from now on. The kernel does not ask again, and would send
    the same request for ever. So it is however often the disk is taken over, and where a limit is raised."""
    path, content = tmp_path / "s", b"c" * MIB
    config, less = served_at(path), Limits(payload_bytes=64 << 10)

    async def story() -> None:
        service = Service(config)
        await service.start()
        try:
            client = await (await WireClient.connect(str(path))).go()
            service = await following(replace(config, limits=less), service)
            await client.write(0, content)
            newcomer = await (await WireClient.connect(str(path))).go()
            for limits in (less, Limits()):
                assert (await newcomer.call(CMD_READ, 0, MIB)).error == errno.EINVAL
                service = await following(replace(config, limits=limits), service)
                assert await client.read(0, MIB) == content
            newcomer.send(request(CMD_WRITE, 0, MIB))
            assert await newcomer.at_end()
        finally:
            await service.stop()
        for one in (client, newcomer):
            await one.close()

    tell(story())


@pytest.mark.parametrize(("mode", "stays"), [(TlsMode.ON, 1), (TlsMode.REQUIRE, 0)])
def test_nobody_goes_on_without_tls_where_that_is_required_now(tmp_path: Path, mode: TlsMode, stays: int) -> None:
    """Clients that have it are none of those that are given away."""
    config = served_at(tmp_path / "s")
    certificate, key = Pki(tmp_path).issue("localhost", file="server", alternatives="DNS:localhost")

    async def story() -> None:
        service = Service(config)
        await service.start()
        client = await (await WireClient.connect(str(tmp_path / "s"))).go()
        service = await following(replace(config, tls=TlsConfig(mode=mode, certificate=certificate, key=key)), service)
        found = len(service.clients())
        await service.stop()
        assert found == stays
        assert await client.at_end()
        await client.close()

    tell(story())


@pytest.mark.parametrize("told", [{"export": "gone"}, {"size_bytes": 5 * MIB}], ids=["another disk", "more of it"])
def test_whose_disk_is_not_what_it_was_told_is_hung_up_on(
    tmp_path: Path, told: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Who does not hear that waits for answers for ever."""
    config = served_at(tmp_path / "s")

    async def story() -> None:
        service = Service(config)
        await service.start()
        client = await (await WireClient.connect(str(tmp_path / "s"))).go()
        given = await give_back(service)
        given = replace(given, clients=[replace(one, **told) for one in given.clients])
        service = Service(config, handed=given)
        await service.start(listen=False)
        try:
            await service.listen()
            for _ in range(100):  # turns of the loop, each of which looks at what there is
                await asyncio.sleep(0)
            ended = client.reader.at_eof()
        finally:
            await service.stop()
        client.writer.transport.abort()
        assert ended

    tell(story())
    assert "is not what it was; disconnecting" in caplog.text


def test_a_socket_file_that_another_server_put_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"

    async def story() -> None:
        service = Service(served_at(path))
        await service.start()
        path.unlink()
        with socket.socket(socket.AF_UNIX) as successor:
            successor.bind(str(path))
            await service.stop()
            assert path.is_socket()

    tell(story())


def test_who_has_no_descriptor_left_to_reach_its_successor_says_so(tmp_path: Path) -> None:
    """And no trace of ours: nothing happened, and raising the limit helps."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(UserError, match="it has no descriptors left: Too many open files; raise LimitNOFILE="):
            reach(tmp_path / "s")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
