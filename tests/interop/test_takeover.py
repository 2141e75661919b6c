"""One server goes on in place of another, with its clients: they see a pause, and neither an error nor an end."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from nbdzram.control.client import ControlClient
from nbdzram.errors import UserError
from nbdzram.server.handover import FORMAT, KNOWS, SERVING, Handover
from tests.support.nbd_client import Client
from tests.support.pki import Pki
from tests.support.programs import PROGRAM_SECONDS, require_file, require_program
from tests.support.server import START_SECONDS, Nbdzram, free_port
from tests.wire import CMD_READ, CMD_WRITE, SIMPLE_REPLY, request

pytestmark = pytest.mark.interop

KIB, MIB = 1 << 10, 1 << 20
SIZE = 512 * MIB
PAUSE_SECONDS = 10.0
"""For a pause, whatever else the machine does; docs/howto/survive-a-restart.md says what it is on a quiet one."""
JOBS = """
[global]
ioengine=nbd
uri={uri}
iodepth=8
size=8M
rw=randwrite
bsrange=512-128k
bs_unaligned
refill_buffers
verify=crc32c
verify_fatal=1
do_verify=1
loops=1000
offset_increment=16M
[clients]
numjobs=8
"""


class Line:
    """Servers that take over from each other: one control socket, one state directory or none, one address."""

    def __init__(
        self,
        directory: Path,
        arguments: Sequence[str] = (),
        exports: dict[str, str] | None = None,
        *,
        in_memory: bool = False,
    ) -> None:
        self.directory = directory
        self.control = directory / "c.sock"
        self.state = "" if in_memory else str(directory / "state")
        self.arguments = [*(["--state-dir", self.state] if self.state else []), *arguments]
        self.exports = exports or {"disk": str(SIZE)}
        self._numbers = itertools.count()
        self.servers = [self._server([])]

    def _server(self, more: Sequence[str], behind: Sequence[str] = ()) -> Nbdzram:
        line = self

        class Member(Nbdzram):
            def environment(self) -> dict[str, str]:
                self.command[self.command.index("--control") + 1] = str(line.control)
                self.command[:0] = behind
                self.control = line.control
                return super().environment()

        place = self.directory / str(next(self._numbers))
        place.mkdir()
        return Member(place, self.exports, arguments=[*self.arguments, *more])

    @property
    def last(self) -> Nbdzram:
        return self.servers[-1]

    def take_over(self, more: Sequence[str] = (), behind: Sequence[str] = ()) -> Nbdzram:
        """`behind`: a command that runs the new server."""
        before = self.last
        self.servers.append(self._server(["--takeover", *more], behind))
        assert before.process.wait(START_SECONDS) == 0, before.log
        return self.last

    def attached(self) -> int:
        """How often anybody attached."""
        return sum(server.log.count("attached to export") for server in self.servers)

    def writes(self) -> int:
        with ControlClient(self.control) as control:
            return sum(export.operations["write"].requests for export in control.status().exports)

    def accepted(self) -> int:
        with ControlClient(self.control) as control:
            return control.status().connections_total


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    made = Line(tmp_path)
    yield made
    made.last.stop()


@pytest.fixture(params=["state-directory", "memory"])
def either_line(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Line]:
    """With disks in a state directory, and with disks in the process's own memory."""
    made = Line(tmp_path, in_memory=request.param == "memory")
    yield made
    made.last.stop()


