"""The metrics server's manners and bounds, on real sockets."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import os
import re
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import uvloop

from nbdzram.config import TcpAddress
from nbdzram.errors import NoSuchExport, UserError
from nbdzram.metrics import answers, http, requests
from nbdzram.metrics.answers import Answer, Answers, Pace, Shared, sentence
from nbdzram.metrics.http import ANSWER_PLACES, BURST, HEAD_PLACES, MetricsServer, Places
from nbdzram.metrics.page import load_page
from nbdzram.metrics.requests import MAX_HEAD_BYTES, MAX_PIECES, Hosts
from nbdzram.status import ServerStatus
from nbdzram.unread import UNSENT_BYTES
from tests.support.unread import unread_bytes
from tests.unit.metrics.stage import Show, with_server
from tests.unit.records import EXPORT, SERVER

LARGE = dataclasses.replace(
    SERVER, exports=tuple(dataclasses.replace(EXPORT, name=f"disk{number}") for number in range(2000))
)
"""Its status.json is some 700 KB: more than a socket with small buffers takes."""


def exchange(host: str, port: int, request: bytes) -> bytes:
    with socket.create_connection((host, port), timeout=30) as client:
        client.sendall(request)
        return b"".join(iter(lambda: client.recv(65536), b""))


def raw(request: bytes, hosts: tuple[str, ...] = ()) -> bytes:
    answer: bytes = with_server(lambda host, port: exchange(host, port, request), hosts=hosts)
    return answer


def get(path: str, host: str = "localhost") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("request_head", "code"),
    [
        (get("/nothing"), 404),
        (b"POST /metrics HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        (b"\x16\x03\x01\r\n\r\n", 400),
        (b"GET http://[::1/metrics HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET http://[1.2.3.4]/metrics HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nCookie: " + b"x" * 3 * MAX_HEAD_BYTES + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nCookie: " + b"x" * 2 * MAX_HEAD_BYTES, 431),
        (b"GET /metrics?x=1 HTTP/1.0\r\n\r\n", 200),
        (b"\r\n" + get("/healthz"), 200),
        (b"\r\n\r\n" + get("/healthz"), 200),
        (b"GET http://localhost:9809/metrics?x=1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        (b"GET HTTP://127.0.0.1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        (b"GET ftp://localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400),  # RFC 9112, section 3.2: a server must refuse it
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    ],
)
def test_each_request_gets_the_status_that_fits(request_head: bytes, code: int) -> None:
    assert raw(request_head).startswith(f"HTTP/1.1 {code} ".encode())


def test_head_gets_the_head_alone() -> None:
    """Of a refusal too: what comes behind it would be taken for the next answer."""
    for host, path in (("a", "/healthz"), ("a", "/nothing"), ("evil.example", "/metrics")):
        assert raw(f"HEAD {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()).endswith(b"\r\n\r\n")


def test_a_method_that_is_not_served_is_told_which_are() -> None:
    assert b"\r\nAllow: GET, HEAD\r\n" in raw(b"PUT /metrics HTTP/1.1\r\nHost: a\r\n\r\n")


@pytest.mark.parametrize(
    ("host", "allowed", "admitted"),
    [
        ("127.0.0.1", (), True),
        ("::1", (), True),
        ("localhost", (), True),
        ("LocalHost.", (), True),
        ("nbd.localhost", (), True),
        ("nbdzram", (), True),  # a container's, or a name of the local network: no stranger has one without a dot
        ("", (), True),
        ("evil.example", (), False),
        ("evil.example", ("good.example",), False),
        ("good.example", ("good.example",), True),
        ("GOOD.example.", ("good.example",), True),
        ("a.b.example", ("*.example",), True),
        ("example", ("*.example",), True),
        ("bad-example.org", ("*.example.org",), False),
        ("127.0.0.1.evil.example", (), False),
        ("evil.example", ("*",), True),
    ],
)
def test_a_name_is_answered_if_no_stranger_can_have_it(host: str, allowed: tuple[str, ...], admitted: bool) -> None:
    assert Hosts(allowed).admit(host) is admitted


def test_this_machines_own_name_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdzram.metrics.requests.socket.gethostname", lambda: "NBD1.example.org")
    assert Hosts(()).admit("nbd1.example.org")


@pytest.mark.parametrize("path", ["/", "/metrics", "/status.json", "/history.json", "/usage.json"])
def test_a_page_that_was_led_here_by_its_own_name_learns_nothing(path: str) -> None:
    """DNS rebinding: the browser names the page's host, whichever address that has by now."""
    refused = raw(get(path, host="evil.example:9809"))
    assert refused.startswith(b"HTTP/1.1 421 ")
    assert b"--metrics-hosts" in refused
    absolute = f"GET http://evil.example{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    assert raw(absolute).startswith(b"HTTP/1.1 421 ")
    assert raw(get(path, host="evil.example:9809"), hosts=("evil.example",)).startswith(b"HTTP/1.1 200 ")
    assert raw(get("/healthz", host="evil.example")).startswith(b"HTTP/1.1 200 ")  # it tells nothing, a probe needs it


