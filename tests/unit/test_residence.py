"""A server that clients swap to stays in memory: locked, ended last, and still giving back what was freed."""

from __future__ import annotations

import os
import random
import re
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from nbdzram import precedence, residence
from nbdzram.cli import diagnosis
from nbdzram.cli.diagnosis import Level, Patient
from nbdzram.config import ServerConfig
from tests.support.programs import require_program
from tests.support.server import START_SECONDS, Nbdzram
from tests.support.takeover import Line, listening

MIB = 1 << 20
STORED = 48 * MIB
MEMALLOC_NOIO = 0x00080000  # PF_MEMALLOC_NOIO, include/linux/sched.h: what PR_SET_IO_FLUSHER sets
FLAGS_FIELD = 6  # of /proc/PID/stat, counted behind the name; proc_pid_stat(5)

SYS_RESOURCE = 24  # capabilities(7)


def may(capability: int) -> bool:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> capability & 1)


pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may lock all that it maps")


def status_of(server: Nbdzram, name: str) -> int:
    """Bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path(f"/proc/{server.pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) << 10


def file_backed(directory: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in directory.glob("*.pool"))


@pytest.mark.parametrize("kept", [False, True], ids=["anonymous", "file"])
def test_locked_memory_is_neither_filled_ahead_nor_kept_when_blocks_are_freed(tmp_path: Path, kept: bool) -> None:
    """Addresses are reserved for all that a pool may hold; and of locked pages the kernel takes back no plain way."""
    state = Path(f"/dev/shm/nbdzram-test-{os.getpid()}") if kept else tmp_path / "state"
    arguments = ["--swap", *(["--state-dir", str(state)] if kept else [])]
    try:
        with Nbdzram(tmp_path, {"disk": "256M"}, arguments=arguments) as server:
            assert status_of(server, "VmLck") > 1 << 30, "the pool's addresses are not locked"
            empty = server.resident_bytes()
            assert empty < 256 * MIB
            noise = random.Random(3)
            with server.client() as client:
                for offset in range(0, STORED, MIB):
                    client.write(offset, noise.randbytes(MIB))
                full = server.resident_bytes()
                assert full > empty + STORED * 3 // 4
                client.trim(0, STORED)
            server.compact()
            assert server.resident_bytes() < full - STORED * 3 // 4
            if kept:
                assert file_backed(state) < STORED // 4
            assert "cannot be locked" not in server.log
            assert "-name disk -swap" in server.log
    finally:
        for file in state.glob("*") if kept and state.exists() else ():
            file.unlink()
        if kept and state.exists():
            state.rmdir()


@pytest.mark.skipif(not may(SYS_RESOURCE), reason="needs CAP_SYS_RESOURCE, which this root lacks")
def test_every_thread_of_it_waits_for_no_pages_that_are_written_back_and_it_is_ended_last(tmp_path: Path) -> None:
    with Nbdzram(tmp_path, {"disk": "4M"}, arguments=["--swap"]) as server:
        with server.client() as client:
            client.write(0, b"a" * MIB)
        assert Path(f"/proc/{server.pid}/oom_score_adj").read_text() == f"{residence.OOM_SCORE}\n"
        stats = [task.read_text() for task in Path(f"/proc/{server.pid}/task").glob("*/stat")]
        flags = [int(stat.rpartition(")")[2].split()[FLAGS_FIELD]) for stat in stats]
        assert len(flags) > 2
        assert all(flag & MEMALLOC_NOIO for flag in flags)


def test_it_is_asked_for_before_there_is_a_thread_that_would_go_without(tmp_path: Path) -> None:
    code = (
        "import os; from nbdzram.cli import serve; from nbdzram.config import ServerConfig as C, UnixAddress as U\n"
        "from pathlib import Path as P\n"
        "serve.stay = lambda **_: print('threads', len(os.listdir('/proc/self/task')), flush=True) or []\n"
        "config = C(swap=True, tcp=(), metrics=None, unix=(U(path=P('nbd.sock')),), control=P('control.sock'))\n"
        "print('status', serve.serve(config, lambda: config, run='true'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path
    )
    assert done.stdout.split() == ["threads", "1", "status", "0"], done.stderr


def test_without_swap_nothing_is_locked(tmp_path: Path) -> None:
    with Nbdzram(tmp_path, {"disk": "4M"}) as server:
        assert status_of(server, "VmLck") == 0


class Powerless(Nbdzram):
    """A server that may not lock more than 64 KiB, nor lower its score, nor be what writes pages back."""

    def __init__(self, directory: Path, exports: Mapping[str, str | int], arguments: Sequence[str]) -> None:
        super().__init__(directory, exports, arguments=arguments)

    def environment(self) -> dict[str, str]:
        if self.command[0] == sys.executable:
            prlimit = require_program("prlimit", package="util-linux")
            setpriv = require_program("setpriv", package="util-linux")
            self.command[:0] = [prlimit, "--memlock=65536:65536", setpriv, "--bounding-set=-ipc_lock,-sys_resource"]
        return super().environment()


def test_what_is_refused_is_a_sentence_each_and_it_serves_all_the_same(tmp_path: Path) -> None:
    """A pool that could not reserve its addresses any more, because some of the memory was locked, would not start."""
    with Powerless(tmp_path, {"disk": "4M"}, ["--swap", "--pool", "other=1G"]) as server:
        with server.client() as client:
            client.write(0, b"a" * MIB)
        said = [line for line in server.log.splitlines() if "--swap:" in line]
        assert status_of(server, "VmLck") == 0
    assert len(said) == 3
    for words in ("RLIMIT_MEMLOCK is 65536 bytes.*LimitMEMLOCK=infinity", "OOMScoreAdjust=-900", "CAP_SYS_RESOURCE"):
        assert any(re.search(words, line) for line in said), said


def test_a_soft_limit_is_raised_to_a_hard_one_that_is_none() -> None:
    limits = [(65536, resource.RLIM_INFINITY)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resource, "getrlimit", lambda _: limits[-1])
        patch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
        assert residence.may_lock() is None
    assert limits[-1] == (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


def test_doctor_says_beforehand_that_memory_cannot_be_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, not_asked = (Patient(ServerConfig(swap=swap), None) for swap in (True, False))
    refusal = residence.Refusal("memory cannot be locked", "RLIMIT_MEMLOCK is 8", "LimitMEMLOCK=infinity")
    monkeypatch.setattr(diagnosis, "may_lock", lambda: refusal)
    monkeypatch.setattr(diagnosis, "may_go_late", lambda: None)
    (found,) = diagnosis.swap(asked)
    assert (found.level, found.remedy) == (Level.WARN, "LimitMEMLOCK=infinity")
    assert "swap = true, but memory cannot be locked" in found.says
    assert [finding.level for finding in diagnosis.swap(not_asked)] == [Level.OK]
    monkeypatch.setattr(diagnosis, "may_lock", lambda: None)
    assert [finding.says for finding in diagnosis.swap(asked)] == ["this user may lock memory, and have it ended last"]
    monkeypatch.setattr(diagnosis, "may_go_late", lambda: residence.Refusal("no score", "no capability", "a unit"))
    (found,) = diagnosis.swap(asked)
    assert (found.level, found.says, found.remedy) == (
        Level.WARN,
        "swap = true, but no score: no capability",
        "a unit",
    )


@pytest.mark.parametrize(
    ("score", "capabilities", "may_be_late"),
    [(0, 0, False), (-899, 0, False), (-900, 0, True), (0, 1 << SYS_RESOURCE, True), (0, ~(1 << SYS_RESOURCE), False)],
)
def test_a_score_is_lowered_by_who_may_or_is_low_already(
    tmp_path: Path, score: int, capabilities: int, may_be_late: bool
) -> None:
    (tmp_path / "oom_score_adj").write_text(f"{score}\n")
    (tmp_path / "status").write_text(f"Name:\tnbdzram\nCapEff:\t{capabilities & (1 << 64) - 1:016x}\n")
    refusal = residence.may_go_late(tmp_path)
    assert refusal is None if may_be_late else "OOMScoreAdjust=-900" in str(refusal)


@pytest.mark.parametrize(("score", "then"), [(0, -900), (-899, -900), (-900, -900), (-1000, -1000)])
def test_a_score_that_is_lower_already_stays(tmp_path: Path, score: int, then: int) -> None:
    file = tmp_path / "oom_score_adj"
    file.write_text(f"{score}\n")
    assert list(residence.go_late(file)) == []
    assert int(file.read_text()) == then


def score_of(pid: int) -> str:
    return Path(f"/proc/{pid}/oom_score_adj").read_text()


@pytest.mark.parametrize("arguments", [[], ["--swap"]], ids=["plain", "swap"])
def test_who_takes_over_goes_first_until_it_serves(tmp_path: Path, arguments: list[str]) -> None:
    """It has nothing to lose before; then it goes as late as it was told to, and so does one that found no server."""
    line = Line(tmp_path, arguments, exports={"disk": "1M"}, in_memory=True)
    score = score_of(line.last.pid)
    told = tmp_path / "new.log"
    with listening(tmp_path / "step") as steps, told.open("w") as log:
        words = ["serve", "--takeover", "-e", "disk=1M", "--control", str(line.control), "--metrics", "off", *arguments]
        command = [sys.executable, "-m", "tests.support.held", "new has opened", str(tmp_path / "step"), *words]
        with subprocess.Popen(command, env=Nbdzram.environment(line.last), stdout=log, stderr=log) as new:
            try:
                with steps.accept()[0]:
                    assert score_of(new.pid) == f"{precedence.FIRST_SCORE}\n"
                assert line.last.process.wait(START_SECONDS) == 0
                assert score_of(new.pid) == score
            finally:
                new.terminate()
                line.last.kill()
    refusals = told.read_text().count("--swap: the score of the OOM killer cannot be lowered")
    assert refusals == (arguments == ["--swap"] and not may(SYS_RESOURCE)), "asked for too early, or never"
    alone = tmp_path / "alone"
    alone.mkdir()
    first = Line(alone, ["--takeover", *arguments], exports={"disk": "1M"}, in_memory=True)
    assert score_of(first.last.pid) == score
    first.last.stop()


def test_a_check_of_the_configuration_goes_first(tmp_path: Path) -> None:
    """It is a process beside the server that may have no memory left, and the first that a unit's reload runs."""
    code = (
        "from pathlib import Path; from nbdzram.cli import serve\n"
        "serve.description = lambda _: [Path('/proc/self/oom_score_adj').read_text()]\n"
        "from nbdzram.__main__ import main; main()"
    )
    command = [sys.executable, "-c", code, "serve", "-e", "d=1M", "--check-config"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[0] == str(precedence.FIRST_SCORE)


def test_a_score_that_cannot_be_raised_is_told_and_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    precedence.go_first(str(tmp_path / "absent" / "oom_score_adj"))()
    assert [record.message for record in caplog.records] == [
        "the score of the OOM killer cannot be raised: No such file or directory"
    ]


def test_a_score_is_set_again_as_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "oom_score_adj"
    file.write_text("-900\n")
    give_back = precedence.go_first(str(file), score=-500)
    assert file.read_text() == "-500\n"
    give_back()
    assert file.read_text() == "-900\n"
    file.unlink()
    give_back()
    assert [record.message for record in caplog.records] == [
        "the score of the OOM killer cannot be set to -900 again: No such file or directory"
    ]


SCORES = "import nbdzram.residence; nbdzram.residence.HELPERS_SCORE = 500; from nbdzram.__main__ import main; main()"


@pytest.mark.parametrize(("score", "has"), [(0, "500"), (700, "700")])
def test_a_program_that_a_server_runs_does_not_go_as_late_as_the_server(tmp_path: Path, score: int, has: str) -> None:
    """It has nothing that would be lost with it; below 0, which takes a capability, a score is as one below 500 here.
    Those that it starts itself inherit it from the first on.
    """
    qemu_img = require_program("qemu-img", package="qemu-utils")
    image, program, scores = tmp_path / "image", tmp_path / "bin" / "qemu-img", tmp_path / "scores"
    image.write_bytes(b"i" * MIB)
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncat /proc/self/oom_score_adj >>{scores}\nexec {qemu_img} "$@"\n')
    program.chmod(0o755)
    run = f"cat /proc/self/oom_score_adj >>{scores}; cat /proc/$PPID/oom_score_adj"
    done = subprocess.run(
        ["choom", "-n", str(score), "--", sys.executable, "-c", SCORES, "serve", "-e", f"d=@{image}", "--run", run],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"},
    )
    assert done.stdout == f"{score}\n", done.stderr
    assert scores.read_text().split() == [has] * len(scores.read_text().split())
    assert len(scores.read_text().split()) >= 3  # the look at the image, the copy, and what is run
