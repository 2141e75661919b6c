"""The control socket, with a real server and a real client on both ends of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdzram.control import client as client_module
from nbdzram.control import messages
from nbdzram.control.client import ControlClient
from nbdzram.control.methods import Method, Progress, method_table
from nbdzram.control.server import ControlServer
from nbdzram.engine.stats import DiskUsage
from nbdzram.errors import NoSuchExport, ServerUnreachable, UserError
from nbdzram.status import (
    ClientStatus,
    ExportLoss,
    ExportRenaming,
    ExportStatus,
    PoolStatus,
    ReceiveReport,
    ReloadReport,
    RunOptions,
    RunReport,
    RunStatus,
    SendReport,
    ServerStatus,
    StreamStatus,
    from_json,
    to_json,
)
from nbdzram.stream.pipe import Pipe
from tests.support.hanging import hanging_server
from tests.unit.records import CLIENT, EXPORT, REPORT, RUNNING, SERVER, STREAM, USAGE, WAITING


class RecordedOperations:
    """Answers with fixed records and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def status(self) -> ServerStatus:
        return SERVER

    async def settled(self, _changed: object) -> None:
        """At once."""

    def clients(self) -> tuple[ClientStatus, ...]:
        return (CLIENT,)

    async def takeover(
        self,
        socket: str,
        pid: int,
        format: int,  # noqa: A002
        knows: Sequence[str],
        state_dir: str,
        *,
        unit: str,
    ) -> int:
        self.asked.append((socket, pid, format, knows, state_dir, unit))
        return 7

    async def disconnect_client(self, number: int) -> None:
        self.asked.append((number,))

    async def run(
        self, kind: str, options: RunOptions, *, pool: str | None, cpu_percent: int, progress: Progress
    ) -> tuple[RunReport, ...]:
        self.asked.append((kind, pool, options, cpu_percent))
        if kind == "broken":
            raise RuntimeError("a bug of ours")
        for done in range(3):
            progress(replace(RUNNING, done=done), WAITING if done == 0 else None)
        return (REPORT,)

    async def add_export(
        self,
        name: str,
        size_bytes: int,
        *,
        pool: str | None,
        read_only: bool | None,
        description: str | None,
        **rules: Any,
    ) -> ExportStatus:
        self.asked.append((name, size_bytes, pool, read_only, description, rules))
        return EXPORT

    async def change_export(self, name: str, **rules: Any) -> ExportStatus:
        self.asked.append((name, rules))
        return EXPORT

    async def lose_export(self, name: str, size_bytes: int, snapshot: str | None) -> ExportLoss:  # noqa: ARG002
        return ExportLoss(name=name, size_bytes=1 << 30, stored_bytes=size_bytes, alone_bytes=None, clients=())

    async def rename_export(self, name: str, new_name: str) -> ExportRenaming:
        self.asked.append((name, new_name))
        return ExportRenaming(name, EXPORT, old_name_declared=True, remembered=False)

    async def remove_export(self, name: str, *, force: bool) -> None:
        self.asked.append((name, force))
        raise NoSuchExport(f"there is no export '{name}'")

    async def resize_export(self, name: str, size_bytes: int, *, yes: bool, force: bool) -> ExportStatus:
        self.asked.append((name, size_bytes, yes, force))
        return EXPORT

    async def rollback_export(self, name: str, snapshot: str, *, force: bool) -> ExportStatus:
        self.asked.append((name, snapshot, force))
        return EXPORT

    async def reset_export(self, name: str, *, force: bool) -> ExportStatus:
        self.asked.append((name, force))
        return EXPORT

    async def add_pool(self, name: str, mem_limit: int, dedup: str, **_: Any) -> PoolStatus:
        self.asked.append((name, mem_limit, dedup))
        return SERVER.pools[0]

    async def change_pool(self, name: str, mem_limit: int | None, dedup: str | None, **_: Any) -> PoolStatus:
        self.asked.append((name, mem_limit, dedup))
        return SERVER.pools[0]

    async def remove_pool(self, name: str) -> None:
        self.asked.append((name,))

    def lose_pool(self, name: str) -> None:
        self.asked.append(("lose", name))

    async def usage(self) -> dict[str, DiskUsage]:
        return {"disk": USAGE}

    async def reload(self) -> ReloadReport:
        return ReloadReport(("export disk added",), ("pool old",), ("listen",))

    async def runs(self) -> tuple[RunStatus, ...]:
        return (RUNNING, WAITING)

    async def cancel_run(self, number: int) -> RunStatus:
        self.asked.append(("cancel", number))
        return RUNNING

    async def pause_run(self, number: int) -> RunStatus:
        self.asked.append(("pause", number))
        return RUNNING

    async def resume_run(self, number: int) -> RunStatus:
        self.asked.append(("resume", number))
        return RUNNING

    async def copy_export(self, source: str, name: str, *, read_only: bool) -> ExportStatus:
        self.asked.append((source, name, read_only))
        return EXPORT

    async def send_stream(
        self, exports: Sequence[str], since: str | None, *, resumable: bool, resume: str | None, pipe: Pipe
    ) -> SendReport:
        self.asked.append((*exports, since, resumable, resume))
        pipe.write(b"a stream")
        pipe.end()
        return SendReport(tuple(exports), 1, 1, 57, 8, 0.5)

    async def receive_stream(self, prefix: str, pool: str | None, *, resumable: bool, pipe: Pipe) -> ReceiveReport:
        parts = []
        while part := await asyncio.to_thread(pipe.read, 1 << 16):
            parts.append(part)
            if b"bad" in part:
                raise UserError("the stream is bad")
        self.asked.append((prefix, pool, resumable, b"".join(parts)))
        return ReceiveReport(("disk",), 1, 1, 0, 57, 8, 0.5)

    async def streams(self) -> tuple[StreamStatus, ...]:
        return (STREAM,)

    async def abandon_stream(self, name: str) -> None:
        self.asked.append((name,))

    async def take_moment(self, name: str) -> tuple[ExportStatus, ...]:
        self.asked.append((name,))
        return (EXPORT,)


