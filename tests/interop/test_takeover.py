"""One server goes on in place of another, with its clients: they see a pause, and neither an error nor an end."""

from __future__ import annotations

import collections
import contextlib
import http.client
import random
import socket
import ssl
import subprocess
import tempfile
import threading
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

from nbdzram.config import TcpAddress
from nbdzram.control.client import ControlClient
from nbdzram.server.handover import KNOWS, Handover, metrics_at
from tests.support.nbd_client import Client, RequestFailed
from tests.support.pki import Pki
from tests.support.programs import PROGRAM_SECONDS, require_file, require_program
from tests.support.server import START_SECONDS, free_port
from tests.support.takeover import MIB, PATIENT, Line, ask, fill_half, listening, take_over_under_fio
from tests.support.threads import wait_until
from tests.wire import CMD_READ, CMD_WRITE, SIMPLE_REPLY, request

pytestmark = pytest.mark.interop


@pytest.mark.parametrize("in_memory", [False, True], ids=["state-directory", "memory"])
def test_clients_of_a_server_that_is_taken_over_see_a_pause_and_no_end(tmp_path: Path, *, in_memory: bool) -> None:
    """Eight connections of fio write and verify meanwhile, and nobody connects again. Their pause waits for nothing
    that is given up after a while: servers whose patience never ends hand over as well. Its length: tests/bench/pauses.
    """
    line = Line(tmp_path, in_memory=in_memory, program=PATIENT, successors=PATIENT)
    try:
        take_over_under_fio(line, 3)
        assert line.accepted() >= 9
    finally:
        line.last.stop()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["memory", "tmpfs", "disk"])
