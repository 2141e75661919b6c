"""BLOCK_STATUS of what an export's blocks share (nbdzram:fold): to know it one has to look at much of the export."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest

from nbdzram.engine.fold import Fold
from nbdzram.engine.recompress import Recompress
from nbdzram.nbd.constants import FoldState
from nbdzram.sessions.rehearsal import serve
from tests.support.rehearsal import Client, Stage
from tests.unit.engine.blocks import resident_bytes, run, text
from tests.wire import CMD_BLOCK_STATUS, CMD_READ, request

BLOCK, KIB, MIB = 4096, 1 << 10, 1 << 20
SIZE = 64 * MIB
BOTH = 2  # contexts: base:allocation and nbdzram:fold
SIMPLE_REPLY = 16
CHUNK = 20
WINDOW = 16 * MIB  # of stored blocks that one request tells, in all its contexts together
LOOKED_AT = 4 * MIB  # in a turn
STRETCH = 256 * MIB  # that is looked through
REQ_ONE = 1 << 3
DESCRIPTORS = 512  # of a context in a reply
ROOM = 256 * KIB  # to look through 64 MiB of stored blocks: two places for each, of 8 bytes


def made(budget: int = 1 << 30) -> Stage:
    """An export of which every block is stored, and the first two share an object."""
    stage = Stage(SIZE, budget=budget)
    stage.disk.write(0, b"\x07" * SIZE)
    stage.disk.write(0, text(1) * 2)
    run(Fold(stage.pool))
    return stage


@pytest.fixture
def stage() -> Iterator[Stage]:
    made_one = made()
    yield made_one
    for client in made_one.clients.values():
        client.line.reset = True
        made_one.plane.abort(client.session)
    made_one.close()


def told(client: Client) -> dict[int, list[tuple[int, int]]]:
    """Lengths and states, a list for each context that was told of."""
    found, answers = {}, bytes(client.line.outgoing)
    while answers:
        length = struct.unpack_from(">I", answers, CHUNK - 4)[0]
        content, answers = answers[CHUNK : CHUNK + length], answers[CHUNK + length :]
        pairs = list(struct.unpack(f">{len(content) // 4 - 1}I", content[4:]))
        found[int.from_bytes(content[:4])] = list(zip(pairs[::2], pairs[1::2], strict=True))
    return found


@pytest.mark.parametrize("length", [BLOCK, SIZE])
def test_it_is_looked_for_and_told_in_turns(length: int, stage: Stage) -> None:
    """Of one block, too: 64 MiB of the export are looked through, and whoever is beside is served meanwhile."""
    hog, other = stage.attach(style=1, contexts=BOTH), stage.attach(style=0)
    hog.send(request(CMD_BLOCK_STATUS, 0, length))
    turns = 0
    while not hog.line.outgoing:
        turns += 1
        serve(stage.desk, hog.session)
        stage.desk.turn()
        if not hog.line.outgoing:
            other.send(request(CMD_READ, 0, 512))
            serve(stage.desk, other.session)
            assert len(other.line.outgoing) == turns * (SIMPLE_REPLY + 512)
    assert turns > SIZE // LOOKED_AT * (2 if length == SIZE else 1)
    stage.settle()
    rest = [(SIZE - 2 * BLOCK, FoldState.SAME_FILLED)] if length == SIZE else []
    assert list(told(hog).values()) == [[(length, 0)], [(min(length, 2 * BLOCK), FoldState.SHARED), *rest]]


@pytest.mark.parametrize("tells", [False, True])
def test_what_a_fold_with_another_export_makes_of_a_raw_block_is_not_told(tells: bool) -> None:
    """LZ4 cannot compress it, Zstandard can, and somebody else's equal one was recompressed: the smaller stays."""
    stage = Stage(SIZE)
    stage.pool.tells_sharing = tells
    secret = bytes(random.Random(1).choices(range(64), k=BLOCK))
    stage.pool.create("other", MIB).write(0, secret)
    run(Recompress(stage.pool))
    stage.disk.write(0, secret)
    found = []
    for _ in range(2):
        client = stage.attach(style=1, contexts=BOTH)
        client.send(request(CMD_BLOCK_STATUS, 0, BLOCK))
        stage.settle()
        found += [pairs[0][1] for pairs in told(client).values()]
        run(Fold(stage.pool))
    assert stage.pool.stats().objects == 1
    assert found == ([0, FoldState.HUGE, 0, FoldState.SHARED] if tells else [0, 0, 0, 0])
    client.line.sends_no_more = True
    stage.settle()
    stage.close()


def test_a_stretch_is_told_as_far_as_a_reply_has_room(stage: Stage) -> None:
    """Every second block is a hole: what was looked through is not looked through again for each 16 MiB of it."""
    for block in range(1, 2 * DESCRIPTORS, 2):
        stage.disk.trim(block * BLOCK, BLOCK)
    client = stage.attach(style=1, contexts=BOTH)
    client.send(request(CMD_BLOCK_STATUS, 0, SIZE) + request(CMD_BLOCK_STATUS, 0, SIZE, flags=REQ_ONE))
    stage.settle()
    many = len(client.line.outgoing) - BOTH * (CHUNK + 4 + 8)
    assert many == BOTH * (CHUNK + 4 + 8 * DESCRIPTORS)


