"""What the metrics server answers, by request and by state, up to each header: answered.txt has it.

python -m tests.unit.metrics.test_answered        writes it anew, after a change that is meant
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from nbdzram.metrics.answers import UNTOLD, Answers
from nbdzram.metrics.http import _head
from nbdzram.metrics.requests import MAX_HEAD_BYTES, MAX_PIECES, Head, Hosts, Refused
from nbdzram.status import ExportSample, HistorySample
from tests.unit.metrics.stage import Show
from tests.unit.records import CLIENT, SERVER, USAGE

ANSWERED = Path(__file__).with_name("answered.txt")
HEADERS = b"Host: a\r\n\r\n"
HEADS: tuple[bytes, ...] = (
    b"GET / HTTP/1.1\r\n" + HEADERS,
    b"HEAD /metrics?a=b HTTP/1.1\r\nHost: a.b:9809\r\n\r\n",
    b"GET /a/b HTTP/1.0\r\n\r\n",
    b"GET /a HTTP/1.1\r\n\r\n",
    b"get / HTTP/1.1\r\n" + HEADERS,
    *(method + b" /metrics HTTP/1.1\r\n" + HEADERS for method in (b"POST", b"PUT", b"OPTIONS", b"TRACE")),
    *(
        b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n"
        for host in (b"", b"[::1]:1", b"[::1]", b"[::1", b"a:", b"a:b:c")
    ),
    *(
        b"GET " + target + b" HTTP/1.1\r\n" + HEADERS
        for target in (
            *(
                b"http://b",
                b"http://b/",
                b"http://b:1/p?q",
                b"HTTP://[::1]:2/p",
                b"http://",
                b"http:///p",
                b"https://b/",
            ),
            *(b"*", b"b:1", b"//b/p", b"/p?q?r", b"/%2e", b"http://[b/", b"/caf\xc3\xa9"),
        )
    ),
    b"\r\n\r\nGET /p HTTP/1.1\r\n" + HEADERS,
    b"\n\nGET /p HTTP/1.1\r\n" + HEADERS,
    b"\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n",
    b"\x16\x03\x01\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    *(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * size for size in (MAX_HEAD_BYTES - 29, MAX_HEAD_BYTES - 27)),
)
NAMES = (
    *("", "a", "A.", "localhost", "a.localhost", "A.LOCALHOST.", "localhost.a", "127.0.0.1", "1.2.3", "::1", "fe80::1"),
    *("here.example", "x.here.example", "there.example", "x.there.example", "x.y.there.example", "xthere.example"),
    *("there.example.", "example", "x.example", "my-own-name", "my-own-name.local", "127.0.0.1.example"),
)
PATHS = (
    *(
        "/",
        "/metrics",
        "/healthz",
        "/readyz",
        "/status.json",
        "/clients.json",
        "/history.json",
        "/usage.json",
        "/usage",
    ),
    *(
        "/history/disk",
        "/history/a%20b%2Fc",
        "/history/",
        "/history/other",
        "/history",
        "//",
        "/Healthz",
        "/healthz/",
        "",
    ),
)
SAMPLES = (
    HistorySample(1.7e9, 1.0, 2.0, 3.0, 4.0, 5.0, 65_537),
    HistorySample(1.8e9, 6.0, 7.0, 8.0, 9.0, 10.0, 131_071),
)
OF_ONE = (ExportSample(1.7e9, *(float(one) for one in range(len(ExportSample.__dataclass_fields__) - 1))),)
LARGE = replace(USAGE, compressed=65_535, unique=65_535, shared=0, huge=65_536)
SHOWS = {
    "well": Show(
        usage={"disk": USAGE, "large": LARGE},
        attached=(CLIENT, replace(CLIENT, number=8, certificate_names=())),
        samples=SAMPLES,
        of_exports={"disk": OF_ONE, "a b/c": (), "": OF_ONE},
    ),
    "draining": Show(lambda: replace(SERVER, draining=True, starting=True), usage_age=None),
    "starting": Show(lambda: replace(SERVER, starting=True), usage={}, usage_age=59.6),
}


ALWAYS = (
    "Content-Security-Policy: POLICY\r\nX-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\n"
    "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
)
"""Behind what is of one answer alone."""


def shortened(text: str) -> str:
    return text if len(text) < 400 else f"{text.splitlines()[0][:60]}..."


def heads() -> Iterator[str]:
    """What is understood of a request's head, at once and byte by byte."""
    for sent in HEADS:
        told = heard(sent)
        yield f"{shortened(repr(sent))}: {told}"
        if told.startswith("Request") and len(sent) < MAX_PIECES:
            assert told == heard(*(sent[at : at + 1] for at in range(len(sent)))), sent


def heard(*pieces: bytes) -> str:
    head, told = Head(), None
    try:
        for piece in pieces:
            told = head.receive(piece)
            if told is not None:
                break
    except Refused as refused:
        words, colon, _ = str(refused).partition(": ")  # behind it stand h11's own
        return f"{refused.status.value} {dict(refused.headers)} {words}{colon}"
    return repr(told)


def names() -> Iterator[str]:
    """Who is answered by which name."""
    for allowed in ((), ("here.example", "*.there.example"), ("*",)):
        hosts = Hosts(allowed)
        hosts._allowed = {"my-own-name.local", *allowed}
        yield f"{allowed}: {' '.join(f'{name}={hosts.admit(name):d}' for name in NAMES)}"
    try:
        Hosts(()).require("a." * 200)
    except Refused as refused:
        yield f"{refused.status.value} {refused}"


async def answers() -> list[str]:
    """Each path, in each state, with what of the head before it is not the same in all."""
    told = []
    for state, show in SHOWS.items():
        answers = Answers(show)
        for path in PATHS:
            answer = await answers.answer(path)
            head = _head(answer, "POLICY").decode()
            assert head.endswith(ALWAYS), head
            length = f"Content-Length: {len(answer.body)}\r\n"
            assert length in head
            told.append(f"{state}, {path!r}: {head.removesuffix(ALWAYS).replace(length, '')!r}")
            told.append("  " + shortened(answer.body.decode().rstrip()))
    return told


def lines() -> Iterator[str]:
    yield "-- heads"
    yield from heads()
    yield "-- names"
    yield from names()
    yield "-- answers"
    yield from asyncio.run(answers())


def test_each_request_is_answered_as_it_was() -> None:
    assert list(lines()) == ANSWERED.read_text(encoding="utf-8").splitlines()


def test_who_may_attach_is_not_told_to_strangers() -> None:
    body = asyncio.run(Answers(Show()).answer("/status.json")).body.decode()
    assert '"exports":[{' in body
    assert not [name for name in UNTOLD if name in body]


if __name__ == "__main__":
    ANSWERED.write_text("\n".join(lines()) + "\n", encoding="utf-8")