@contextlib.asynccontextmanager
async def serving(path: Path) -> AsyncIterator[RecordedOperations]:
    operations = RecordedOperations()
    server = ControlServer(path, method_table(operations, operations))
    await server.start()
    try:
        yield operations
    finally:
        await server.stop()


def with_server(path: Path, act: Callable[[], Any]) -> tuple[Any, RecordedOperations]:
    """Run the blocking client code `act` beside a live server."""

    async def both() -> tuple[Any, RecordedOperations]:
        async with serving(path) as operations:
            return await asyncio.to_thread(act), operations

    return asyncio.run(both())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


def test_a_status_crosses_the_socket_whole(path: Path) -> None:
    def act() -> ServerStatus:
        with ControlClient(path) as client:
            return client.status()

    assert with_server(path, act)[0] == SERVER


def test_clients_cross_the_socket_whole(path: Path) -> None:
    def act() -> tuple[ClientStatus, ...]:
        with ControlClient(path) as client:
            client.call("clients.disconnect", number=7)
            return client.clients()

    answer, operations = with_server(path, act)
    assert answer == (CLIENT,)
    assert operations.asked == [(7,)]


def test_what_exports_cost_crosses_the_socket_whole(path: Path) -> None:
    def act() -> dict[str, DiskUsage]:
        with ControlClient(path) as client:
            return client.usage()

    assert with_server(path, act)[0] == {"disk": USAGE}


def test_progress_comes_before_the_result(path: Path) -> None:
    heard: list[tuple[RunStatus, RunStatus | None]] = []

    def act() -> Any:
        with ControlClient(path) as client:
            return client.call("run", lambda *step: heard.append(step), kind="fold", dry_run=True)

    answer, operations = with_server(path, act)
    assert from_json(RunReport, answer[0]) == REPORT
    assert heard == [(replace(RUNNING, done=done), WAITING if done == 0 else None) for done in range(3)]
    assert operations.asked == [("fold", None, RunOptions(dry_run=True), 100)]


def test_progress_that_nobody_reads_is_left_out_and_the_result_comes(path: Path) -> None:
    told = threading.Event()

    async def run(_: Any, progress: Progress) -> str:
        for _ in range(100):
            for _ in range(200):
                progress(RUNNING, None)
            await asyncio.sleep(0)
        told.set()
        return "done"

    def act() -> list[Any]:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(path))
            raw.sendall(b'{"jsonrpc":"2.0","method":"long","id":1}\n')
            assert told.wait(60)
            answers: list[Any] = []
            with raw.makefile("rb") as lines:
                while not answers or "result" not in answers[-1]:
                    answers.append(json.loads(lines.readline()))
            return answers

    async def both() -> list[Any]:
        server = ControlServer(path, {"long": Method({}, run)})
        await server.start()
        try:
            return await asyncio.to_thread(act)
        finally:
            await server.stop()

    answers = asyncio.run(both())
    assert answers[-1]["result"] == "done"
    assert 2 < len(answers) < 10_000  # of 20,000: what the system and the server keep for who reads later


