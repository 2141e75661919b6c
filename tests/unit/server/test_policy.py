"""A pool maintains itself when it pays, and says why it does or does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from nbdzram.config import Trigger
from nbdzram.engine.reports import CheckReport, CompactReport, FoldReport, RecompressReport, Report
from nbdzram.engine.stats import PoolStats
from nbdzram.server.policy import (
    FIRST_BACKOFF_SECONDS,
    LAST_BACKOFF_SECONDS,
    Policy,
    Reason,
    compact_gain,
    fold_gain,
    gained,
    recompress_gain,
)
from tests.unit.records import MIB, POOL_STATS

QUIET = replace(
    POOL_STATS, compr_data_size=100 * MIB, objects=51_200, mem_used_total=110 * MIB, mem_limit=0, fold_pending=0
)
MEAN = QUIET.compr_data_size // QUIET.objects


def auto(gain: Callable[[PoolStats], int] = fold_gain) -> Policy:
    return Policy.new(Trigger.AUTO, 0, gain, now=0.0)


def pending(size: int) -> PoolStats:
    return replace(QUIET, fold_pending=size // MEAN)


def test_recompression_pays_where_much_was_not_tried() -> None:
    resting = replace(QUIET, recompress_untried=50 * MIB)
    assert recompress_gain(resting) == 10 * MIB
    assert auto(recompress_gain).decide(1.0, resting, 0) is Reason.WORTH_IT
    done = replace(QUIET, compr_by_codec={"lz4": 50 * MIB, "zstd": 0, "raw": 9 * MIB}, recompress_untried=0)
    assert auto(recompress_gain).decide(1.0, done, 0) is Reason.NOTHING_NEW


def test_off_never_runs_and_counts_nothing() -> None:
    policy = Policy.new(Trigger.OFF, 0, fold_gain, now=0.0)
    assert policy.decide(1e9, pending(50 * MIB), 0) is None
    assert not policy.decisions


def test_an_interval_runs_when_it_has_passed_whatever_there_is_to_gain() -> None:
    policy = Policy.new(Trigger.INTERVAL, 60, fold_gain, now=100.0)
    assert policy.decide(159.9, QUIET, 0) is Reason.NOT_DUE
    assert policy.decide(160.0, QUIET, 1e6) is Reason.INTERVAL
    policy.learn(165.0, 0, 0)
    assert policy.decide(224.0, QUIET, 0) is Reason.NOT_DUE
    assert policy.decisions == {Reason.NOT_DUE: 2, Reason.INTERVAL: 1}


@pytest.mark.parametrize(
    ("stats", "requests", "reason"),
    [
        (QUIET, 0, Reason.NOTHING_NEW),
        (pending(MIB // 2), 0, Reason.NOT_WORTH_IT),
        (pending(2 * MIB), 0, Reason.WORTH_IT),
        (pending(2 * MIB), 10_000, Reason.CLIENTS_BUSY),
        (pending(20 * MIB), 10_000, Reason.WORTH_IT),
        (replace(pending(MIB // 2), mem_limit=115 * MIB), 10_000, Reason.NEAR_LIMIT),
        (replace(pending(MIB // 2), mem_limit=125 * MIB), 0, Reason.NEAR_LIMIT),  # metadata counts
    ],
)
def test_auto_weighs_gain_against_clients(stats: PoolStats, requests: float, reason: Reason) -> None:
    assert auto().decide(1.0, stats, requests) is reason


def test_auto_backs_off_twice_as_long_while_runs_gain_nothing_and_forgets_it_after_a_good_one() -> None:
    policy, now, pauses = auto(), 0.0, []
    for _ in range(10):
        policy.learn(now, 10 * MIB, 0)
        pauses.append(policy.waits_seconds(now))
        assert policy.decide(now, pending(50 * MIB), 0) is Reason.BACKING_OFF
        now += pauses[-1]
        assert policy.decide(now, pending(50 * MIB), 0) is Reason.WORTH_IT
    assert pauses[:3] == [FIRST_BACKOFF_SECONDS, 2 * FIRST_BACKOFF_SECONDS, 4 * FIRST_BACKOFF_SECONDS]
    assert pauses[-1] == LAST_BACKOFF_SECONDS
    policy.learn(now, 10 * MIB, 9 * MIB)
    assert policy.decide(now, pending(50 * MIB), 0) is Reason.WORTH_IT


def test_a_quarter_of_what_was_expected_is_worth_another_run() -> None:
    policy = auto()
    policy.learn(0.0, 8 * MIB, 2 * MIB)
    assert policy.waits_seconds(0.0) == 0
    policy.learn(0.0, 8 * MIB, 2 * MIB - 1)
    assert policy.waits_seconds(0.0) == FIRST_BACKOFF_SECONDS


def test_compaction_expects_what_zspages_hold_beyond_their_objects() -> None:
    dense = replace(QUIET, mem_used_total=QUIET.compr_data_size + 8 * QUIET.objects)
    assert compact_gain(dense) == 0
    assert compact_gain(replace(dense, mem_used_total=dense.mem_used_total + 30 * MIB)) == 30 * MIB


def test_an_empty_pool_expects_nothing() -> None:
    empty = replace(QUIET, objects=0, compr_data_size=0, mem_used_total=0)
    assert (fold_gain(empty), compact_gain(empty)) == (0, 0)


def recompressed(*, bytes_before: int, bytes_after: int, pages_returned: int) -> RecompressReport:
    return RecompressReport(
        objects_seen=4,
        objects_recompressed=3,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        pages_returned=pages_returned,
        dictionary_bytes=0,
    )


@pytest.mark.parametrize(
    ("report", "freed"),
    [
        (FoldReport(objects_merged=3, bytes_freed=9000, pages_returned=1, comparisons=3), 9000),
        (FoldReport(objects_merged=3, bytes_freed=3000, pages_returned=1, comparisons=3), 4096),
        (CompactReport(objects_moved=3, pages_returned=2), 8192),
        (recompressed(bytes_before=9000, bytes_after=4000, pages_returned=0), 5000),
        (recompressed(bytes_before=9000, bytes_after=4000, pages_returned=2), 8192),
        (CheckReport(objects_checked=3, changing=0), 0),
    ],
    ids=["fold", "fold of little", "compact", "recompress", "recompress and return", "check"],
)
def test_a_run_is_judged_by_what_it_says_that_it_freed(report: Report, freed: int) -> None:
    """And not by the pool before and after: clients write meanwhile."""
    assert gained(report) == freed
