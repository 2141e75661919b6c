"""Extended headers on a real socket: what the extension adds, clause by clause (docs/protocol.md has the table)."""

from __future__ import annotations

import random
import struct

import pytest

from nbdzram.config import EVERYONE
from nbdzram.nbd.constants import Chunk, Error
from nbdzram.server.exports import Export
from tests.support.loop_client import WireClient
from tests.unit.server.conftest import SIZE, Play, Stage
from tests.wire import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EXTENDED_REPLY_MAGIC,
    FLAG_PAYLOAD_LEN,
    request,
)

GIB, MIB = 1 << 30, 1 << 20
VAST = 5 * GIB + 4096  # bytes: more than 32 bits say
CONTEXTS = (b"base:allocation", b"nbdzram:fold")
BLOCK_STATUS_PAYLOAD = 1 << 12  # transmission flag
REQ_ONE = 1 << 3


async def vast(stage: Stage, *, contexts: tuple[bytes, ...] = ()) -> WireClient:
    """A client of an export that 32-bit lengths cannot describe in one request."""
    stage.exports.add(
        Export(name="vast", disk=stage.pool.create("vast", VAST), pool_name="default", access=EVERYONE, read_only=False)
    )
    return await stage.client(b"vast", style=2, contexts=contexts)


def descriptors(chunk: tuple[int, bytes]) -> list[tuple[int, int]]:
    """(length, status) of a BLOCK_STATUS_EXT chunk, whose count must be that of its descriptors."""
    kind, payload = chunk
    assert kind == Chunk.BLOCK_STATUS_EXT
    found = list(struct.iter_unpack(">QQ", payload[8:]))
    assert int.from_bytes(payload[4:8]) == len(found) > 0
    return found


def test_every_reply_has_the_extended_header_with_the_offset_of_its_request(play: Play) -> None:
    """Success, error, data from the middle of a READ: always 32 bytes, never a simple reply."""

    async def story(stage: Stage) -> None:
        client = await stage.client(style=2, contexts=CONTEXTS)
        await client.write(8 * MIB, random.Random(3).randbytes(MIB))
        asked = {
            1: (CMD_READ, 8 * MIB + 7, MIB - 7),
            2: (CMD_READ, SIZE, 1),
            3: (CMD_FLUSH, 0, 0),
            4: (CMD_CACHE, 4096, 4096),
            5: (CMD_BLOCK_STATUS, 8192, MIB),
            6: (CMD_WRITE_ZEROES, 12288, 4096),
            7: (CMD_TRIM, SIZE - 1, 4096),
            8: (99, 77, 0),
        }
        for cookie, (command, offset, length) in asked.items():
            client.ask(command, offset, length, cookie=cookie)
        done: set[int] = set()
        while len(done) < len(asked):
            header = await client.reader.readexactly(32)
            magic, flags, _, cookie, offset, size = struct.unpack(">IHHQQQ", header)
            assert magic == EXTENDED_REPLY_MAGIC
            assert offset == asked[cookie][1]
            await client.reader.readexactly(size)
            if flags & 1:
                done.add(cookie)
        await client.close()

    play(story)


@pytest.mark.parametrize(("style", "foreign"), [(2, False), (1, True), (0, True)])
def test_the_other_kind_of_request_header_ends_the_connection(play: Play, style: int, foreign: bool) -> None:
    """What was negotiated counts for every message: compact after extended is nonsense, and the reverse."""

    async def story(stage: Stage) -> None:
        client = await stage.client(style=style)
        client.send(request(CMD_READ, 0, 512, extended=foreign) + bytes(8))
        assert await client.at_end()
        assert stage.server.protocol_errors == 1
        await client.close()

    play(story)