class Beater(threading.Thread):
    """A client that writes and reads without a pause of its own, and knows the longest that it had."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        self.client = client
        self.ended = threading.Event()
        self.rounds = 0
        self.longest_seconds = 0.0
        self.error: BaseException | None = None

    def run(self) -> None:
        noise = random.Random(5)
        try:
            while not self.ended.is_set():
                began, block = time.monotonic(), noise.randbytes(4096)
                offset = SIZE // 4 + self.rounds % 512 * 4096
                self.client.write(offset, block)
                assert self.client.read(offset, 4096) == block
                self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
                self.rounds += 1
        except BaseException as error:  # noqa: BLE001
            self.error = error

    def beat(self) -> None:
        """Wait for another round."""
        before, deadline = self.rounds, time.monotonic() + PROGRAM_SECONDS
        while self.rounds < before + 2:
            assert self.is_alive(), self.error
            assert time.monotonic() < deadline
            self.ended.wait(0.01)

    def end(self) -> None:
        self.ended.set()
        self.join()
        assert self.error is None, self.error


@contextlib.contextmanager
def beating(line: Line) -> Iterator[Beater]:
    with line.last.client() as client:
        beater = Beater(client)
        beater.start()
        try:
            beater.beat()
            yield beater
        finally:
            beater.end()


@contextlib.contextmanager
def fio_on(line: Line) -> Iterator[subprocess.Popen[str]]:
    """Eight connections that write and verify until they are told to end, and were right."""
    fio = require_program("fio", package="fio")
    jobs = line.directory / "jobs.fio"
    jobs.write_text(JOBS.format(uri=line.last.uri()))
    running = subprocess.Popen(
        [fio, "--output-format=json", jobs],
        cwd=line.directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        before = line.writes()
        line.last.wait_until(lambda: line.writes() > before + 8 * 20, START_SECONDS)  # its looks at the size are over
        yield running
        assert running.poll() is None, running.communicate()[0]
        running.send_signal(signal.SIGINT)
        printed, _ = running.communicate(timeout=PROGRAM_SECONDS)
        report = json.loads(printed[printed.index("{") : printed.rindex("}") + 1])
        assert [job["error"] for job in report["jobs"]] == [0] * 8, printed
    finally:
        running.kill()
        running.wait()


def take_over_under_fio(line: Line, times: int) -> float:
    """The longest pause that a client beside them saw."""
    with fio_on(line) as fio, beating(line) as beater:
        attached = line.attached()
        for _ in range(times):
            line.take_over()
            beater.beat()
            assert fio.poll() is None
        with ControlClient(line.control) as control:
            assert control.status().connections == 9
        assert line.attached() == attached, "somebody connected again"
    for server in line.servers:
        assert "Traceback" not in server.log, server.log
    return beater.longest_seconds


def test_clients_of_a_server_that_is_taken_over_see_a_pause_and_no_end(either_line: Line) -> None:
    """Eight connections of fio write and verify meanwhile, and nobody connects again."""
    assert take_over_under_fio(either_line, 3) < PAUSE_SECONDS
    assert either_line.accepted() >= 9


@pytest.mark.slow
def test_a_hundred_takeovers_under_fio(either_line: Line) -> None:
    """With 256 MiB stored, that do not compress."""
    line = either_line
    with line.last.client() as client:
        for offset in range(SIZE // 2, SIZE, MIB):
            client.write(offset, random.Random(offset).randbytes(MIB))
    longest = take_over_under_fio(line, 100)
    print(f"longest pause {longest * 1e3:.0f} ms")
    assert longest < PAUSE_SECONDS


def test_what_came_of_a_request_before_the_takeover_is_answered_after_it(line: Line) -> None:
    """Half of a header, half of a small payload, and requests that nobody has read the answers of."""
    block = b"b" * 4096
    whole = request(CMD_WRITE, 8192, 4096, cookie=7) + block
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(line.last.client()) for _ in range(3)]
        for client, cut in zip(clients, (5, 1000), strict=False):
            client.socket.sendall(whole[:cut])
        reads = request(CMD_READ, 0, 4096, cookie=8)
        clients[2].socket.sendall(reads * 3)
        line.take_over()
        for client, cut in zip(clients, (5, 1000), strict=False):
            client.socket.sendall(whole[cut:])
            assert SIMPLE_REPLY.unpack(client.receive(SIMPLE_REPLY.size))[1:] == (0, 7)
        for _ in range(3):
            assert SIMPLE_REPLY.unpack(clients[2].receive(SIMPLE_REPLY.size))[1:] == (0, 8)
            clients[2].receive(4096)
        assert clients[2].read(8192, 4096) == block
        assert line.attached() == 3


def test_a_large_payload_that_goes_on_arriving_is_stored_before_and_one_that_stops_is_its_clients_to_send_again(
    line: Line,
) -> None:
    """It waits for a while: then whoever stopped is hung up on, with nothing of it stored, and all others go on."""
    payload = b"p" * MIB
    half = line.last.client()
    with line.last.client() as whole, half.socket:
        sent = threading.Event()

        def send() -> None:
            whole.socket.sendall(request(CMD_WRITE, 0, MIB, cookie=1) + payload)
            sent.set()

        half.socket.sendall(request(CMD_WRITE, 2 * MIB, MIB, cookie=2) + payload[: MIB // 2])
        threading.Thread(target=send).start()
        line.take_over()
        assert sent.wait(START_SECONDS)
        assert SIMPLE_REPLY.unpack(whole.receive(SIMPLE_REPLY.size))[1:] == (0, 1)
        assert half.socket.recv(1) == b""
        assert whole.read(0, MIB) == payload
        assert whole.read(2 * MIB, MIB) == bytes(MIB)


def test_a_payload_that_is_arriving_is_waited_for(line: Line) -> None:
    """Its client is at rest once it is stored and answered, and is handed over like others."""
    payload, place = b"p" * MIB, line.directory / "s"
    with line.last.client() as client, listening(place) as listener:
        client.socket.sendall(request(CMD_WRITE, 0, MIB, cookie=1) + payload[: MIB // 2])
        ask(line, place)
        client.socket.sendall(payload[MIB // 2 :])
        with listener.accept()[0] as giver:
            taken = Handover.take(giver)
            assert [(one.export, one.rest) for one in taken.clients] == [("disk", b"")]
            taken.close()
        assert SIMPLE_REPLY.unpack(client.receive(SIMPLE_REPLY.size))[1:] == (0, 1)
        assert client.read(0, MIB) == payload


def test_who_waits_to_be_accepted_is_accepted_by_the_next(line: Line) -> None:
    """The sockets that are listened on are never closed, and their files stay."""
    path, inode = line.last.unix_path, line.last.unix_path.stat().st_ino
    line.take_over()
    line.take_over()
    assert path.stat().st_ino == inode
    assert line.last.port == line.servers[0].port
    with Client(path, "disk") as client:
        client.write(0, b"a" * 4096)
    with Client(("127.0.0.1", line.last.port or 0), "disk") as client:
        assert client.read(0, 4096) == b"a" * 4096


def test_terms_are_kept_and_a_client_that_may_only_read_still_may_only_read(tmp_path: Path) -> None:
    python = require_program("/usr/bin/python3", package="python3")
    require_file(Path("/usr/lib/python3/dist-packages/nbd.py"), package="python3-libnbd")
    line = Line(tmp_path, exports={"disk": "1M,ro"})
    script = (
        "import nbd, sys\nh = nbd.NBD()\n"
        "h.add_meta_context('base:allocation')\n"
        f"h.connect_uri({line.last.uri()!r})\n"
        "print('up', flush=True); sys.stdin.readline()\n"
        "assert h.get_structured_replies_negotiated()\n"
        "assert h.pread(512, 0) == bytearray(512)\n"
        "h.block_status(1 << 20, 0, lambda c, o, e, err: print(c, e))\n"
        "h.set_strict_mode(0)\n"
        "try: h.pwrite(b'x' * 512, 0)\n"
        "except nbd.Error as error: print(error.errno)\n"
    )
    with subprocess.Popen([python, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "up\n"
        line.take_over()
        printed, _ = client.communicate("go\n", timeout=PROGRAM_SECONDS)
    assert printed.split("\n")[:2] == ["base:allocation [1048576, 3]", "EPERM"]
    line.last.stop()


def test_a_client_behind_tls_is_closed_between_two_requests(tmp_path: Path) -> None:
    pki = Pki(tmp_path)
    certificate, key = pki.issue("localhost", file="server", alternatives="DNS:localhost")
    files = ["--tls-certificate", str(certificate), "--tls-key", str(key)]
    line = Line(tmp_path, ["--tls", "on", *files])
    client = Client(line.last.unix_path, "disk", tls=pki.client_context())
    with client.socket, line.last.client() as plain:
        client.write(0, b"a" * 4096)
        line.take_over()
        assert plain.read(0, 4096) == b"a" * 4096
        with contextlib.suppress(ssl.SSLError):
            assert client.socket.recv(1) == b""
    line.last.stop()


# ---- what fails leaves the old one serving, its clients attached


def ask(
    line: Line, place: Path, *, speaks: int = FORMAT, knows: Sequence[str] = KNOWS, state: str | None = None
) -> None:
    with ControlClient(line.control) as control:
        state_dir = line.state if state is None else state
        control.call(
            "takeover", socket=str(place), pid=os.getpid(), format=speaks, knows=list(knows), state_dir=state_dir
        )


def ends_when_it_is_to_take(line: Line, place: Path) -> None:
    with listening(place) as listener:
        ask(line, place)
        listener.accept()[0].close()


def ends_when_it_has_taken(line: Line, place: Path) -> None:
    with listening(place) as listener:
        ask(line, place)
        with listener.accept()[0] as giver:
            Handover.take(giver).close()


def says_something_else(line: Line, place: Path) -> None:
    with listening(place) as listener:
        ask(line, place)
        with listener.accept()[0] as giver:
            taken = Handover.take(giver)
            giver.sendall(b"x" * len(SERVING))
            taken.close()


def cannot_bind_its_metrics(line: Line, _: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        metrics = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(AssertionError, match="cannot listen on"):
            line.take_over(["--metrics", metrics])


def cannot_read_its_certificate(line: Line, _: Path) -> None:
    missing = str(line.directory / "missing")
    with pytest.raises(AssertionError, match="missing"):
        line.take_over(["--tls", "on", "--tls-certificate", missing, "--tls-key", missing])


def has_no_descriptors(line: Line, _: Path) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(line.last.client()) for _ in range(60)]
        with pytest.raises(AssertionError, match="raise LimitNOFILE="):
            line.take_over(behind=["prlimit", "--nofile=64:64"])
        line.servers[0].wait_until(lambda: "going on" in line.servers[0].log, START_SECONDS)
        for client in clients:
            assert client.read(0, 4096) == bytes(4096)


def cannot_open_the_pools(line: Line, _: Path) -> None:
    """Its state directory is the same, and one of its pools is no arena."""
    (Path(line.state) / "other.pool").write_bytes(b"no arena" * 4096)
    with pytest.raises(AssertionError, match="is not an nbdzram arena"):
        line.take_over(["--pool", "other"])


@contextlib.contextmanager
def listening(place: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen(1)
        listener.settimeout(START_SECONDS)
        yield listener


@pytest.mark.parametrize(
    "fails",
    [
        ends_when_it_is_to_take,
        ends_when_it_has_taken,
        says_something_else,
        cannot_bind_its_metrics,
        cannot_read_its_certificate,
        has_no_descriptors,
        cannot_open_the_pools,
    ],
)
def test_a_successor_that_fails_leaves_the_old_server_serving(
    either_line: Line, fails: Callable[[Line, Path], None]
) -> None:
    line = either_line
    if not line.state and fails is cannot_open_the_pools:
        pytest.skip("no file of a pool lies anywhere")
    with beating(line) as beater:
        fails(line, line.directory / "s")
        server = line.servers[0]
        server.wait_until(lambda: "going on" in server.log, START_SECONDS)
        beater.beat()
        assert line.attached() == (61 if fails is has_no_descriptors else 1), "its client had to connect again"
        with Client(server.unix_path, "disk") as newcomer:
            newcomer.read(0, 4096)
        assert server.command_line("stat").returncode == 0
        line.servers[1:] = []
        line.take_over()
        beater.beat()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"speaks": FORMAT + 1}, "restart it instead"),
        ({"state": "/somewhere/else"}, "and not in /somewhere/else"),
        ({"state": ""}, "and not in memory"),
        ({"knows": []}, "which the one that asks does not know"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_happens(line: Line, given: dict[str, object], says: str) -> None:
    with beating(line) as beater:
        with pytest.raises(UserError, match=says):
            ask(line, line.directory / "s", **given)  # type: ignore[arg-type]
        beater.beat()
    assert "going on" not in line.last.log


def test_disks_in_memory_go_over_with_all_that_was_changed_at_run_time(tmp_path: Path) -> None:
    """What no file remembers: exports and pools that were added, renamed and removed, rules, and what was counted."""
    line = Line(tmp_path, exports={"disk": "1M", "other": "1M"}, in_memory=True)
    with line.last.client() as client:
        client.write(0, b"d" * 4096)
        for words in (
            "pools add more --mem-limit 64M",
            "exports add new 2M --pool more --allow-address 192.0.2.0/24 --description kept",
            "exports remove other --yes",
        ):
            done = line.last.command_line(*words.split())
            assert done.returncode == 0, done.stderr
        with Client(line.servers[0].unix_path, "new") as second:
            second.write(0, b"n" * 4096)
        before = told(line)
        for _ in range(2):
            line.take_over()
            assert client.read(0, 4096) == b"d" * 4096
            with Client(line.servers[0].unix_path, "new") as second:
                assert second.read(0, 4096) == b"n" * 4096
        after = told(line)
        assert after["exports"] == before["exports"]
        assert after["pools"] == before["pools"]
        assert after["writes"] == before["writes"] == 2
        assert after["numbers"] == before["numbers"]
        assert after["accepted"] == before["accepted"] + 2
    line.last.stop()


def told(line: Line) -> dict[str, Any]:
    with ControlClient(line.control) as control:
        status, clients = control.status(), control.clients()
    return {
        "exports": {
            export.name: (export.pool, export.size_bytes, export.allow_addresses, export.description)
            for export in status.exports
        },
        "pools": {pool.name: pool.stats.mem_limit for pool in status.pools},
        "writes": sum(export.operations["write"].requests for export in status.exports),
        "accepted": status.connections_total,
        "numbers": {client.number for client in clients},
    }


@pytest.mark.parametrize("held", [0, 1])
def test_disks_in_memory_are_not_given_to_who_has_a_directory_nor_the_other_way(tmp_path: Path, held: int) -> None:
    line = Line(tmp_path, exports={"disk": "1M"}, in_memory=not held)
    with pytest.raises(UserError, match="and not in"):
        ask(line, tmp_path / "s", state="" if held else str(tmp_path))
    line.last.stop()


def test_who_may_have_few_descriptors_raises_the_limit_before_it_takes_them(line: Line) -> None:
    """One for which there is no place would be lost, and its client with it."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(line.last.client()) for _ in range(60)]
        line.take_over(behind=["prlimit", "--nofile=48:4096"])
        for client in clients:
            assert client.read(0, 4096) == bytes(4096)


