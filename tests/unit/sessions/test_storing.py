"""Who stores large WRITEs, workers or the session's own thread: the way that is quicker, found by trying."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nbdzram.ready import readable
from nbdzram.sessions.rehearsal import Stores, delay, let_pause
from tests.support.rehearsal import Client, Stage
from tests.wire import CMD_WRITE, request

KIB, MIB = 1 << 10, 1 << 20
LENGTH = 256 * KIB
MILLISECOND = 1_000_000
QUICK, SLOW = MILLISECOND // 4, MILLISECOND // 2
LAP = 8 * MIB
ROUND = 4 * LAP // LENGTH  # large WRITEs that are judged together
WARM_UP = 2 * ROUND  # until both ways were tried
LONG = 500 * ROUND
SOME = 100 * ROUND


def beside_of(stores: Stores, count: int, *, here: int, beside: int, pause: int = 0, idle: bool = True) -> int:
    """How many of so many the workers store."""
    return sum(stores.store(LENGTH, here=here, beside=beside, pause=pause, idle=idle) for _ in range(count))


def test_the_first_are_the_workers_and_both_ways_are_tried() -> None:
    stores = Stores()
    assert beside_of(stores, ROUND, here=QUICK, beside=QUICK) == ROUND
    assert beside_of(stores, ROUND, here=QUICK, beside=QUICK) == 0


def test_workers_store_where_that_is_quicker() -> None:
    stores = Stores()
    beside_of(stores, WARM_UP, here=SLOW, beside=QUICK)
    assert beside_of(stores, LONG, here=SLOW, beside=QUICK) > LONG * 9 // 10


def test_a_thread_stores_itself_where_a_hop_is_no_gain_and_tries_ever_more_rarely() -> None:
    stores = Stores()
    beside_of(stores, WARM_UP, here=QUICK, beside=SLOW)
    assert beside_of(stores, LONG, here=QUICK, beside=SLOW) < LONG // 40


def test_a_small_gain_is_not_worth_a_hop() -> None:
    stores = Stores()
    beside_of(stores, WARM_UP, here=QUICK, beside=QUICK * 19 // 20)
    assert beside_of(stores, LONG, here=QUICK, beside=QUICK * 19 // 20) < LONG // 40


def test_what_became_quicker_is_found_by_the_next_trial() -> None:
    stores = Stores()
    beside_of(stores, WARM_UP, here=QUICK, beside=SLOW)
    beside_of(stores, 8 * ROUND, here=SLOW, beside=QUICK)
    assert beside_of(stores, 40 * ROUND, here=SLOW, beside=QUICK) > 30 * ROUND


def test_no_hop_without_a_processor_for_it_and_nothing_is_learnt_then() -> None:
    stores = Stores()
    assert beside_of(stores, 3 * WARM_UP, here=QUICK, beside=SLOW, idle=False) == 0
    assert beside_of(stores, ROUND, here=SLOW, beside=QUICK) == ROUND, "what was done here counted against the workers"


@pytest.mark.parametrize("each", [2, ROUND // 4, 3 * ROUND // 8])
def test_workers_that_are_busy_now_and_then_are_left_where_they_are_slower(each: int) -> None:
    stores = Stores()
    hops = sum(stores.store(LENGTH, here=QUICK, beside=SLOW, idle=number % each != 0) for number in range(SOME))
    assert hops < SOME // 10


@pytest.mark.parametrize("each", [3, ROUND // 4])
def test_workers_that_are_busy_now_and_then_are_kept_where_they_are_quicker(each: int) -> None:
    stores = Stores()
    hops = sum(stores.store(LENGTH, here=SLOW, beside=QUICK, idle=number % each != 0) for number in range(SOME))
    assert hops > SOME * (each - 1) // each * 8 // 10


def test_what_the_client_waits_before_its_next_counts_for_neither_way() -> None:
    """It waits in one way, by chance, and not in the other."""
    stores = Stores()
    for number in range(2 * WARM_UP):
        stores.store(LAP, here=SLOW, beside=QUICK, pause=1000 * MILLISECOND if number < ROUND else 0)
    assert stores.store(LAP, here=SLOW, beside=QUICK)


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage(64 * MIB, processors=2)
    yield made
    for client in made.clients.values():
        client.line.reset = True
        made.plane.abort(client.session)
    made.close()


def take(stage: Stage, client: Client) -> None:
    """Let the session take all that was sent, and hear nothing of what comes home meanwhile."""
    while client.line.incoming:
        if not readable(stage.desk.fileno(), seconds=0):
            stage.serve(client)
        else:
            stage.desk.turn()


def store(stage: Stage, client: Client, *, delayed: bool) -> bool:
    """One large WRITE, a lap of its own: do workers store it?"""
    content = bytes(range(256)) * (LAP // 256)
    client.send(request(CMD_WRITE, 0, LAP) + content[:MIB])
    take(stage, client)
    if delayed:
        delay(client.session, 2_000 * MILLISECOND)
    client.send(content[MIB:])
    take(stage, client)
    beside = client.session.storing == 1
    stage.settle()
    return beside


@pytest.mark.parametrize("quicker_beside", [False, True])
def test_a_session_learns_of_both_ways(stage: Stage, quicker_beside: bool) -> None:
    client = stage.attach(style=0)
    expected = [True] * 4 + [False] * 4 + [quicker_beside] * 3
    assert [store(stage, client, delayed=way != quicker_beside) for way in expected] == expected


def test_a_client_that_pauses_says_nothing_of_the_way_that_comes_next(stage: Stage) -> None:
    client = stage.attach(style=0)
    expected = [True] * 4 + [False] * 4 + [True] * 3
    seen = []
    for way in expected:
        if way:
            let_pause(client.session, 20_000 * MILLISECOND)
        seen.append(store(stage, client, delayed=not way))
    assert seen == expected
