"""What happened a second, from two statuses of one server."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nbdzram.rates import Rates, between, quantile
from nbdzram.status import OperationStatus, ServerStatus
from tests.unit.records import EXPORT, SERVER

BOUNDS = (1e-6, 2e-6, 4e-6)


def status(seconds: float, **operations: OperationStatus) -> ServerStatus:
    export = replace(EXPORT, operations=operations)
    return replace(SERVER, uptime_seconds=seconds, latency_bounds_seconds=BOUNDS, exports=(export,))


def operation(requests: int, size: int, counts: tuple[int, ...]) -> OperationStatus:
    return OperationStatus(requests=requests, bytes=size, errors={}, latency_counts=counts, latency_sum_seconds=0.0)


def test_traffic_is_the_difference_over_the_time_between() -> None:
    before = status(10.0, read=operation(10, 1000, (10, 0, 0, 0)))
    after = status(12.0, read=operation(30, 5000, (10, 20, 0, 0)), trim=operation(2, 1 << 40, (0, 0, 0, 2)))
    everything, each = between(before, after)
    assert everything == each["disk"]
    assert (everything.read_bytes, everything.write_bytes, everything.requests) == (2000.0, 0.0, 11.0)
    assert everything.median_seconds == pytest.approx(1.5e-6)  # half way through the bucket of 1 to 2 us


def test_a_server_that_began_anew_has_no_rates_yet() -> None:
    before = status(100.0, read=operation(1000, 1, (1000, 0, 0, 0)))
    assert between(before, replace(status(5.0), started_at=SERVER.started_at + 200)) == (Rates(), {})
    longer = status(300.0, read=operation(2000, 2, (2000, 0, 0, 0)))  # than the one before was when it was looked at
    assert between(before, replace(longer, started_at=SERVER.started_at + 200)) == (Rates(), {})


def test_an_export_made_again_is_never_told_below_zero() -> None:
    before = status(10.0, read=operation(1000, 9999, (1000, 0, 0, 0)))
    everything, _ = between(before, status(11.0, read=operation(1, 10, (1, 0, 0, 0))))
    assert everything == Rates()


@pytest.mark.parametrize(
    "again",
    [
        operation(9, 99999, (9, 0, 0, 0)),
        operation(11, 10, (11, 0, 0, 0)),
        operation(11, 99999, (1, 10, 0, 0)),
        operation(11, 99999, (11, 0, 0)),  # another version goes on, with other buckets
    ],
)
def test_an_export_made_again_is_told_by_whatever_fell(again: OperationStatus) -> None:
    before = status(10.0, read=operation(10, 9999, (10, 0, 0, 0)))
    assert between(before, status(11.0, read=again)) == (Rates(), {})
    assert between(before, status(11.0, write=again)) == (Rates(), {})


def test_an_export_made_again_hides_nothing_of_what_others_did() -> None:
    """It did less than the one before it had done: the others' requests made up for that, and all was told as quiet."""

    def two(seconds: float, again: OperationStatus, other: OperationStatus) -> ServerStatus:
        first = status(seconds, read=again)
        return replace(first, exports=(*first.exports, replace(EXPORT, name="other", operations={"read": other})))

    before = two(10.0, operation(1000, 9999, (1000, 0, 0, 0)), operation(10, 100, (10, 0, 0, 0)))
    after = two(12.0, operation(1, 10, (1, 0, 0, 0)), operation(50, 900, (10, 40, 0, 0)))
    everything, each = between(before, after)
    assert everything == each["other"]
    assert (everything.requests, everything.read_bytes) == (20.0, 400.0)
    assert everything.median_seconds == pytest.approx(1.5e-6)
    assert each.keys() == {"other"}


def test_a_new_export_waits_for_its_second_look() -> None:
    before, after = replace(status(10.0), exports=()), status(11.0, read=operation(5, 5, (5, 0, 0, 0)))
    assert between(before, after) == (Rates(), {})


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ((0, 0, 0, 0), 0.5, 0.0),
        ((4, 0, 0, 0), 0.5, 0.5e-6),
        ((0, 0, 10, 0), 1.0, 4e-6),
        ((0, 0, 0, 3), 0.5, 4e-6),  # above every bound: the last bound is all that is known
        ((98, 0, 2, 0), 0.99, 3e-6),
    ],
)
def test_a_quantile_is_interpolated_in_its_bucket(counts: tuple[int, ...], share: float, expected: float) -> None:
    assert quantile(counts, BOUNDS, share) == pytest.approx(expected)
