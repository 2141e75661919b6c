"""What a server says of each client and counts, from its first byte to its last, as it was: overheard.txt.

python -m tests.unit.server.test_overheard        writes it anew, after a change that is meant
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import uvloop

from nbdzram.config import NOBODY, Limits
from nbdzram.server.exports import Export
from tests.support.loop_client import WireClient
from tests.unit.server.conftest import Stage
from tests.unit.server.house import until
from tests.wire import (
    CMD_DISC,
    CMD_READ,
    CMD_WRITE,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_GO,
    OPT_LIST,
    OPT_STARTTLS,
    client_hello,
    name_and_infos,
    option,
    request,
)

OVERHEARD = Path(__file__).with_name("overheard.txt")
LIMITS = Limits(handshake_options=8, payload_bytes=1 << 16, connections=3)
Part = Callable[[Stage], Awaitable[None]]


class Heard(logging.Handler):
    """Lines of the log, of whatever level, without what is another number each time."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        words = re.sub(r"\b(pid|process|client) \d+", r"\1 N", record.getMessage())
        self.lines.append(f"{record.levelname.lower()} {record.name.removeprefix('nbdzram.')}: {words}")


@contextlib.contextmanager
def listening() -> Iterator[Heard]:
    heard, log = Heard(), logging.getLogger("nbdzram")
    before = log.level
    log.addHandler(heard)
    log.setLevel(logging.DEBUG)
    try:
        yield heard
    finally:
        log.removeHandler(heard)
        log.setLevel(before)


def says(*words: bytes, flags: int | None = 3) -> Part:
    """Before an export, and then it hangs up."""

    async def part(stage: Stage) -> None:
        client = await WireClient.connect(stage.path, client_flags=flags)
        client.send(b"".join(words))
        client.writer.write_eof()
        with contextlib.suppress(ConnectionError):
            await client.reader.read()
        await client.close()

    return part


def attached(*words: bytes, name: bytes = b"disk", style: int = 1) -> Part:
    """Of an export, and then it hangs up."""

    async def part(stage: Stage) -> None:
        client = await stage.client(name, style=style)
        client.send(b"".join(words))
        client.writer.write_eof()
        with contextlib.suppress(ConnectionError):
            await client.reader.read()
        await client.close()

    return part


def ended(how: str) -> Part:
    """By the server, in the middle of a payload."""

    async def part(stage: Stage) -> None:
        client = await stage.client()
        client.send(request(CMD_WRITE, 0, 4096) + b"w" * 100)
        await until(lambda: any(one.session.midway for one in stage.server.sessions))
        for one in list(stage.server.sessions):
            getattr(one, how)()
        with contextlib.suppress(ConnectionError):
            await client.at_end()
        await client.close()

    return part


async def crowd(stage: Stage) -> None:
    """One more than there is place for."""
    clients = [await stage.client() for _ in range(3)]
    late = await WireClient.connect(stage.path)
    late.send(option(OPT_GO, name_and_infos(b"disk")))
    with contextlib.suppress(ConnectionError):
        await late.at_end()
    for client in (*clients, late):
        await client.close()


async def haggling_crowd(stage: Stage) -> None:
    """Strangers, one more than there is place for: the oldest one goes."""
    clients = [await WireClient.connect(stage.path) for _ in range(3)]
    newcomer = await WireClient.connect(stage.path)
    with contextlib.suppress(ConnectionError):
        await clients[0].at_end()
    for client in (*clients, newcomer):
        await client.close()


PARTS: dict[str, Part] = {
    "only knocks": says(flags=None),
    "says hello": says(),
    "says what no client says": says(b"GET / HTTP/1.0\r\n\r\n", flags=None),
    "has flags of its own": says(client_hello(8), flags=None),
    "an option without its magic": says(b"x" * 16),
    "half an option": says(option(OPT_GO, name_and_infos(b"disk"))[:20]),
    "gives up": says(option(OPT_ABORT)),
    "lists": says(option(OPT_LIST), option(OPT_ABORT)),
    "lists with words": says(option(OPT_LIST, b"words")),
    "an unknown option": says(option(99, b"what")),
    "too many options": says(option(OPT_LIST) * 12),
    "too long an option": says(option(OPT_GO, b"", size=1 << 20)),
    "TLS where there is none": says(option(OPT_STARTTLS)),
    "an unknown export": says(option(OPT_GO, name_and_infos(b"nobody's"))),
    "an unknown export, as they asked once": says(option(OPT_EXPORT_NAME, b"nobody's")),
    "an export for others": says(option(OPT_GO, name_and_infos(b"closed"))),
    "a name that is no text": says(option(OPT_GO, name_and_infos(b"\xff\xfe"))),
    "a name with lines": says(option(OPT_GO, name_and_infos(b"a\nb\x1b[0m"))),
    "attaches and leaves": attached(request(CMD_DISC, 0, 0)),
    "attaches and hangs up": attached(),
    "leaves in a header": attached(request(CMD_READ, 0, 512)[:9]),
    "leaves in a payload": attached(request(CMD_WRITE, 0, 512) + b"w" * 100),
    "no request": attached(b"x" * 28),
    "too long a payload": attached(request(CMD_WRITE, 0, (1 << 16) + 1)),
    "reads behind the end": attached(request(CMD_READ, 1 << 40, 512)),
    "reads too much": attached(request(CMD_READ, 0, (1 << 16) + 1)),
    "an unknown command": attached(request(77, 0, 0)),
    "errs ten times": attached(request(CMD_READ, 1 << 40, 512) * 10),
    "errs once more": attached(request(CMD_READ, 1 << 40, 512) * 11),
    "errs often": attached(request(CMD_READ, 1 << 40, 512) * 30),
    "errs often in few words": attached(request(CMD_READ, 1 << 40, 512) * 30, style=0),
    "writes what is read-only": attached(request(CMD_WRITE, 0, 4) + b"word", name=b"frozen", style=0),
    "is cut in a payload": ended("abort"),
    "is drained in a payload": ended("drain"),
    "comes to a full house": crowd,
    "comes to a full lobby": haggling_crowd,
}


def repeated(said: Iterable[str]) -> Iterator[tuple[str, int]]:
    for line, those in itertools.groupby(said):
        yield line, len(list(those))


async def lines() -> list[str]:
    told: list[str] = []
    with tempfile.TemporaryDirectory() as directory, listening() as heard:
        stage = Stage(Path(directory))
        stage.config = replace(stage.config, limits=LIMITS)
        closed = stage.pool.create("closed", 1 << 20)
        stage.exports.add(Export(name="closed", disk=closed, pool_name="default", access=NOBODY, read_only=False))
        async with stage.serving():
            heard.lines.clear()
            for name, part in PARTS.items():
                failed, broken = dict(stage.server.handshake_failures), stage.server.protocol_errors
                await part(stage)
                await until(lambda: stage.server.connections == 0)
                failures = {
                    cause: count - failed.get(cause, 0)
                    for cause, count in stage.server.handshake_failures.items()
                    if count != failed.get(cause, 0)
                }
                told.append(f"-- {name}: failed {failures}, broken {stage.server.protocol_errors - broken}")
                told += (f"{line} * {count}" if count > 1 else line for line, count in repeated(heard.lines))
                heard.lines.clear()
        told += ["-- at the end", *heard.lines]
        stage.pool.close()
    return told


def test_each_client_is_told_of_and_counted_as_it_was() -> None:
    assert uvloop.run(lines()) == OVERHEARD.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    OVERHEARD.write_text("\n".join(uvloop.run(lines())) + "\n", encoding="utf-8")
