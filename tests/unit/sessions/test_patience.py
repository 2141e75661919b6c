"""How a thread waits, asleep, with a nap first or looking: the way that its clients are served sooner by, by trying."""

from __future__ import annotations

from collections import Counter

import pytest

from nbdzram.sessions.rehearsal import Waits

MICROSECOND = US = 1_000
ROUND = 256  # waits that are judged together
WARM_UP = 8 * ROUND  # until both ways were tried
LONG = 750 * ROUND
NAP = 15 * MICROSECOND
BARRED = 20_000 * MICROSECOND
BARRED_TIMES = 16
A_SLICE = 3_000 * MICROSECOND  # that a busy neighbour has the processor for
FEWEST_ROUNDS_OF_WAITS = 4 * ROUND


SPARED = {"sleep": (8 * US, 2, 8 * US), "nap": (NAP, 4, 12 * US), "look": (3 * US, 1, 5 * US)}  # 8, 6.75, 8 us each
NO_SLOWER = {**SPARED, "nap": (NAP, 2, US)}
A_LITTLE_SLOWER = {**SPARED, "nap": (NAP, 2, 15 * US // 10)}
SLOWER = {**SPARED, "nap": (NAP, 2, 3 * US)}
NAPS = 300  # rounds, far more than a warm-up


def ways_of(waits: Waits, rounds: int, **paces: tuple[int, int, int]) -> Counter[str]:
    """Play rounds of waits, each way of which takes its (nanoseconds waited, requests then, work): how often which."""
    taken: Counter[str] = Counter()
    for _ in range(rounds * ROUND):
        way = waits.way()
        waited, served, work = paces[way]
        waits.waited(waited, way=way, served=served, work=work)
        taken[way] += 1
    return taken


def looks_of(waits: Waits, count: int, *, asleep: int, awake: int) -> int:
    """Play `count` requests that come after so many nanoseconds; how often the thread looked."""
    looked = 0
    for _ in range(count):
        way = waits.way()
        looked += way == "look"
        waits.waited({"look": awake, "sleep": asleep, "nap": NAP + asleep}[way], way=way)
    return looked


def test_a_thread_looks_where_being_woken_is_dear() -> None:
    waits = Waits()
    looks_of(waits, WARM_UP, asleep=40 * MICROSECOND, awake=12 * MICROSECOND)
    assert looks_of(waits, LONG, asleep=40 * MICROSECOND, awake=12 * MICROSECOND) > LONG * 9 // 10


def test_a_thread_sleeps_where_looking_is_no_gain_and_tries_ever_more_rarely() -> None:
    waits = Waits()
    first = looks_of(waits, WARM_UP, asleep=5 * MICROSECOND, awake=30 * MICROSECOND)
    assert first == ROUND + 1, "looking was not tried once"  # one has what sleep had left, and is of no lap
    assert looks_of(waits, LONG, asleep=5 * MICROSECOND, awake=30 * MICROSECOND) < LONG // 100


def test_a_small_gain_is_not_worth_a_processor() -> None:
    waits = Waits()
    looks_of(waits, WARM_UP, asleep=20 * MICROSECOND, awake=19 * MICROSECOND)
    assert looks_of(waits, LONG, asleep=20 * MICROSECOND, awake=19 * MICROSECOND) < LONG // 100


def test_one_lap_that_something_else_made_long_says_nothing_against_its_way() -> None:
    """Whatever else a machine does: of the laps of a round the quickest counts."""
    waits = Waits()
    for number in range(LONG):
        if waits.way() == "look":
            waits.waited(12 * MICROSECOND, way="look", work=10_000 * MICROSECOND if number % ROUND == ROUND - 1 else 0)
        else:
            waits.waited(40 * MICROSECOND)
    assert waits.way() == "look"


def test_nobody_looks_for_a_client_that_takes_its_time() -> None:
    waits = Waits()
    assert looks_of(waits, LONG, asleep=1000 * MICROSECOND, awake=990 * MICROSECOND) == 0


def test_a_client_that_becomes_slow_is_looked_for_no_longer() -> None:
    waits = Waits()
    looks_of(waits, WARM_UP, asleep=40 * MICROSECOND, awake=12 * MICROSECOND)
    assert waits.way() == "look"
    assert looks_of(waits, LONG, asleep=1040 * MICROSECOND, awake=1040 * MICROSECOND) < 2 * FEWEST_ROUNDS_OF_WAITS


def test_nobody_looks_again_for_a_client_that_was_quick_once() -> None:
    waits = Waits()
    looks_of(waits, WARM_UP, asleep=40 * MICROSECOND, awake=12 * MICROSECOND)
    waits.bar(A_SLICE)
    assert looks_of(waits, 2 * ROUND, asleep=1000 * MICROSECOND, awake=990 * MICROSECOND) == 0


def test_requests_that_come_several_at_a_time_are_judged_by_how_many_come_in_what_time() -> None:
    """Awake, a thread has fewer at a time, and is there sooner for each."""
    waits = Waits()
    paces = {"sleep": (60 * US, 8, 24 * US), "nap": (75 * US, 8, 24 * US), "look": (5 * US, 2, 6 * US)}
    ways_of(waits, 8, **paces)
    assert waits.way() == "look"


def test_a_thread_looks_for_no_clients_that_are_as_fast_either_way() -> None:
    """They have their own pace: looking makes the batches smaller, and nothing sooner."""
    paces = {"sleep": (80 * US, 8, 24 * US), "nap": (80 * US, 8, 24 * US), "look": (10 * US, 1, 3 * US)}
    assert ways_of(Waits(), NAPS, **paces)["look"] < NAPS * ROUND // 20


def test_what_keeps_a_thread_from_looking_says_nothing_against_it() -> None:
    """While its processor is wanted by others it sleeps; looking is as good as it was when that is over."""
    waits = Waits()
    looks_of(waits, WARM_UP, asleep=40 * MICROSECOND, awake=12 * MICROSECOND)
    for _ in range(2 * ROUND):
        assert waits.way() == "look"
        waits.waited(40 * MICROSECOND)
    assert looks_of(waits, LONG, asleep=40 * MICROSECOND, awake=12 * MICROSECOND) > LONG * 9 // 10


def test_what_was_better_and_is_not_is_tried_again_soon() -> None:
    waits = Waits()
    looks_of(waits, LONG, asleep=40 * MICROSECOND, awake=12 * MICROSECOND)
    looks_of(waits, 2 * ROUND, asleep=40 * MICROSECOND, awake=60 * MICROSECOND)
    assert waits.way() == "sleep"
    assert looks_of(waits, 40 * ROUND, asleep=40 * MICROSECOND, awake=12 * MICROSECOND) > 20 * ROUND


def test_a_processor_that_others_want_is_left_to_them() -> None:
    waits = Waits()
    looks_of(waits, WARM_UP, asleep=40 * MICROSECOND, awake=12 * MICROSECOND)
    waits.bar(A_SLICE)
    barred_from = waits.now
    while waits.now < barred_from + BARRED - 50 * MICROSECOND:
        waits.waited(40 * MICROSECOND)
        assert waits.way() == "sleep"
    waits.passes(50 * MICROSECOND)
    assert waits.way() == "look"


def test_who_had_our_processor_for_a_moment_has_it_for_a_few_more_and_nothing_is_learnt_of_it() -> None:
    waits, looked = Waits(), 0
    looks_of(waits, WARM_UP, asleep=40 * MICROSECOND, awake=12 * MICROSECOND)
    for _ in range(1000):
        waits.bar(60 * MICROSECOND)
        waits.passes(BARRED_TIMES * 60 * MICROSECOND - 1)
        barred = waits.way()
        assert barred != "look"
        waits.waited(40 * MICROSECOND, way=barred)
        looked += looks_of(waits, 20, asleep=40 * MICROSECOND, awake=12 * MICROSECOND)
    assert looked > 1000 * 20 * 9 // 10


def test_a_thread_naps_where_requests_follow_each_other_sooner_so() -> None:
    assert ways_of(Waits(), NAPS, **SPARED)["nap"] > 9 * NAPS * ROUND // 10


def test_a_nap_is_taken_where_it_makes_nothing_slower_for_it_spares_a_processor() -> None:
    assert ways_of(Waits(), NAPS, **NO_SLOWER)["nap"] > 9 * NAPS * ROUND // 10


def test_no_nap_where_it_makes_clients_wait() -> None:
    """A client with few requests under way has none to send meanwhile."""
    assert ways_of(Waits(), NAPS, **SLOWER)["nap"] < NAPS * ROUND // 20


def test_a_nap_that_becomes_a_little_slower_is_kept_and_not_begun() -> None:
    """Else noise would have each way tried again and again."""
    waits = Waits()
    assert ways_of(waits, NAPS, **A_LITTLE_SLOWER)["nap"] < NAPS * ROUND // 20
    waits = Waits()
    ways_of(waits, NAPS, **NO_SLOWER)
    assert ways_of(waits, NAPS, **A_LITTLE_SLOWER)["nap"] > 9 * NAPS * ROUND // 10


def test_no_nap_is_tried_where_requests_come_singly_and_far_apart() -> None:
    """A client that has its own pace is as fast either way, and would only wait for each answer."""
    far = {"sleep": (33 * US, 1, 3 * US), "nap": (33 * US, 1, 3 * US), "look": (33 * US, 1, 3 * US)}
    assert ways_of(Waits(), NAPS, **far)["nap"] == 0


def test_a_nap_that_brings_one_request_is_not_kept_for_its_pace() -> None:
    one = {"sleep": (12 * US, 1, 8 * US), "nap": (NAP + US, 1, 3 * US), "look": (12 * US, 1, 8 * US)}
    assert ways_of(Waits(), NAPS, **one)["nap"] < NAPS * ROUND // 20


def test_naps_end_when_requests_come_far_apart() -> None:
    waits = Waits()
    ways_of(waits, NAPS, **SPARED)
    assert waits.way() == "nap"
    far = dict.fromkeys(SPARED, (33 * US, 1, 3 * US))
    assert ways_of(waits, NAPS, **far)["nap"] <= FEWEST_ROUNDS_OF_WAITS


def test_laps_that_something_else_made_long_rule_no_nap_out() -> None:
    waits = Waits()
    ways_of(waits, NAPS, **SPARED)
    for number in range(10 * ROUND):
        assert waits.way() == "nap"
        waits.waited(5_000 * US if number % ROUND == 0 else NAP, way="nap", served=4, work=12 * US)


def test_looking_has_to_be_quicker_than_naps_too() -> None:
    """It takes a processor, and a nap spares some of one."""
    little = {**SPARED, "look": (2 * US, 1, 4 * US)}  # 6 us, where a nap takes 6.75
    assert ways_of(Waits(), NAPS, **little)["look"] < NAPS * ROUND // 20
    much = {**SPARED, "look": (2 * US, 1, 3 * US)}
    assert ways_of(Waits(), NAPS, **much)["look"] > 9 * NAPS * ROUND // 10


def test_naps_are_left_for_looks_when_a_client_begins_to_take_turns_with_its_thread() -> None:
    waits = Waits()
    ways_of(waits, NAPS, **SPARED)
    turns = {"sleep": (25 * US, 1, 3 * US), "nap": (28 * US, 1, 3 * US), "look": (5 * US, 1, 3 * US)}
    assert ways_of(waits, NAPS, **turns)["look"] > NAPS * ROUND // 2


def refused(waits: Waits, rounds: int, *, kept_from_looking: bool, bar_each: int = 0, stolen: int = 0) -> Counter[str]:
    """As `ways_of` SPARED, by a thread that may not look, or is disturbed at it."""
    taken: Counter[str] = Counter()
    for _ in range(rounds * ROUND):
        way = waits.way()
        taken[way] += 1
        if way == "look" and bar_each and taken[way] % bar_each == 0:
            waits.bar(stolen)
        way = "sleep" if way == "look" and kept_from_looking else way
        waited, served, work = SPARED[way]
        waits.waited(waited, way=way, served=served, work=work)
    return taken


def test_naps_go_on_where_a_thread_may_never_look() -> None:
    """One processor, or another thread that looks: a trial that cannot be made is over, and in vain."""
    assert refused(Waits(), NAPS, kept_from_looking=True)["nap"] > 9 * NAPS * ROUND // 10


@pytest.mark.parametrize("stolen", [60 * MICROSECOND, A_SLICE])
@pytest.mark.parametrize("each", [1, 10, 100])
def test_naps_go_on_where_each_trial_of_looking_is_disturbed(each: int, stolen: int) -> None:
    ways = refused(Waits(), NAPS, kept_from_looking=False, bar_each=each, stolen=stolen)
    assert ways["nap"] > 9 * NAPS * ROUND // 10


SLOW = {"sleep": (1000 * US, 1, US), "nap": (1015 * US, 1, US), "look": (1000 * US, 1, US)}


@pytest.mark.parametrize("each", [2, 10, 63])
@pytest.mark.parametrize("why", ["another thread looks", "others have its processor"])
def test_who_is_kept_from_looking_now_and_then_still_looks_for_no_clients_that_become_slow(why: str, each: int) -> None:
    waits, looks = Waits(), 0
    looks_of(waits, WARM_UP, asleep=40 * US, awake=12 * US)
    assert waits.way() == "look"
    for number in range(NAPS * ROUND):
        way = waits.way()
        looks += way == "look"
        if way == "look" and number % each == 0:
            if why == "another thread looks":
                way = "sleep"
            else:
                waits.bar(60 * US)
        waited, served, work = SLOW[way]
        waits.waited(waited, way=way, served=served, work=work)
    assert looks < 4 * ROUND


def test_a_look_is_worth_what_it_was_though_every_other_one_may_not_be() -> None:
    waits, looks = Waits(), 0
    looks_of(waits, WARM_UP, asleep=40 * US, awake=12 * US)
    for _ in range(NAPS * ROUND // 2):
        looks += looks_of(waits, 1, asleep=40 * US, awake=12 * US)
        waits.waited(40 * US, way="sleep" if waits.way() == "look" else waits.way())
    assert looks > NAPS * ROUND // 2 * 9 // 10


def test_who_looked_and_may_look_no_more_takes_naps_where_they_are_better() -> None:
    waits = Waits()
    looks_of(waits, WARM_UP, asleep=40 * US, awake=3 * US)  # less than all of SPARED
    assert waits.way() == "look"
    assert refused(waits, NAPS, kept_from_looking=True)["nap"] > 8 * NAPS * ROUND // 10


def test_what_is_paused_in_a_trial_goes_on_with_what_was_better() -> None:
    """A client at its limit: a trial that was cut off is due later, not at once and so for ever."""
    waits, taken = Waits(), Counter[str]()
    for number in range(NAPS * ROUND):
        way = waits.way()
        if number % (3 * ROUND) == 0:
            waits.pause()
            way = "sleep"
        waited, served, work = SPARED[way]
        waits.waited(waited, way=way, served=served, work=work)
        taken[way] += 1
    assert taken["nap"] > 4 * NAPS * ROUND // 10


def test_looks_that_bring_nothing_rule_no_nap_out() -> None:
    disturbing = {**SPARED, "look": (20 * US, 1, 5 * US)}
    assert ways_of(Waits(), NAPS, **disturbing)["nap"] > 9 * NAPS * ROUND // 10


@pytest.mark.parametrize("way", ["nap", "look"])
def test_a_burst_keeps_no_way_that_is_wrong_for_the_most(way: str) -> None:
    """A quarter of requests in a deep burst, the rest one at a time, or slowly."""
    singly = {"sleep": (5 * US, 1, 3 * US), "nap": (NAP + US, 1, 3 * US), "look": (6 * US, 1, 3 * US)}
    slowly = {"sleep": (1000 * US, 1, US), "nap": (1015 * US, 1, US), "look": (1000 * US, 1, US)}
    awake = {"sleep": (40 * US, 1, US), "nap": (55 * US, 1, US), "look": (12 * US, 1, US)}
    burst, rest = (SPARED, singly) if way == "nap" else (awake, slowly)
    waits, taken = Waits(), Counter[str]()
    for number in range(NAPS * ROUND):
        taken[waits.way()] += 1
        waited, served, work = (burst if number % ROUND < ROUND // 4 else rest)[waits.way()]
        waits.waited(waited, way=waits.way(), served=served, work=work)
    assert taken[way] < NAPS * ROUND // 10


def test_naps_behind_which_requests_come_are_none() -> None:
    """Clients with a pace of their own, in bursts: as quick either way, and a nap is one waking more."""
    waits, naps = Waits(), 0
    for _ in range(NAPS * ROUND):
        way = waits.way()
        naps += way == "nap"
        waits.waited(80 * US, way=way, served=8, work=20 * US, vain=way == "nap")
    assert naps < NAPS * ROUND // 20


def test_an_equal_pace_is_no_slower_whatever_its_last_digits() -> None:
    odd = {"sleep": (8 * US + 15, 1, 5 * US), "nap": (NAP, 2, 11 * US + 30), "look": (8 * US, 1, 5 * US)}
    assert ways_of(Waits(), NAPS, **odd)["nap"] > 9 * NAPS * ROUND // 10


def test_looking_is_held_against_the_better_of_the_two() -> None:
    """Naps that are kept though they are a little slower do not make it easier."""
    waits = Waits()
    ways_of(waits, NAPS, **NO_SLOWER)
    # 7.1 us: an eighth less than naps take, and not than sleep.
    close = {**A_LITTLE_SLOWER, "look": (3 * US, 1, 4 * US + 100)}
    assert ways_of(waits, NAPS, **close)["nap"] > 9 * NAPS * ROUND // 10