def test_the_last_that_a_reply_has_room_for_is_told_to_its_end(stage: Stage) -> None:
    """It is found piece by piece, and goes on behind the leaf in which it begins."""
    for block in (*range(0, DESCRIPTORS - 1, 2), 2 * DESCRIPTORS):
        stage.disk.trim(block * BLOCK, BLOCK)
    client = stage.attach(style=1, contexts=1)
    client.send(request(CMD_BLOCK_STATUS, 0, SIZE))
    stage.settle()
    ((*singles, last),) = told(client).values()
    assert [length for length, _ in singles] == [BLOCK] * (DESCRIPTORS - 1)
    assert last == ((DESCRIPTORS + 1) * BLOCK, 0)


def test_to_tell_a_long_range_takes_a_turn(stage: Stage) -> None:
    client = stage.attach(style=1, contexts=1)
    client.send(request(CMD_BLOCK_STATUS, 2 * BLOCK, SIZE // 2) * 20)
    serve(stage.desk, client.session)
    assert client.session.requests <= 2
    stage.settle()
    assert client.session.requests == 20


def test_all_contexts_of_a_request_share_what_it_may_look_at(stage: Stage) -> None:
    stage.pool.tells_sharing = True  # nothing has to be looked for
    for contexts in (1, BOTH):
        client = stage.attach(style=1, contexts=contexts)
        client.send(request(CMD_BLOCK_STATUS, 2 * BLOCK, SIZE - 2 * BLOCK))
        stage.settle()
        for pairs in told(client).values():
            assert 0 < sum(length for length, _ in pairs) <= WINDOW // contexts


def test_no_context_goes_further_than_what_was_looked_through() -> None:
    stage = Stage(2 * STRETCH, mem_limit=STRETCH)
    stage.disk.write(STRETCH - BLOCK, b"\x07" * 2 * BLOCK)
    client = stage.attach(style=1, contexts=BOTH)
    client.send(request(CMD_BLOCK_STATUS, 0, 2 * STRETCH))
    stage.settle()
    hole = FoldState.HOLE
    assert list(told(client).values()) == [
        [(STRETCH - BLOCK, 3), (BLOCK, 0)],
        [(STRETCH - BLOCK, hole), (BLOCK, FoldState.SAME_FILLED)],
    ]
    client.line.sends_no_more = True
    stage.settle()
    stage.close()


def test_memory_to_look_is_of_the_budget_and_comes_back(stage: Stage) -> None:
    stays, leaves = stage.attach(style=1, contexts=BOTH), stage.attach(style=1, contexts=BOTH)
    for client in (stays, leaves):
        client.send(request(CMD_BLOCK_STATUS, 0, BLOCK))
        serve(stage.desk, client.session)
        assert client.session.in_flight == 1
    assert stage.plane.budget.used >= 2 * ROOM
    leaves.line.reset = True
    stage.plane.abort(leaves.session)
    stage.settle()
    assert stage.plane.budget.used == 0
    assert len(told(stays)) == BOTH


def test_without_memory_to_look_nothing_is_told_of_sharing() -> None:
    stage = made(budget=ROOM - 1)
    client = stage.attach(style=1, contexts=BOTH)
    client.send(request(CMD_BLOCK_STATUS, 0, BLOCK))
    stage.settle()
    assert [pairs[0][1] for pairs in told(client).values()] == [0, 0]
    client.line.sends_no_more = True
    stage.settle()
    stage.close()


def test_an_export_that_is_deleted_while_it_is_looked_at_is_an_error(stage: Stage) -> None:
    client = stage.attach(style=1, contexts=BOTH)
    client.send(request(CMD_BLOCK_STATUS, 0, BLOCK))
    serve(stage.desk, client.session)
    assert client.session.in_flight == 1
    stage.pool.delete(stage.disk)
    stage.settle()
    assert client.session.error_count == 1
    assert stage.plane.budget.used == 0


@pytest.mark.parametrize("leaves", [False, True])
def test_what_was_gathered_is_given_back(leaves: bool) -> None:
    """Behind the answer, and when the client leaves before it: 8 KiB of each request stayed otherwise."""
    stage = Stage(STRETCH, mem_limit=STRETCH)
    stage.disk.write(0, text(1) * 2 + b"\x07" * MIB)

    def ask(times: int) -> None:
        for _ in range(times):
            client = stage.attach(style=1, contexts=BOTH)
            client.send(request(CMD_BLOCK_STATUS, 0, MIB))
            serve(stage.desk, client.session)
            if leaves:
                client.line.reset = True
                stage.plane.abort(client.session)
            else:
                client.line.sends_no_more = True
            stage.settle()

    ask(100)
    before = resident_bytes()
    ask(4000)
    assert resident_bytes() - before < 16 * MIB
    stage.close()
