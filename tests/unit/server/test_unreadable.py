"""A stored object that does not decode, met by a READ: what each reply style can still say, and what it must not.

The pool lies in a file here, and the test spoils the bytes of one block in it, as a broken memory module would.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdzram.config import EVERYONE, Limits
from nbdzram.engine.pool import Pool
from nbdzram.nbd.constants import Chunk, Error
from nbdzram.server.exports import Export
from tests.support.loop_client import Answer
from tests.unit.server.conftest import Play, Stage
from tests.wire import CMD_READ, CMD_WRITE, CMD_WRITE_ZEROES, SIMPLE_REPLY

BLOCK, KIB, MIB = 4096, 1 << 10, 1 << 20
LENGTH = 4 * MIB
TORN = 2 * MIB + 300 * KIB  # where the spoiled block begins
AMPLE, NONE = Limits().total_bytes, 128 * KIB  # for replies: any piece, or none of 256 KiB
CHUNKED = pytest.mark.parametrize("style", [1, 2], ids=["structured", "extended"])
BUDGETS = pytest.mark.parametrize("budget", [AMPLE, NONE], ids=["ample", "none"])
DF = 4

STREAMS = [(NONE, LENGTH), (NONE, 512 * KIB)]  # simple replies that there is no memory for
SHORT = [
    (style, budget, length)
    for style, budget, length in itertools.product((0, 1, 2), (AMPLE, NONE), (BLOCK, 60 * KIB, 512 * KIB, 2 * MIB))
    if style or budget == AMPLE or length <= 64 * KIB
]


def marked(block: int) -> bytes:
    """A block whose encoding begins with 16 bytes as they are: LZ4 cannot shorten them."""
    return random.Random(block).randbytes(16) + bytes([block % 255 + 1]) * (BLOCK - 16)


CONTENT = b"".join(marked(block) for block in range(LENGTH // BLOCK))


@pytest.fixture
def torn(stage: Stage, tmp_path: Path) -> Iterator[Export]:
    """An export `torn` of CONTENT with one block that does not decode."""
    arena = tmp_path / "arena"
    with Pool(path=str(arena)) as pool:
        disk = pool.create("torn", LENGTH)
        disk.write(0, CONTENT)
        where = arena.read_bytes().index(CONTENT[TORN : TORN + 16])
        with arena.open("r+b") as file:
            file.seek(where - 1)
            file.write(b"\xff" * 24)  # the token and what follows: more literals than there are bytes
        export = Export(name="torn", disk=disk, pool_name="default", access=EVERYONE, read_only=False)
        stage.exports.add(export)
        yield export


@pytest.mark.parametrize(("style", "budget", "length"), SHORT)
def test_a_short_read_is_answered_with_eio(play: Play, torn: Export, style: int, budget: int, length: int) -> None:
    """One error reply, and the connection goes on; what can be read is read."""

    async def story(stage: Stage) -> None:
        client = await stage.client(b"torn", style=style)
        offset = TORN - (length - BLOCK) // 2 // BLOCK * BLOCK
        answer = await client.call(CMD_READ, offset, length)
        assert answer.error == Error.EIO
        assert style == 0 or offset <= (answer.failed_at or 0) <= TORN
        assert await client.read(0, 64 * KIB) == CONTENT[: 64 * KIB]
        assert torn.traffic.io_stat().failed_reads == 1
        await client.close()

    play(story, Limits(total_bytes=budget))


@CHUNKED
@BUDGETS
@pytest.mark.usefixtures("torn")
def test_a_long_read_in_chunks_tells_where_it_failed(play: Play, style: int, budget: int) -> None:
    """Chunks that came are right and do not overlap, the last one is ERROR_OFFSET, and the connection goes on."""

    async def story(stage: Stage) -> None:
        client = await stage.client(b"torn", style=style)
        answer = await client.call(CMD_READ, 0, LENGTH)
        assert answer.error == Error.EIO
        assert "do not decode" in answer.text
        assert answer.failed_at is not None
        assert TORN - 256 * KIB < answer.failed_at <= TORN
        expect_true_parts(answer)
        assert await client.read(0, 1 * MIB) == CONTENT[: 1 * MIB]
        await client.close()

    play(story, Limits(total_bytes=budget))


@CHUNKED
@pytest.mark.usefixtures("torn")
def test_an_unfragmented_read_is_one_error(play: Play, style: int) -> None:
    """With DF nothing but the error comes."""

    async def story(stage: Stage) -> None:
        client = await stage.client(b"torn", style=style)
        answer = await client.call(CMD_READ, TORN - 128 * KIB, 256 * KIB, flags=DF)
        assert answer.error == Error.EIO
        assert [kind for kind, _ in answer.chunks] == [Chunk.ERROR_OFFSET]
        assert await client.read(0, BLOCK) == CONTENT[:BLOCK]
        await client.close()

    play(story)


@pytest.mark.parametrize(("budget", "length"), STREAMS)
@pytest.mark.usefixtures("torn")
def test_a_stream_that_cannot_go_on_ends_the_connection(play: Play, budget: int, length: int) -> None:
    """A long simple reply has promised success in its header: only the connection's end tells, and no byte is wrong."""

    async def story(stage: Stage) -> None:
        other = await stage.client(b"torn")
        client = await stage.client(b"torn", style=0)
        offset = TORN - length // 2 + 2 * BLOCK
        client.ask(CMD_READ, offset, min(length, LENGTH - offset), cookie=7)
        async with asyncio.timeout(30):
            received = await client.reader.read()
        _, error, cookie = SIMPLE_REPLY.unpack(received[: SIMPLE_REPLY.size])
        assert (error, cookie) == (0, 7)
        sent = received[SIMPLE_REPLY.size :]
        assert len(sent) <= TORN - offset
        assert sent == CONTENT[offset : offset + len(sent)]
        assert stage.server.protocol_errors == 1
        assert await other.read(0, 64 * KIB) == CONTENT[: 64 * KIB]
        await client.close()
        await other.close()

    play(story, Limits(total_bytes=budget))


