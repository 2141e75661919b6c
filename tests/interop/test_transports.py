"""How a connection comes about: addresses, socket files, sockets handed over, one on standard input."""

from __future__ import annotations

import os
import shlex
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.pki import Pki
from tests.support.programs import PROGRAM_SECONDS, missing, require_program, require_root, run
from tests.support.reach import tls_arguments
from tests.support.server import Nbdzram

pytestmark = pytest.mark.interop

ROOT = Path(__file__).resolve().parents[2]


def serve_words(directory: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "nbdzram", "serve", "--metrics", "off", "--control", f"{directory}/c.sock", *words]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def size_of(uri: str) -> int:
    return int(run([require_program("nbdinfo", package="libnbd-bin"), "--size", uri]))


def test_it_listens_on_several_addresses_of_both_families(serve: Callable[..., Nbdzram]) -> None:
    server = serve({"disk": "1M"}, arguments=("-i", "127.0.0.2", "-i", "::1"))
    uris = [line.split()[1] for line in server.log.splitlines() if line.split()[:1] == ["NBD"]]
    tcp = [uri for uri in uris if "unix" not in uri]
    assert [uri.rpartition(":")[0] for uri in tcp] == ["nbd://127.0.0.1", "nbd://127.0.0.2", "nbd://[::1]"]
    for uri in tcp:
        assert size_of(f"{uri}/disk") == 1 << 20


@pytest.mark.parametrize("tls", [False, True])
def test_the_lines_of_the_greeting_work_as_they_are_printed(
    serve: Callable[..., Nbdzram], pki: Pki, client_files: Path, *, tls: bool
) -> None:
    """Its unix socket, and over TLS its address and a directory in the place of DIR."""
    server = serve({"a disk, with a comma": "1M"}, arguments=tls_arguments(pki, mode="require") if tls else ())
    for program, size in (("nbdinfo", "1048576"), ("qemu-img", "1048576 bytes")):
        require_program(program, package="libnbd-bin qemu-utils")
        line = server.greeting(rf"\n  ({program} .*)").replace("DIR", str(client_files))
        assert size in run(shlex.split(line))


def test_a_unix_socket_has_the_mode_and_owner_that_were_asked_for(
    serve: Callable[..., Nbdzram], tmp_path: Path
) -> None:
    require_root("only root gives files away")
    path = tmp_path / "shared.sock"
    serve({"disk": "1M"}, arguments=("-U", f"{path},mode=0660,owner=nobody:nogroup"))
    status = path.stat()
    assert stat.S_IMODE(status.st_mode) == 0o660
    assert (path.owner(), path.group()) == ("nobody", "nogroup")
    assert size_of(f"nbd+unix:///disk?socket={path}") == 1 << 20


def test_libnbd_starts_the_server_by_socket_activation(tmp_path: Path) -> None:
    nbdinfo = require_program("nbdinfo", package="libnbd-bin")
    command = [nbdinfo, "--size", "--", "[", *serve_words(tmp_path, "-e", "disk=3M"), "]"]
    process = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=PROGRAM_SECONDS, check=False
    )
    assert process.returncode == 0, process.stderr
    # libnbd leaves standard output to the server, which greets there.
    assert process.stdout.split()[-1] == str(3 << 20)


ACTIVATE = "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid()); os.execv(sys.argv[1], sys.argv[1:])"


def start_with(listeners: list[socket.socket], directory: Path, names: str) -> subprocess.Popen[str]:
    """What systemd does: the sockets are descriptors 3 and up, and LISTEN_PID names the process itself."""

    def place() -> None:
        for index, listener in enumerate(listeners):
            os.dup2(listener.fileno(), 3 + index, inheritable=True)

    assert all(listener.fileno() >= 3 + len(listeners) for listener in listeners)
    return subprocess.Popen(
        [sys.executable, "-c", ACTIVATE, *serve_words(directory, "-e", "disk=2M")],
        env=environment() | {"LISTEN_FDS": str(len(listeners)), "LISTEN_FDNAMES": names},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        pass_fds=tuple(range(3, 3 + len(listeners))),
        preexec_fn=place,  # noqa: PLW1509 - no threads here
    )