@pytest.mark.parametrize("command", [CMD_TRIM, CMD_WRITE_ZEROES, CMD_CACHE])
def test_an_effect_length_has_64_bits(play: Play, command: int) -> None:
    """One request for five gigabytes works, and one that ends a byte later does not."""

    async def story(stage: Stage) -> None:
        client = await vast(stage)
        await client.write(VAST - 4096, b"x" * 4096)
        past_end = Error.ENOSPC if command == CMD_WRITE_ZEROES else Error.EINVAL
        for offset, length in ((0, VAST + 1), (1, VAST), (0, 2**64 - 1), (2**64 - 1, 2**64 - 1)):
            assert (await client.call(command, offset, length)).error == past_end
        assert await client.read(VAST - 4096, 4096) == b"x" * 4096
        assert (await client.call(command, 0, VAST)).error == 0
        assert await client.read(VAST - 4096, 4096) == (b"x" if command == CMD_CACHE else b"\0") * 4096
        await client.close()

    play(story)


def test_one_descriptor_tells_of_more_than_32_bits(play: Play) -> None:
    """BLOCK_STATUS_EXT: 64-bit lengths, a count, 32 upper bits of status zero; REQ_ONE gives one a context."""

    async def story(stage: Stage) -> None:
        client = await vast(stage, contexts=CONTEXTS)
        await client.write(VAST - 4096, random.Random(1).randbytes(4096))
        answer = await client.call(CMD_BLOCK_STATUS, 0, VAST)
        assert [int.from_bytes(payload[:4]) for _, payload in answer.chunks] == [1, 2]
        assert descriptors(answer.chunks[0]) == [(VAST - 4096, 3), (4096, 0)]
        assert [length for length, _ in descriptors(answer.chunks[1])] == [VAST - 4096, 4096]
        assert all(status < 2**32 for chunk in answer.chunks for _, status in descriptors(chunk))
        answer = await client.call(CMD_BLOCK_STATUS, 4096, GIB, flags=REQ_ONE)
        assert [descriptors(chunk)[0][0] for chunk in answer.chunks] == [GIB, GIB]
        assert [len(descriptors(chunk)) for chunk in answer.chunks] == [1, 1]
        await client.close()

    play(story)


@pytest.mark.parametrize("command", [CMD_READ, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES, 99])
@pytest.mark.parametrize("size", [0, 1, 70_000])
def test_a_payload_where_none_belongs_is_consumed_and_refused(play: Play, command: int, size: int) -> None:
    """EINVAL, of whatever length, and the next request is understood."""

    async def story(stage: Stage) -> None:
        client = await stage.client(style=2)
        answer = await client.call(command, 0, size, flags=FLAG_PAYLOAD_LEN, payload=bytes(size))
        assert answer.error == Error.EINVAL
        assert await client.read(0, 512) == bytes(512)
        await client.close()

    play(story)


@pytest.mark.parametrize("command", [CMD_WRITE, CMD_READ, CMD_BLOCK_STATUS, CMD_TRIM, 99])
@pytest.mark.parametrize("size", [(64 << 20) + 1, 2**32, 2**64 - 1])
def test_a_payload_over_the_maximum_ends_the_connection(play: Play, command: int, size: int) -> None:
    """No command makes the server read on for gigabytes."""

    async def story(stage: Stage) -> None:
        client = await stage.client(style=2, contexts=CONTEXTS)
        client.send(request(command, 0, size, flags=FLAG_PAYLOAD_LEN, extended=True))
        assert await client.at_end()
        await client.close()

    play(story)


def test_the_payload_form_of_block_status_is_offered_where_it_can_be_used(play: Play) -> None:
    """With extended headers and contexts for the export; never without the headers."""

    async def story(stage: Stage) -> None:
        for style, contexts, offered in ((2, CONTEXTS, True), (2, (), False), (1, CONTEXTS, False), (0, (), False)):
            client = await stage.client(style=style, contexts=contexts)
            assert bool(client.flags & BLOCK_STATUS_PAYLOAD) is offered, (style, contexts)
            await client.close()

    play(story)