def test_a_refusal_keeps_its_kind_and_the_connection_goes_on(path: Path) -> None:
    def act() -> str:
        with ControlClient(path) as client:
            with pytest.raises(NoSuchExport, match="there is no export 'gone'") as caught:
                client.call("exports.remove", name="gone")
            assert caught.value.exit_code == 4
            return client.status().version

    assert with_server(path, act)[0] == "0.1.0"


def test_a_bug_of_ours_is_logged_with_its_trace_and_answered_without(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def act() -> None:
        with ControlClient(path) as client, pytest.raises(UserError, match=r"^run failed: a bug of ours$"):
            client.call("run", kind="broken")

    with caplog.at_level(logging.ERROR, logger="nbdzram.control"):
        with_server(path, act)
    assert caplog.records[0].exc_info is not None


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"not json", -32700),
        (b"[" * 30_000, -32700),
        (b"[]", -32600),
        (b'{"jsonrpc":"1.0","method":"status","id":1}', -32600),
        (b'{"jsonrpc":"2.0","method":7,"id":1}', -32600),
        (b'{"jsonrpc":"2.0","method":"status","id":[]}', -32600),
        (b'{"jsonrpc":"2.0","method":"nothing","id":1}', -32601),
        (b'{"jsonrpc":"2.0","method":"status","params":[],"id":1}', -32602),
        (b'{"jsonrpc":"2.0","method":"status","params":{"x":1},"id":1}', -32602),
        (b'{"jsonrpc":"2.0","method":"exports.reset","id":1}', -32602),
        (b'{"jsonrpc":"2.0","method":"exports.reset","params":{"name":1},"id":1}', -32602),
        (b'{"jsonrpc":"2.0","method":"exports.add","params":{"name":"a","size_bytes":true},"id":1}', -32602),
        (b'"' + b"x" * messages.MAX_REQUEST_BYTES + b'"', -32600),
    ],
)
def test_a_wrong_request_gets_its_code(path: Path, line: bytes, code: int) -> None:
    def act() -> Any:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(path))
            raw.sendall(line + b"\n")
            return json.loads(raw.makefile("rb").readline())

    answer, _ = with_server(path, act)
    assert answer["error"]["code"] == code
    assert answer["jsonrpc"] == "2.0"
    assert answer["id"] == (1 if b'"2.0"' in line and b'"id":1' in line else None)  # of this version of JSON-RPC


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("pools.add", {"name": "p", "mem_limit": 10**30}),
        ("pools.add", {"name": "../p"}),
        ("pools.change", {"name": "p", "mem_limit": -1}),
        ("pools.change", {"name": "p", "dedup": "later"}),
        ("exports.add", {"name": "\udce9", "size_bytes": 4096}),
        ("exports.add", {"name": "a", "size_bytes": 10**30}),
        ("exports.add", {"name": "a", "size_bytes": 4096, "description": "\udce9"}),
        ("exports.add", {"name": "a", "size_bytes": 4096, "pool": 7}),
        ("exports.copy", {"source": "a", "name": "b\n"}),
        ("exports.rename", {"name": "a", "new_name": "b\n"}),
        ("exports.change", {"name": "a", "description": "d" * 4097}),
        ("exports.change", {"name": "a", "allow_addresses": ["10.0.0.1/8"]}),
        ("exports.change", {"name": "a", "allow_addresses": [7]}),
        ("exports.change", {"name": "a", "allow_addresses": ["10.0.0.1"] * 1025}),
        ("exports.change", {"name": "a", "allow_certificates": [""]}),
        ("exports.resize", {"name": "a", "size_bytes": 513}),
        ("run", {"kind": "fold", "idle_seconds": 10**30}),
        ("run", {"kind": "recompress", "level": -7}),
    ],
    ids=lambda given: str(given)[:60].encode("unicode_escape").decode(),
)
def test_a_value_that_flags_and_files_would_refuse_is_refused_here(
    path: Path, method: str, params: dict[str, Any]
) -> None:
    """And never comes to the server, which would remember it."""

    def act() -> None:
        with ControlClient(path) as client, pytest.raises(UserError):
            client.call(method, **params)

    _, operations = with_server(path, act)
    assert operations.asked == []


