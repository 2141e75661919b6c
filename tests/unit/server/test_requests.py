"""Requests over a real socket, against a real engine."""

from __future__ import annotations

import asyncio
import random
import struct

import pytest

from nbdzram.config import EVERYONE, Limits
from nbdzram.nbd.constants import Error
from nbdzram.server.exports import Export
from tests.unit.server.conftest import SIZE, Play, Stage
from tests.wire import request

STYLES = pytest.mark.parametrize("style", [0, 1, 2], ids=["simple", "structured", "extended"])
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
LIMIT = 64 << 20


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@STYLES
@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, 4096),
        (1, 1),
        (4095, 2),
        (12345, 65536),
        (4096, 65537),
        (777, 300_000),
        (0, 1 << 20),
        (511, 1 << 20),
        (4096 * 3 + 5, 2_500_000),
        (0, 32 << 20),
        (511, 49_900_000),
    ],
)
def test_what_was_written_is_read_back(play: Play, style: int, offset: int, size: int) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client(style=style)
        content = noise(size)
        await client.write(offset, content)
        assert await client.read(offset, size) == content
        await client.close()

    play(story)


@STYLES
def test_any_split_of_the_requests_gives_the_same_replies(play: Play, style: int) -> None:
    """Wherever a batch is cut, each request is answered exactly as if all came at once."""

    async def story(stage: Stage) -> None:
        extended = style == 2
        batch = b"".join(
            [
                request(WRITE, 10, 5000, flags=32 if extended else 0, cookie=1, extended=extended) + noise(5000),
                request(READ, 0, 6000, cookie=2, extended=extended),
                request(9, 0, 0, cookie=3, extended=extended),
                request(WRITE, SIZE, 100, flags=32 if extended else 0, cookie=4, extended=extended) + noise(100),
                request(TRIM, 0, 4096, cookie=5, extended=extended),
                request(FLUSH, 0, 0, cookie=6, extended=extended),
                request(DISC, 0, 0, cookie=7, extended=extended),
            ]
        )
        seen = set()
        shuffler = random.Random(style)
        for cuts in (
            [],
            [1],
            [27],
            [28],
            [31, 32],
            [100, 5027, 5028],
            sorted(shuffler.sample(range(1, 5300), 9)),
        ):
            client = await stage.client(style=style)
            await client.call(ZEROES, 0, 65536)
            for start, end in zip([0, *cuts], [*cuts, len(batch)], strict=True):
                client.send(batch[start:end])
                await client.writer.drain()
                for _ in range(3):
                    await asyncio.sleep(0)
            seen.add(await client.reader.read())
            await client.close()
        assert len(seen) == 1

    play(story)


@STYLES
def test_requests_of_no_length_are_answered(play: Play, style: int) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client(style=style)
        for command in (READ, FLUSH, TRIM, CACHE, ZEROES):
            assert (await client.call(command, 0, 0)).error == 0
        assert (await client.call(WRITE, 0, 0, flags=32 if style == 2 else 0)).error == 0
        await client.close()

    play(story)


@STYLES
def test_refused_requests_leave_the_connection_usable(play: Play, style: int) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client(style=style)
        await client.write(0, b"keep" * 1024)
        cases = [
            (READ, SIZE - 100, 4096, 0, b"", Error.EINVAL),
            (WRITE, SIZE - 100, 4096, 0, bytes(4096), Error.ENOSPC),
            (WRITE, SIZE, 5 << 20, 0, bytes(5 << 20), Error.ENOSPC),
            (ZEROES, SIZE, 1, 0, b"", Error.ENOSPC),
            (TRIM, SIZE, 1, 0, b"", Error.EINVAL),
            (99, 0, 0, 0, b"", Error.EINVAL),
            (READ, 0, 4096, 1 << 9, b"", Error.EINVAL),
            (WRITE, 0, 4096, 1 << 1, bytes(4096), Error.EINVAL),
            (STATUS, 0, 4096, 0, b"", Error.EINVAL),
        ]
        for command, offset, length, flags, payload, error in cases:
            answer = await client.call(command, offset, length, flags=flags, payload=payload)
            assert answer.error == error, (command, answer)
            assert style == 0 or answer.text
        assert await client.read(0, 4096) == b"keep" * 1024
        counts = stage.disk.traffic.io_stat()
        assert counts.invalid_io == len(cases)
        await client.close()

    play(story)


