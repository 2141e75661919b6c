"""`nbdzram doctor` on a server that runs: it is judged by what it has, whatever a configuration here says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nbdzram.cli import vitals
from nbdzram.cli.diagnosis import Finding, Level, Patient, huge_pages
from nbdzram.cli.vitals import VITALS
from nbdzram.config import ServerConfig
from nbdzram.machine import Machine, Share
from nbdzram.status import PoolStatus
from tests.unit.cli.conftest import Server
from tests.unit.records import EXPORT, MIB, POOL_STATS, SERVER

UNIT_CGROUP = "0::/system.slice/nbdzram.service\n"


def patient(processes: Path, **server: object) -> Patient:
    return Patient(ServerConfig(), replace(SERVER, **server), processes=processes)  # type: ignore[arg-type]


def test_only_the_server_s_own_process_is_looked_at(tmp_path: Path) -> None:
    """Not another one of its number, as of a server in a container, and not that of whoever looks."""
    process(tmp_path)
    (tmp_path / "self").symlink_to(str(SERVER.pid))
    assert patient(tmp_path).process == tmp_path / str(SERVER.pid)
    assert not Patient(ServerConfig(), None, processes=tmp_path).process.exists()
    process(tmp_path, comm="cron\n")
    assert not patient(tmp_path).process.exists()
    assert not patient(tmp_path, pid=SERVER.pid + 1).process.exists()


def pool(**stats: int) -> PoolStatus:
    return replace(SERVER.pools[0], stats=replace(POOL_STATS, **stats))  # type: ignore[arg-type]


def process(root: Path, **files: str) -> Path:
    """A /proc with files of the server's process."""
    place = root / str(SERVER.pid)
    place.mkdir(exist_ok=True)
    for name, content in {"comm": "nbdzram\n", **files}.items():
        (place / name).write_text(content)
    return root


def only(findings: Iterable[Finding]) -> Finding:
    (finding,) = findings
    assert finding.remedy or finding.level is Level.OK
    return finding


def test_every_check_says_something_of_a_server_whose_process_may_not_be_looked_at(tmp_path: Path) -> None:
    for check in VITALS:
        findings = list(check(patient(tmp_path)))
        assert findings, check
        assert all(finding.remedy for finding in findings if finding.level is not Level.OK)


@pytest.mark.parametrize(
    ("limit", "room", "level"),
    [(0, 1 << 40, Level.WARN), (512 * MIB, 1 << 40, Level.OK), (512 * MIB, 256 * MIB, Level.FAIL)],
)
def test_the_limits_that_pools_have_now_are_held_against_the_servers_own_cgroup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, room: int, level: Level
) -> None:
    asked = []

    def memory(machine: Machine) -> Share:
        asked.append(machine.process)
        return Share(room)

    monkeypatch.setattr(Machine, "memory", memory)
    finding = next(vitals.pools(patient(process(tmp_path), pools=(pool(mem_limit=limit),))))
    assert (finding.level, bool(finding.remedy)) == (level, level is not Level.OK)
    assert set(asked) == {tmp_path / str(SERVER.pid)}


def test_a_cgroup_that_would_end_the_server_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "memory", lambda _: Share(540 * MIB, Path("/unit")))
    told = list(vitals.pools(patient(tmp_path)))
    assert [(finding.subject, finding.level) for finding in told] == [("memory", Level.OK), ("survival", Level.WARN)]
    assert "/unit ends the server" in told[1].says


@pytest.mark.parametrize(("taken", "warned"), [(450, False), (461, True)])
def test_a_pool_that_is_nearly_full_warns_by_its_name(tmp_path: Path, taken: int, warned: bool) -> None:
    full = pool(mem_limit=512 * MIB, mem_used_total=taken * MIB - POOL_STATS.metadata)
    told = [finding for finding in vitals.pools(patient(tmp_path, pools=(full,))) if finding.subject == "pool"]
    assert [finding.level for finding in told] == [Level.WARN] * warned
    assert all("'default'" in finding.says and "fold --pool default" in finding.remedy for finding in told)


@pytest.mark.parametrize(("free", "level"), [(300, Level.WARN), (400, Level.OK)])
def test_the_state_directory_needs_room_for_what_pools_may_still_take(tmp_path: Path, free: int, level: Level) -> None:
    """512 MiB may be taken, 113 are."""
    stored = replace(SERVER.pools[0], path="/var/lib/nbdzram/default.pool")
    finding = only(vitals.state(patient(tmp_path, pools=(stored,), state_dir_free_bytes=free * MIB)))
    assert (finding.level, "/var/lib/nbdzram has room" in finding.says) == (level, True)
    assert (
        "disks end with the process, and the next one begins from a checkpoint"
        in only(vitals.state(patient(tmp_path))).says
    )
    assert only(vitals.state(patient(tmp_path, checkpoint=None))).says.endswith("disks end with the process")