def test_a_request_that_breaks_off_is_not_performed(path: Path) -> None:
    """A client that died in its middle may not have meant all of what a shorter one says."""

    def act() -> bytes:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(path))
            raw.sendall(b'{"jsonrpc":"2.0","method":"exports.remove","params":{"name":"disk"},"id":1}')
            raw.shutdown(socket.SHUT_WR)
            return raw.recv(1)

    answer, operations = with_server(path, act)
    assert (answer, operations.asked) == (b"", [])


def test_a_notification_is_not_answered(path: Path) -> None:
    def act() -> Any:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(path))
            raw.sendall(b'{"jsonrpc":"2.0","method":"status"}\n{"jsonrpc":"2.0","method":"nothing","id":5}\n')
            return json.loads(raw.makefile("rb").readline())

    assert with_server(path, act)[0]["id"] == 5


def test_the_socket_admits_its_owner_alone_and_goes_with_the_server(path: Path) -> None:
    def act() -> int:
        return path.stat().st_mode

    assert stat.S_IMODE(with_server(path, act)[0]) == 0o600
    assert not path.exists()


def test_a_socket_that_a_dead_server_left_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    def act() -> ServerStatus:
        with ControlClient(path) as client:
            return client.status()

    assert with_server(path, act)[0] == SERVER


def test_a_second_server_is_refused_and_the_first_lives_on(path: Path) -> None:
    async def act() -> None:
        async with serving(path):
            says = rf"another server answers on the control socket {path} \(process {os.getpid()}\); stop it"
            with pytest.raises(UserError, match=says):
                await ControlServer(path, {}).start()
            with await asyncio.to_thread(ControlClient, path) as client:
                assert await asyncio.to_thread(client.status) == SERVER

    asyncio.run(act())


def test_a_server_that_hangs_does_not_hang_the_next_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", _impatient(socket.socket.connect))
    with (
        hanging_server(path),
        pytest.raises(UserError, match=rf"another server answers on the control socket {path}; stop it"),
    ):
        asyncio.run(ControlServer(path, {}).start())


def _impatient(connect: Callable[[socket.socket, str], None]) -> Callable[[socket.socket, str], None]:
    """Who would wait fails instead."""

    def connect_at_once(client: socket.socket, path: str) -> None:
        assert client.gettimeout() == 0, "it waits for a server that may hang"
        connect(client, path)

    return connect_at_once


@pytest.mark.parametrize(
    ("name", "clue"), [("file", "is no socket"), ("gone/x", "No such file"), ("x" * 120, "too long")]
)
def test_an_unusable_path_is_one_sentence(tmp_path: Path, name: str, clue: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"cannot make the control socket .*{clue}.*--control PATH"):
        asyncio.run(ControlServer(tmp_path / name, {}).start())


