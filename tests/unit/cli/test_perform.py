"""What a run tells when it is done."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nbdzram.cli import compact, fold, perform, recompress
from nbdzram.cli.perform import _leave, describe
from nbdzram.server.runs import ENDS
from nbdzram.status import RunReport
from tests.unit.records import MIB, POOL_STATS, REPORT, RUNNING, WAITING


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


def test_figures_are_told_as_they_were_and_as_they_are() -> None:
    (line,) = [line for line in describe(report("fold", 5 * MIB)) if "110M" in line]
    assert line.split()[-3:] == ["110M", "100M", "-10M"]


def test_a_dry_run_says_nothing_of_what_clients_did_meanwhile() -> None:
    assert len(list(describe(replace(report("fold", 30 * MIB), dry_run=True)))) == 1


def test_a_run_has_ended_here_as_where_it_runs() -> None:
    assert set(ENDS) == perform.ENDED


def test_who_stops_waiting_is_told_what_goes_on_and_what_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    _leave(RUNNING, None, None)
    _leave(WAITING, None, Path("/run/my socket"))
    going, waiting = capsys.readouterr().err.strip().split("\n\n")
    assert f"run {RUNNING.number} ({RUNNING.kind} of the pool {RUNNING.pool}) goes on in the server" in going
    assert f"`nbdzram runs cancel {RUNNING.number}` ends it" in going
    assert f"run {WAITING.number} ({WAITING.kind} of the pool {WAITING.pool}) waits in the server" in waiting
    assert f"`nbdzram runs cancel {WAITING.number} --control '/run/my socket'` ends it" in waiting


@pytest.mark.parametrize("terminal", ["stdin", "stderr"])
def test_nobody_is_asked_whose_answer_would_not_be_his_or_who_would_not_see_the_question(
    terminal: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(getattr(sys, terminal), "isatty", lambda: True)
    monkeypatch.setattr(perform, "_ask", lambda *_, **__: pytest.fail("nobody is there"))
    _leave(RUNNING, None, None)
    assert f"`nbdzram runs cancel {RUNNING.number}` ends it" in capsys.readouterr().err


@pytest.mark.parametrize("module", [compact, fold, recompress], ids=lambda module: module.__name__)
def test_a_run_is_asked_for_as_it_was_said(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "perform", lambda kind, **given: asked.append({"kind": kind, **given}))
    CliRunner().invoke(module.command, ["--pool", "fast", "--cpu", "20", "--json"], catch_exceptions=False)
    CliRunner().invoke(module.command, [], catch_exceptions=False)
    for given, pool, cpu, as_json in zip(asked, ("fast", None), (20, 100), (True, False), strict=True):
        assert given["kind"] == module.__name__.rpartition(".")[2]
        assert (given["pool"], given["cpu_percent"], given["as_json"]) == (pool, cpu, as_json)