def high(listener: socket.socket) -> socket.socket:
    """The same socket on a descriptor that `place` does not overwrite."""
    import fcntl

    moved = socket.socket(fileno=fcntl.fcntl(listener.fileno(), fcntl.F_DUPFD_CLOEXEC, 100))
    listener.close()
    return moved


def test_several_sockets_are_handed_over_with_their_names(tmp_path: Path) -> None:
    path = tmp_path / "activated.sock"
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(path))
    unix.listen()
    tcp = high(socket.create_server(("127.0.0.1", 0)))
    unix = high(unix)
    process = start_with([tcp, unix], tmp_path, "lan:local")
    port = tcp.getsockname()[1]
    try:
        # The sockets listen already: a client waits until the server accepts.
        assert size_of(f"nbd://127.0.0.1:{port}/disk") == 2 << 20
        assert size_of(f"nbd+unix:///disk?socket={path}") == 2 << 20
    finally:
        process.terminate()
        printed, _ = process.communicate(timeout=PROGRAM_SECONDS)
        tcp.close()
        unix.close()
    assert process.returncode == 0, printed
    assert path.exists(), "the socket file is systemd's, not ours to remove"


def test_a_socket_that_does_not_listen_is_refused_with_its_name(tmp_path: Path) -> None:
    ours, theirs = (high(one) for one in socket.socketpair())
    process = start_with([theirs], tmp_path, "lan")
    printed, _ = process.communicate(timeout=PROGRAM_SECONDS)
    ours.close()
    theirs.close()
    assert process.returncode == 1, printed
    assert "3 (lan) does not listen" in printed


def test_one_connection_on_standard_input_is_served_and_then_it_ends() -> None:
    """As from inetd: the socket is 0, 1 and 2; nothing but NBD may appear on it."""
    ours, theirs = socket.socketpair()
    words = [sys.executable, "-m", "nbdzram", "serve", "--stdin", "-e", "disk=1M", "--log-level", "debug"]
    end = theirs.fileno()
    process = subprocess.Popen(words, env=environment(), stdin=end, stdout=end, stderr=end)
    theirs.close()
    with ours, ours.makefile("rwb") as stream:
        assert stream.read(18) == b"NBDMAGICIHAVEOPT\0\3"
        stream.write(b"\0\0\0\3IHAVEOPT" + (1).to_bytes(4) + (4).to_bytes(4) + b"disk")
        stream.flush()
        assert int.from_bytes(stream.read(8)) == 1 << 20
        stream.read(2)
        stream.write(bytes.fromhex("25609513 0000 0002") + bytes(20))  # DISC
        stream.flush()
        assert stream.read() == b""
    assert process.wait(timeout=PROGRAM_SECONDS) == 0


def test_standard_input_that_is_no_socket_is_refused(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "nbdzram", "serve", "--stdin", "-e", "disk=1M"],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PROGRAM_SECONDS,
        cwd=tmp_path,
        check=False,
    )
    assert process.returncode == 1
    assert "--stdin needs a connected socket" in process.stderr


def test_vsock_is_served_where_the_kernel_has_a_loopback(serve: Callable[..., Nbdzram]) -> None:
    """Context 1 is this machine itself (vsock(7))."""
    try:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
            listener.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
            listener.listen()
            with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as probe:
                probe.settimeout(1)
                probe.connect((1, listener.getsockname()[1]))
                port = listener.getsockname()[1]
    except OSError as error:
        pytest.skip(f"this kernel has no vsock loopback (vsock_loopback): {error}")
    serve({"disk": "1M"}, arguments=("--vsock", str(port)))
    assert size_of(f"nbd+vsock://1:{port}/disk") == 1 << 20


def test_the_servers_end_of_a_tcp_connection_has_keepalive(serve: Callable[..., Nbdzram]) -> None:
    """Seen from outside: `ss` shows the keepalive timer of the server's end."""
    server = serve({"disk": "1M"})
    ss = require_program("ss", package="iproute2")
    with socket.create_connection(("127.0.0.1", server.port or 0)) as client:
        client.recv(18)
        shown = run([ss, "-tnoH", "state", "established", f"( sport = :{server.port} )"])
        if not shown:
            missing("ss shows no connections here")
        assert "timer:(keepalive," in shown, shown
