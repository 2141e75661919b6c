"""Connections from accept to the end: handshakes that fail, slow readers, draining, several exports."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from nbdzram.config import Access, Limits, ServerConfig, TcpAddress, UnixAddress
from nbdzram.errors import ConfigError, ExportExists, NoSuchExport, UserError
from nbdzram.nbd.constants import Reply
from nbdzram.server.attached import Attached
from nbdzram.server.exports import Export, Exports, Peer, PeerDirectory
from nbdzram.server.hosting import Hosted
from nbdzram.server.listener import NbdServer
from nbdzram.server.service import Service
from nbdzram.server.sockets import inherited, open_unix
from nbdzram.server.syncs import Syncs
from nbdzram.sessions.line import SocketLine
from nbdzram.unread import UNSENT_BYTES
from tests.support.loop_client import WireClient
from tests.unit.server.conftest import Play, Stage
from tests.wire import OPT_ABORT, OPT_GO, OPT_LIST, client_hello, name_and_infos, option, request

READ, WRITE, DISC, FLUSH = range(4)
STATUS = 7


def test_the_oldest_kind_of_client_is_served(play: Play) -> None:
    async def story(stage: Stage) -> None:
        client = await WireClient.connect(stage.path, client_flags=0)
        client.send(option(1, b"disk"))
        reply = await client.reader.readexactly(134)
        assert int.from_bytes(reply[:8]) == stage.disk.size_bytes
        assert reply[10:] == bytes(124)
        await client.write(0, b"x" * 4096)
        assert await client.read(0, 4096) == b"x" * 4096
        await client.close()

    play(story)


@pytest.mark.parametrize(
    ("sent", "cause"),
    [
        (struct.pack(">I", 4), "client_flags"),
        (struct.pack(">I", 3) + option(1, b"nope"), "unknown_export"),
        (struct.pack(">I", 3) + b"x" * 16, "bad_magic"),
        (struct.pack(">I", 3) + option(99) * 129, "too_many_options"),
    ],
)
def test_a_failed_handshake_is_closed_and_counted_by_cause(play: Play, sent: bytes, cause: str) -> None:
    async def story(stage: Stage) -> None:
        client = await WireClient.connect(stage.path, client_flags=None)
        client.send(sent)
        await client.reader.read()
        assert stage.server.handshake_failures[cause] == 1
        await client.close()

    play(story)


def test_a_handshake_has_a_deadline(play: Play) -> None:
    async def story(stage: Stage) -> None:
        client = await WireClient.connect(stage.path)
        assert await client.at_end()
        assert stage.server.handshake_failures["timeout"] == 1
        await client.close()

    play(story, Limits(handshake_seconds=0.05))


def test_connections_above_the_limit_are_turned_away(play: Play) -> None:
    async def story(stage: Stage) -> None:
        kept = [await stage.client(), await stage.client()]
        late = await WireClient.connect(stage.path)
        with pytest.raises(EOFError):
            await late.option(OPT_GO, name_and_infos(b"disk"))
        assert stage.server.handshake_failures["connection_limit"] == 1
        assert await kept[1].read(0, 512) == bytes(512)
        for client in (*kept, late):
            await client.close()

    play(story, Limits(connections=2))


def test_a_client_that_asks_and_never_reads_is_held_at_bounded_memory(play: Play) -> None:
    """Its reads are not performed ahead of it; a second client is served meanwhile."""

    async def story(stage: Stage) -> None:
        stage.disk.disk.write(0, b"\x07" * (32 << 20))
        hog = await stage.client()
        other = await stage.client()
        hog.writer.transport.pause_reading()  # type: ignore[attr-defined]
        for cookie in range(64):
            hog.ask(READ, 0, 32 << 20, cookie=cookie)
        await hog.writer.drain()
        for _ in range(20):
            assert await other.read(0, 65536) == b"\x07" * 65536
        assert stage.server._hosting is not None
        assert stage.server._hosting.plane.budget.used < 4 << 20  # its window of pieces, and what its socket queues
        assert stage.disk.traffic.operations()["read"].requests == 20
        hog.writer.transport.abort()
        with contextlib.suppress(OSError):
            await hog.writer.wait_closed()
        await other.close()

    play(story)


def test_stopping_answers_what_was_begun_reads_nothing_more_and_closes(stage: Stage, play: Play) -> None:
    """No request is answered with an error because the server stops: who connects again asks for it again."""

    async def story(stage: Stage) -> None:
        client = await stage.client()
        content = bytes(range(256)) * 16384
        client.ask(WRITE, 0, len(content), cookie=1, payload=content)
        client.ask(FLUSH, 0, 0, cookie=2)
        await client.answer()
        await client.answer()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.ask(READ, 0, 4 << 20, cookie=3)
        client.send(b"\x25\x60\x95\x13")  # a request that has begun, and must not end in an error
        (attached,) = stage.server.sessions
        while not attached.busy:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0)
        draining = asyncio.ensure_future(stage.server.drain())
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        cookie, answer = await client.answer(read_length=4 << 20)
        assert (cookie, answer.error, answer.content) == (3, 0, content)
        assert await client.at_end()
        await draining
        await client.close()

    play(story)
    assert not Path(stage.path).exists()


def test_a_server_that_stops_still_answers_who_haggles(play: Play) -> None:
    """Options get ERR_SHUTDOWN, and ABORT its ACK (section "Option types")."""

    async def story(stage: Stage) -> None:
        hagglers = [await WireClient.connect(stage.path) for _ in range(2)]
        for haggler in hagglers:
            await haggler.option(OPT_LIST)
        draining = asyncio.ensure_future(stage.server.drain())
        await asyncio.sleep(0)
        assert (await hagglers[0].option(OPT_GO, name_and_infos(b"disk")))[-1].kind == Reply.ERR_SHUTDOWN
        assert (await hagglers[0].option(OPT_ABORT))[-1].kind == Reply.ACK
        assert await hagglers[0].at_end()
        assert (await hagglers[1].option(OPT_ABORT))[-1].kind == Reply.ACK
        await draining
        for haggler in hagglers:
            await haggler.close()

    play(story)


def test_everything_asked_for_before_the_end_of_file_is_answered(play: Play) -> None:
    """More than one wake-up performs, by a client that then says that it sends no more."""
    count = 5000

    async def story(stage: Stage) -> None:
        client = await stage.client()
        client.send(b"".join(request(READ, 0, 4096, cookie=cookie) for cookie in range(count)))
        client.writer.write_eof()
        assert [(await client.answer(read_length=4096))[0] for _ in range(count)] == list(range(count))
        assert await client.at_end()
        await client.close()

    play(story)


def test_idle_connections_do_not_hold_up_draining(play: Play) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client()
        await client.read(0, 512)
        await stage.server.drain()
        assert await client.at_end()
        await client.close()

    play(story)


def test_a_removed_export_is_detached_and_unknown(play: Play) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client()
        await stage.server.detach(stage.exports.remove("disk"))
        assert await client.at_end()
        again = await WireClient.connect(stage.path)
        assert (await again.option(7, name_and_infos(b"disk")))[-1].kind == Reply.ERR_UNKNOWN
        await client.close()
        await again.close()

    play(story)


def test_two_connections_see_each_others_writes(play: Play) -> None:
    async def story(stage: Stage) -> None:
        one, two = await stage.client(), await stage.client(style=2)
        assert one.flags & 1 << 8
        await one.write(12345, b"shared")
        assert await two.read(12345, 6) == b"shared"
        await one.close()
        await two.close()

    play(story)


def test_a_flush_on_one_connection_holds_for_what_another_was_answered(play: Play) -> None:
    """CAN_MULTI_CONN: writes of one, small, large, zeroing, answered; a flush of another; then the engine has them."""

    async def story(stage: Stage) -> None:
        one, two = await stage.client(), await stage.client(style=2)
        for number in range(1, 20):
            small, large = bytes([number]) * 5000, bytes([number]) * (3 << 20)
            await one.write(100, small)
            await one.write(1 << 20, large)
            assert (await one.call(6, 8 << 20, 2 << 20)).error == 0
            assert (await two.call(FLUSH, 0, 0)).error == 0
            assert stage.disk.disk.read(100, len(small)) == small
            assert stage.disk.disk.read(1 << 20, len(large)) == large
            assert stage.disk.disk.read(8 << 20, 4096) == bytes(4096)
            await two.write(8 << 20, small)
        await one.close()
        await two.close()

    play(story)


def test_an_accepted_tcp_socket_sends_at_once_and_notices_a_vanished_peer(stage: Stage, play: Play) -> None:
    """Read back from the server's own socket: no delay for small replies, and keepalive within two minutes."""
    stage.config = replace(stage.config, tcp=(TcpAddress(port=0),))

    async def story(stage: Stage) -> None:
        (port,) = (int(uri.rpartition(":")[2]) for uri in stage.server.uris if "unix" not in uri)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(client_hello() + option(OPT_GO, name_and_infos(b"disk")))
        await reader.readexactly(18 + 20 + 12 + 20)
        (attached,) = stage.server.sessions
        with accepted_socket(attached) as ours:
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
            assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) != 0
            idle, interval, count = (
                ours.getsockopt(socket.IPPROTO_TCP, what)
                for what in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            unsent = ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
            patience = ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert idle + interval * count <= 120
        assert unsent == UNSENT_BYTES
        assert patience == 0  # for as long as it is attached: a virtual machine that is paused takes nothing either
        writer.close()
        await writer.wait_closed()

    play(story)


@pytest.mark.parametrize(
    ("host", "ours", "taken"),
    [("127.0.0.1", "127.0.0.1", "reno"), ("127.0.0.1", "127.0.0.2", None), ("::1", "::1", "reno")],
)
def test_nothing_is_paced_on_the_way_to_a_client_of_this_machine(
    stage: Stage, play: Play, host: str, ours: str, taken: str | None
) -> None:
    """To others what the administrator chose for the network is used."""
    allowed = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control").read_text().split()
    chosen = next((one for one in allowed if one != "reno"), None)
    if chosen is None:
        pytest.skip("this kernel lets us have Reno alone")
    stage.config = replace(stage.config, tcp=(TcpAddress(host=host, port=0),))

    async def story(stage: Stage) -> None:
        (listener,) = (one for one in stage.server._listeners if one.family != socket.AF_UNIX)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, chosen.encode())
        reader, writer = await asyncio.open_connection(host, listener.getsockname()[1], local_addr=(ours, 0))
        writer.write(client_hello() + option(OPT_GO, name_and_infos(b"disk")))
        await reader.readexactly(18 + 20 + 12 + 20)
        (attached,) = stage.server.sessions
        with accepted_socket(attached) as accepted:
            used = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()
        assert used == (taken or chosen)
        writer.close()
        await writer.wait_closed()

    play(story)


