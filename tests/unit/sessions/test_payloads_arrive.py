"""Payloads on their way: whose turn it is meanwhile."""

from __future__ import annotations

import pytest

from nbdzram.sessions.stage import Stage as Ends
from tests.support.rehearsal import Stage
from tests.unit.sessions.test_released import stage  # noqa: F401  (fixture)
from tests.wire import CMD_READ, CMD_WRITE, request

KIB, MIB = 1 << 10, 1 << 20
SIZE = 64 * MIB


@pytest.mark.parametrize("offset", [0, SIZE], ids=["stored", "refused"])
def test_the_poller_is_asked_between_those_who_send_payloads_however_many_they_are(
    stage: Stage,  # noqa: F811
    offset: int,
) -> None:
    """To take what came of them is work: a spell of it ends as any other does, and a turn takes a mebibyte at most."""
    senders, quiet = [stage.attach(style=0) for _ in range(8)], stage.attach(style=0)
    for sender in senders:
        sender.send(request(CMD_WRITE, offset, 4 * MIB) + bytes(300 * KIB))
    stage.settle()  # their inboxes have grown
    for sender in senders:
        sender.send(bytes(200 * KIB))
        stage.serve(sender)
        stage.desk.turn()
    for sender in senders:
        sender.send(bytes(3 * MIB))
    before = [len(sender.line.incoming) for sender in senders]
    for sender in senders:
        stage.serve(sender)
    for turns in range(1, 9):
        quiet.send(request(CMD_READ, 0, 512))
        assert stage.serve(quiet)
        assert quiet.session.requests == turns
        stage.desk.turn()
        taken = [was - len(sender.line.incoming) for was, sender in zip(before, senders, strict=True)]
        assert sum(size > 0 for size in taken) <= turns
        assert max(taken) <= MIB


def test_a_buffer_that_is_larger_than_what_needs_it_is_charged_as_large_as_it_is() -> None:
    """A payload's, and that of answers which nobody reads."""
    played = Stage(SIZE, budget=8 * MIB)
    played.disk.write(0, b"\x07" * SIZE)
    budget = played.plane.budget
    for kept in (2 * MIB, 80 * KIB):
        client = played.attach(style=0)
        client.send(request(CMD_WRITE, 0, kept) + bytes(kept))
        played.settle()
        client.line.sends_no_more = True
        played.settle()
    assert budget.kept == 2 * MIB + 80 * KIB
    before = budget.used
    writer = played.attach(style=0)
    writer.send(request(CMD_WRITE, 0, 1900 * KIB) + bytes(1900 * KIB - 1))
    played.settle()
    assert budget.kept == 80 * KIB
    assert budget.used - before >= 2 * MIB
    before = budget.used
    reader = played.attach(style=0)
    reader.line.room = 0
    reader.send(request(CMD_READ, 0, 64 * KIB))
    played.settle()
    assert budget.kept == 0
    assert budget.used - before >= 80 * KIB
    for client in (writer, reader):
        client.line.sends_no_more = True
    reader.line.room = 1 << 40
    played.settle()
    assert budget.used == 0
    played.close()


def test_what_is_kept_of_large_buffers_and_what_is_in_use_are_what_there_is_for_requests() -> None:
    """The next of that size has it, one that needs much less has not, and who needs room has it before."""
    played = Stage(SIZE, budget=8 * MIB)
    played.disk.write(0, b"\x07" * SIZE)
    budget = played.plane.budget

    def write(length: int) -> None:
        writer.send(request(CMD_WRITE, 0, length) + bytes(length))
        played.settle()

    writer, reader = played.attach(style=0), played.attach(style=0)
    for _ in range(3):
        write(2 * MIB)
        assert budget.kept == 2 * MIB
    write(1900 * KIB)
    assert budget.kept == 2 * MIB, "it was taken again"
    write(100 * KIB)
    assert budget.kept == 2 * MIB + 100 * KIB
    reader.line.room = 0
    reader.send(request(CMD_READ, 0, 7 * MIB))
    played.settle()
    assert 7 * MIB < budget.used <= budget.limit - budget.kept
    assert budget.kept <= 100 * KIB
    write(400 * KIB)
    assert budget.used + budget.kept <= budget.limit
    reader.line.room = 1 << 40
    played.settle()
    write(2 * MIB)
    played.plane.rest()
    assert budget.kept >= 2 * MIB
    played.plane.rest()
    assert budget.kept == 0
    for _ in range(9):
        played.attach(style=0).send(request(CMD_WRITE, 0, MIB // 2) + bytes(MIB // 2 - 1))
        played.settle()
    for client in played.clients.values():
        client.send(b"\0" * (client.session.payload_remaining == 1))
    played.settle()
    assert 4 * MIB < budget.kept <= 8 * MIB
    budget.empty()
    assert budget.kept == 0
    for client in played.clients.values():
        client.line.sends_no_more = True
    played.close()


@pytest.mark.parametrize(("budget", "chunks"), [(1 << 30, 1), (512 * KIB, 16)], ids=["plenty", "strained"])
def test_a_read_of_middling_length_goes_on_in_small_steps_where_memory_is_short(budget: int, chunks: int) -> None:
    """What would be done at once otherwise: a block of it at a time, each its own chunk."""
    played = Stage(MIB, budget=budget)
    answer = played.play([request(CMD_READ, 0, 64 * KIB)], style=1)
    assert answer.count(b"\x66\x8e\x33\xef") == chunks
    assert len(answer) == 64 * KIB + chunks * 28
    played.close()


def test_a_turn_that_comes_with_a_second_wish_to_drain_is_taken() -> None:
    """Rings that meet are one letter: a session that drains already, as all of its payload came, still hears that its
    turn has come."""
    played = Stage(SIZE, budget=600 * KIB)
    first, second = played.attach(style=0), played.attach(style=0)
    for _ in range(8):  # its inbox grows
        second.send((request(CMD_WRITE, 0, 32 * KIB) + bytes(32 * KIB)) * 8)
        played.settle()
    first.send(request(CMD_WRITE, 0, 24 * MIB) + b"w" * 4096)
    played.settle()
    second.send(request(CMD_WRITE, 0, 200 * KIB) + b"s" * (200 * KIB))
    played.settle()
    assert second.session.waits_for_room
    played.plane.drain(second.session)
    played.settle()
    assert second.session.stage == Ends.DRAINING
    played.plane.abort(first.session)  # whose end rings: go on
    played.plane.drain(second.session)
    played.settle()
    assert first.over
    assert second.over
    assert played.disk.read(0, 200 * KIB) == b"s" * (200 * KIB)
    played.close()


def test_a_wish_to_drain_that_comes_with_a_turn_is_heard() -> None:
    """The other way round: whose turn has come, and who drains from that same letter on, reads no more."""
    played = Stage(SIZE, budget=2 * MIB)
    first, second = played.attach(style=0), played.attach(style=0)
    for client in (first, second):
        client.send(request(CMD_WRITE, 0, 24 * MIB) + b"w" * 4096)
        played.settle()
    assert played.plane.turns.waiting == 1
    played.plane.abort(first.session)  # whose end rings: go on
    played.plane.drain(second.session)
    played.settle()
    assert second.over
    played.close()
