"""What each request takes of a turn, whose payload is stored next, and which part of a long request failed."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterator

import pytest

from nbdzram.nbd.constants import Chunk
from nbdzram.sessions.rehearsal import Looks, serve
from nbdzram.sessions.stage import Stage as Ends
from nbdzram.sessions.turns import PACE_BYTES, PACE_SECONDS
from nbdzram.sessions.workers import Workers
from tests.support.rehearsal import Client, Stage
from tests.wire import CMD_BLOCK_STATUS, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, request

BLOCK, KIB, MIB = 4096, 1 << 10, 1 << 20
SIZE = 64 * MIB
TURN = MIB
HEADER = 28
CHUNK = 20
FLAG_FUA = 1
LONG = 16 * MIB  # a payload beside which no other one is stored as it arrives


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage(SIZE, budget=4 * MIB)
    yield made
    for client in made.clients.values():
        client.line.reset = True
        made.plane.abort(client.session)
    made.close()


# -- what a request takes of a turn ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "takes"),
    [
        pytest.param(request(CMD_READ, 0, 512), BLOCK, id="a part of a block is decoded whole"),
        pytest.param(request(CMD_READ, 0, BLOCK), BLOCK, id="a block"),
        pytest.param(request(CMD_READ, 0, 64 * KIB), 64 * KIB, id="many blocks"),
        pytest.param(request(CMD_WRITE, 0, 512) + bytes(512), 4 * BLOCK, id="its block is decoded and encoded again"),
        pytest.param(request(CMD_TRIM, 0, BLOCK), BLOCK + BLOCK // 8, id="a block is trimmed"),
        pytest.param(request(CMD_TRIM, 0, MIB), BLOCK + MIB // 8, id="as much as is charged at once is trimmed"),
        pytest.param(request(CMD_TRIM, 0, MIB + BLOCK), 2 * BLOCK + (MIB + BLOCK) // 8, id="more is trimmed"),
        pytest.param(request(CMD_WRITE_ZEROES, 0, MIB), BLOCK + MIB // 8, id="zeroes are as holes"),
        pytest.param(request(CMD_BLOCK_STATUS, 0, BLOCK), 16 * KIB + BLOCK // 16, id="a block's status"),
        pytest.param(request(CMD_BLOCK_STATUS, 0, 4 * MIB), 16 * KIB + 4 * MIB // 16, id="that of many"),
        pytest.param(request(CMD_READ, SIZE, BLOCK), 16 * KIB - HEADER, id="a refusal"),
    ],
)
def test_so_many_requests_are_answered_in_a_turn(stage: Stage, asked: bytes, takes: int) -> None:
    client = stage.attach(style=1, contexts=1)
    client.send(request(CMD_FLUSH, 0, 0) * 20_000)
    stage.settle()  # its inbox has grown
    before = client.session.requests
    client.send(asked * 300)
    serve(stage.desk, client.session, alone=True)
    of_a_turn = -(-TURN // (HEADER + takes))
    assert client.session.requests - before == of_a_turn


@pytest.mark.parametrize("processors", range(1, 9))
def test_of_every_two_processors_one_may_be_looked_with(processors: int) -> None:
    """And none while all are at work."""
    workers = Workers(processors)
    looks = Looks(workers)
    allowed = [looks.begins() for _ in range(processors)].count(True)
    assert allowed == processors // 2
    if allowed:
        assert not looks.begins()
        looks.ends()
        looks.works(processors)
        assert not looks.begins()
        looks.works(-1)
        assert looks.begins()
    workers.stop()


# -- whose payload is stored next ------------------------------------------------------------------------------------


def begins(stage: Stage, size: int) -> Client:
    """A client that sends a payload of this size, and has sent a block of it."""
    client = stage.attach(style=0)
    client.send(request(CMD_WRITE, 0, size) + bytes(BLOCK))
    stage.settle()
    return client


def goes_on(client: Client) -> bool:
    return client.session.waits_for_peer


@pytest.mark.parametrize(
    ("sizes", "order"),
    [
        ((LONG, LONG, LONG), (0, 1, 2)),
        ((LONG, LONG - BLOCK, LONG), (1, 0, 2)),
        ((LONG, LONG - BLOCK, LONG - BLOCK), (1, 2, 0)),
        ((LONG - BLOCK, LONG, LONG - 2 * BLOCK), (2, 0, 1)),
    ],
)
def test_the_shortest_goes_on_and_of_equals_who_came_first(
    stage: Stage, sizes: tuple[int, ...], order: tuple[int, ...]
) -> None:
    goes = begins(stage, LONG)
    waiting = [begins(stage, size) for size in sizes]
    assert goes_on(goes)
    for following in order:
        assert not any(goes_on(client) for client in waiting if client is not goes and not client.over)
        stage.plane.abort(goes.session)
        stage.settle()
        goes = waiting[following]
        assert goes_on(goes)


def test_who_begins_another_payload_has_his_time_anew(stage: Stage) -> None:
    """Whatever was left of the one before when it was looked last: what came of this one is another thing."""
    sender = begins(stage, 2 * MIB)
    stage.plane.rest()  # nobody waits: it is noted how much is left
    sender.send(bytes(2 * MIB - BLOCK) + request(CMD_WRITE, 0, 2 * MIB) + bytes(64 * KIB))
    stage.settle()
    assert sender.session.payload_remaining == 2 * MIB - 64 * KIB
    first, second = begins(stage, LONG), begins(stage, LONG)
    for _ in range(PACE_SECONDS):
        stage.plane.rest()
    stage.settle()
    assert [client.session.stage for client in (sender, first, second)] == [Ends.OPEN] * 3
    for _ in range(PACE_SECONDS):
        stage.plane.rest()
    stage.settle()
    assert [client.session.stage >= Ends.LOST for client in (sender, first)] == [True, True]
    assert second.session.stage == Ends.OPEN


@pytest.mark.parametrize("asks_more", [False, True])
def test_whose_payload_is_complete_before_it_is_told_to_go_is_not_cut(stage: Stage, asks_more: bool) -> None:
    """Nobody waits for it any more, and what it sent is stored and answered."""
    sender = begins(stage, 2 * MIB)
    first, second = begins(stage, LONG), begins(stage, LONG)
    for _ in range(2 * PACE_SECONDS):
        stage.plane.rest()  # all that have a turn are told to go
    sender.send(bytes(sender.session.payload_remaining))
    if asks_more:
        sender.send(request(CMD_WRITE, 0, 2 * MIB) + bytes(BLOCK))
    for _ in range(4):
        serve(stage.desk, sender.session, alone=True)  # its thread hears of bytes before it opens its mail
    stage.settle()
    assert sender.session.stage == Ends.OPEN
    assert len(sender.line.outgoing) == 16
    assert first.session.stage >= Ends.LOST
    assert second.session.stage == Ends.OPEN


@pytest.mark.parametrize("size", [2 * MIB, LONG], ids=["has a buffer", "is stored as it arrives"])
def test_who_keeps_the_pace_is_cut_in_no_round_and_who_does_not_in_the_next(stage: Stage, size: int) -> None:
    """What is still to come of a payload is what has not come, at each look."""
    sender = begins(stage, size)
    others = [begins(stage, LONG), begins(stage, LONG)]
    for sent in (PACE_BYTES, PACE_BYTES, PACE_BYTES - 1):
        for second in range(PACE_SECONDS):
            assert sender.session.stage == Ends.OPEN
            if second == 1:
                sender.send(bytes(sent))
                stage.settle()
            if second == 2:
                others[0].send(bytes(2 * PACE_BYTES))
                stage.settle()
            stage.plane.rest()
        stage.settle()
    assert sender.session.stage >= Ends.LOST
    assert others[1].session.stage == Ends.OPEN


# -- which part failed -----------------------------------------------------------------------------------------------


def failed_at(client: Client) -> int:
    """The offset in the last chunk, an error."""
    rest = bytes(client.line.outgoing)
    while True:
        _, flags, kind, _, length = struct.unpack_from(">IHHQI", rest)
        payload, rest = rest[CHUNK : CHUNK + length], rest[CHUNK + length :]
        if flags:
            assert (kind, rest) == (Chunk.ERROR_OFFSET, b"")
            return int.from_bytes(payload[-8:])


@pytest.mark.parametrize("processors", [1, 2], ids=["here", "by a worker"])
def test_a_long_write_that_finds_no_room_tells_where_it_failed_first(processors: int) -> None:
    """All before that is stored; parts behind it failed as well, and are not what is told."""
    stage = Stage(SIZE, processors=processors)
    stage.pool.mem_limit = MIB
    content = random.Random(1).randbytes(4 * MIB)
    client = stage.attach(style=1)
    client.send(request(CMD_WRITE, 0, len(content)) + content)
    stage.settle()
    failed = failed_at(client)
    assert 0 < failed < MIB
    assert stage.disk.read(0, failed) == content[:failed]
    part = content[failed : failed + 256 * KIB]
    assert stage.disk.read(failed, len(part)) != part
    client.line.sends_no_more = True
    stage.settle()
    stage.close()


@pytest.mark.parametrize(("command", "a_turn"), [(CMD_TRIM, 8 * MIB), (CMD_READ, MIB)], ids=["trim", "read"])
def test_a_long_request_that_fails_behind_its_first_turn_tells_where(stage: Stage, command: int, a_turn: int) -> None:
    stage.disk.write(0, b"\x07" * SIZE)
    client = stage.attach(style=1)
    client.send(request(command, 0, 3 * a_turn))
    serve(stage.desk, client.session)
    stage.pool.delete(stage.disk)
    stage.settle()
    assert failed_at(client) == a_turn


def test_what_waits_for_a_sync_took_its_time_from_its_own_beginning(stage: Stage) -> None:
    """And not from that of the turn in which its last part was done."""
    client = stage.attach(style=0, syncs=True)
    client.send(request(CMD_TRIM, 0, 24 * MIB, flags=FLAG_FUA))
    serve(stage.desk, client.session)
    assert client.session.in_flight == 1
    began = time.monotonic_ns()
    while time.monotonic_ns() - began < 5_000_000:
        pass
    took = time.monotonic_ns() - began
    stage.settle()
    stage.plane.synced(client.session, 1, False)
    stage.settle()
    told = stage.tallies[client.session.number].operation(CMD_TRIM)
    assert told is not None
    requests, _, nanoseconds, *_ = told
    assert requests == 1
    assert nanoseconds >= took