@STYLES
def test_a_read_over_the_payload_limit_is_refused_whole(play: Play, style: int) -> None:
    """Not a byte of it comes, and the connection goes on."""

    async def story(stage: Stage) -> None:
        client = await stage.client(style=style)
        answer = await client.call(READ, 0, LIMIT + 1)
        assert (answer.error, len(answer.chunks)) == (Error.EINVAL, 1 if style else 0)
        assert await client.read(0, 512) == bytes(512)
        await client.close()

    play(story)


def test_a_request_of_as_many_bytes_as_are_allowed_is_served(play: Play) -> None:
    """Clients are told the limit, and go up to it."""
    content = bytes(range(256)) * (LIMIT // 256)

    async def story(stage: Stage) -> None:
        client = await stage.client()
        await client.write(0, content)
        assert await client.read(0, LIMIT) == content
        await client.close()

    play(story)


def test_a_read_only_export_changes_nothing(play: Play) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client(b"frozen")
        for command, payload in ((WRITE, bytes(4096)), (TRIM, b""), (ZEROES, b"")):
            assert (await client.call(command, 0, 4096, payload=payload)).error == Error.EPERM
        await client.close()

    play(story)


@STYLES
def test_zeroes_and_trim_of_any_size_read_as_zeroes(play: Play, style: int) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client(style=style)
        for command, flags in ((ZEROES, 0), (ZEROES, 2), (ZEROES, 16), (TRIM, 0)):
            for length in (4096, 70 << 20):
                await client.write(1 << 20, noise(1 << 20))
                assert (await client.call(command, 1 << 20, length, flags=flags)).error == 0
                assert await client.read(1 << 20, 4096) == bytes(4096)
        await client.close()

    play(story)


def test_holes_are_sent_as_holes(play: Play) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client()
        await client.write(8192, noise(4096))
        answer = await client.call(READ, 0, 65536)
        assert [kind for kind, _ in answer.chunks] == [2, 1, 2]
        answer = await client.call(READ, 0, 65536, flags=4)
        assert [kind for kind, _ in answer.chunks] == [1]
        await client.close()

    play(story)


@pytest.mark.parametrize("style", [1, 2])
@pytest.mark.parametrize("offset", [0, 5])
def test_the_longest_read_without_fragments_is_one_chunk(play: Play, style: int, offset: int) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client(style=style)
        content = noise(256 << 10)
        await client.write(offset, content)
        answer = await client.call(READ, offset, len(content), flags=4)
        assert [chunk[1][8:] for chunk in answer.chunks] == [content]
        await client.close()

    play(story)


def test_a_large_read_without_fragments_overflows(play: Play) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client()
        assert (await client.call(READ, 0, 1 << 20, flags=4)).error == Error.EOVERFLOW
        await client.write(0, noise(1 << 20))
        for offset, length in ((0, 65536), (511, 65536), (511, 262144)):
            answer = await client.call(READ, offset, length, flags=4)
            assert [kind for kind, _ in answer.chunks] == [1]
            assert answer.content == noise(1 << 20)[offset : offset + length]
        await client.close()

    play(story)


def test_replies_to_many_requests_in_flight_find_their_cookies(play: Play) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client()
        blocks = {cookie: noise(300_000 if cookie % 3 else 4096, cookie) for cookie in range(1, 65)}
        for cookie, content in blocks.items():
            client.ask(WRITE, cookie << 20, len(content), cookie=cookie, payload=content)
        assert {(await client.answer())[0] for _ in blocks} == set(blocks)
        for cookie, content in blocks.items():
            client.ask(READ, cookie << 20, len(content), cookie=cookie)
        pieces: dict[int, bytearray] = {cookie: bytearray(len(content)) for cookie, content in blocks.items()}
        open_cookies = set(blocks)
        while open_cookies:
            magic = int.from_bytes(await client.reader.readexactly(4))
            flags, kind, cookie, payload = await client._chunk(magic)
            at = int.from_bytes(payload[:8]) - (cookie << 20)
            assert kind == 1
            pieces[cookie][at : at + len(payload) - 8] = payload[8:]
            if flags & 1:
                open_cookies.discard(cookie)
        assert pieces == blocks
        await client.close()

    play(story)


@STYLES
def test_disconnect_answers_everything_before_it_closes(play: Play, style: int) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client(style=style)
        content = noise(1 << 20)
        client.ask(WRITE, 0, len(content), cookie=7, payload=content)
        client.ask(WRITE, 2 << 20, 4096, cookie=8, payload=content[:4096])
        client.ask(DISC, 0, 0)
        answers = dict([await client.answer(), await client.answer()])
        assert {cookie: answer.error for cookie, answer in answers.items()} == {7: 0, 8: 0}
        assert await client.at_end()
        await client.close()
        again = await stage.client(style=style)
        assert await again.read(0, len(content)) == content
        await again.close()

    play(story)


def test_a_client_that_vanishes_in_the_middle_of_a_write_changes_nothing(play: Play) -> None:
    async def story(stage: Stage) -> None:
        witness = await stage.client()
        before = noise(8 << 20)
        await witness.write(0, before)
        for sent in (100, 60_000, 5_000_000):
            client = await stage.client()
            client.send(request(WRITE, 0, 8 << 20) + bytes(sent))
            await client.writer.drain()
            await client.close()
        assert await witness.read(0, len(before)) == before
        await witness.close()

    play(story)


@STYLES
def test_a_write_without_budget_is_stored_as_it_arrives(play: Play, style: int) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client(style=style)
        content = noise(9_000_001)
        await client.write(4321, content)
        assert await client.read(4321, len(content)) == content
        await client.close()

    play(story, Limits(total_bytes=1 << 20))


@pytest.mark.parametrize("junk", [bytes(28), request(WRITE, 0, 65 << 20), b"\xff" * 64])
def test_a_broken_protocol_ends_the_connection_and_only_that(play: Play, junk: bytes) -> None:
    async def story(stage: Stage) -> None:
        other = await stage.client()
        client = await stage.client()
        client.send(junk)
        assert await client.at_end()
        assert stage.server.protocol_errors == 1
        assert await other.read(0, 512) == bytes(512)
        await client.close()
        await other.close()

    play(story)


def test_long_requests_of_one_connection_leave_the_workers_to_others(play: Play) -> None:
    """Requests of 8 tasks each do not stand in the queue together: a READ that comes later overtakes most. They are so
    many that the machine may be busy with something else meanwhile."""
    many = 1024

    async def story(stage: Stage) -> None:
        huge = Export(
            name="huge", disk=stage.pool.create("huge", 1 << 30), pool_name="default", access=EVERYONE, read_only=False
        )
        stage.exports.add(huge)
        hog = await stage.client(b"huge", style=2)
        other = await stage.client()
        hog.send(request(ZEROES, 0, 512 << 20, flags=2, extended=True) * many)
        await other.read(0, 512)  # the server has taken them all
        await other.read(0, 1 << 20)
        assert huge.traffic.operations()["write_zeroes"].requests < many // 2
        hog.writer.transport.abort()
        await other.close()

    play(story)


@pytest.mark.parametrize("style", [1, 2])
def test_block_status_describes_each_context(play: Play, style: int) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client(style=style, contexts=(b"base:allocation", b"nbdzram:fold"))
        await client.write(8192, noise(4096))
        for length in (65536, SIZE):
            answer = await client.call(STATUS, 0, length)
            status = {}
            for kind, payload in answer.chunks:
                assert kind == (6 if style == 2 else 5)
                head, form = (8, ">QQ") if style == 2 else (4, ">II")
                status[int.from_bytes(payload[:4])] = list(struct.iter_unpack(form, payload[head:]))
            assert status[1] == [(8192, 3), (4096, 0), (length - 12288, 3)]
            assert [length for length, _ in status[2]] == [8192, 4096, length - 12288]
        answer = await client.call(STATUS, 8192, 65536, flags=8)
        assert len(answer.chunks) == 2
        assert all(len(payload) == (24 if style == 2 else 12) for _, payload in answer.chunks)
        await client.close()

    play(story)


@pytest.mark.parametrize("style", [1, 2])
def test_an_unfragmented_read_is_one_chunk_up_to_the_limit(play: Play, style: int) -> None:
    """256 KiB with DF are one content chunk, wherever they begin; a byte more is EOVERFLOW, and served without DF."""
    limit, df = 256 << 10, 4

    async def story(stage: Stage) -> None:
        client = await stage.client(style=style)
        content = noise(1 << 20)
        await client.write(0, content)
        for offset in (0, 5, 4096):
            answer = await client.call(READ, offset, limit, flags=df)
            assert [kind for kind, payload in answer.chunks if payload] == [1]
            assert answer.content == content[offset : offset + limit]
            assert (await client.call(READ, offset, limit + 1, flags=df)).error == Error.EOVERFLOW
            assert await client.read(offset, limit + 1) == content[offset : offset + limit + 1]
        await client.close()

    play(story)


def test_block_status_is_a_short_turn(play: Play) -> None:
    """A reply has 512 descriptors at most, and describes 16 MiB of stored blocks at most; a client asks on."""

    async def story(stage: Stage) -> None:
        client = await stage.client(contexts=(b"base:allocation",))
        for block in range(0, 5000, 2):
            stage.disk.disk.write(block * 4096, b"x" * 4096)
        for length in (256 << 10, (256 << 10) + 4096, 16 << 20):
            ((_, payload),) = (await client.call(STATUS, 0, length)).chunks
            described = list(struct.iter_unpack(">II", payload[4:]))
            assert len(described) == min(length // 4096, 512)
        stage.disk.disk.zero(0, SIZE, no_hole=True)
        ((_, payload),) = (await client.call(STATUS, 0, SIZE)).chunks
        assert list(struct.iter_unpack(">II", payload[4:])) == [(16 << 20, 2)]
        await client.close()

    play(story)


@STYLES
def test_requests_of_four_gigabytes_without_payload_hold_nobody_up(play: Play, style: int) -> None:
    """TRIM, WRITE_ZEROES and BLOCK_STATUS of 4 GiB - 512 are answered, and somebody else is served meanwhile."""

    async def story(stage: Stage) -> None:
        huge = (4 << 30) - 512
        stage.exports.add(
            Export(
                name="huge",
                disk=stage.pool.create("huge", 5 << 30),
                pool_name="default",
                access=EVERYONE,
                read_only=False,
            )
        )
        contexts = (b"base:allocation",) if style else ()
        client = await stage.client(b"huge", style=style, contexts=contexts)
        other = await stage.client()
        await client.write(1 << 20, noise(4096))
        commands = [(TRIM, 0), (ZEROES, 2), (ZEROES, 16), *([(STATUS, 0)] if style else [])]
        for command, flags in commands:
            client.ask(command, 0, huge, flags=flags)
            await other.write(0, noise(4096))
            assert await other.read(0, 4096) == noise(4096)
            assert (await client.answer())[1].error == 0
        assert await client.read(1 << 20, 4096) == bytes(4096)
        assert (await client.call(TRIM, 2 << 30, (4 << 30) - 1)).error == Error.EINVAL
        await client.close()
        await other.close()

    play(story)