def test_a_client_without_a_server_is_told_so(path: Path) -> None:
    """And keeps no socket: whoever looks for a server again and again would run out of them."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ServerUnreachable, match="is `nbdzram serve` running") as caught:
        ControlClient(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert caught.value.exit_code == 3


def test_a_server_that_goes_away_is_unreachable(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        client = ControlClient(path)
        accepted, _ = listening.accept()
        accepted.close()
    with client, pytest.raises(ServerUnreachable, match="went away"):
        client.call("status")


@pytest.mark.parametrize("look", ["status", "clients", "runs", "streams"])
def test_who_looks_at_a_server_that_does_not_answer_is_told_so(
    path: Path, look: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A health check would wait for ever for one that is stopped, and `top` show what was. A run may take its time."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        with ControlClient(path) as client:
            answering, _ = listening.accept()
            with answering:
                answering.sendall(
                    b'{"jsonrpc":"2.0","result":"here","id":1}\n{"jsonrpc":"2.0","result":"done","id":2}\n'
                )
                assert client.call(look) == "here"
                assert client._socket.gettimeout() == client_module.LOOK_SECONDS
                assert client.call("run") == "done"
                assert client._socket.gettimeout() is None
                monkeypatch.setattr(client_module, "LOOK_SECONDS", 0.01)
                with pytest.raises(ServerUnreachable, match="has not answered for") as caught:
                    client.call(look)
        told: list[str] = []
        with ControlClient(path, told.append) as client:
            monkeypatch.setattr(client_module, "LATE_SECONDS", 0.125)
            monkeypatch.setattr(client_module, "LOOK_SECONDS", 0.375)
            with pytest.raises(ServerUnreachable, match=r"has not answered for 0\.375 s: it is stopped, hangs"):
                client.call(look)
            assert client._socket.gettimeout() == 0.25  # what is left of it
        assert [sentence.split(") ")[1] for sentence in told] == ["has not answered for 0.125 s"]
        assert caught.value.exit_code == 3
        assert f"pid {os.getpid()}" in str(caught.value)


def test_an_answer_of_another_version_is_refused_in_one_sentence() -> None:
    payload = json.loads(to_json(SERVER))
    payload["surprise"] = 1
    assert from_json(ServerStatus, payload) == SERVER
    del payload["pools"]
    with pytest.raises(UserError, match="'pools'; was it written by another version"):
        from_json(ServerStatus, payload)


@pytest.mark.parametrize("answer", [{}, {"exports": "none"}, [], None])
def test_a_list_that_another_version_does_not_tell_is_missed_in_one_sentence(
    answer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ControlClient, "call", lambda *_: answer)
    with pytest.raises(UserError, match="'exports'; was it written by another version"):
        ControlClient.__new__(ControlClient).status_part("exports")


def test_a_stream_comes_before_the_answer_and_the_connection_goes_on(path: Path) -> None:
    def act() -> tuple[bytes, Any, ServerStatus]:
        parts: list[bytes] = []
        with ControlClient(path) as client:
            report = client.call_for_stream("streams.send", parts.append, exports=["a", "b"], since="monday")
            return b"".join(parts), report, client.status()

    (stream, report, status), operations = with_server(path, act)
    assert (stream, report["exports"], status) == (b"a stream", ["a", "b"], SERVER)
    assert operations.asked == [("a", "b", "monday", False, None)]


def test_a_stream_of_the_client_is_taken_to_its_end(path: Path) -> None:
    pieces = [b"one ", b"two " * 100_000, b"three", b""]

    def act() -> tuple[Any, ServerStatus]:
        left = iter(pieces)
        with ControlClient(path) as client:
            return client.call_with_stream("streams.receive", lambda _: next(left), prefix="new-"), client.status()

    (report, status), operations = with_server(path, act)
    assert (report["exports"], status) == (["disk"], SERVER)
    assert operations.asked == [("new-", None, False, b"".join(pieces))]


def test_streams_are_told_and_abandoned(path: Path) -> None:
    def act() -> Any:
        with ControlClient(path) as client:
            client.call("streams.abandon", name="00" * 16)
            return client.call("streams")

    (told,), operations = with_server(path, act)
    assert from_json(StreamStatus, told) == STREAM
    assert operations.asked == [("00" * 16,)]


def test_a_stream_that_is_refused_in_its_middle_tells_why_and_ends_the_connection(path: Path) -> None:
    """However much of it is still to come: nobody reads that."""

    def act() -> tuple[str, bool]:
        with ControlClient(path) as client:
            with pytest.raises(UserError) as told:
                client.call_with_stream("streams.receive", lambda _: b"bad " * 10_000)
            client._socket.settimeout(60)
            with contextlib.suppress(ConnectionResetError):
                return str(told.value), client._socket.recv(1) == b""
            return str(told.value), True

    assert with_server(path, act)[0] == ("the stream is bad", True)


def test_a_client_that_goes_away_in_its_stream_is_no_end_of_it(path: Path) -> None:
    def act() -> None:
        client = ControlClient(path)

        def read(_: int) -> bytes:
            raise KeyboardInterrupt

        with client, pytest.raises(KeyboardInterrupt):
            client.call_with_stream("streams.receive", read)
        with ControlClient(path) as other:
            other.status()

    _, operations = with_server(path, act)
    assert operations.asked == []


@pytest.mark.parametrize("name", ["socket", "state_dir"])
@pytest.mark.parametrize("place", ["/a\0b", "/\ud800"])
def test_a_path_that_none_can_be_is_refused_in_a_sentence(name: str, place: str) -> None:
    """It comes from another program as it stands, and would end in a trace where it is used."""
    given = {"socket": "/s", "pid": 1, "format": 1, "state_dir": "", name: place}
    operations = RecordedOperations()
    with pytest.raises(messages.MessageError, match=f"{name}: .* is not a path"):
        method_table(operations, operations)["takeover"].read(given)
