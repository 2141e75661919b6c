"""Sessions whose line goes to another process: what came goes with it, and what comes with one is held as any other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nbdzram.ready import readable
from nbdzram.sessions.rehearsal import rest, serve
from tests.support.rehearsal import Stage
from tests.wire import CMD_BLOCK_STATUS, CMD_READ, CMD_TRIM, CMD_WRITE, request

KIB, MIB = 1 << 10, 1 << 20
SIZE = 64 * MIB


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage(SIZE)
    made.disk.write(0, b"\x07" * (4 * MIB))
    yield made
    for client in made.clients.values():
        made.plane.abort(client.session)
    made.close()


LONG_ONES = {
    "a READ that is not read": (request(CMD_READ, 0, 4 * MIB), 100 * KIB),
    "a long READ": (request(CMD_READ, 0, 4 * MIB), 1 << 40),
    "a long TRIM": (request(CMD_TRIM, 0, 48 * MIB), 1 << 40),
    "many": (request(CMD_BLOCK_STATUS, 0, 16 * MIB) * 90, 1 << 40),
    "answers that are not read": (request(CMD_READ, 0, 32 * KIB) * 20, 100),
}


@pytest.mark.parametrize("first", LONG_ONES)
@pytest.mark.parametrize("size", [60_000, MIB, 63 * MIB])
@pytest.mark.parametrize("offset", [0, SIZE], ids=["stored", "refused"])
def test_a_payload_that_had_begun_behind_a_long_request_goes_on_on_the_same_line(
    stage: Stage, first: str, size: int, offset: int
) -> None:
    """Released, a session is between two requests, whatever it waited for as it was told: of a WRITE that was not begun
    to be taken all that came goes over, and nobody hangs up on its client."""
    sent, room = LONG_ONES[first]
    begun = request(CMD_WRITE, offset, size, cookie=7) + b"w" * 5000
    client = stage.attach(style=1, contexts=2)
    client.line.room = room
    client.send(sent + begun)
    serve(stage.desk, client.session)
    stage.plane.release(client.session)
    stage.desk.turn()
    client.line.room = 1 << 40
    stage.settle()
    assert client.over
    assert (client.session.released, client.line.closed) == (True, False)
    assert client.session.take_rest() == begun
    assert stage.plane.budget.used == 0


def test_what_came_with_a_client_is_charged_and_its_inbox_is_small_again_once_it_is_quiet(stage: Stage) -> None:
    """A thousand that were handed over with half a request each would hold as much for ever, and nobody would know."""
    whole = request(CMD_WRITE, 0, 60_000) + b"r" * 60_000
    client = stage.attach(style=0, rest=whole[:50_000])
    assert stage.plane.budget.used >= 50_000 - 8 * KIB
    client.send(whole[50_000:])
    stage.settle()
    for _ in range(2):
        rest(stage.desk, client.session)
    assert stage.plane.budget.used == 0
    assert stage.disk.read(0, 60_000) == b"r" * 60_000
    client.send(whole)
    stage.settle()
    assert client.session.requests == 2


@pytest.mark.parametrize("ends", ["release", "drain"])
@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("style", [1, 2])
@pytest.mark.parametrize("came", [b"", b"w" * 5000], ids=["nothing", "some"])
def test_who_waits_for_room_is_between_two_requests(ends: str, quiet: bool, style: int, came: bytes) -> None:
    """Memory for payloads is used up by one who stands in the middle of his; the next is read when that one is gone,
    and would then be in the middle of his own: everybody waited for them one after the other."""
    stage = Stage(SIZE, budget=2 * MIB)
    first, second = stage.attach(style=style), stage.attach(style=style)
    begun = request(CMD_WRITE, 0, 24 * MIB, extended=style == 2) + came
    if quiet:  # its inbox, which had grown, is small again meanwhile
        second.send((request(CMD_WRITE, 0, 32 * KIB, extended=style == 2) + bytes(32 * KIB)) * 8)
        stage.settle()
    before = second.session.requests
    for client in (first, second):
        client.send(begun)
        stage.settle()
    assert (first.session.waits_for_room, second.session.waits_for_room) == (False, True)
    if quiet:
        for _ in range(2):
            rest(stage.desk, second.session)
    getattr(stage.plane, ends)(second.session)
    stage.settle()
    assert (second.over, first.over, stage.plane.turns.waiting) == (True, False, 0)
    assert second.session.requests == before
    if ends == "release":
        assert (second.session.released, second.line.closed) == (True, False)
        assert second.session.take_rest() == begun
    else:
        assert second.line.closed
    third = stage.attach(style=style)
    third.send(begun)
    stage.settle()
    stage.plane.abort(first.session)
    stage.settle()
    assert third.session.payload_remaining == 24 * MIB - len(came) // 4096 * 4096, "it has its turn next"
    stage.plane.abort(third.session)
    stage.settle()
    stage.close()


def test_who_does_not_read_and_waited_for_room_keeps_it_from_nobody_when_he_is_to_go() -> None:
    stage = Stage(SIZE, budget=2 * MIB)
    first, second = stage.attach(style=0), stage.attach(style=0)
    second.line.room = 0
    first.send(request(CMD_WRITE, 0, 24 * MIB))
    stage.settle()
    second.send(request(CMD_READ, 0, 4096) + request(CMD_WRITE, 0, 24 * MIB))
    stage.settle()
    assert second.session.waits_for_room
    stage.plane.release(second.session)
    stage.settle()
    assert (second.over, stage.plane.turns.waiting) == (False, 0)
    second.line.room = 1 << 40
    stage.settle()
    assert second.session.take_rest() == request(CMD_WRITE, 0, 24 * MIB)
    stage.plane.abort(first.session)
    stage.settle()
    stage.close()


@pytest.mark.parametrize("ends", ["release", "drain"])
def test_nothing_is_read_of_a_payload_that_waits_although_its_line_was_told_of_before(ends: str) -> None:
    """A busy line is told of, and stands in the queue; meanwhile the payload before is stored, and the next request is
    begun, for which there is no room. Its header had no place to be put back to: that ended the server."""
    stage = Stage(SIZE, budget=4 * MIB, processors=3)
    first, second = stage.attach(style=0), stage.attach(style=0)
    first.send(request(CMD_WRITE, 0, 24 * MIB))
    stage.settle()
    second.send(request(CMD_WRITE, 0, 200 * KIB) + bytes(200 * KIB))
    while second.session.storing == 0:
        assert stage.serve(second, alone=True)
    begun = request(CMD_WRITE, 0, 24 * MIB)
    second.send(request(CMD_READ, 0, 4 * KIB) * 20 + begun)
    assert stage.serve(second, alone=True)
    readable(stage.desk.fileno())  # the payload before is stored: that word waits, too
    second.send(b"w" * 100)
    assert stage.serve(second)  # it was busy: it is to have its turn behind others
    stage.desk.turn()
    assert second.session.waits_for_room
    assert second.line.incoming == b"w" * 100
    getattr(stage.plane, ends)(second.session)
    stage.settle()
    assert second.over
    if ends == "release":
        assert second.session.take_rest() == begun
    stage.plane.abort(first.session)
    stage.settle()
    assert stage.plane.budget.used == 0
    stage.close()


FIRST_ONES = {
    "a payload that is stored as it arrives": (0, 400 * KIB),
    "a payload of a request that is refused": (SIZE, 300 * KIB),
}


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("first", FIRST_ONES)
def test_who_is_to_go_behind_his_payload_begins_no_other(first: str, waits: bool) -> None:
    """What follows came with the end of it, and not completely: begun, it would have to be waited for as well, or wait
    itself for room, and everybody for it."""
    stage = Stage(SIZE, budget=600 * KIB)
    offset, size = FIRST_ONES[first]
    hog, client = stage.attach(style=0), stage.attach(style=0)
    client.send(request(CMD_WRITE, offset, size) + bytes(size - 1))
    stage.settle()
    if waits:
        hog.send(request(CMD_WRITE, 0, 24 * MIB))
        stage.settle()
    stage.plane.release(client.session)
    stage.settle()
    assert not client.over
    begun = request(CMD_WRITE, 0, MIB) + b"w" * 100
    client.send(b"\0" + begun)
    stage.settle()
    assert (client.over, client.session.released, client.session.requests) == (True, True, 1)
    assert client.session.take_rest() == begun
    stage.plane.abort(hog.session)
    stage.settle()
    assert stage.plane.budget.used == 0
    stage.close()


def test_who_has_more_to_do_than_a_turn_begins_no_payload_once_he_is_to_go(stage: Stage) -> None:
    client = stage.attach(style=0)
    client.send((request(CMD_WRITE, 0, 32 * KIB) + bytes(32 * KIB)) * 16)
    stage.settle()  # its inbox has grown
    begun = request(CMD_WRITE, 0, MIB) + b"w" * 100
    client.send(request(CMD_READ, 0, 64 * KIB) * 20 + begun)
    assert stage.serve(client, alone=True)
    stage.plane.release(client.session)
    stage.settle()
    assert (client.over, client.session.released) == (True, True)
    assert client.session.take_rest() == begun


@pytest.mark.parametrize("ends", ["release", "drain"])
def test_a_request_that_is_put_back_took_nothing_of_what_its_export_may(ends: str) -> None:
    """It is asked again, and others of the export would wait for its bytes twice."""
    stage = Stage(SIZE, budget=2 * MIB)
    hog, client, other = (stage.attach(style=0) for _ in range(3))
    hog.send(request(CMD_WRITE, 0, 24 * MIB))
    stage.settle()
    stage.throttle.limit((0, 0), (MIB, 0), 1000)
    client.send(request(CMD_WRITE, 0, 24 * MIB))
    stage.settle()
    assert client.session.waits_for_room
    getattr(stage.plane, ends)(client.session)
    stage.settle()
    assert client.over
    other.send(request(CMD_READ, 0, 4 * KIB))
    stage.settle()
    assert len(other.line.outgoing) == 16 + 4 * KIB
    for one in (hog, other):
        stage.plane.abort(one.session)
    stage.settle()
    stage.close()