@contextlib.contextmanager
def crowd(host: str, port: int, count: int, begin: bytes) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        members = []
        for _ in range(count):
            member = stack.enter_context(socket.socket())
            member.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            member.settimeout(20)
            member.connect((host, port))
            member.sendall(begin)
            members.append(member)
        yield members


@pytest.mark.parametrize("count", [HEAD_PLACES + 9, 4 * HEAD_PLACES])
def test_half_requests_keep_nobody_out(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEAD_SECONDS", 600)  # it is not time that makes room

    def act(host: str, port: int) -> None:
        with crowd(host, port, count, b"GET /metrics HTTP/1.1\r\nHo") as members:
            for path in ("/healthz", "/readyz", "/metrics", "/"):
                assert exchange(host, port, get(path)).startswith(b"HTTP/1.1 200 ")
            assert members[0].recv(1) == b""  # the oldest made room
            members[-1].sendall(b"st: a\r\n\r\n")
            assert members[-1].recv(9) == b"HTTP/1.1 "

    with_server(act)


def test_who_comes_again_and_again_waits_where_it_costs_the_loop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst is let in; the others stay in the system's queue until the pause is over, and no task is made for any."""
    monkeypatch.setattr(http, "BURST_PAUSE_SECONDS", 600)
    tasks: list[object] = []

    def make_task(loop: asyncio.AbstractEventLoop, what: Coroutine[Any, Any, Any], **words: Any) -> asyncio.Task[Any]:
        tasks.append(what)
        return asyncio.Task(what, loop=loop, **words)

    async def act() -> None:
        server = MetricsServer(TcpAddress(port=0), Show())
        await server.start()
        asyncio.get_running_loop().set_task_factory(make_task)  # type: ignore[arg-type]
        port = int(server.url.split(":")[2].split("/")[0])
        with crowd("127.0.0.1", port, 3 * BURST, b"GET /metrics HTTP/1.1\r\nHo"):
            while not server._heads._deadlines:  # noqa: ASYNC110 - nobody is told of it
                await asyncio.sleep(0)
            for _ in range(100):  # turns of the loop, of which each could let in others
                await asyncio.sleep(0)
            assert len(server._heads._deadlines) == BURST
            assert tasks == []
            server.accept_no_more()
            assert all(pause.cancelled() for pause in server._pauses.values()), "none ends in letting in others"
        await server.stop()

    uvloop.run(act())


def test_who_cannot_be_accepted_is_left_alone_for_longer_and_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no descriptor for him, and there will be none the next moment."""
    monkeypatch.setattr(http, "ACCEPT_PAUSE_SECONDS", 600)

    async def act() -> None:
        server = MetricsServer(TcpAddress(port=0), Show())
        await server.start()
        (listener,) = server._listeners
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.create_connection(listener.getsockname()):
            lowest_free = os.dup(0)
            os.close(lowest_free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
            try:
                while not server._pauses:  # noqa: ASYNC110 - nobody is told of it
                    await asyncio.sleep(0)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert server._pauses[listener].when() > asyncio.get_running_loop().time() + 300
        await server.stop()

    uvloop.run(act())
    assert caplog.text.count("cannot accept a connection for metrics: Too many open files") == 1


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_leaves_in_the_middle_of_its_head_leaves_its_place_too(
    reset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "HEAD_SECONDS", 600)

    async def act() -> None:
        server = MetricsServer(TcpAddress(port=0), Show())
        await server.start()
        port = int(server.url.split(":")[2].split("/")[0])
        with crowd("127.0.0.1", port, 1, b"") as members:
            while not server._heads._deadlines:  # noqa: ASYNC110 - nobody is told of it
                await asyncio.sleep(0.001)
            members[0].sendall(b"GET /metrics HTTP/1.1\r\nHo")  # the loop hears of this and of the end at once
            if reset:
                members[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        async with asyncio.timeout(30):
            while server._heads._deadlines:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.001)
        await server.stop()

    uvloop.run(act())


def test_readers_that_do_not_read_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "REPLY_SECONDS", 600)

    def act(host: str, port: int) -> None:
        with crowd(host, port, ANSWER_PLACES + 9, get("/status.json")) as members:
            for path in ("/healthz", "/readyz", "/status.json", "/"):
                assert exchange(host, port, get(path)).startswith(b"HTTP/1.1 200 ")
            assert unread_bytes(port) < 4 * ANSWER_PLACES * UNSENT_BYTES
            whole = len(exchange(host, port, get("/status.json")))
            assert rest_of(members[0]) < whole / 2  # it was cut: read at last, it would have been answered whole

    with_server(act, Show(lambda: LARGE))


def test_each_newcomer_takes_the_place_of_another_one_though_all_come_at_once() -> None:
    ended: list[int] = []

    async def stay(places: Places, number: int) -> None:
        try:
            with places.taken():
                await asyncio.Event().wait()
        finally:
            ended.append(number)

    async def in_some_turns() -> list[int]:
        for _ in range(9):
            await asyncio.sleep(0)
        return sorted(ended)

    async def act() -> None:
        places = Places(2)
        tasks = [asyncio.create_task(stay(places, number)) for number in range(5)]
        assert await in_some_turns() == [0, 1, 2]
        assert all(task.cancelled() for task in tasks[:3])
        tasks[4].cancel()
        assert await in_some_turns() == [0, 1, 2, 4]
        tasks.append(asyncio.create_task(stay(places, 5)))
        assert await in_some_turns() == [0, 1, 2, 4], "a place was free"
        for task in tasks:
            task.cancel()
        assert await in_some_turns() == list(range(6))

    uvloop.run(act())


def rest_of(member: socket.socket) -> int:
    """How many bytes come until the server ends it."""
    count = 0
    with contextlib.suppress(ConnectionResetError):
        while piece := member.recv(65536):
            count += len(piece)
    return count


@pytest.mark.parametrize("path", ["/healthz", "/status.json"])
def test_a_reply_that_is_not_read_ends_at_its_deadline_however_short(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short one fits the socket's own buffer: the connection ends all the same, though the client does nothing."""
    monkeypatch.setattr(http, "REPLY_SECONDS", 0.2)

    async def act() -> None:
        loop = asyncio.get_running_loop()
        server = MetricsServer(TcpAddress(port=0), Show(lambda: LARGE))
        await server.start()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", int(server.url.split(":")[2].split("/")[0])))
            await loop.sock_sendall(client, get(path))
            places = server._health if path == "/healthz" else server._replies
            async with asyncio.timeout(30):
                while not places._tasks:  # noqa: ASYNC110 - nobody is told of it
                    await asyncio.sleep(0.001)
                await asyncio.gather(*places._tasks, return_exceptions=True)
                with pytest.raises(OSError):  # noqa: PT011 - ECONNRESET, or EPIPE behind a whole reply
                    while await loop.sock_recv(client, 65536):  # the system has nothing to keep
                        pass
                    await loop.sock_sendall(client, b"x")
        await server.stop()

    uvloop.run(act())


def test_a_head_that_does_not_arrive_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEAD_SECONDS", 0.2)

    def act(host: str, port: int) -> None:
        for begin in (b"", b"\r\n", b"GET / HTTP/1.1\r\nHost"):
            with crowd(host, port, 1, begin) as members:
                assert members[0].recv(1) == b""

    with_server(act)


@pytest.mark.parametrize("piece", [b"\r\n", b"x"])
def test_a_head_in_too_many_pieces_is_refused(piece: bytes) -> None:
    head = requests.Head()
    for _ in range(MAX_PIECES - 1):
        assert head.receive(piece) is None
    with pytest.raises(requests.Refused, match="pieces"):
        head.receive(piece)


def test_one_text_is_made_for_all_who_ask_meanwhile() -> None:
    """However many scrape, the server looks at itself a handful of times."""
    made, scrapers = 0, 30

    def status() -> ServerStatus:
        nonlocal made
        made += 1
        return LARGE

    def act(host: str, port: int) -> None:
        together = threading.Barrier(scrapers)
        texts: list[bytes] = []

        def scrape() -> None:
            together.wait()
            texts.append(exchange(host, port, get("/metrics")).partition(b"\r\n\r\n")[2])

        threads = [threading.Thread(target=scrape) for _ in range(scrapers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {b"nbdzram_export_size_bytes" in text for text in texts} == {True}
        assert len(texts) == scrapers

    with_server(act, Show(status))
    assert made <= scrapers / 3


def story(act: Callable[[], object]) -> None:
    asyncio.run(act())  # type: ignore[arg-type]


@pytest.mark.parametrize("fails", [False, True])
def test_making_rests_nine_times_as_long_as_it_took(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Whatever came of it."""
    slept: list[float] = []
    now = 100.0

    async def rest(_: Pace, seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += max(seconds, 0.0)

    async def make() -> Answer:
        nonlocal now
        now += 0.5
        if fails:
            raise NoSuchExport("disk")
        return sentence(200, "made")  # type: ignore[arg-type]

    async def act() -> None:
        pace = Pace()
        first, second = Shared(pace, make), Shared(pace, make)
        for each in (first, second):  # another text, and yet the same loop pays for it
            with pytest.raises(NoSuchExport) if fails else contextlib.nullcontext():
                await each.get()

    monkeypatch.setattr("nbdzram.metrics.answers.Pace._rest", rest)
    monkeypatch.setattr("nbdzram.metrics.answers.time.monotonic", lambda: now)
    story(act)
    assert slept[1] == pytest.approx(answers.REST * 0.5)


def test_who_has_asked_is_answered_without_a_rest_by_a_server_that_leaves() -> None:
    async def act() -> None:
        metrics = MetricsServer(TcpAddress(port=0), Show())
        await metrics.start()
        pace = metrics._answers._pace
        pace._due = time.monotonic() + 3600
        address, rests = ("127.0.0.1", metrics.ports[0]), asyncio.Event()

        async def rest(seconds: float) -> None:
            rests.set()
            await Pace._rest(pace, seconds)

        pace._rest = rest  # type: ignore[method-assign]
        asked = asyncio.create_task(asyncio.to_thread(exchange, *address, get("/metrics")))
        await rests.wait()
        await metrics.finish()
        assert (await asked).startswith(b"HTTP/1.1 200 OK\r\n")

    story(act)


def test_who_does_not_read_holds_no_server_up_that_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FINISH_SECONDS", 0.01)
    monkeypatch.setattr(http, "REPLY_SECONDS", 3600.0)

    async def act() -> None:
        asked = asyncio.Event()

        def status() -> ServerStatus:
            asked.set()
            return LARGE

        metrics = MetricsServer(TcpAddress(port=0), Show(status))
        await metrics.start()
        with socket.create_connection(("127.0.0.1", metrics.ports[0])) as client:
            client.sendall(get("/status.json"))
            await asked.wait()
            await asyncio.wait_for(metrics.finish(), 30)

    story(act)


def test_a_text_that_cannot_be_made_is_told_to_all_and_made_anew_for_the_next() -> None:
    failing = True

    async def make() -> Answer:
        await asyncio.sleep(0)
        if failing:
            raise ValueError("not today")
        return sentence(200, "made")  # type: ignore[arg-type]

    async def act() -> None:
        nonlocal failing
        shared = Shared(Pace(), make)
        told = await asyncio.gather(shared.get(), shared.get(), return_exceptions=True)
        assert [type(one) for one in told] == [ValueError, ValueError]
        failing = False
        assert (await shared.get()).body == b"made\n"

    story(act)


def test_who_goes_away_does_not_end_it_for_the_others() -> None:
    async def act() -> None:
        go_on = asyncio.Event()

        async def make() -> Answer:
            await go_on.wait()
            return sentence(200, "made")  # type: ignore[arg-type]

        shared = Shared(Pace(), make)
        leaver, stayer = asyncio.ensure_future(shared.get()), asyncio.ensure_future(shared.get())
        await asyncio.sleep(0)
        leaver.cancel()
        go_on.set()
        assert (await stayer).body == b"made\n"

    story(act)


def test_an_address_in_use_is_one_sentence_with_the_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = TcpAddress(port=taken.getsockname()[1])
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{address.port} for metrics: .*--metrics off"):
            asyncio.run(MetricsServer(address, Show()).start())


@pytest.mark.parametrize("path", ["/metrics", "/status.json", "/usage.json", "/history.json", "/clients.json"])
def test_what_is_being_made_ends_with_the_server(path: str) -> None:
    async def story() -> None:
        answers = Answers(Show())
        async with answers._pace._lock:  # so that none has its turn
            asked = asyncio.create_task(answers.answer(path))
            await asyncio.sleep(0)
            answers.stop()
            await asyncio.wait({asked}, timeout=30)
            assert asked.cancelled()

    asyncio.run(story())


def test_the_page_s_policy_has_its_one_script_and_its_one_style_each_where_it_may_be_used() -> None:
    page, policy = load_page()
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    for element, directive in ((b"style", "style-src"), (b"script", "script-src")):
        (content,) = re.findall(rb"<%b>(.*?)</%b>" % (element, element), page, re.DOTALL)
        assert directives[directive] == f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"
    assert directives["default-src"] == "'none'"
