"""Sessions on a stage of their own, a step at a time: whose turn it is, what is held, and how a session ends."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest

from nbdzram.config import Limits
from nbdzram.sessions.rehearsal import age, rest, serve
from nbdzram.sessions.stage import Ending
from nbdzram.sessions.stage import Stage as Ends
from tests.support.rehearsal import Client, Stage
from tests.wire import CMD_BLOCK_STATUS, CMD_DISC, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, request

BLOCK, KIB, MIB = 4096, 1 << 10, 1 << 20
SIZE = 64 * MIB
SCRATCH = 260 * KIB  # answers of one turn
STORE_LIMIT = 64  # large WRITEs, and answers that wait for a sync, of one session
SIMPLE_REPLY = 16
RECORD = 16 * KIB  # of TLS
LONG_TURN = 33  # requests of a block: a spell of those that are busy
TURN_OF_REQUESTS = 70  # that one turn answers at most, of those that cost the least of these: 1 MiB / 16 KiB, and some


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage(SIZE)
    yield made
    for client in made.clients.values():
        client.line.reset = True
        made.plane.abort(client.session)
    made.close()


@pytest.mark.parametrize(
    ("alone", "way", "gifts"),
    [
        pytest.param(True, "sleep", 8, id="alone"),
        pytest.param(True, "look", 8, id="looked for"),
        pytest.param(True, "nap", 2, id="never short of work"),
        pytest.param(False, "sleep", 1, id="beside others"),
        pytest.param(False, "nap", 1, id="behind a nap beside others"),
    ],
)
def test_a_client_that_nobody_is_beside_gets_its_first_answers_before_its_last_are_made(
    stage: Stage, alone: bool, way: str, gifts: int
) -> None:
    """So that it can go on meanwhile: every fourth of small requests, where one send would do; every sixteenth where it
    has enough to do anyhow."""
    client = stage.attach(style=0)
    client.send(request(CMD_WRITE, 0, BLOCK) + bytes(BLOCK))
    serve(stage.desk, client.session)  # its inbox grows
    before = len(client.line.gifts)
    client.send(request(CMD_READ, 0, BLOCK) * 32)
    serve(stage.desk, client.session, alone=alone, way=way)
    assert answered(client) == 33
    assert len(client.line.gifts) - before == gifts


def test_records_are_filled_while_more_is_to_come(stage: Stage) -> None:
    """A record of a few bytes costs as much as a full one: the few wait for the answers behind them."""
    client = stage.attach(style=0)
    client.line.record = RECORD
    client.send(request(CMD_WRITE, 0, BLOCK) + bytes(BLOCK))
    serve(stage.desk, client.session)
    before, held = len(client.line.gifts), bytes(client.line.outgoing)
    content = stage.disk.read(0, 16 * BLOCK)
    client.send(b"".join(request(CMD_READ, number * BLOCK, BLOCK) for number in range(16)))
    serve(stage.desk, client.session, alone=True)
    *ahead, last = client.line.gifts[before:]
    assert ahead == [RECORD] * 4
    assert last == 16 * SIMPLE_REPLY
    answers = bytes(client.line.outgoing)[len(held) :]
    assert (
        b"".join(
            answers[at + SIMPLE_REPLY : at + SIMPLE_REPLY + BLOCK]
            for at in range(0, len(answers), SIMPLE_REPLY + BLOCK)
        )
        == content
    )


def test_what_a_long_answer_leaves_of_a_record_goes_with_what_follows(stage: Stage) -> None:
    stage.disk.write(0, random.Random(7).randbytes(SIZE))
    client = stage.attach(style=1)
    client.line.record = RECORD
    client.send(request(CMD_READ, 0, MIB))
    stage.settle()
    assert [size % RECORD for size in client.line.gifts[:-1]] == [0] * (len(client.line.gifts) - 1)
    assert sum(client.line.gifts) > MIB


@pytest.mark.parametrize("room", [0, 1, RECORD - 1, RECORD, RECORD + 1, 3 * RECORD])
def test_a_peer_that_stops_reading_between_two_records_gets_every_answer_once(stage: Stage, room: int) -> None:
    stage.disk.write(0, random.Random(7).randbytes(MIB))
    client = stage.attach(style=0)
    client.line.record, client.line.room = RECORD, room
    client.send(request(CMD_READ, 0, BLOCK) + request(CMD_READ, 0, BLOCK) * 3)  # its inbox grows
    client.send(b"".join(request(CMD_READ, number * BLOCK, BLOCK) for number in range(40)))
    serve(stage.desk, client.session, alone=True)
    serve(stage.desk, client.session, alone=True)
    client.line.room = 1 << 40
    while client.line.ready:
        serve(stage.desk, client.session, alone=True)
        stage.desk.turn()
    contents = [0] * 4 + list(range(40))
    assert bytes(client.line.outgoing) == b"".join(
        struct.pack(">IIQ", 0x67446698, 0, 1) + stage.disk.read(number * BLOCK, BLOCK) for number in contents
    )


def answered(client: Client) -> int:
    return client.session.requests


def stage_of(client: Client) -> Ends:
    """How far its end has come."""
    return client.session.stage


def busy_clients(stage: Stage, count: int) -> list[Client]:
    """Whose last turns were long; each has one request more where its poller finds it."""
    clients = [stage.attach(style=0) for _ in range(count)]
    for client in clients:
        client.send(request(CMD_READ, 0, BLOCK) * LONG_TURN)
        serve(stage.desk, client.session, alone=True)
        assert answered(client) == LONG_TURN
        client.send(request(CMD_READ, 0, BLOCK) * LONG_TURN)
    return clients


def test_who_asks_for_little_is_served_before_all_that_are_busy(stage: Stage) -> None:
    busy, quiet = busy_clients(stage, 3), stage.attach(style=0)
    quiet.send(request(CMD_READ, 0, BLOCK))
    for client in (*busy, quiet, *busy):  # the poller tells again and again of what is left in a socket
        serve(stage.desk, client.session)
    assert answered(quiet) == 1
    assert [answered(client) for client in busy] == [LONG_TURN] * 3


def test_the_poller_is_asked_between_turns_of_the_busy_and_each_has_its_turn(stage: Stage) -> None:
    busy = busy_clients(stage, 4)
    for client in busy:
        serve(stage.desk, client.session)
    for served in range(1, 5):
        stage.desk.turn()
        assert [answered(client) for client in busy] == [2 * LONG_TURN] * served + [LONG_TURN] * (4 - served)
        serve(stage.desk, busy[0].session)  # it asked for no more


def test_a_spell_serves_nobody_twice(stage: Stage) -> None:
    """However short the turns are, the poller is asked behind one of each."""
    clients = [stage.attach(style=0) for _ in range(2)]
    for client in clients:
        client.line.untold, client.line.piece = True, len(request(CMD_READ, 0, BLOCK))
        client.send(request(CMD_READ, 0, BLOCK) * 8)
        serve(stage.desk, client.session)
    for served in range(2, 9):
        stage.desk.turn()
        assert [answered(client) for client in clients] == [served] * 2


def test_who_has_more_to_do_goes_behind_those_that_the_poller_told_of_meanwhile(stage: Stage) -> None:
    long, other = stage.attach(style=0), busy_clients(stage, 1)[0]
    long.send(request(CMD_TRIM, 0, 48 * MIB))  # a step of 4 MiB costs half a turn; it takes six
    serve(stage.desk, long.session)
    assert long.session.in_flight == 1
    serve(stage.desk, other.session)
    stage.desk.turn()
    assert long.session.in_flight == 1
    assert answered(other) == LONG_TURN
    stage.desk.turn()
    assert answered(other) == 2 * LONG_TURN
    assert long.session.in_flight == 1


def test_who_was_busy_and_asks_for_little_now_is_served_at_once_again(stage: Stage) -> None:
    client = busy_clients(stage, 1)[0]
    serve(stage.desk, client.session, alone=True)
    for _ in range(2):
        client.send(request(CMD_READ, 0, BLOCK))
        serve(stage.desk, client.session)
        stage.desk.turn()
    client.send(request(CMD_READ, 0, BLOCK))
    serve(stage.desk, client.session)
    assert answered(client) == 2 * LONG_TURN + 3


def test_who_is_in_the_middle_of_a_payload_waits_for_others(stage: Stage) -> None:
    """Taking what came of it is work, though it performs nothing yet."""
    sender, quiet = stage.attach(style=0), stage.attach(style=0)
    sender.send(request(CMD_WRITE, 0, MIB) + bytes(BLOCK))
    serve(stage.desk, sender.session)
    sender.send(bytes(MIB - 2 * BLOCK))
    quiet.send(request(CMD_READ, 0, BLOCK))
    serve(stage.desk, sender.session)
    serve(stage.desk, quiet.session)
    assert (answered(quiet), sender.session.payload_remaining) == (1, MIB - BLOCK)
    stage.desk.turn()
    assert sender.session.payload_remaining == BLOCK


@pytest.mark.parametrize(
    "storm",
    [
        pytest.param(request(CMD_READ, 1 << 62, 1), id="refused"),
        pytest.param(request(CMD_BLOCK_STATUS, 0, 16 << 20), id="status"),
        pytest.param(request(CMD_WRITE, 3, 1) + b"x", id="byte"),
        pytest.param(request(CMD_WRITE_ZEROES, 0, 1 << 20), id="zeroes"),
    ],
)
def test_thousands_of_small_requests_take_turns_with_others(stage: Stage, storm: bytes) -> None:
    """They are many in few bytes, and each is work: however many are there, a turn answers a few dozen of them."""
    hog, other = stage.attach(style=1, contexts=2), stage.attach(style=0)
    hog.send(storm * 60_000)
    for _ in range(40):  # its inbox grows
        serve(stage.desk, hog.session)
        stage.desk.turn()
    other.send(request(CMD_READ, 0, 512))
    before = answered(hog)
    serve(stage.desk, hog.session)
    serve(stage.desk, other.session)
    assert len(other.line.outgoing) == SIMPLE_REPLY + 512
    assert answered(hog) - before <= TURN_OF_REQUESTS
    stage.desk.turn()
    assert answered(hog) - before <= 2 * TURN_OF_REQUESTS


@pytest.mark.parametrize("command", [CMD_READ, CMD_TRIM, CMD_WRITE_ZEROES])
def test_a_long_request_is_served_in_turns(stage: Stage, command: int) -> None:
    """While it is under way, others are served after each of its turns, and it ends all the same."""
    stage.disk.write(0, b"\x07" * SIZE)
    hog, other = stage.attach(style=0), stage.attach(style=0)
    hog.send(request(command, 0, SIZE))
    serve(stage.desk, hog.session)
    assert hog.session.in_flight == 1
    other.send(request(CMD_READ, 0, 512))
    serve(stage.desk, other.session)
    assert len(other.line.outgoing) == SIMPLE_REPLY + 512
    assert hog.session.in_flight == 1
    stage.settle()
    assert hog.session.in_flight == 0
    assert len(hog.line.outgoing) == SIMPLE_REPLY + (SIZE if command == CMD_READ else 0)


@pytest.mark.parametrize("budget", [1 << 30, MIB], ids=["in a buffer", "as it comes"])
def test_a_large_write_is_stored_in_turns(budget: int) -> None:
    """A byte of it takes as long as four of a READ: a quarter of a mebibyte, and others have their turns."""
    stage = Stage(SIZE, budget=budget)
    hog, other = stage.attach(style=0), stage.attach(style=0)
    content = random.Random(1).randbytes(MIB)
    hog.send(request(CMD_WRITE, 0, MIB) + content)
    most = before = 0
    while not hog.line.outgoing:
        other.send(request(CMD_READ, 0, 512))
        assert stage.serve(other)
        stage.serve(hog)
        stage.desk.turn()
        most, before = max(most, stage.disk.stats().stored - before), stage.disk.stats().stored
    assert most == (256 * KIB if budget else 64 * KIB), "what comes without a buffer is what an inbox holds"
    assert stage.disk.read(0, MIB) == content
    stage.close()


@pytest.mark.parametrize("style", [0, 1, 2])
def test_who_asks_and_does_not_read_holds_a_scratch_and_is_served_when_it_reads(stage: Stage, style: int) -> None:
    stage.disk.write(0, b"\x07" * SIZE)
    hog = stage.attach(style=style)
    hog.line.room = 0
    for cookie in range(40):
        hog.send(request(CMD_READ, 0, 200 * KIB, cookie=cookie, extended=style == 2))
    stage.settle()
    assert stage.plane.budget.used <= SCRATCH + 8 * KIB
    assert hog.line.watched == 2, "nothing more is read of it"
    assert answered(hog) <= 2
    hog.line.room = 1 << 40
    stage.settle()
    assert answered(hog) == 40
    assert stage.plane.budget.used == 0
    assert len(hog.line.outgoing) >= 40 * 200 * KIB


def test_an_inbox_that_has_become_quiet_is_small_again(stage: Stage) -> None:
    """It grows while its client is busy, and the session that stays is charged for nothing two seconds later."""
    client = stage.attach(style=0)
    for cookie in range(8):
        client.send(request(CMD_WRITE, cookie * 64 * KIB, 60 * KIB, cookie=cookie) + b"x" * (60 * KIB))
    stage.settle()
    assert answered(client) == 8
    assert stage.plane.budget.used > 0
    rest(stage.desk, client.session)
    assert stage.plane.budget.used > 0
    rest(stage.desk, client.session)
    assert stage.plane.budget.used == 0
    client.send(request(CMD_WRITE, 0, 60 * KIB) + b"y" * (60 * KIB))
    stage.settle()
    assert stage.disk.read(0, 60 * KIB) == b"y" * (60 * KIB)


def test_answers_that_wait_for_a_sync_are_limited_and_given_in_order(stage: Stage) -> None:
    """One more than the limit waits in its socket, whatever it asks; a sync answers who came before it alone."""
    client = stage.attach(style=0, syncs=True)
    for cookie in range(STORE_LIMIT):
        client.send(request(CMD_FLUSH, 0, 0, cookie=cookie))
    client.send(request(CMD_READ, 0, 512, cookie=99))
    stage.settle()
    assert client.line.outgoing == b""
    assert answered(client) == STORE_LIMIT
    stage.plane.synced(client.session, 3, False)
    stage.settle()
    replies = struct.unpack(">" + "IIQ" * 3, client.line.outgoing[: 3 * SIMPLE_REPLY])
    assert replies[2::3] == (0, 1, 2)
    assert replies[1::3] == (0, 0, 0)
    assert len(client.line.outgoing) == 4 * SIMPLE_REPLY + 512, "now the READ has its place"
    stage.plane.synced(client.session, stage.plane.syncs_asked(client.session), True)
    stage.settle()
    failed = client.line.outgoing[4 * SIMPLE_REPLY + 512 :]
    assert [error for _, error, _ in struct.iter_unpack(">IIQ", failed)] == [5] * (STORE_LIMIT - 3)


def test_a_session_that_is_lost_is_not_gone_before_its_work_has_come_back(stage: Stage) -> None:
    """Nobody may delete a disk, or end the engine, while something is under way for it."""
    client = stage.attach(style=0, syncs=True)
    client.send(request(CMD_FLUSH, 0, 0))
    stage.settle()
    client.line.reset = True
    stage.settle()
    assert stage_of(client) == Ends.LOST
    assert client.session.number in stage.clients
    stage.plane.synced(client.session, 1, False)
    stage.settle()
    assert client.over
    assert client.session.number not in stage.clients
    assert stage.plane.budget.used == 0


@pytest.mark.parametrize("left", [False, True], ids=["attached", "behind its end of file"])
def test_who_is_cut_says_that_nobody_is_to_be_answered_for_whom_a_sync_is_waited(stage: Stage, left: bool) -> None:
    """And is told of no error: that is an I/O error to the client, and a connection that ends is none if it comes
    again."""
    client = stage.attach(style=0, syncs=True)
    client.send(request(CMD_FLUSH, 0, 0))
    stage.settle()
    client.line.sends_no_more = left
    stage.settle()
    stage.plane.abort(client.session)
    stage.desk.turn()
    tidings, _ = stage.plane.collect()
    assert [(sync, gone) for _, _, sync, gone in tidings] == [(True, False)]
    assert stage_of(client) == Ends.LOST
    stage.plane.synced(client.session, 1, True)
    stage.settle()
    assert client.over
    assert client.line.outgoing == b""


def test_draining_answers_what_came_completely_and_nothing_else(stage: Stage) -> None:
    """A long READ is under way, a WRITE stands complete behind it, another has begun: that one is as if never sent."""
    stage.disk.write(0, b"\x07" * SIZE)
    client = stage.attach(style=0)
    client.line.room = 100 * KIB
    client.send(request(CMD_READ, 0, 4 * MIB, cookie=1))
    client.send(request(CMD_WRITE, 0, 512, cookie=2) + b"w" * 512)
    client.send(request(CMD_WRITE, BLOCK, 512, cookie=3) + b"n" * 100)
    stage.settle()
    stage.plane.drain(client.session)
    stage.settle()
    client.send(b"n" * 412)  # too late
    assert not client.line.closed
    client.line.room = 1 << 40
    stage.settle()
    assert client.line.closed_in_order
    assert client.over
    assert len(client.line.outgoing) == SIMPLE_REPLY + 4 * MIB + SIMPLE_REPLY
    assert stage.disk.read(0, 512) == b"w" * 512
    assert stage.disk.read(BLOCK, 512) == b"\x07" * 512
    assert stage.plane.budget.used == 0


@pytest.mark.parametrize(
    ("sent", "ending", "value"),
    [
        (b"x" * 28, Ending.BAD_MAGIC, 0),
        (request(CMD_WRITE, 0, 128 * MIB), Ending.LONG_PAYLOAD, 128 * MIB),
        (request(2, 0, 0), Ending.LEFT, 0),
    ],
)
def test_how_a_session_ends_is_told_and_what_was_asked_before_is_answered(
    stage: Stage, sent: bytes, ending: Ending, value: int
) -> None:
    client = stage.attach(style=0)
    client.send(request(CMD_READ, 0, 512) + sent + request(CMD_READ, 0, 512))
    stage.settle()
    assert client.over
    assert (client.session.ending, client.session.ending_value) == (ending, value)
    assert len(client.line.outgoing) == SIMPLE_REPLY + 512


@pytest.mark.parametrize("reads", [True, False])
def test_a_closing_client_has_some_seconds_to_take_its_last_replies(stage: Stage, *, reads: bool) -> None:
    """Then it is cut; meanwhile it is not gone."""
    client = stage.attach(style=0)
    client.line.room = 8
    client.send(request(CMD_READ, 0, 512) + request(CMD_DISC, 0, 0))
    stage.settle()
    assert stage_of(client) == Ends.CLOSING
    for seconds in (0, 4):
        age(client.session, seconds)
        rest(stage.desk, client.session)
    assert not client.over
    if reads:
        client.line.room = 1 << 20
    age(client.session, 2)
    stage.settle()
    rest(stage.desk, client.session)
    assert client.line.closed
    assert client.line.closed_in_order is reads
    stage.settle()
    assert client.over


def test_descriptors_of_32_bits_end_in_a_whole_block_and_those_of_64_do_not(stage: Stage) -> None:
    """A client that counts in 32 bits asks on from there."""
    stage.disk = stage.pool.create("far", 1 << 40)
    stage.disk.write(9 << 32, b"\x07" * BLOCK)

    def first(style: int, offset: int, length: int) -> int:
        client = stage.attach(style=style, contexts=1)
        client.send(request(CMD_BLOCK_STATUS, offset, length, extended=style == 2))
        stage.settle()
        at, size = (32 + 8, 8) if style == 2 else (20 + 4, 4)
        return int.from_bytes(client.line.outgoing[at : at + size])

    longest = (1 << 32) - 1
    assert first(1, 0, longest) == (1 << 32) - BLOCK
    assert first(1, (8 << 32) + BLOCK, longest) == (1 << 32) - BLOCK
    assert first(1, (8 << 32) + 2 * BLOCK, longest) == (1 << 32) - 2 * BLOCK
    assert first(2, 0, 1 << 40) == 9 << 32


@pytest.mark.parametrize("processors", [1, 3])
@pytest.mark.parametrize("mem_limit", [0, 1 * MIB])
def test_a_large_write_is_answered_once_whoever_stores_it(processors: int, mem_limit: int) -> None:
    """With workers and without, on a pool that takes it and on one that does not; what was charged comes back."""
    stage = Stage(SIZE, processors=processors)
    stage.pool.mem_limit = mem_limit
    content = random.Random(1).randbytes(4 * MIB)
    client = stage.attach(style=1, limits=Limits(connection_bytes=64 * MIB))
    for cookie in range(4):
        client.send(request(CMD_WRITE, cookie * 4 * MIB, len(content), cookie=cookie) + content)
    stage.settle()
    errors = client.session.error_count
    assert (errors > 0) == (mem_limit > 0)
    assert answered(client) == 4
    assert stage.plane.budget.used <= 256 * KIB
    if not mem_limit:
        assert stage.disk.read(12 * MIB, 4 * MIB) == content
    client.line.sends_no_more = True
    stage.settle()
    assert client.over
    assert stage.plane.budget.used == 0
    stage.close()


def test_no_answer_comes_into_the_content_of_a_read_whose_header_went_ahead() -> None:
    """There is no memory to make it whole, its peer reads slowly, and a WRITE before it is stored meanwhile."""
    stage = Stage(SIZE, processors=3, budget=3 * MIB)
    size = 4 * MIB
    content = random.Random(1).randbytes(MIB // 2)
    stage.disk.write(0, content * (size // len(content)))
    client = stage.attach(style=0, limits=Limits(connection_bytes=64 * MIB))
    client.line.room = MIB
    client.send(request(CMD_WRITE, 8 * MIB, len(content), cookie=1) + content)
    client.send(request(CMD_READ, 0, size, cookie=2))
    stage.settle()
    client.line.room = 1 << 30
    stage.settle()
    replies = dict.fromkeys((1, 2), b"")
    got = bytes(client.line.outgoing)
    while got:
        cookie = int.from_bytes(got[8:SIMPLE_REPLY])
        length = size if cookie == 2 else 0
        replies[cookie], got = got[SIMPLE_REPLY : SIMPLE_REPLY + length], got[SIMPLE_REPLY + length :]
    assert replies == {1: b"", 2: stage.disk.read(0, size)}
    client.line.sends_no_more = True
    stage.settle()
    assert client.over
    stage.close()


def test_a_session_lost_while_workers_store_gives_everything_back() -> None:
    stage = Stage(SIZE, processors=3)
    content = b"\x07" * (8 * MIB)
    for _ in range(10):
        client = stage.attach(style=0)
        client.send(request(CMD_WRITE, 0, len(content)) + content)
        while client.line.ready:
            serve(stage.desk, client.session, alone=True)
        stage.plane.abort(client.session)
        stage.settle()
        assert client.over
        assert stage.plane.budget.used == 0
    stage.close()


def test_what_waits_for_its_turn_at_the_end_of_file_is_answered(stage: Stage) -> None:
    """More stands in the inbox than two turns answer when the peer says that it sends no more."""
    client = stage.attach(style=0)
    client.send(request(CMD_READ, 1 << 62, 1) * 200)
    client.line.sends_no_more = True
    serve(stage.desk, client.session)
    assert answered(client) < 200
    serve(stage.desk, client.session)
    assert not client.line.closed
    stage.settle()
    assert client.over
    assert len(client.line.outgoing) == 200 * SIMPLE_REPLY


def test_what_a_line_holds_is_taken_in_turns_of_its_own(stage: Stage) -> None:
    """A record is decrypted whole, and the socket has no more to tell of it: nobody else will."""
    client, other = stage.attach(style=0), stage.attach(style=0)
    client.line.untold = True
    client.line.piece = 28
    client.send(request(CMD_FLUSH, 0, 0) * 50)
    assert stage.serve(client)
    assert not client.line.ready
    assert answered(client) == 1
    other.send(request(CMD_FLUSH, 0, 0))
    stage.desk.turn()
    assert answered(client) == 2
    assert stage.serve(other)
    for _ in range(60):
        stage.desk.turn()
    assert answered(client) == 50
    assert len(client.line.outgoing) == 50 * SIMPLE_REPLY


def test_a_line_that_holds_bytes_is_left_alone_while_its_peer_does_not_read(stage: Stage) -> None:
    client = stage.attach(style=0)
    client.line.untold = True
    client.line.piece = 28
    client.line.room = 10
    client.send(request(CMD_FLUSH, 0, 0) * 50)
    stage.settle()
    assert answered(client) == 1
    assert len(client.line.incoming) == 49 * 28
    client.line.room = 1 << 30
    stage.settle()
    assert answered(client) == 50


def test_a_session_waits_until_its_line_has_said_that_no_more_comes(stage: Stage) -> None:
    """The last replies filled the socket, and TLS has one more word to say."""
    client = stage.attach(style=0)
    client.line.mute = True
    client.send(request(CMD_READ, 0, 4096) + request(CMD_DISC, 0, 0))
    stage.settle()
    assert len(client.line.outgoing) == SIMPLE_REPLY + 4096
    assert stage_of(client) == Ends.CLOSING
    client.line.mute = False
    assert stage.serve(client)
    assert client.line.closed_in_order
    assert stage_of(client) >= Ends.LOST


def test_a_line_that_never_says_its_last_word_is_not_waited_for_for_ever(stage: Stage) -> None:
    client = stage.attach(style=0)
    client.line.mute = True
    client.send(request(CMD_DISC, 0, 0))
    stage.settle()
    age(client.session, 6)
    rest(stage.desk, client.session)
    stage.settle()
    assert client.over


def test_a_peer_that_is_gone_before_the_last_word_is_not_waited_for(stage: Stage) -> None:
    """The poller tells of it again and again, and nothing is read any more."""
    client = stage.attach(style=0)
    client.line.mute = True
    client.send(request(CMD_DISC, 0, 0))
    stage.settle()
    assert stage_of(client) == Ends.CLOSING
    client.line.reset = True
    assert stage.serve(client)
    assert stage_of(client) >= Ends.LOST