def accepted_socket(attached: Hosted) -> socket.socket:
    """Another descriptor of the server's own socket."""
    line = attached.session.line
    assert isinstance(line, SocketLine)
    return socket.socket(fileno=os.dup(line.fileno()))


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link", "live socket"])
def test_a_socket_path_that_is_taken_is_told_and_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "nbd.sock"
    other = socket.socket(socket.AF_UNIX)
    remark = "no socket stands there"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        remark = "another server listens there"
        other.bind(str(path))
        other.listen(0)
        with socket.socket(socket.AF_UNIX) as queued:  # its backlog is full, and a blocking probe would wait for ever
            queued.connect(str(path))
            with pytest.raises(UserError, match=remark):
                open_unix(UnixAddress(path=path))
    before = path.lstat()
    with other, pytest.raises(UserError, match=remark):
        open_unix(UnixAddress(path=path))
    assert path.lstat().st_ino == before.st_ino


@pytest.mark.parametrize("count", ["", "x", "-1", "1e3"])
def test_a_number_of_handed_over_sockets_that_is_none_is_told(count: str) -> None:
    with pytest.raises(UserError, match=f"LISTEN_FDS='{count}' is not a number of sockets"):
        inherited({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count})


def test_an_unusable_address_is_one_sentence(tmp_path: Path) -> None:
    async def story() -> None:
        config = ServerConfig(tcp=(), unix=(UnixAddress(path=tmp_path / "missing" / "nbd.sock"),))
        with pytest.raises(UserError, match=r"missing/nbd\.sock"):
            await NbdServer(Exports(), config).start({})

    asyncio.run(story())


