"""What a run tells when it is done."""

from __future__ import annotations

from dataclasses import replace

from nbdzram.cli.perform import describe
from nbdzram.status import RunReport
from tests.unit.records import MIB, POOL_STATS, REPORT


def report(kind: str, gaps: int) -> RunReport:
    """A run that changed something and left `gaps` bytes of fragmentation in 100 MiB."""
    after = replace(POOL_STATS, mem_used_total=100 * MIB, compr_data_size=100 * MIB - gaps)
    return RunReport(
        kind=kind,
        pool="default",
        dry_run=False,
        reason="asked",
        result={},
        seconds=1.0,
        cpu_seconds=1.0,
        before=POOL_STATS,
        after=after,
    )


def test_a_run_is_one_sentence_of_what_came_of_it() -> None:
    told = next(describe(replace(REPORT, result=REPORT.result | {"objects_seen": 100, "dictionary_bytes": 0})))
    assert told == "fold of pool default: objects merged 100, bytes freed 293K, pages returned 70 in 0.25 s"
    told = next(describe(replace(REPORT, result={"dictionary_bytes": 65536}, dry_run=True)))
    assert told == "fold of pool default: dictionary bytes 64K in 0.25 s (dry run: nothing was changed)"


def test_gaps_that_a_fold_leaves_are_told_with_the_command_that_gives_them_back() -> None:
    assert list(describe(report("fold", 30 * MIB)))[-1] == (
        "30M of the memory used are gaps: `nbdzram compact` gives most of them back"
    )


def test_small_gaps_and_a_compaction_itself_need_no_hint() -> None:
    assert not any("nbdzram compact" in line for line in describe(report("fold", 5 * MIB)))
    assert not any("nbdzram compact" in line for line in describe(report("compact", 30 * MIB)))
