"""The control socket's client side: what it leaves behind where nobody answers."""

from __future__ import annotations

import fcntl
import itertools
import json
import socket
import struct
import termios
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdzram.control.client import ControlClient
from nbdzram.control.messages import Code
from nbdzram.errors import ServerUnreachable, UserError


def nothing(_: Path) -> None:
    """The directory is empty."""


def a_file(path: Path) -> None:
    path.touch()


def nobody_listens(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as former:
        former.bind(str(path))


def descriptors() -> list[str]:
    """What those of this process lead to."""
    return sorted(str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())


@pytest.mark.parametrize("make", [nothing, a_file, nobody_listens], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["control.sock", "n" * 200], ids=["path", "long path"])
def test_who_finds_no_server_leaves_no_socket_open(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    path = tmp_path / name
    if len(name) < 100:
        make(path)
    before = descriptors()
    told = "of 107 at most" if len(name) > 100 else "is no socket; name" if make is a_file else "no server answers on"
    with pytest.raises(ServerUnreachable, match=told) as refused:
        ControlClient(path)
    assert descriptors() == before, refused  # whoever has the error has what it happened in


def answering(path: Path, *answers: bytes) -> threading.Thread:
    """Who answers the first request of each connection with these bytes, and hangs up."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def answer() -> None:
        with listener:
            for content in answers:
                client, _ = listener.accept()
                with client, client.makefile("rb") as asked:
                    asked.readline()
                    client.sendall(content)

    thread = threading.Thread(target=answer)
    thread.start()
    return thread


STREAM = b'{"jsonrpc":"2.0","method":"stream","params":{"id":1}}\n'
ANSWERS: dict[bytes, str] = {
    b"no JSON\n": "is no nbdzram server",
    b"[]\n": "is no nbdzram server",
    b"": "went away: it closed the connection$",
    b'{"jsonrpc":"2.0","result":1,"id":1}': "went away: it closed the connection$",
    STREAM: "it closed the connection in the middle of a stream",
    STREAM + b"\0\0": "it closed the connection in the middle of a stream",
    STREAM + b"\0\0\0\5four": "it closed the connection in the middle of a stream",
    STREAM + b"\0\0\0\1a\0\0\0\0": "went away: it closed the connection$",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_what_no_server_answers_is_one_sentence(tmp_path: Path, answer: bytes) -> None:
    thread = answering(tmp_path / "control.sock", answer)
    with ControlClient(tmp_path / "control.sock") as client, pytest.raises(UserError, match=ANSWERS[answer]):
        client.call_for_stream("streams.send", lambda _: None)
    thread.join()


def unread(connection: socket.socket) -> int:
    return int(struct.unpack("i", fcntl.ioctl(connection, termios.FIONREAD, bytes(4)))[0])


@pytest.mark.parametrize("waits", [False, True], ids=["a broken pipe", "a reset"])
def test_what_a_server_says_of_a_stream_is_told_though_it_reads_no_more_of_that(tmp_path: Path, waits: bool) -> None:
    """It hangs up with a part of it unread: a broken pipe to who sends the next, a reset to who waits for room."""
    path = tmp_path / "control.sock"
    refusal = {"jsonrpc": "2.0", "id": 1, "error": {"code": Code.REFUSED, "message": "the pool is full"}}
    state = Path(f"/proc/self/task/{threading.get_native_id()}/stat")
    hung_up = threading.Event()
    parts = itertools.count()

    def read(count: int) -> bytes:
        if not waits and next(parts) == 5:
            hung_up.wait()
        return bytes(min(count, 1 << 12))

    def wait_until_it_waits(client: socket.socket) -> None:
        looks, before = 0, 0
        while looks < 100:  # of which any may find it before it has asked for room
            sleeps, now = state.read_text().rpartition(") ")[2][0] == "S", unread(client)
            looks = looks + 1 if sleeps and now == before > 0 else 0
            before = now

    def serve(listener: socket.socket) -> None:
        client, _ = listener.accept()
        with client:
            client.recv(1 << 16)
            client.sendall(STREAM)
            if waits:
                wait_until_it_waits(client)
            client.recv(1)
            client.sendall(json.dumps(refusal).encode() + b"\n")
        hung_up.set()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        server = threading.Thread(target=serve, args=(listener,))
        server.start()
        with ControlClient(path) as client, pytest.raises(UserError, match="the pool is full"):
            client.call_with_stream("streams.receive", read)
        server.join()


def done(number: int) -> bytes:
    return b'{"jsonrpc":"2.0","result":"done","id":%d}\n' % number


@pytest.mark.parametrize("method", ["status", "clients", "runs", "streams", "usage"])
def test_what_changes_nothing_is_asked_once_more_where_the_connection_was_cut_off(tmp_path: Path, method: str) -> None:
    """Another process may have taken over. Not twice."""
    path = tmp_path / "control.sock"
    thread = answering(path, b"", done(2))
    with ControlClient(path) as client:
        assert client.call(method) == "done"
    thread.join()
    path.unlink()
    thread = answering(path, b"", b"")
    with ControlClient(path) as client, pytest.raises(ServerUnreachable, match="it closed the connection"):
        client.call(method)
    thread.join()


@pytest.mark.parametrize("method", ["reload", "exports.reset", "exports.lose", "run"])
def test_an_act_of_which_nobody_knows_whether_it_was_done_is_not_asked_for_again(tmp_path: Path, method: str) -> None:
    path = tmp_path / "control.sock"
    thread = answering(path, b"", done(1))
    with ControlClient(path) as client, pytest.raises(ServerUnreachable, match="it closed the connection"):
        client.call(method)
    with ControlClient(path) as other:
        assert other.call(method) == "done"
    thread.join()