def test_the_registry_knows_its_names(stage: Stage) -> None:
    with pytest.raises(ExportExists, match="'disk'"):
        stage.exports.add(stage.disk)
    with pytest.raises(NoSuchExport, match="'nope'"):
        stage.exports.get("nope")
    assert stage.exports.resolve("") is stage.disk
    stage.exports.default_name = None
    assert stage.exports.resolve("") is None
    stage.exports.remove("frozen")
    assert stage.exports.resolve("") is stage.disk


def restricted(stage: Stage, **rules: tuple[str, ...]) -> Export:
    access = Access(**rules)  # type: ignore[arg-type]
    return Export(name="inner", disk=stage.disk.disk, pool_name="default", access=access, read_only=False)


@pytest.mark.parametrize(
    ("address", "admitted"),
    [("192.0.2.7", True), ("192.0.20.7", False), ("::ffff:192.0.2.9", True), ("2001:db8::1", False)],
)
def test_addresses_are_compared_as_networks_not_as_text(stage: Stage, address: str, admitted: bool) -> None:
    import ipaddress

    export = restricted(stage, addresses=("192.0.2.0/24",))
    assert export.admits(Peer("x", ipaddress.ip_address(address))) is admitted


@pytest.mark.parametrize(
    ("network", "admitted"),
    [
        ("::ffff:192.0.2.0/120", True),
        ("::ffff:192.0.2.7", True),
        ("::ffff:10.0.0.0/104", False),
        ("::ffff:0.0.0.0/96", True),  # all of IPv4, and nothing else
        ("::fffe:0:0/95", False),
        ("::/0", False),
    ],
)
def test_a_network_of_mapped_addresses_means_the_ipv4_network(stage: Stage, network: str, admitted: bool) -> None:
    import ipaddress

    export = restricted(stage, addresses=(network,))
    for address in ("192.0.2.7", "::ffff:192.0.2.7"):
        assert export.admits(Peer("x", ipaddress.ip_address(address))) is admitted