def test_one_takeover_at_a_time_and_who_asks_meanwhile_is_answered_by_the_next(line: Line) -> None:
    payload = b"p" * MIB
    with line.last.client() as client, listening(line.directory / "s") as listener:
        client.socket.sendall(request(CMD_WRITE, 0, MIB, cookie=1) + payload[: MIB // 2])
        ask(line, line.directory / "s")
        with pytest.raises(UserError, match="it is ending already"):
            ask(line, line.directory / "t")
        client.socket.sendall(payload[MIB // 2 :])
        with listener.accept()[0] as giver:
            taken = Handover.take(giver)
            with contextlib.ExitStack() as stack:  # nobody accepts it now, and it is not refused either
                waiting = stack.enter_context(ControlClient(line.control))
                taken.close()
                giver.close()
                line.last.wait_until(
                    lambda: [export.name for export in waiting.status().exports] == ["disk"], START_SECONDS
                )
        assert SIMPLE_REPLY.unpack(client.receive(SIMPLE_REPLY.size))[1:] == (0, 1)


def test_a_server_that_is_told_to_stop_while_it_gives_stops_where_that_fails(line: Line) -> None:
    with listening(line.directory / "s") as listener:
        ask(line, line.directory / "s")
        with listener.accept()[0] as giver:
            Handover.take(giver).close()
            line.last.process.send_signal(signal.SIGTERM)
    assert line.last.process.wait(START_SECONDS) == 0, line.last.log


def test_who_goes_on_needs_nothing_that_is_not_there_any_more(tmp_path: Path) -> None:
    """Neither certificates that are broken by now, which may be why nobody could take over, nor its metrics' port."""
    pki = Pki(tmp_path)
    certificate, key = pki.issue("localhost", file="server", alternatives="DNS:localhost")
    files = ["--tls-certificate", str(certificate), "--tls-key", str(key)]
    port = free_port()
    line = Line(tmp_path, ["--tls", "on", *files, "--metrics", f"127.0.0.1:{port}"], in_memory=True)
    with beating(line) as beater, listening(line.directory / "s") as listener:
        ask(line, line.directory / "s")
        with listener.accept()[0] as giver:
            taken = Handover.take(giver)
            certificate.write_text("broken")
            with socket.create_server(("127.0.0.1", port)):
                taken.close()
                giver.close()
                line.last.wait_until(lambda: "going on without metrics" in line.last.log, START_SECONDS)
                beater.beat()
    assert line.attached() == 1
    line.last.stop()


def test_who_ended_before_anything_was_given_to_him_is_told_to_nobody(line: Line) -> None:
    """Whoever asks has to listen: nothing ends before he was reached."""
    with beating(line) as beater:
        with pytest.raises(UserError, match="is it still there"):
            ask(line, line.directory / "s")
        beater.beat()
    assert "going on" not in line.last.log


def test_a_server_that_is_killed_before_it_gives_is_followed_by_one_that_starts(line: Line) -> None:
    """With a state directory it has what the killed one had."""
    payload, client = b"p" * MIB, line.last.client()
    with client.socket:
        client.write(0, b"a" * 4096)
        client.socket.sendall(request(CMD_WRITE, MIB, MIB, cookie=1) + payload[: MIB // 2])  # it waits for the rest
        old = line.last
        starting = threading.Thread(target=lambda: line.servers.append(line._server(["--takeover"])))
        starting.start()
        old.wait_until(lambda: "takes over" in old.log, START_SECONDS)
        old.kill()
        starting.join()
    assert "ended before it gave anything away; starting" in line.last.log
    with line.last.client() as client:
        assert client.read(0, 4096) == b"a" * 4096


def test_where_no_server_runs_one_starts(tmp_path: Path) -> None:
    line = Line(tmp_path, ["--takeover"])
    with line.last.client() as client:
        client.write(0, b"a" * 4096)
    assert "no server runs here that could be taken over" in line.last.log
    line.last.stop()
    assert not list(tmp_path.glob(f".{os.getpid()}*"))
