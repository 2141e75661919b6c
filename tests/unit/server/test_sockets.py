"""Listening sockets: what this machine has is served, what it lacks is told, and a path is nobody else's file."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import shutil
import socket
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop

from nbdzram.config import EVERYONE, Access, ServerConfig, TcpAddress, UnixAddress, VsockAddress
from nbdzram.errors import UserError
from nbdzram.listening import close_all
from nbdzram.nbd.constants import Reply
from nbdzram.server.connection import peer_of
from nbdzram.server.exports import Exports, Peer, PeerDirectory
from nbdzram.server.handover import Handover
from nbdzram.server.listener import NbdServer
from nbdzram.server.sockets import (
    ANY_CONTEXT,
    BACKLOG,
    KEEPALIVE,
    _owner,
    inherited,
    open_tcp,
    open_unix,
    open_vsock,
    set_bounds,
)
from nbdzram.unread import UNSENT_BYTES
from tests.support.hanging import hanging_server
from tests.support.loop_client import WireClient
from tests.unit.server.conftest import Play, Stage
from tests.wire import name_and_infos


def two_addresses(*_: Any, **__: Any) -> list[Any]:
    """As /etc/hosts has it for localhost."""
    return [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
    ]


def lacking(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """IPv6 is not there: the family (EAFNOSUPPORT), or only the address."""

    class Socket(socket.socket):
        def __init__(self, family: int = -1, *args: Any, **given: Any) -> None:
            if family == socket.AF_INET6 and number == errno.EAFNOSUPPORT:
                raise OSError(number, os.strerror(number))
            super().__init__(family, *args, **given)

        def bind(self, address: Any) -> None:
            if self.family == socket.AF_INET6:
                raise OSError(number, os.strerror(number))
            super().bind(address)

    monkeypatch.setattr(socket, "socket", Socket)


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
def test_a_name_is_served_on_the_addresses_that_this_machine_has(
    number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lacking(number, monkeypatch)
    monkeypatch.setattr(socket, "getaddrinfo", two_addresses)
    opened = open_tcp(TcpAddress(host="localhost", port=0))
    assert [listener.family for listener in opened] == [socket.AF_INET]
    assert "not listening on ::1" in caplog.text
    close_all(opened)


def test_a_port_in_use_on_one_of_a_names_addresses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients would reach whoever has it."""
    lacking(errno.EADDRINUSE, monkeypatch)
    monkeypatch.setattr(socket, "getaddrinfo", two_addresses)
    with pytest.raises(UserError, match="Address already in use"):
        open_tcp(TcpAddress(host="localhost", port=0))