def test_an_export_for_certificates_hides_from_everyone_else(stage: Stage) -> None:
    stage.exports.add(restricted(stage, certificates=("vm1.example",)))
    stranger = PeerDirectory(stage.exports, Peer("x"))
    assert stranger.find("inner") is None
    assert "inner" not in [offer.name for offer in stranger.offers() if offer]
    friend = PeerDirectory(stage.exports, Peer("x", None, frozenset({"vm1.example"})))
    assert friend.find("inner") is not None


def test_a_network_that_is_none_is_refused_with_its_value(stage: Stage) -> None:
    with pytest.raises(ConfigError, match=r"10\.0\.0\.1/8"):
        restricted(stage, addresses=("10.0.0.1/8",))


@pytest.mark.parametrize("lacking", ["socket", "arena"])
def test_a_client_for_whom_there_is_no_descriptor_is_closed_and_counted(
    play: Play, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    """One for the session's socket, or one to sync the arena with: it hears of it at once, and others are served."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def story(stage: Stage) -> None:
        client = await WireClient.connect(stage.path)
        with monkeypatch.context() as broken:
            broken.setattr(*{"socket": (os, "dup"), "arena": (Syncs, "of")}[lacking], refuse)
            client.send(option(OPT_GO, name_and_infos(b"disk")))
            async with asyncio.timeout(20):
                await client.reader.read()
        assert stage.server.handshake_failures["connection_limit"] == 1
        await client.close()
        again = await stage.client()
        assert await again.read(0, 512) == bytes(512)
        await again.close()

    play(story)


def test_who_gives_up_waiting_for_a_client_to_end_leaves_it_as_it_is(play: Play) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client()
        client.ask(READ, 0, 64 << 20)
        (attached,) = stage.server.sessions
        while not attached.session.requests:  # noqa: ASYNC110
            await asyncio.sleep(0)
        attached.drain = lambda: None  # type: ignore[method-assign]  # it takes its time
        attached.abort = lambda: None  # type: ignore[method-assign]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stage.server.end([attached]), 0.05)
        assert not attached.closed.done()
        await client.close()
        await attached.closed
        assert stage.server.connections == 0

    play(story, Limits(drain_seconds=0.01))


def test_a_mistake_in_what_one_client_tells_loses_nobody_elses(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(stage: Stage) -> None:
        told: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        clients = [await stage.client() for _ in range(3)]

        def stumble(_: Attached) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(Attached, "ended", stumble)
        for client in clients:
            client.ask(DISC, 0, 0)
        for client in clients:
            assert await client.at_end()
            await client.close()
        async with asyncio.timeout(20):
            while stage.server.sessions:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert len(told) == 3

    play(story)


def test_a_server_is_starting_until_it_lets_clients_in_and_never_again(tmp_path: Path) -> None:
    async def act() -> None:
        service = Service(ServerConfig(exports=(), tcp=(), unix=(UnixAddress(path=tmp_path / "n.sock"),)))
        await service.start(listen=False)
        assert service.status().starting
        await service.listen()
        assert not service.status().starting
        await service.stop()
        assert (service.status().starting, service.status().draining) == (False, True)

    asyncio.run(act())