def expect_true_parts(answer: Answer) -> None:
    """Every content chunk holds what is stored, none reaches into the spoiled block, none comes twice."""
    seen: set[int] = set()
    for kind, payload in answer.chunks[:-1]:
        assert kind == Chunk.OFFSET_DATA
        at, content = int.from_bytes(payload[:8]), payload[8:]
        assert content == CONTENT[at : at + len(content)]
        covered = range(at, at + len(content), 512)
        assert TORN not in covered
        assert seen.isdisjoint(covered)
        seen.update(covered)
    assert seen, "nothing of what could be read came"
    assert answer.chunks[-1][0] == Chunk.ERROR_OFFSET


@BUDGETS
@pytest.mark.parametrize("command", [CMD_WRITE, CMD_WRITE_ZEROES])
@pytest.mark.parametrize("length", [100, 60 * KIB, 300 * KIB])
def test_a_change_of_part_of_a_block_that_does_not_decode_is_eio(
    play: Play, torn: Export, budget: int, command: int, length: int
) -> None:
    """ENOSPC would send the operator after room; what is stored is spoiled, and the rest of it goes on."""

    async def story(stage: Stage) -> None:
        client = await stage.client(b"torn")
        payload = bytes(length) if command == CMD_WRITE else b""
        answer = await client.call(command, TORN + 5, length, payload=payload)
        assert answer.error == Error.EIO
        assert "do not decode" in answer.text
        assert torn.traffic.io_stat().failed_writes == 1
        await client.write(TORN, b"w" * BLOCK)  # a whole block needs nothing of the old one
        assert await client.read(TORN, BLOCK) == b"w" * BLOCK
        await client.close()

    play(story, Limits(total_bytes=budget))