def test_block_status_with_a_payload_answers_exactly_the_wanted_contexts(play: Play) -> None:
    """One, the other, or both in either order; the effect length is the payload's, of 64 bits, not the header's."""

    async def story(stage: Stage) -> None:
        client = await vast(stage, contexts=CONTEXTS)
        for ids in ([1], [2], [1, 2], [2, 1]):
            payload = struct.pack(f">Q{len(ids)}I", VAST - 4096, *ids)
            answer = await client.call(CMD_BLOCK_STATUS, 4096, len(payload), payload=payload)
            assert sorted(int.from_bytes(status[:4]) for _, status in answer.chunks) == sorted(ids)
            assert [descriptors(chunk)[0][0] for chunk in answer.chunks] == [VAST - 4096] * len(ids)
        await client.close()

    play(story)


@pytest.mark.parametrize(
    "payload",
    [
        struct.pack(">QII", 4096, 2, 2),
        struct.pack(">QI", 4096, 9),
        struct.pack(">QI", 0, 1),
        struct.pack(">QI", 2 * SIZE, 1),
        struct.pack(">QI", 2**64 - 1, 1),
        struct.pack(">Q", 4096),
        struct.pack(">QI", 4096, 1)[:-1],
        b"1234567",
        bytes(70_000),
        b"",
    ],
    ids=["twice", "unknown", "empty", "past end", "overflow", "no id", "ragged", "short", "long", "nothing"],
)
def test_a_wrong_payload_of_block_status_is_consumed_and_refused(play: Play, payload: bytes) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client(style=2, contexts=CONTEXTS)
        answer = await client.call(CMD_BLOCK_STATUS, 0, len(payload), flags=FLAG_PAYLOAD_LEN, payload=payload)
        assert answer.error == Error.EINVAL
        assert (await client.call(CMD_BLOCK_STATUS, 0, 4096)).error == 0
        await client.close()

    play(story)


def test_block_status_with_a_payload_needs_contexts(play: Play) -> None:
    """Without SET_META_CONTEXT the flag was not offered: the payload is consumed, then EINVAL."""

    async def story(stage: Stage) -> None:
        client = await stage.client(style=2)
        answer = await client.call(CMD_BLOCK_STATUS, 0, 12, payload=struct.pack(">QI", 4096, 1))
        assert answer.error == Error.EINVAL
        assert await client.read(0, 512) == bytes(512)
        await client.close()

    play(story)


def test_disconnect_ends_the_connection_whatever_it_carries(play: Play) -> None:
    """A DISC with a payload flag has no reply, and what was asked before it is answered."""

    async def story(stage: Stage) -> None:
        client = await stage.client(style=2)
        client.ask(CMD_READ, 0, 4096, cookie=5)
        client.send(request(CMD_DISC, 1, 100, flags=FLAG_PAYLOAD_LEN, extended=True) + bytes(100))
        assert (await client.answer(read_length=4096))[0] == 5
        assert await client.at_end()
        await client.close()

    play(story)


def test_holes_are_described_far_however_few_blocks_are_stored(play: Play) -> None:
    """Looking at stored blocks takes time; passing over tables that are not there takes none to speak of."""

    async def story(stage: Stage) -> None:
        disk = stage.pool.create("far", 128 * GIB)
        stage.exports.add(Export(name="far", disk=disk, pool_name="default", access=EVERYONE, read_only=False))
        client = await stage.client(b"far", style=2, contexts=CONTEXTS)
        answer = await client.call(CMD_BLOCK_STATUS, 0, 128 * GIB)
        assert [descriptors(chunk) for chunk in answer.chunks] == [[(128 * GIB, 3)], [(128 * GIB, 8)]]
        disk.write(40 * GIB, b"x" * 4096)
        answer = await client.call(CMD_BLOCK_STATUS, 4096, 127 * GIB)
        rest = 87 * GIB
        expected = [[(40 * GIB - 4096, 3), (4096, 0), (rest, 3)], [(40 * GIB - 4096, 8), (4096, 4), (rest, 8)]]
        assert [descriptors(chunk) for chunk in answer.chunks] == expected
        await client.close()

    play(story)