@pytest.mark.parametrize(("number", "remedy"), [(errno.EAFNOSUPPORT, "no IPv6"), (errno.EADDRNOTAVAIL, "-i takes")])
def test_an_address_that_cannot_be_served_at_all_is_one_sentence(
    number: int, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking(number, monkeypatch)
    with pytest.raises(UserError, match=rf"cannot listen on \[::\]:0: .*; .*{remedy}"):
        open_tcp(TcpAddress(host="::", port=0))


def test_all_of_ipv4_is_served_where_all_of_ipv6_is_named_too_and_not_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lacking(errno.EAFNOSUPPORT, monkeypatch)
    both = (TcpAddress(host="::", port=0), TcpAddress(host="127.0.0.1", port=0))

    async def story() -> None:
        server = NbdServer(Exports(), ServerConfig(tcp=both))
        await server.start({})
        assert len(server.uris) == 1
        await server.drain()
        with pytest.raises(UserError, match="no IPv6"):
            await NbdServer(Exports(), ServerConfig(tcp=both[:1])).start({})

    asyncio.run(story())
    assert "this machine has no IPv6" in caplog.text


WITHOUT_IPV6 = 'ip link set lo up; echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6; exec "$@"'
in_a_network = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root, unshare and ip")


def printed_in_a_network(script: str, code: str) -> str:
    """What Python code prints in a network of its own, which a shell sets up."""
    command = ["unshare", "-n", "sh", "-c", script, "sh", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "Operation not permitted" in done.stderr:
        pytest.skip("may not make a network namespace")
    assert done.returncode == 0, done.stderr
    return done.stdout


@in_a_network
def test_localhost_is_served_in_a_network_without_ipv6() -> None:
    """A network of its own, where the kernel has IPv6 and no address of it."""
    code = (
        "from nbdzram.config import TcpAddress; from nbdzram.server import sockets;"
        "real = sockets.socket.getaddrinfo;"
        "sockets.socket.getaddrinfo = lambda *a, **k: real('::1', 0, type=1) + real('127.0.0.1', 0, type=1);"
        "print([s.getsockname()[0] for s in sockets.open_tcp(TcpAddress(host='localhost', port=0))])"
    )
    assert printed_in_a_network(WITHOUT_IPV6, code) == "['127.0.0.1']\n"


@in_a_network
def test_metrics_of_localhost_are_served_in_a_network_without_ipv6_and_doctor_says_so() -> None:
    code = (
        "import uvloop; from nbdzram.cli import diagnosis; from nbdzram.config import TcpAddress;"
        "from nbdzram.metrics import http; real = http.socket.getaddrinfo;"
        "http.socket.getaddrinfo = lambda *a, **k: real('::1', a[1], type=1) + real('127.0.0.1', a[1], type=1);"
        "here = TcpAddress(host='localhost', port=0); print(diagnosis._cannot_listen(here));"
        "metrics = http.MetricsServer(here, None); uvloop.run(metrics.start());"
        "print([one.getsockname()[0] for one in metrics._listeners]);"
        "print(diagnosis._cannot_listen(TcpAddress(host='::1', port=metrics._listeners[0].getsockname()[1])))"
    )
    assert printed_in_a_network(WITHOUT_IPV6, code) == "None\n['127.0.0.1']\nAddress already in use\n"


@in_a_network
def test_a_link_local_address_is_served_and_told_with_its_interface() -> None:
    """Without it nobody can connect there. For metrics as well, whose address the event loop would look up."""
    code = (
        "import uvloop; from nbdzram.config import TcpAddress, TlsMode; from nbdzram.metrics import http;"
        "from nbdzram.server import sockets; here = TcpAddress(host='fe80::77%lo', port=0);"
        "print(sockets.uri_of(*sockets.open_tcp(here), TlsMode.OFF).rpartition(':')[0]);"
        "metrics = http.MetricsServer(here, None); uvloop.run(metrics.start());"
        "print(metrics.url.rpartition(':')[0])"
    )
    script = 'set -e; ip link set lo up; ip -6 addr add fe80::77/64 dev lo nodad; exec "$@"'
    assert printed_in_a_network(script, code) == "nbd://[fe80::77%25lo]\nhttp://[fe80::77%25lo]\n"


def test_a_descriptor_of_an_arena_that_is_not_there_is_one_sentence() -> None:
    code = (
        "import os; from nbdzram.errors import UserError; from nbdzram.server.sockets import inherited_arenas;"
        "environment = {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1', 'LISTEN_FDNAMES': 'pool-default'}\n"
        "os.closerange(3, 4)\n"
        "try: inherited_arenas(environment)\n"
        "except UserError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.startswith("LISTEN_FDNAMES names the descriptor 3 pool-default, and it is not there")


def test_no_program_that_is_started_gets_an_arena() -> None:
    """It would keep the memory of disks that are gone, as systemd passes each to whatever is started."""
    code = (
        "import os; from nbdzram.server.sockets import inherited_arenas; arena = os.memfd_create('arena');"
        "os.dup2(arena, 3, inheritable=True) if arena != 3 else os.set_inheritable(3, True);"
        "environment = {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1', 'LISTEN_FDNAMES': 'pool-default'};"
        "print(inherited_arenas(environment), os.get_inheritable(3))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == "{'default': 3} False\n"


def test_a_place_whose_server_has_no_place_left_is_anothers(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with hanging_server(path), pytest.raises(UserError, match="another server listens there"):
        open_unix(UnixAddress(path=path))
    assert path.exists()


def test_an_ipv6_socket_leaves_ipv4_to_others() -> None:
    """Or 0.0.0.0 beside :: would be an address in use."""
    for _ in range(10):  # programs beside this one may have some of the ports, and none has all of them
        try:
            (listener,) = open_tcp(TcpAddress(host="::", port=0))
        except UserError:
            pytest.skip("no IPv6 here")
        with listener, socket.socket(socket.AF_INET) as other:
            assert listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1
            try:
                other.bind(("0.0.0.0", listener.getsockname()[1]))
            except OSError as error:
                assert error.errno == errno.EADDRINUSE
            else:
                return
    raise AssertionError("no port is left to IPv4")


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_a_socket_file_has_its_mode_from_the_first_instant(
    tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, modes = tmp_path / "nbd.sock", []
    real = socket.socket.listen

    def listen(self: socket.socket, backlog: int) -> None:
        modes.append(stat.S_IMODE(path.stat().st_mode))
        real(self, backlog)

    monkeypatch.setattr(socket.socket, "listen", listen)
    monkeypatch.setattr(os, "chmod", refuse)
    monkeypatch.setattr(Path, "chmod", refuse)
    before = os.umask(0o022)
    try:
        open_unix(UnixAddress(path=path, mode=mode)).close()
        assert modes == [mode]
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("a path is named again after it was bound: by then it may lead to another file")


def test_a_socket_file_admits_its_owner_alone_unless_told_otherwise(tmp_path: Path) -> None:
    with open_unix(UnixAddress(path=tmp_path / "nbd.sock")):
        assert stat.S_IMODE((tmp_path / "nbd.sock").stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_an_owner_is_given_to_the_socket_and_never_to_what_a_link_leads_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, target = tmp_path / "nbd.sock", tmp_path / "target"
    target.touch()
    with open_unix(UnixAddress(path=path, owner="nobody")):
        assert path.stat().st_uid == 65534
    path.unlink()
    real = socket.socket.bind

    def bind(self: socket.socket, address: Any) -> None:
        real(self, address)
        path.unlink()
        path.symlink_to(target)

    monkeypatch.setattr(socket.socket, "bind", bind)
    with open_unix(UnixAddress(path=path, owner="1:1")):
        assert (target.stat().st_uid, path.lstat().st_uid, path.lstat().st_gid) == (0, 1, 1)


@pytest.mark.parametrize(
    ("owner", "clue"),
    [
        ("nobody-here", "no such user"),
        ("root:nobody-here", "no such group"),
        ("4294967295", "no such user: '4294967295'"),  # to chown(2) it means "as it is"
        (":" + "9" * 5000, "no such group"),
    ],
)
def test_an_owner_who_does_not_exist_is_told(tmp_path: Path, owner: str, clue: str) -> None:
    with pytest.raises(UserError, match=f"{clue}.*owner= takes"):
        open_unix(UnixAddress(path=tmp_path / "nbd.sock", owner=owner))
    assert list(tmp_path.iterdir()) == []
    assert _owner("4294967294:0") == (4294967294, 0), "the last there is, and the first"


def test_an_owner_whom_it_may_not_be_given_to_is_told_and_no_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(UserError, match="Operation not permitted; only root may give it to '1:1': leave out owner="):
        open_unix(UnixAddress(path=tmp_path / "nbd.sock", owner="1:1"))
    assert list(tmp_path.iterdir()) == []


def test_the_backlog_is_what_the_kernel_is_told_last(stage: Stage, play: Play) -> None:
    """The loop listens again on what it is given, with 100 unless it is told otherwise."""
    stage.config = replace(stage.config, tcp=(TcpAddress(port=0),))

    async def story(stage: Stage) -> None:
        (port,) = (int(uri.rpartition(":")[2]) for uri in stage.server.uris if "unix" not in uri)
        for words, column in ((["-ltnH", f"sport = {port}"], 2), (["-lxnH", "src", stage.path], 3)):
            process = await asyncio.create_subprocess_exec("ss", *words, stdout=asyncio.subprocess.PIPE)
            shown, _ = await process.communicate()
            assert shown.split()[column] == str(min(BACKLOG, somaxconn())).encode()

    if shutil.which("ss") is None:
        pytest.skip("needs ss (iproute2)")
    play(story)


def somaxconn() -> int:
    return int(Path("/proc/sys/net/core/somaxconn").read_text())


# ---- who is at the other end ----


def transport(family: int, peername: object) -> Any:
    given = {"socket": SimpleNamespace(family=family, fileno=lambda: 0), "peername": peername}
    return SimpleNamespace(get_extra_info=given.get)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_an_ip_client_whose_address_is_gone_is_not_taken_for_a_local_one(stage: Stage, family: int) -> None:
    """It hung up between accept and getpeername; what it sent is still there."""
    peer = peer_of(transport(family, None))
    assert not peer.local
    stage.disk.set_rules(access=Access(addresses=("127.0.0.0/8",)), read_only=False, description="")
    assert not stage.disk.admits(peer)
    assert stage.disk.admits(Peer("x", ipaddress.ip_address("127.0.0.1")))
    assert stage.disk.admits(Peer("x", local=True))


def test_a_client_of_one_link_is_told_by_its_address_alone() -> None:
    """Which of our interfaces it is on is nothing that a list, or who reads the log, knows it by."""
    peer = peer_of(transport(socket.AF_INET6, ("fe80::7%eth0", 2000, 0, 2)))
    assert (peer.text, str(peer.address)) == ("[fe80::7]:2000", "fe80::7")


def test_a_local_client_of_whom_the_kernel_cannot_be_asked_is_served_all_the_same(
    monkeypatch: pytest.MonkeyPatch, play: Play
) -> None:
    """To ask takes a descriptor, and others may have the last ones for a moment."""

    def refuse(_: int) -> int:
        monkeypatch.undo()
        raise OSError(errno.EMFILE, "Too many open files")

    async def story(stage: Stage) -> None:
        monkeypatch.setattr("nbdzram.server.connection.os.dup", refuse)
        client = await stage.client()
        assert [session.peer.text for session in stage.server.sessions] == ["local client"]
        await client.close()

    play(story)


def test_a_vsock_listener_serves_and_its_clients_are_local_each_context_a_source(stage: Stage) -> None:
    """The loop knows no such family. A TCP socket that calls itself one stands for it, where a kernel has no way from
    one vsock socket of a machine to another; so the context is an address here."""

    async def story() -> None:
        with socket.create_server(("127.0.0.1", 0)) as tcp:
            port = tcp.getsockname()[1]
            stands_for = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM, fileno=os.dup(tcp.fileno()))
        server = NbdServer(stage.exports, stage.config)
        await server.start(handed=Handover(listeners=[stands_for], uris=["nbd+vsock://2:10809"]))
        try:
            client = await WireClient.over(await asyncio.open_connection("127.0.0.1", port))
            await client.go(b"disk")
            (peer,) = (session.peer for session in server.sessions)
            assert (peer.local, peer.account) == (True, "context 127.0.0.1")
            await client.close()
        finally:
            await server.drain()
        with socket.socket() as late:
            assert late.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED, "it no longer listens"

    uvloop.run(story())


def test_a_vsock_address_is_served_and_told_as_others_reach_it(stage: Stage) -> None:
    stage.config = replace(stage.config, unix=(), vsock=(VsockAddress(port=free_vsock_port()),))

    async def story() -> None:
        server = NbdServer(stage.exports, stage.config)
        await server.start({})
        (uri,) = server.uris
        await server.drain()
        assert uri.startswith("nbd+vsock://")
        assert str(ANY_CONTEXT) not in uri
        open_vsock(stage.config.vsock[0]).close()  # the port is free again

    uvloop.run(story())


def free_vsock_port() -> int:
    try:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as probe:
            probe.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
            return int(probe.getsockname()[1])
    except OSError as error:
        pytest.skip(f"this machine has no vsock: {error}")


def test_local_clients_are_told_apart_by_process_and_user(play: Play) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client()
        assert stage.disk.clients() == [f"unix client (pid {os.getpid()}, uid {os.geteuid()})"]
        await client.close()

    play(story)


def test_the_empty_name_opens_no_export_that_the_peer_may_not_name(stage: Stage) -> None:
    directory = PeerDirectory(stage.exports, Peer("x", ipaddress.ip_address("192.0.2.7")))
    assert directory.find("") is stage.disk
    stage.disk.set_rules(access=Access(addresses=("10.0.0.0/8",)), read_only=False, description="")
    assert directory.find("") is None
    stage.exports.remove("frozen")
    stage.exports.default_name = None  # the only one is the default then
    assert directory.find("") is None
    stage.disk.set_rules(access=EVERYONE, read_only=False, description="")
    assert directory.find("") is stage.disk


# ---- sockets handed over ----


def test_sockets_that_were_handed_to_another_process_are_not_ours(tmp_path: Path) -> None:
    """LISTEN_PID: a child inherits the variables of its parent, and not the sockets."""
    assert inherited({"LISTEN_PID": str(os.getppid()), "LISTEN_FDS": "1"}) == []
    assert inherited({"LISTEN_FDS": "1"}) == []
    code = (
        "import os; os.dup2(int(os.environ['HANDED']), 3); os.environ['LISTEN_PID'] = str(os.getpid());"
        "from nbdzram.server.sockets import inherited;"
        "print([s.getsockname() for s in inherited(os.environ)])"
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "handed"))
        listener.listen()
        done = subprocess.run(
            [sys.executable, "-c", code],
            pass_fds=[listener.fileno()],
            env={**os.environ, "LISTEN_FDS": "1", "HANDED": str(listener.fileno())},
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout == f"['{tmp_path / 'handed'}']\n"


def test_a_socket_that_is_no_stream_is_refused_wherever_it_comes_from(tmp_path: Path) -> None:
    """systemd's ListenSequentialPacket=, and a datagram socket of inetd."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "packets"))
        listener.listen()
        code = (
            "import os; os.dup2(int(os.environ['HANDED']), 3); os.environ['LISTEN_PID'] = str(os.getpid());"
            "from nbdzram.server.sockets import inherited; inherited(os.environ)"
        )
        handed = {"LISTEN_FDS": "1", "HANDED": str(listener.fileno())}
        assert "use ListenStream=" in complaint(code, pass_fds=[listener.fileno()], env={**os.environ, **handed})
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        code = "from nbdzram.server.sockets import take_stdin; take_stdin()"
        assert "needs a stream" in complaint(code, stdin=ours)


def complaint(code: str, **given: Any) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **given)
    return str(done.stderr.splitlines()[-1])


def test_a_refused_name_says_the_same_of_what_is_not_there_and_what_is_not_for_you(play: Play) -> None:
    async def story(stage: Stage) -> None:
        stage.frozen.set_rules(access=Access(certificates=("vm1.example",)), read_only=True, description="")
        told = []
        for name in (b"frozen", b"nowhere"):
            client = await WireClient.connect(stage.path)
            reply = (await client.option(7, name_and_infos(name)))[-1]
            told.append((reply.kind, reply.data.replace(name, b"NAME")))
            await client.close()
        assert told[0] == told[1]
        assert told[0][0] == Reply.ERR_UNKNOWN

    play(story)


class OfAnotherSystem(socket.socket):
    """Of a kernel that is emulated, or of MPTCP, which learnt of keepalive and of user timeouts late, if at all."""

    unknown = frozenset[int]()

    def setsockopt(self, level: int, name: int, value: Any) -> None:  # type: ignore[override]
        if level == socket.IPPROTO_TCP and name in self.unknown:
            raise OSError(errno.ENOPROTOOPT, "Protocol not available")
        super().setsockopt(level, name, value)


BOUNDS = dict([*KEEPALIVE, (socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES), (socket.TCP_USER_TIMEOUT, 10_000)])


@pytest.mark.parametrize("unknown", [{one} for one in BOUNDS] + [set(BOUNDS)])
def test_a_system_that_does_not_know_a_bound_is_served_from_within_all_others(unknown: set[int]) -> None:
    with OfAnotherSystem() as listener:
        listener.unknown = frozenset(unknown)
        set_bounds(listener)
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) != 0
        kept = {one for one, value in BOUNDS.items() if listener.getsockopt(socket.IPPROTO_TCP, one) == value}
        assert kept == set(BOUNDS) - unknown