def test_a_hundred_takeovers_under_fio(tmp_path: Path, where: str) -> None:
    """With 256 MiB stored, that do not compress; with a state directory on tmpfs, and on what tests run on."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if where == "tmpfs" else tmp_path) as directory:
        line = Line(Path(directory), in_memory=where == "memory")
        try:
            fill_half(line)
            print(f"longest pause {take_over_under_fio(line, 100) * 1e3:.0f} ms")
        finally:
            line.last.stop()


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


def test_a_payload_that_is_arriving_is_waited_for(tmp_path: Path) -> None:
    """Its client is at rest once it is stored and answered, and is handed over like others."""
    line, payload, place = Line(tmp_path, program=PATIENT), b"p" * MIB, tmp_path / "s"
    with line.last.client() as client, listening(place) as listener:
        client.socket.sendall(request(CMD_WRITE, 0, MIB, cookie=1) + payload[: MIB // 2])
        assert ask(line, place) == line.last.pid
        client.socket.sendall(payload[MIB // 2 :])
        with listener.accept()[0] as giver:
            taken = Handover.take(giver)
            assert [(one.export, one.rest) for one in taken.clients] == [("disk", b"")]
            taken.close()
        assert SIMPLE_REPLY.unpack(client.receive(SIMPLE_REPLY.size))[1:] == (0, 1)
        assert client.read(0, MIB) == payload
    line.last.stop()


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


def test_disks_in_memory_go_over_with_all_that_was_changed_at_run_time(tmp_path: Path) -> None:
    """What no file remembers: exports and pools that were added, renamed and removed, rules, and what was counted."""
    line = Line(tmp_path, exports={"disk": "1M", "other": "1M"}, in_memory=True)
    with line.last.client() as client:
        client.write(0, b"d" * 4096)
        for words in (
            "pools add more --mem-limit 64M",
            "exports add new 2M --pool more --allow-address 192.0.2.0/24 --description kept",
            "exports add slow 1M --iops 100 --iops-burst 1",
            "exports remove other --yes",
        ):
            done = line.last.command_line(*words.split())
            assert done.returncode == 0, done.stderr
        with Client(line.servers[0].unix_path, "new") as second:
            second.write(0, b"n" * 4096)
        with Client(line.servers[0].unix_path, "slow") as third:
            for block in range(4):
                third.write(block * 4096, random.Random(5).randbytes(4096))
        assert line.last.command_line("fold").returncode == 0
        before = told(line)
        for _ in range(2):
            line.take_over()
            assert client.read(0, 4096) == b"d" * 4096
            with Client(line.servers[0].unix_path, "new") as second:
                assert second.read(0, 4096) == b"n" * 4096
        after = told(line)
        assert after["exports"] == before["exports"]
        assert after["pools"] == before["pools"]
        assert after["writes"] == before["writes"] == 6
        assert after["throttled"] == before["throttled"] != (0, 0.0)
        assert after["counters"] == before["counters"]
        assert before["counters"]["default"]["objects_folded"] == 3
        assert after["totals"] == before["totals"]
        assert before["totals"]["default"]["fold"].runs == 1
        assert after["numbers"] == before["numbers"]
        assert after["accepted"] == before["accepted"] + 2
    line.last.stop()


def told(line: Line) -> dict[str, Any]:
    """What the server says, once it has seen that all clients but the first have left."""
    line.last.wait_until(lambda: line.numbers() <= {1}, START_SECONDS)
    with ControlClient(line.control) as control:
        status, clients = control.status(), control.clients()
    return {
        "exports": {
            export.name: (export.pool, export.size_bytes, export.allow_addresses, export.description)
            for export in status.exports
        },
        "pools": {pool.name: pool.stats.mem_limit for pool in status.pools},
        "counters": {pool.name: pool.stats.counters() for pool in status.pools},
        "totals": {pool.name: pool.maintenance.totals for pool in status.pools},
        "throttled": next(
            (
                (export.throttled_requests, export.throttled_seconds)
                for export in status.exports
                if export.name == "slow"
            ),
            None,
        ),
        "writes": sum(export.operations["write"].requests for export in status.exports),
        "accepted": status.connections_total,
        "numbers": {client.number for client in clients},
    }


def test_clients_that_were_taken_over_count_for_where_they_came_in(tmp_path: Path) -> None:
    """The last places are not for a listener, or a source, that has its share."""
    limits = tmp_path / "limits.toml"
    limits.write_text("[limits]\nconnections = 40\n")
    line = Line(tmp_path, ["--config", str(limits)], in_memory=True)
    with contextlib.ExitStack() as stack:
        for _ in range(35):
            stack.enter_context(line.last.client())
        for _ in range(2):
            line.take_over()
        with pytest.raises((EOFError, ConnectionError)), Client(line.servers[0].unix_path, "disk"):
            pass
        line.last.wait_until(lambda: "which has its share" in line.last.log, START_SECONDS)
        with Client(("127.0.0.1", line.last.port or 0), "disk") as other:
            assert other.read(0, 4096) == bytes(4096)
    with ControlClient(line.control) as control:
        line.last.wait_until(lambda: control.status().connections == 0, START_SECONDS)
    line.last.stop()


def test_who_may_have_few_descriptors_raises_the_limit_before_it_takes_them(line: Line) -> None:
    """One for which there is no place would be lost, and its client with it."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(line.last.client()) for _ in range(60)]
        line.take_over(behind=["prlimit", "--nofile=48:4096"])
        for client in clients:
            assert client.read(0, 4096) == bytes(4096)


@pytest.mark.parametrize("in_memory", [False, True], ids=["directory", "memory"])
def test_a_full_pool_is_taken_over_and_refuses_no_more_and_no_less_than_before(
    tmp_path: Path, *, in_memory: bool
) -> None:
    """What a new process needs beside what is stored is not refused, and nothing that was answered is lost."""
    line = Line(tmp_path, ["--mem-limit", "16M"], in_memory=in_memory)
    noise, known = random.Random(7), dict[int, bytes]()
    with line.last.client() as client:
        for _ in range(3):
            refused = 0
            while refused < 200:
                block, content = noise.randrange(8192), noise.randbytes(4096)
                try:
                    client.write(block * 4096, content)
                    known[block] = content
                except RequestFailed:
                    refused += 1
            line.take_over()
            assert all(client.read(block * 4096, 4096) == content for block, content in known.items())
            trimmed = noise.sample(sorted(known), 100)
            for block in trimmed:
                client.trim(block * 4096, 4096)
                del known[block]
            for block in trimmed[:50]:
                client.write(block * 4096, noise.randbytes(4096))
                client.trim(block * 4096, 4096)
    assert line.attached() == 1
    with ControlClient(line.control) as control:
        (pool,) = control.status().pools
        assert pool.stats.mem_used_total + pool.stats.metadata <= pool.stats.mem_limit == 16 * MIB
    line.last.stop()


