"""Whether a thread looks again before it sleeps: the way that its clients are served sooner by, found by trying."""

from __future__ import annotations

from nbdzram.sessions.rehearsal import Waits

MICROSECOND = 1_000
ROUND = 256  # waits that are judged together
WARM_UP = 8 * ROUND  # until both ways were tried
LONG = 750 * ROUND
BARRED = 20_000 * MICROSECOND
FEWEST_ROUNDS_OF_WAITS = 4 * ROUND


def looks_of(waits: Waits, count: int, *, asleep: int, awake: int) -> int:
    """Play `count` requests that come after so many nanoseconds; how often the thread looked."""
    looked = 0
    for _ in range(count):
        if waits.looks():
            looked += 1
            waits.waited(awake, looked=True)
        else:
            waits.waited(asleep)
    return looked


def test_a_thread_looks_where_being_woken_is_dear() -> None:
    waits = Waits()
    looks_of(waits, WARM_UP, asleep=40 * MICROSECOND, awake=12 * MICROSECOND)
    assert looks_of(waits, LONG, asleep=40 * MICROSECOND, awake=12 * MICROSECOND) > LONG * 9 // 10


def test_a_thread_sleeps_where_looking_is_no_gain_and_tries_ever_more_rarely() -> None:
    waits = Waits()
    first = looks_of(waits, WARM_UP, asleep=5 * MICROSECOND, awake=30 * MICROSECOND)
    assert first == ROUND, "looking was not tried once"
    assert looks_of(waits, LONG, asleep=5 * MICROSECOND, awake=30 * MICROSECOND) < LONG // 100


def test_a_small_gain_is_not_worth_a_processor() -> None:
    waits = Waits()
    looks_of(waits, WARM_UP, asleep=20 * MICROSECOND, awake=19 * MICROSECOND)
    assert looks_of(waits, LONG, asleep=20 * MICROSECOND, awake=19 * MICROSECOND) < LONG // 100


def test_one_lap_that_something_else_made_long_says_nothing_against_its_way() -> None:
    """Whatever else a machine does: of the laps of a round the quickest counts."""
    waits = Waits()
    for number in range(LONG):
        if waits.looks():
            waits.waited(12 * MICROSECOND, looked=True, work=10_000 * MICROSECOND if number % ROUND == ROUND - 1 else 0)
        else:
            waits.waited(40 * MICROSECOND)
    assert waits.looks()


def test_nobody_looks_for_a_client_that_takes_its_time() -> None:
    waits = Waits()
    assert looks_of(waits, LONG, asleep=1000 * MICROSECOND, awake=990 * MICROSECOND) == 0


def test_a_client_that_becomes_slow_is_looked_for_no_longer() -> None:
    waits = Waits()
    looks_of(waits, WARM_UP, asleep=40 * MICROSECOND, awake=12 * MICROSECOND)
    assert waits.looks()
    assert looks_of(waits, LONG, asleep=1040 * MICROSECOND, awake=1040 * MICROSECOND) < 2 * FEWEST_ROUNDS_OF_WAITS


def test_nobody_looks_again_for_a_client_that_was_quick_once() -> None:
    waits = Waits()
    looks_of(waits, WARM_UP, asleep=40 * MICROSECOND, awake=12 * MICROSECOND)
    waits.bar()
    assert looks_of(waits, 2 * ROUND, asleep=1000 * MICROSECOND, awake=990 * MICROSECOND) == 0


def test_requests_that_come_several_at_a_time_are_judged_by_how_many_come_in_what_time() -> None:
    """Awake, a thread has fewer at a time, and is there sooner for each."""
    waits = Waits()
    for _ in range(WARM_UP):
        if waits.looks():
            waits.waited(5 * MICROSECOND, looked=True, served=2, work=6 * MICROSECOND)
        else:
            waits.waited(60 * MICROSECOND, served=8, work=24 * MICROSECOND)
    assert waits.looks()


def test_a_thread_sleeps_while_its_clients_are_as_fast_either_way() -> None:
    """They have their own pace: looking makes the batches smaller, and nothing sooner."""
    waits = Waits()
    for _ in range(LONG):
        if waits.looks():
            waits.waited(10 * MICROSECOND, looked=True, served=1, work=3 * MICROSECOND)
        else:
            waits.waited(80 * MICROSECOND, served=8, work=24 * MICROSECOND)
    assert not waits.looks()


def test_what_keeps_a_thread_from_looking_says_nothing_against_it() -> None:
    """While its processor is wanted by others it sleeps; looking is as good as it was when that is over."""
    waits = Waits()
    looks_of(waits, WARM_UP, asleep=40 * MICROSECOND, awake=12 * MICROSECOND)
    for _ in range(2 * ROUND):
        assert waits.looks()
        waits.waited(40 * MICROSECOND)
    assert looks_of(waits, LONG, asleep=40 * MICROSECOND, awake=12 * MICROSECOND) > LONG * 9 // 10


def test_what_was_better_and_is_not_is_tried_again_soon() -> None:
    waits = Waits()
    looks_of(waits, LONG, asleep=40 * MICROSECOND, awake=12 * MICROSECOND)
    looks_of(waits, 2 * ROUND, asleep=40 * MICROSECOND, awake=60 * MICROSECOND)
    assert not waits.looks()
    assert looks_of(waits, 40 * ROUND, asleep=40 * MICROSECOND, awake=12 * MICROSECOND) > 20 * ROUND


def test_a_processor_that_others_want_is_left_to_them() -> None:
    waits = Waits()
    looks_of(waits, WARM_UP, asleep=40 * MICROSECOND, awake=12 * MICROSECOND)
    waits.bar()
    barred_from = waits.now
    while waits.now < barred_from + BARRED - 50 * MICROSECOND:
        waits.waited(40 * MICROSECOND)
        assert not waits.looks()
    waits.passes(50 * MICROSECOND)
    assert waits.looks()