def test_disks_that_systemd_may_keep_are_not_said_to_end_with_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped unit keeps them over a restart and a crash."""
    monkeypatch.setattr(Machine, "unit", lambda _: "nbdzram.service")
    told = only(vitals.state(patient(tmp_path, checkpoint=None))).says
    assert "end with the process" not in told
    assert told.endswith("end with `systemctl stop nbdzram.service`")


@pytest.mark.parametrize(
    ("age", "failures", "level", "says"),
    [
        (30, 0, Level.OK, "the newest is 30 s old"),
        (30, 1, Level.OK, "the newest is 30 s old, 1 failure since the start"),
        (120.5, 1, Level.OK, "the newest is 2 min 0 s old, 1 failure since the start"),
        (121, 1, Level.WARN, "2 min 1 s old, and one is due every 1 min 0 s, 1 failure since the start"),
        (359, 0, Level.OK, "5 min 59 s old"),
        (361, 2, Level.FAIL, "6 min 1 s old, and one is due every 1 min 0 s, 2 failures since the start"),
        (-90, 0, Level.OK, "the newest is 0 s old"),  # a clock that was set back
        (None, 0, Level.OK, "none is whole yet"),
    ],
)
def test_a_checkpoint_that_is_late_is_a_failure(
    tmp_path: Path, age: float | None, failures: int, level: Level, says: str
) -> None:
    assert SERVER.checkpoint is not None
    now = SERVER.started_at + SERVER.uptime_seconds
    taken = replace(SERVER.checkpoint, moment=None if age is None else now - age, failures=failures)
    finding = only(vitals.checkpoints(patient(tmp_path, checkpoint=taken)))
    assert (finding.level, says in finding.says) == (level, True), finding
    written = only(vitals.checkpoints(patient(tmp_path, checkpoint=replace(taken, written_share=0.5))))
    assert written.level is (Level.FAIL if level is Level.FAIL else Level.OK), "one is under way"
    late = patient(tmp_path, checkpoint=replace(taken, moment=None), uptime_seconds=1000.0)
    assert only(vitals.checkpoints(late)).says.startswith("none is whole yet, and one is due every 1 min 0 s")
    for uptime_seconds in (200.0, 1000.0):
        empty = {"uptime_seconds": uptime_seconds, "exports": ()}
        nothing = patient(tmp_path, checkpoint=replace(taken, moment=None, failures=1), **empty)
        assert only(vitals.checkpoints(nothing)).level is Level.OK
    assert "no directory" in only(vitals.checkpoints(patient(tmp_path, checkpoint=None))).says


@pytest.mark.parametrize(
    ("usable", "trouble", "level", "says"),
    [
        (True, "", Level.OK, "on the disk when it is answered"),
        (True, "FLUSH waits for the disk", Level.FAIL, "FLUSH waits for the disk, which gives no answer"),
        (False, "", Level.WARN, "waits for the first checkpoint"),
        (False, "the journal in /d failed (Input/output error)", Level.FAIL, "FLUSH fails: the journal in /d"),
    ],
)
def test_a_journal_that_cannot_be_used_is_told(
    tmp_path: Path, usable: bool, trouble: str, level: Level, says: str
) -> None:
    assert SERVER.journal is not None
    journal = replace(SERVER.journal, usable=usable, trouble=trouble)
    found = only(vitals.journal(patient(tmp_path, journal=journal, checkpoint=None)))
    assert found.level is level
    assert says in found.says
    assert "none" in only(vitals.journal(patient(tmp_path, journal=None))).says


@pytest.mark.parametrize(
    ("share", "failures", "level", "says"),
    [
        (0.257, 0, Level.WARN, "waits for the first checkpoint of this server, of which 26% is written"),
        (None, 0, Level.WARN, "waits for the first checkpoint of this server"),
        (0.5, 2, Level.FAIL, "of which 50% is written; it failed 2 times"),
    ],
)
def test_who_waits_for_the_first_checkpoint_is_told_how_far_it_is(
    tmp_path: Path, share: float | None, failures: int, level: Level, says: str
) -> None:
    assert SERVER.journal is not None
    assert SERVER.checkpoint is not None
    taken = replace(SERVER.checkpoint, written_share=share, failures=failures)
    found = only(vitals.journal(patient(tmp_path, journal=replace(SERVER.journal, usable=False), checkpoint=taken)))
    assert found.level is level
    assert found.says.endswith(says)


def test_exports_whose_flush_fails_are_named(tmp_path: Path) -> None:
    assert SERVER.journal is not None
    found = only(vitals.journal(patient(tmp_path, journal=replace(SERVER.journal, held_back=("disk", "other")))))
    assert found.level is Level.FAIL
    assert found.says.startswith("FLUSH of disk, other fails")


def test_exports_that_checkpoints_lack_are_named(tmp_path: Path) -> None:
    """Ten of many, and not where the newest is old, which is worse: those are not all that it lacks."""
    assert SERVER.checkpoint is not None
    many = tuple(f"disk{number}" for number in range(10, 22))
    young = replace(SERVER.checkpoint, moment=SERVER.started_at + SERVER.uptime_seconds, held_back=many)
    found = only(vitals.checkpoints(patient(tmp_path, checkpoint=young)))
    assert found.level is Level.FAIL
    assert "; disk10, disk11," in found.says
    assert "disk19 and 2 more cannot be read, and is there as it was before" in found.says
    old = only(vitals.checkpoints(patient(tmp_path, checkpoint=replace(young, moment=0.0))))
    assert "one is due every" in old.says
    assert "disk10" not in old.says


def test_damaged_files_beside_checkpoints_are_a_warning(tmp_path: Path) -> None:
    assert SERVER.checkpoint is not None
    young = replace(SERVER.checkpoint, moment=SERVER.started_at + SERVER.uptime_seconds, damaged_files=3)
    found = only(vitals.checkpoints(patient(tmp_path, checkpoint=young)))
    assert found.level is Level.WARN
    assert found.says.endswith("; 3 files that a start could not use lie beside it")
    assert "*.damaged" in found.remedy


@pytest.mark.parametrize(
    ("cgroup", "name"),
    [
        (UNIT_CGROUP, "nbdzram.service runs it"),
        ("1:name=systemd:/system.slice/nbdzram.service\n0::/\n", "nbdzram.service runs it"),
        ("0::/user.slice/user-0.slice/session-3.scope\n", "no service"),
        ("0::/user.slice/user-1.slice/user@1.service/app.slice/mine.service\n", "mine.service runs it"),
        ("0::/user.slice/user-1.slice/user@1.service/app.slice/term.scope\n", "no service"),
        ("0::/system.slice/docker-0123.scope\n", "no service"),
        ("0::/system.slice/podman.service/libpod-0123.scope\n", "no service"),
        ("0::/\n", "no service"),
    ],
)
def test_the_unit_that_runs_it_is_named(tmp_path: Path, cgroup: str, name: str) -> None:
    assert name in only(vitals.unit(patient(process(tmp_path, cgroup=cgroup)))).says


def test_another_process_with_the_number_of_a_server_in_a_container_is_left_alone(tmp_path: Path) -> None:
    seen = patient(process(tmp_path, cgroup=UNIT_CGROUP, comm="postgres\n", status="Threads:\t17\n"))
    assert "not seen from here" in only(vitals.unit(seen)).says
    assert "an unknown number run" in only(vitals.threads(seen)).says
    assert "told to root" in only(vitals.descriptors(seen)).says


def test_a_file_that_cannot_be_read_is_nothing_that_is_known(tmp_path: Path) -> None:
    """As of a process that ends meanwhile, or that only root may look at."""
    seen = patient(process(tmp_path))
    (seen.process / "status").mkdir()
    (seen.process / "limits").symlink_to("limits")
    assert "an unknown number run" in only(vitals.threads(seen)).says
    assert "told to root" in only(vitals.descriptors(seen)).says


@pytest.mark.parametrize(("allowed", "level"), [(16, Level.WARN), (4096, Level.OK), (None, Level.OK)])
def test_threads_are_counted_against_the_servers_own_cgroup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int | None, level: Level
) -> None:
    monkeypatch.setattr(Machine, "tasks", lambda _: None if allowed is None else Share(allowed, Path("/unit")))
    finding = only(vitals.threads(patient(process(tmp_path, status="Name:\tnbdzram\nThreads:\t17\n"))))
    assert (finding.level, finding.says.startswith("17 run")) == (level, True)


@pytest.mark.parametrize(
    ("limit", "level", "says"),
    [
        ("65536", Level.OK, "2304 needed for 1024 connections, 65536 allowed; 2 are connected"),
        ("2304", Level.OK, "2304 needed for 1024 connections, 2304 allowed; 2 are connected"),
        ("1024", Level.WARN, "1024 allowed, 2304 needed for 1024 connections: 576 will be attached at once"),
        ("unlimited", Level.OK, "2304 needed for 1024 connections, and allowed"),
    ],
)
def test_descriptors_are_those_of_the_servers_process(tmp_path: Path, limit: str, level: Level, says: str) -> None:
    limits = f"Max processes      1      1      processes\nMax open files     {limit}    {limit}    files\n"
    finding = only(vitals.descriptors(patient(process(tmp_path, limits=limits))))
    assert (finding.level, finding.says) == (level, says)


@pytest.mark.parametrize(
    ("uri", "admits", "level"),
    [
        ("nbd://0.0.0.0:10809", "everyone", Level.WARN),
        ("nbd://[::]:10809", "everyone", Level.WARN),
        ("nbd://192.0.2.7:10809", "everyone", Level.WARN),
        ("nbd://[fe80::1%25eth0]:10809", "everyone", Level.WARN),
        ("nbd://192.0.2.7:10809", "listed", Level.OK),
        ("nbd://127.0.0.2:10809", "everyone", Level.OK),
        ("nbd://[::1]:10809", "everyone", Level.OK),
        ("nbd+unix:///?socket=/run/nbd.sock", "everyone", Level.OK),
        ("nbd://0.0.0.0:10809", "listed", Level.OK),
        ("nbds://0.0.0.0:10809", "everyone", Level.OK),
        ("nbd://127.0.0.1:10809", "everyone", Level.OK),
    ],
)
def test_an_address_that_everybody_reaches_warns(tmp_path: Path, uri: str, admits: str, level: Level) -> None:
    asked = patient(tmp_path, uris=(uri,), exports=(replace(EXPORT, admits=admits),))
    assert only(vitals.addresses(asked)).level is level


@pytest.mark.parametrize(
    ("days", "levels"), [(400, [Level.OK]), (10, [Level.WARN]), (-1, [Level.FAIL]), (None, [Level.OK])]
)
def test_the_certificate_in_use_is_held_against_the_clock(
    tmp_path: Path, days: int | None, levels: list[Level]
) -> None:
    until = None if days is None else (datetime.now(UTC) + timedelta(days=days)).timestamp()
    told = list(vitals.certificate(patient(tmp_path, certificate_expires_at=until)))
    assert [finding.level for finding in told] == levels
    broken = list(vitals.certificate(patient(tmp_path, certificate_expires_at=until, tls_files_usable=False)))
    assert broken[0].level is Level.FAIL


@pytest.mark.parametrize(
    ("enabled", "shmem", "level", "clue"),
    [
        ("always [madvise] never", "always [never] force", Level.OK, "madvise; pools decline them"),
        ("[always] madvise never", "always never [force]", Level.WARN, "every tmpfs"),
        ("", "", Level.OK, "no transparent ones"),
    ],
)
def test_huge_pages_are_told(tmp_path: Path, enabled: str, shmem: str, level: Level, clue: str) -> None:
    (tmp_path / "enabled").write_text(enabled)
    (tmp_path / "shmem_enabled").write_text(shmem)
    finding = only(huge_pages(Patient(ServerConfig(), None, settings=tmp_path)))
    assert (finding.level, clue in finding.says) == (level, True)


def test_a_server_is_judged_by_what_it_was_told_and_a_file_only_when_it_is_named(
    start: Callable[..., Server], tmp_path: Path
) -> None:
    """Not by defaults: the limit is set, and no pool of this server is without one."""
    server = start("-e", "disk=1M", "--mem-limit", "1M")
    told = json.loads(server.run("doctor", "--json").out)
    (memory,) = (finding for finding in told if finding["subject"] == "memory")
    assert (memory["level"], "pools may take 1M" in memory["says"]) == ("ok", True), memory
    assert any("for 1024 connections" in finding["says"] for finding in told), told
    assert not any(finding["subject"] in {"configuration", "port"} for finding in told)
    server.run("pools", "limit", "default", "0")
    told = json.loads(server.run("doctor", "--json").out)
    assert any("'default' has no limit" in finding["says"] for finding in told), told
    file = tmp_path / "other.toml"
    file.write_text('listen = []\nmetrics = "off"\n[pools.default]\nmem_limit = "2M"\n')
    told = json.loads(server.run("doctor", "-c", str(file), "--json").out)
    assert any("pools may take 2M" in finding["says"] for finding in told), told