ASKED_FOR = ("/healthz", "/metrics", "/readyz")


class Scraper(threading.Thread):
    """Asks for health and metrics without a pause, each on a connection of its own."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = urllib.parse.urlsplit(url)
        self.ended = threading.Event()
        self.answers: collections.Counter[object] = collections.Counter()
        self.asked = 0

    def run(self) -> None:
        while not self.ended.is_set():
            for path in ASKED_FOR:
                try:
                    self.answers[path, self.ask(path)] += 1
                except (OSError, http.client.HTTPException) as error:
                    self.answers[path, repr(error)] += 1
                self.asked += 1

    def wait_for(self, more: int) -> None:
        """So many answers."""
        wanted = self.asked + more
        wait_until(lambda: self.asked >= wanted)

    def ask(self, path: str) -> int:
        connection = http.client.HTTPConnection(str(self.url.hostname), self.url.port, timeout=PROGRAM_SECONDS)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            assert answer.read()
            return answer.status


SAME_PLACE = TcpAddress(host="127.0.0.1", port=0)


def hangs_up_with_all_of_it(line: Line, place: Path, metrics: TcpAddress | None) -> None:
    """Another process has everything, metrics too if its own are to be there, and does not say that it serves."""
    with listening(place) as listener:
        ask(line, place, knows=[*KNOWS, metrics_at(metrics)])
        with listener.accept()[0] as giver:
            taken = Handover.take(giver)
            assert len(taken.metrics) == (metrics == SAME_PLACE)
            taken.close()
    place.unlink()


def test_who_asks_for_metrics_and_health_notices_nothing(tmp_path: Path) -> None:
    """Where both serve them at one place: who comes meanwhile waits for the next, as clients do, or for the one that
    goes on, wherever the other would have been: the port, which the system chose, is the same."""
    line = Line(tmp_path, ["--metrics", "127.0.0.1:0"], in_memory=True)
    assert line.last.metrics_url is not None
    scraper = Scraper(line.last.metrics_url)
    scraper.start()
    try:
        for _ in range(3):
            scraper.wait_for(4)
            for metrics in (SAME_PLACE, None, TcpAddress(port=9)):
                hangs_up_with_all_of_it(line, tmp_path / "s", metrics)
            line.take_over()
    finally:
        scraper.ended.set()
        scraper.join()
    assert set(scraper.answers) == {(path, 200) for path in ASKED_FOR}, scraper.answers
    assert line.last.metrics_url == line.servers[0].metrics_url
    line.last.stop()


def test_metrics_that_are_to_be_had_elsewhere_are_no_obstacle(tmp_path: Path) -> None:
    """At all addresses of the port that one of them had; nowhere; and at one again."""
    port = free_port()
    places = [f"127.0.0.1:{port}", f"0.0.0.0:{port}", "off", f"127.0.0.1:{port}"]
    line = Line(tmp_path, ["--metrics", places[0]], in_memory=True)
    with line.last.client() as client:
        for place in places[1:]:
            line.take_over(["--metrics", place])
            assert client.read(0, 4096) == bytes(4096)
            if place == "off":
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection(("127.0.0.1", port))
            else:
                assert line.last.metrics_url == f"http://{place}/metrics"
                assert Scraper(f"http://127.0.0.1:{port}/").ask("/healthz") == 200
    line.last.stop()
