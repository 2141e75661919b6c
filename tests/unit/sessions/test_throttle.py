"""Limits of an export: what begins at once, what waits, who is next, and what is never made to wait.

Time is the test's own: limits are for a span that no test lasts, and `pass_time` lets it go by.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nbdzram.sessions.rehearsal import Schedule, pass_time, serve
from nbdzram.sessions.throttle import Throttle
from tests.support.rehearsal import Client, Stage
from tests.wire import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    request,
)

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB
SECOND = 10**9
HOUR = 3600 * SECOND
SPAN_SECONDS = 1000  # that limits are for: far more than a test takes
SPAN = SPAN_SECONDS * SECOND
SIMPLE_REPLY = 16


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage(SIZE)
    yield made
    made.throttle.limit((0, 0), (0, 0))
    for client in made.clients.values():
        client.line.reset = True
        made.plane.abort(client.session)
    made.close()


def limit(stage: Stage, *, iops: int = 0, iops_burst: int = 0, bandwidth: int = 0, bandwidth_burst: int = 0) -> None:
    stage.throttle.limit((iops, iops_burst), (bandwidth, bandwidth_burst), SPAN_SECONDS)


def send(stage: Stage, client: Client, *requests: bytes) -> None:
    client.send(b"".join(requests))
    stage.settle()


def reads(count: int, size: int = 512) -> bytes:
    return b"".join(request(CMD_READ, 0, size, cookie=number) for number in range(count))


def wait(stage: Stage, nanoseconds: int) -> None:
    pass_time(stage.desk, stage.throttle, nanoseconds)
    stage.settle()


# ---- the arithmetic ----


SHORT_GAPS = st.sampled_from([0, 0, 0, 1, 1000]) | st.integers(0, 3 * SECOND)


@given(
    per_second=st.integers(1, 10**9),
    burst=st.integers(0, 20),
    gaps=st.lists(SHORT_GAPS, min_size=1, max_size=60),
)
@example(per_second=300_000_000, burst=2, gaps=[0] * 30)
def test_in_no_time_more_requests_begin_than_burst_and_rate_allow(per_second: int, burst: int, gaps: list[int]) -> None:
    schedule, now = Schedule(per_second, burst), 0
    begun: list[int] = []
    for gap in gaps:
        now = max(now + gap, begun[-1] if begun else 0)
        begun.append(schedule.take(1, now))
    most = burst or per_second
    assert begun == sorted(begun)
    for first in range(len(begun)):
        for last in range(first, len(begun)):
            assert (last - first + 1 - most) * SECOND <= (begun[last] - begun[first]) * per_second


@given(
    per_second=st.integers(4096, 1 << 36),
    burst=st.integers(0, 1 << 30),
    asked=st.lists(st.tuples(st.integers(0, SECOND), st.integers(1, 1 << 30)), min_size=1, max_size=60),
)
def test_in_no_time_more_bytes_begin_than_burst_and_rate_allow_but_for_the_last_request(
    per_second: int, burst: int, asked: list[tuple[int, int]]
) -> None:
    schedule, now = Schedule(per_second, burst, of_bytes=True), 0
    begun: list[tuple[int, int]] = []
    for gap, amount in asked:
        now = max(now + gap, begun[-1][0] if begun else 0)
        begun.append((schedule.take(amount, now), amount))
    most = burst or per_second
    for first in range(len(begun)):
        moved = 0
        for at, amount in begun[first:]:
            assert moved <= most + (at - begun[first][0] + 1) * per_second / SECOND + 1
            moved += amount


@given(per_second=st.integers(1, 10**6), burst=st.integers(1, 100))
def test_who_asked_for_nothing_as_long_as_the_burst_is_worth_has_all_of_it_again(per_second: int, burst: int) -> None:
    schedule, now = Schedule(per_second, burst), HOUR
    assert [schedule.take(1, now) for _ in range(burst)] == [now] * burst
    assert schedule.take(1, now) > now
    now += (burst + 1) * (SECOND // per_second + 1)
    assert [schedule.take(1, now) for _ in range(burst)] == [now] * burst


def test_the_rate_is_reached_however_late_a_thread_is() -> None:
    """What was due while it slept begins when it wakes, as long as that is within the burst."""
    schedule, begun, now = Schedule(1000, 100), 0, 0
    while now < SECOND:
        while schedule.take(1, now) <= now:
            begun += 1
        schedule.take_back(1)
        now += 50_000_000
    assert 1000 <= begun + 100 <= 1200


@pytest.mark.parametrize("now", [0, SECOND, HOUR])
def test_it_is_scarce_once_half_of_the_burst_is_used_however_young_the_clock(now: int) -> None:
    """The clock begins with the machine, and a burst may be worth hours."""
    schedule = Schedule(1, 10_000)
    schedule.take(4_999, now)
    assert not schedule.is_scarce(now)
    schedule.take(2, now)
    assert schedule.is_scarce(now)


def test_what_is_given_back_others_may_take() -> None:
    schedule = Schedule(1, 2)
    assert [schedule.take(1, 0) for _ in range(2)] == [0, 0]
    due = schedule.take(1, 0)
    schedule.take_back(1)
    assert schedule.take(1, 0) == due


# ---- sessions ----


@pytest.mark.parametrize("command", [CMD_READ, CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES])
def test_a_burst_is_served_at_once_and_the_next_waits_until_it_is_due(stage: Stage, command: int) -> None:
    limit(stage, iops=1, iops_burst=3)
    client = stage.attach(style=0)
    send(stage, client, (request(command, 0, 512) + (b"x" * 512 if command == CMD_WRITE else b"")) * 5)
    assert client.session.requests == 3
    wait(stage, SPAN)
    assert client.session.requests == 4
    wait(stage, SPAN)
    assert client.session.requests == 5
    assert len(client.line.outgoing) == 5 * (SIMPLE_REPLY + (512 if command == CMD_READ else 0))


def test_bytes_are_limited_too_and_a_request_of_any_size_passes(stage: Stage) -> None:
    """One of 1 MiB where 64 KiB may come at once: the others wait until it is worth its time."""
    limit(stage, bandwidth=64 * KIB)
    client = stage.attach(style=0)
    send(stage, client, request(CMD_READ, 0, MIB), request(CMD_READ, 0, 512))
    assert client.session.requests == 1
    wait(stage, 14 * SPAN)
    assert client.session.requests == 1
    wait(stage, 2 * SPAN)
    assert client.session.requests == 2


@pytest.mark.parametrize("size", [60 * KIB, 2 * MIB])
def test_a_write_waits_before_its_payload_is_taken(stage: Stage, size: int) -> None:
    """However large it is: what waits in the socket takes no memory here, and is stored once, whole."""
    limit(stage, iops=1, iops_burst=1)
    client = stage.attach(style=0)
    send(stage, client, request(CMD_READ, 0, 512), request(CMD_WRITE, 0, size) + b"\x05" * size)
    assert client.session.requests == 1
    assert stage.plane.budget.used < MIB
    wait(stage, SPAN)
    assert client.session.requests == 2
    assert stage.disk.read(size - 5, 6) == b"\x05" * 5 + stage.disk.read(size, 1)


def test_trim_and_zeroes_move_no_bytes(stage: Stage) -> None:
    limit(stage, bandwidth=4 * KIB)
    client = stage.attach(style=0)
    send(stage, client, request(CMD_TRIM, 0, SIZE) * 3, request(CMD_WRITE_ZEROES, 0, SIZE) * 3)
    assert client.session.requests == 6


def test_what_reads_no_content_is_not_limited(stage: Stage) -> None:
    limit(stage, iops=1, iops_burst=1, bandwidth=4 * KIB)
    client = stage.attach(style=1, contexts=1)
    send(stage, client, reads(1))
    for command in (CMD_FLUSH, CMD_CACHE, CMD_BLOCK_STATUS):
        send(stage, client, request(command, 0, 512 * (command != CMD_FLUSH)))
    assert client.session.requests == 4
    send(stage, client, request(CMD_DISC, 0, 0))
    assert client.line.closed


def test_a_refused_request_takes_no_place(stage: Stage) -> None:
    limit(stage, iops=1, iops_burst=1)
    client = stage.attach(style=0)
    send(stage, client, request(CMD_READ, 1 << 40, 512) * 4, reads(1))
    assert client.session.requests == 5


def test_what_waits_keeps_what_follows_in_its_order(stage: Stage) -> None:
    """A FLUSH behind a WRITE that waits is answered behind it."""
    limit(stage, iops=1, iops_burst=1)
    client = stage.attach(style=0)
    send(stage, client, reads(1), request(CMD_WRITE, 0, 512, cookie=8) + bytes(512), request(CMD_FLUSH, 0, 0, cookie=9))
    assert client.session.requests == 1
    wait(stage, SPAN)
    assert client.session.requests == 3


def test_clients_of_an_export_take_turns(stage: Stage) -> None:
    """One asks for a hundred things at once, one for a few: each has every second place, also of those that are due
    together as a thread comes late."""
    limit(stage, iops=1, iops_burst=1)
    hog, other = stage.attach(style=0), stage.attach(style=0)
    send(stage, hog, reads(100))
    send(stage, other, reads(100))
    before = hog.session.requests, other.session.requests
    assert before == (1, 0)
    for _ in range(10):
        wait(stage, 2 * SPAN)
    assert abs(hog.session.requests - other.session.requests) <= 2
    assert 19 <= hog.session.requests + other.session.requests <= 22


def test_a_thread_wakes_for_each_who_waits_when_he_is_due(stage: Stage) -> None:
    """Whoever came to wait after him, and however long that one has to."""
    limit(stage, iops=1, iops_burst=1)
    clients = [stage.attach(style=0) for _ in range(4)]
    for client in clients:
        send(stage, client, reads(1))
    for served in range(1, len(clients)):
        assert [client.session.requests for client in clients] == [1] * served + [0] * (len(clients) - served)
        wait(stage, SPAN)
    assert all(client.session.requests == 1 for client in clients)


def test_while_a_burst_is_used_up_a_client_takes_one_place_a_turn(stage: Stage) -> None:
    """Eight are due at once, of a burst of twenty: who comes first does not take them all."""
    limit(stage, iops=20)
    hog, other = stage.attach(style=0), stage.attach(style=0)
    send(stage, hog, reads(40))
    send(stage, other, reads(40))
    pass_time(stage.desk, stage.throttle, 8 * SPAN // 20)
    before = hog.session.requests + other.session.requests
    for _ in range(100):
        stage.desk.turn()
    assert hog.session.requests + other.session.requests == before + 8
    assert abs(hog.session.requests - 20 - other.session.requests) <= 1


def test_an_export_s_limits_are_of_all_its_clients_together_and_of_nobody_else(stage: Stage) -> None:
    limit(stage, iops=1, iops_burst=4)
    clients = [stage.attach(style=0) for _ in range(4)]
    for client in clients:
        send(stage, client, reads(4))
    assert sum(client.session.requests for client in clients) == 4
    free = Stage(SIZE)
    client = free.attach(style=0)
    send(free, client, reads(100))
    assert client.session.requests == 100
    client.line.sends_no_more = True
    free.close()


def test_limits_that_are_lifted_let_go_on_at_once_who_waits(stage: Stage) -> None:
    limit(stage, iops=1, iops_burst=1)
    client = stage.attach(style=0)
    send(stage, client, reads(50))
    limit(stage)
    assert client.session.requests == 1
    stage.plane.go_on(client.session)
    stage.settle()
    assert client.session.requests == 50


def test_other_limits_hold_at_once_for_who_waits(stage: Stage) -> None:
    """A debt of hours under the old ones is none under the new ones; and where nothing changes, debts stay."""
    limit(stage, bandwidth=4 * KIB)
    client = stage.attach(style=0)
    send(stage, client, request(CMD_READ, 0, SIZE), reads(50))
    assert client.session.requests == 1
    limit(stage, bandwidth=4 * KIB)
    stage.plane.go_on(client.session)
    stage.settle()
    assert client.session.requests == 1
    limit(stage, iops=1, iops_burst=10)
    stage.plane.go_on(client.session)
    stage.settle()
    assert client.session.requests == 11


def test_a_server_that_drains_lets_nobody_wait(stage: Stage) -> None:
    """What was asked for completely is answered before the session ends."""
    limit(stage, iops=1, iops_burst=1)
    client = stage.attach(style=0)
    send(stage, client, reads(20))
    stage.plane.drain(client.session)
    stage.settle()
    assert client.over
    assert len(client.line.outgoing) == 20 * (SIMPLE_REPLY + 512)


@pytest.mark.parametrize("end", ["drain", "release"])
def test_who_hangs_up_waits_as_before_until_the_server_drains(stage: Stage, end: str) -> None:
    """Or else a client would get round its limits by hanging up and coming again."""
    limit(stage, iops=1, iops_burst=1)
    client = stage.attach(style=0)
    client.send(reads(20))
    client.line.sends_no_more = True
    stage.settle()
    assert (client.session.requests, client.over) == (1, False)
    wait(stage, SPAN)
    assert client.session.requests == 2
    getattr(stage.plane, end)(client.session)
    stage.settle()
    assert client.over
    assert client.session.requests == 20


def test_a_client_that_is_released_is_answered_first(stage: Stage) -> None:
    limit(stage, iops=1, iops_burst=1)
    client = stage.attach(style=0)
    send(stage, client, reads(20))
    stage.plane.release(client.session)
    stage.settle()
    assert (client.session.requests, client.session.released) == (20, True)


def test_a_client_that_is_cut_while_it_waits_is_gone_and_gives_its_place_back(stage: Stage) -> None:
    limit(stage, bandwidth=64 * KIB)
    waits, other = stage.attach(style=0), stage.attach(style=0)
    send(stage, waits, request(CMD_READ, 0, 64 * KIB), request(CMD_READ, 0, SIZE))
    send(stage, other, reads(1))
    assert (waits.session.requests, other.session.requests) == (1, 0)
    waits.line.reset = True
    stage.serve(waits, alone=True)  # before its place is due
    stage.settle()
    assert waits.over
    assert waits.session.number not in stage.clients
    again = stage.attach(style=0)
    wait(stage, 2 * SPAN)
    send(stage, again, reads(1))
    assert (other.session.requests, again.session.requests) == (0, 1), "the 8 MiB that nobody read are not waited for"


def test_who_waited_and_how_long_is_counted(stage: Stage) -> None:
    limit(stage, iops=1, iops_burst=2)
    client = stage.attach(style=0)
    send(stage, client, reads(4))
    tally = stage.tallies[client.session.number]
    assert tally.throttled() == (0, 0)
    wait(stage, SPAN)
    wait(stage, SPAN)
    requests, nanoseconds = tally.throttled()
    assert requests == 2
    assert 2 * SPAN <= nanoseconds < 3 * SPAN


def test_a_session_that_waits_is_read_until_its_inbox_is_full(stage: Stage) -> None:
    """A peer that floods what waits is stopped by its own socket, and budgets stay what they are."""
    limit(stage, iops=1, iops_burst=1)
    client = stage.attach(style=0)
    client.send(reads(100_000))
    for _ in range(100):
        serve(stage.desk, client.session)
        stage.desk.turn()
    assert client.line.incoming, "not all of it is taken"
    assert client.line.watched == 0
    assert stage.plane.budget.used < MIB


@pytest.mark.parametrize("burst", [1 << 40, (1 << 51) - 1])
def test_a_burst_is_a_days_at_most_however_long_it_takes_to_come_back(burst: int) -> None:
    """Nanoseconds until then may be more than fit a number: the smallest limits, and the largest bursts, are taken."""
    throttle = Throttle()
    throttle.limit((1, burst), (1, burst))
    throttle.limit((0, 0), (0, 0))
