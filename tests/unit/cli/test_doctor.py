"""`nbdzram doctor`: each finding by its cause, on this machine or one made up of files."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nbdzram import engine
from nbdzram.cli import diagnosis, doctor, vitals
from nbdzram.cli.diagnosis import CHECKS, Finding, Kernel, Level, Patient, running_server
from nbdzram.cli.perils import perils
from nbdzram.config import (
    CheckpointConfig,
    Limits,
    PoolConfig,
    ServerConfig,
    TcpAddress,
    TlsConfig,
    TlsMode,
    UnixAddress,
)
from nbdzram.engine import codec
from nbdzram.machine import Machine, Share
from nbdzram.server.certificate import validity
from nbdzram.settings import load
from tests.docs.pages import ROOT
from tests.support.programs import require_program
from tests.support.reach import let_others_pass
from tests.unit.cli.conftest import Server, run
from tests.unit.records import EXPORT, SERVER

QUIET = ServerConfig(tcp=(), metrics=None)


class Caged(Machine):
    """A machine whose cgroup allows 512 MiB."""

    def memory(self) -> Share:
        return Share(512 << 20, Path("/cage"))


def levels(findings: list[Finding]) -> list[Level]:
    return [finding.level for finding in findings]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> TlsConfig:
    """A certificate of ten days."""
    directory = tmp_path_factory.mktemp("tls")
    config = TlsConfig(mode=TlsMode.ON, certificate=directory / "cert.pem", key=directory / "key.pem")
    make = [require_program("openssl", package="openssl"), "req", "-x509", "-newkey", "ec", "-nodes", "-days", "10"]
    make += ["-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", "/CN=disk", "-keyout", str(config.key)]
    subprocess.run([*make, "-out", str(config.certificate)], check=True, capture_output=True)
    return config


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_server_that_may_not_be_asked_or_does_not_answer_is_no_server_that_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`none runs here`, said to whoever may not look, was followed by ports in use."""
    let_others_pass(tmp_path)
    (tmp_path / "nbdzram").mkdir(mode=0o700)
    for variable in ("NBDZRAM_CONTROL", "RUNTIME_DIRECTORY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    os.setresuid(65534, 65534, 0)
    try:
        closed = running_server(None)
    finally:
        os.setresuid(0, 0, 0)
    dead = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(dead))
    for (status, why), clue in ((closed, "may not be opened by user 65534"), (running_server(dead), "no server answ")):
        assert (status, clue in (why or "")) == (None, True)
        (finding,) = diagnosis.server(Patient(QUIET, status, unreachable=why))
        assert (finding.level, clue in finding.says, bool(finding.remedy)) == (Level.WARN, True, True)


def test_what_is_not_ok_has_a_remedy_and_every_check_says_something() -> None:
    for check in CHECKS:
        findings = list(check(Patient(ServerConfig(), None)))
        assert findings, check
        assert all(finding.remedy for finding in findings if finding.level is not Level.OK)


def test_a_port_in_use_fails_unless_it_is_the_running_servers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        patient = Patient(replace(QUIET, tcp=(TcpAddress(port=taken.getsockname()[1]),)), None)
        (finding,) = diagnosis.addresses(patient)
        assert (finding.level, "Address already in use" in finding.says) == (Level.FAIL, True)
        assert levels(list(diagnosis.addresses(replace(patient, server=SERVER)))) == [Level.OK]
    assert levels(list(diagnosis.addresses(patient))) == [Level.OK]


def test_an_address_of_another_machine_and_a_socket_without_a_directory_fail(tmp_path: Path) -> None:
    unix = (UnixAddress(path=tmp_path / "gone" / "nbd.sock"), UnixAddress(path=tmp_path / "nbd.sock"))
    config = replace(QUIET, metrics=TcpAddress(host="192.0.2.1", port=1), unix=unix)
    assert levels(list(diagnosis.addresses(Patient(config, None)))) == [Level.FAIL, Level.FAIL, Level.OK]


def test_a_limit_of_descriptors_below_what_connections_need_warns() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough, short = (Patient(replace(QUIET, limits=Limits(connections=n)), None) for n in (10, hard))
    assert levels(list(diagnosis.descriptors(enough))) == [Level.OK]
    (finding,) = diagnosis.descriptors(short)
    assert (finding.level, f"ulimit -Hn {2 * hard + 256}" in finding.remedy) == (Level.WARN, True)
    assert "will be attached at once" in finding.says


def test_as_many_descriptors_as_connections_need_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    patient = Patient(replace(QUIET, limits=Limits(connections=1000)), None)
    for hard, level in ((2 * 1000 + 256, Level.OK), (2 * 1000 + 255, Level.WARN)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, hard=hard: (hard, hard))
        assert levels(list(diagnosis.descriptors(patient))) == [level]


@pytest.mark.parametrize(
    ("limits", "level"),
    [
        ((0,), Level.WARN),
        ((1 << 20,), Level.OK),
        ((1 << 60,), Level.FAIL),
        ((1 << 20, 0), Level.WARN),
        ((Machine().memory().amount * 2 // 3,) * 2, Level.FAIL),
    ],
)
def test_pools_are_held_against_the_machines_memory(limits: tuple[int, ...], level: Level) -> None:
    pools = tuple(PoolConfig(name=f"pool{number}", mem_limit=limit) for number, limit in enumerate(limits))
    assert levels(list(diagnosis.memory(Patient(replace(QUIET, pools=pools), None))))[0] is level


@pytest.mark.parametrize(("mode", "level"), [("0", Level.OK), ("2", Level.WARN)])
def test_strict_overcommit_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, level: Level) -> None:
    (tmp_path / "overcommit_memory").write_text(f"{mode}\n")
    monkeypatch.setattr(diagnosis, "PROC_VM", tmp_path)
    assert levels(list(diagnosis.memory(Patient(QUIET, None))))[1] is level


def test_a_state_directory_below_somebody_elses_is_made_by_root_and_leaves_that_one_alone(tmp_path: Path) -> None:
    """As another user, in a child: the remedy must not hand over what is above."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    wanted = tmp_path / "closed" / "state" / "nbdzram"
    wanted.parent.mkdir(parents=True)
    wanted.parent.parent.chmod(0o700)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setuid(65534)
            (finding,) = diagnosis.state(Patient(replace(QUIET, state_dir=wanted), None))
            told = finding.level is Level.FAIL and finding.remedy.startswith(
                f"as root: install -d -m 700 -o 65534 {wanted};"
            )
            status = 0 if told else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


PLACES: dict[str, tuple[str, Callable[[Path], ServerConfig]]] = {
    "control": ("--control", lambda path: replace(QUIET, control=path / "control.sock")),
    "pidfile": ("--pidfile", lambda path: replace(QUIET, pidfile=path / "nbdzram.pid")),
    "socket": ("-U", lambda path: replace(QUIET, unix=(UnixAddress(path=path / "nbd.sock"),))),
    "state": ("--state-dir", lambda path: replace(QUIET, state_dir=path)),
    "checkpoints": ("--checkpoint", lambda path: replace(QUIET, checkpoint=CheckpointConfig(directory=path))),
}


@pytest.mark.parametrize("subject", PLACES)
def test_where_nothing_can_be_made_fails_with_a_remedy(tmp_path: Path, subject: str) -> None:
    flag, config = PLACES[subject]
    (tmp_path / "file").touch()
    (tmp_path / "own").mkdir()
    (tmp_path / "others").mkdir(mode=0o755)

    def told(path: Path) -> Finding:
        checks = (diagnosis.state, diagnosis.files, diagnosis.addresses)
        (found,) = (one for check in checks for one in check(Patient(config(path), None)) if one.subject == subject)
        return found

    assert told(tmp_path / "own").level is Level.OK
    wrong = told(tmp_path / "file")
    assert (wrong.level, f"{tmp_path / 'file'} is no directory" in wrong.says) == (Level.FAIL, True)
    assert wrong.remedy == f"choose another with {flag}"
    gone = told(tmp_path / "gone" / "deeper")
    is_made = subject in {"state", "checkpoints"}  # with what is above it
    assert gone.level is (Level.OK if is_made else Level.FAIL)
    assert f"install -d -m 700 -o {os.geteuid()} {tmp_path / 'gone' / 'deeper'};" in gone.remedy or is_made
    if os.geteuid() == 0:
        with as_nobody(tmp_path):
            closed = told(tmp_path / "others" / "new" if is_made else tmp_path / "others")
    else:
        (tmp_path / "others").chmod(0o500)
        closed = told(tmp_path / "others" / "new" if is_made else tmp_path / "others")
    assert (closed.level, "others may not be written by this user" in closed.says) == (Level.FAIL, True)
    assert "install" not in closed.remedy or is_made  # which would take from others what is theirs


@contextmanager
def as_nobody(directory: Path) -> Iterator[None]:
    """Root may write everywhere: for a while this is somebody else, by the identity that access(2) asks for."""
    let_others_pass(directory)
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_a_socket_in_the_place_of_a_directory_fails(tmp_path: Path) -> None:
    for config in (replace(QUIET, control=tmp_path), replace(QUIET, pidfile=tmp_path)):
        assert levels(list(diagnosis.files(Patient(config, None)))) == [Level.FAIL, Level.OK]


def test_a_state_directory_needs_room_for_what_pools_may_take(tmp_path: Path) -> None:
    small, large = (
        Patient(replace(QUIET, state_dir=tmp_path / "new", pools=(PoolConfig(mem_limit=limit),)), None)
        for limit in (4096, 1 << 60)
    )
    assert levels(list(diagnosis.state(small))) == [Level.OK]
    assert levels(list(diagnosis.state(large))) == [Level.WARN]
    (tmp_path / "file").touch()
    nowhere = Patient(replace(QUIET, state_dir=tmp_path / "file" / "new"), None)
    assert levels(list(diagnosis.state(nowhere))) == [Level.FAIL]


@pytest.mark.parametrize(
    ("made", "level", "clue"),
    [
        ("module", Level.OK, "nbd is loaded"),
        ("modules/kernel/drivers/block/nbd.ko.xz", Level.WARN, "not loaded"),
        ("modules/kernel/drivers/block/loop.ko", Level.WARN, "has no module nbd"),
    ],
)
def test_the_kernel_module_is_loaded_at_hand_or_missing(tmp_path: Path, made: str, level: Level, clue: str) -> None:
    (tmp_path / made).mkdir(parents=True)
    patient = Patient(QUIET, None, Kernel(tmp_path / "module", tmp_path / "modules"))
    finding = next(diagnosis.client(patient))
    assert (finding.level, clue in finding.says) == (level, True)


@pytest.mark.parametrize(
    ("program", "clue"),
    [
        ("#!/bin/sh\nexit 0\n", "said nothing of its version"),
        ("#!/bin/sh\nkill -SEGV $$\n", "was killed by signal 11"),
        ("#!/bin/sh\nexec sleep 60\n", "says nothing for 0.1 s"),
        ("#!/bin/sh\nexec >&- 2>&-; exec sleep 60\n", "says nothing for 0.1 s"),
        ("#!/bin/sh\nexec yes\n", "says more than 4095 bytes"),
        ("#!/bin/sh\nexec cat\n", "said nothing of its version"),
        ("no program at all", "cannot be run"),
        ("#!/nonexistent/interpreter\n", "cannot be run"),
    ],
)
def test_a_broken_nbd_client_is_a_finding_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, clue: str
) -> None:
    broken = tmp_path / "nbd-client"
    broken.write_text(program)
    broken.chmod(0o755)
    monkeypatch.setattr(diagnosis, "SEARCH_PATH", str(tmp_path))
    monkeypatch.setattr(diagnosis, "CLIENT_SECONDS", 0.1 if "sleep" in program else 10)
    finding = list(diagnosis.client(Patient(QUIET, None)))[-1]
    assert (finding.level, clue in finding.says, bool(finding.remedy)) == (Level.WARN, True, True), finding


def test_a_client_that_writes_no_utf8_is_quoted_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "nbd-client"
    odd.write_bytes(b"#!/bin/sh\nprintf 'nbd-client \\377 \\033[2J3.24\\n'\n")
    odd.chmod(0o755)
    monkeypatch.setattr(diagnosis, "SEARCH_PATH", str(tmp_path))
    finding = list(diagnosis.client(Patient(QUIET, None)))[-1]
    assert (finding.level, finding.says) == (Level.OK, "nbd-client \ufffd \ufffd[2J3.24")


def test_a_certificate_tells_its_dates(certificate: TlsConfig) -> None:
    assert certificate.certificate is not None
    first, last = validity(certificate.certificate)
    assert last - first == timedelta(days=10)
    assert abs(datetime.now(UTC) - first) < timedelta(hours=1)
    assert levels(list(diagnosis.certificates(Patient(replace(QUIET, tls=certificate), None)))) == [Level.WARN]


def test_each_certificate_that_is_named_is_held_against_the_clock(certificate: TlsConfig, tmp_path: Path) -> None:
    """The authority of clients too: when that ends nobody attaches."""
    assert certificate.certificate is not None
    authority = tmp_path / "authority.pem"
    authority.write_bytes(certificate.certificate.read_bytes())
    tls = replace(certificate, client_ca=authority)
    told = " ".join(finding.says for finding in diagnosis.certificates(Patient(replace(QUIET, tls=tls), None)))
    assert [str(path) in told for path in (certificate.certificate, authority)] == [True, True]


@pytest.mark.parametrize(("days", "level"), [(-1, Level.FAIL), (1, Level.WARN), (-40, Level.FAIL), (11, Level.FAIL)])
def test_a_certificate_is_held_against_the_clock(certificate: TlsConfig, days: int, level: Level) -> None:
    assert certificate.certificate is not None
    now = datetime.now(UTC) + timedelta(days=days)
    assert diagnosis._expiry(certificate.certificate, now).level is level


def test_files_that_are_no_certificates_fail_with_their_name(certificate: TlsConfig, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n")
    for wrong in (garbage, tmp_path / "gone.pem"):
        config = replace(QUIET, tls=replace(certificate, certificate=wrong))
        (finding,) = diagnosis.certificates(Patient(config, None))
        assert (finding.level, str(wrong) in finding.says) == (Level.FAIL, True)
    with pytest.raises(ValueError, match="ends early"):
        validity(garbage)
    assert certificate.key is not None
    with pytest.raises(ValueError, match="no PEM certificate"):
        validity(certificate.key)


def test_the_command_tells_one_line_each_and_ends_with_1_on_failure(start: Callable[..., Server]) -> None:
    server = start("-e", "disk=1M")
    done = server.run("doctor")
    assert f"runs as pid {server.process.pid}; exports: 1" in done.out
    found = json.loads(server.run("doctor", "--json").out)
    assert {finding["level"] for finding in found} <= {"ok", "warn", "fail"}
    assert done.code == any(finding["level"] == "fail" for finding in found)


def test_a_wrong_configuration_is_a_usage_error(tmp_path: Path) -> None:
    file = tmp_path / "nbdzram.toml"
    file.write_text("nonsense = 1\n")
    done = run("doctor", "-c", str(file))
    assert (done.code, f"{file} line 1: unknown key 'nonsense'" in done.err) == (2, True)


@pytest.mark.parametrize(("amount", "level"), [(None, Level.OK), (4096, Level.OK), (16, Level.WARN)])
def test_too_few_tasks_for_the_threads_warn(monkeypatch: pytest.MonkeyPatch, amount: int | None, level: Level) -> None:
    monkeypatch.setattr(Machine, "tasks", lambda _: None if amount is None else Share(amount, Path("/cage")))
    (finding,) = diagnosis.tasks(Patient(QUIET, None))
    assert (finding.level, "/cage" in finding.says) == (level, amount is not None)


def test_the_configuration_of_the_page_of_swap_is_no_cause_of_alarm(tmp_path: Path) -> None:
    """It declares a pool of its own, so that the default one, without a limit, holds nothing: that was warned of."""
    page = (ROOT / "docs" / "howto" / "swap.md").read_text().split("```toml\n")[1].split("```")[0]
    file = tmp_path / "nbdzram.toml"
    file.write_text(page.replace("8G", "8M"))
    config = load(file, {}, {})
    (of_memory, *_) = diagnosis.memory(Patient(config, None))
    assert (of_memory.level, "pools may take 8M" in of_memory.says) == (Level.OK, True)
    assert not list(perils(config, Caged(), environment={}))
    assert levels(list(diagnosis.survival(Patient(config, None)))) == [Level.OK]
    pool = SERVER.pools[0]
    pools = [
        replace(pool, name=name, stats=replace(pool.stats, mem_limit=limit))
        for name, limit in (("default", 0), ("swap", 1))
    ]
    for place, level in (("default", Level.WARN), ("swap", Level.OK)):
        seen = replace(SERVER, pools=tuple(pools), exports=(replace(EXPORT, pool=place),))
        assert levels(list(vitals.pools(Patient(QUIET, seen))))[0] == level


def test_threads_that_are_asked_for_are_among_the_tasks_that_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counted one for each processor, however many the server is to start."""
    monkeypatch.setattr(Machine, "processors", lambda _: 2)
    monkeypatch.setattr(Machine, "tasks", lambda _: Share(80, Path("/cage")))
    for given, level in ((0, Level.OK), (2, Level.OK), (63, Level.WARN)):
        assert levels(list(diagnosis.tasks(Patient(replace(QUIET, threads=given), None)))) == [level]
        server = replace(SERVER, threads=SERVER.threads[:1] * (given or 2))
        assert levels(list(vitals.threads(Patient(QUIET, server)))) == [level]


@pytest.mark.parametrize(("told", "level"), [("VmSwap:\t    2048 kB", Level.WARN), ("VmSwap:\t 0 kB", Level.OK)])
def test_a_server_that_is_swapped_out_is_warned_of(tmp_path: Path, told: str, level: Level) -> None:
    place = tmp_path / str(SERVER.pid)
    place.mkdir()
    (place / "comm").write_text("nbdzram\n")
    (place / "status").write_text(f"Name:\tnbdzram\nVmRSS:\t 9 kB\n{told}\n")
    (finding,) = diagnosis.swap(Patient(QUIET, SERVER, processes=tmp_path))
    assert (finding.level, "2M" in finding.says) == (level, level is Level.WARN)


@pytest.mark.parametrize(
    ("score", "level"), [("-1000\n", Level.OK), ("-900\n", Level.OK), ("-899\n", Level.WARN), ("", Level.OK)]
)
def test_a_server_to_which_clients_swap_and_that_is_not_ended_last_is_warned_of(
    tmp_path: Path, score: str, level: Level
) -> None:
    """The kernel refused it when the server started, and the log that says so may be long gone."""
    place = tmp_path / str(SERVER.pid)
    place.mkdir()
    (place / "comm").write_text("nbdzram\n")
    (place / "status").write_text("Name:\tnbdzram\nVmLck:\t 9 kB\n")
    (place / "oom_score_adj").write_text(score)
    (finding,) = diagnosis.swap(Patient(QUIET, SERVER, processes=tmp_path))
    assert (finding.level, "score is -899" in finding.says) == (level, level is Level.WARN)


def test_the_server_is_found_by_its_name(start: Callable[..., Server]) -> None:
    server = start("-e", "disk=1M")
    assert Path(f"/proc/{server.process.pid}/comm").read_text() == "nbdzram\n"


def test_a_port_in_use_on_one_of_a_names_addresses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a start would: the other address alone would be served in vain."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, port)) for host in ("127.0.0.2", "127.0.0.1")]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        assert diagnosis._cannot_listen(TcpAddress(host="two", port=port)) == "Address already in use"
    assert diagnosis._cannot_listen(TcpAddress(host="two", port=port)) is None


@pytest.mark.parametrize(("columns", "widest"), [("", 100), ("60", 60), ("100", 100), ("300", 100), ("10", 40)])
def test_what_is_told_is_as_wide_as_the_terminal_and_no_wider_than_a_line_is_read(
    monkeypatch: pytest.MonkeyPatch, columns: str, widest: int
) -> None:
    """Twenty columns are left in any case; a program that reads it has what a wide terminal has."""
    monkeypatch.setenv("COLUMNS", columns)
    indent = " " * 20
    lines = [indent + line for line in doctor._wrap("four " * 100, indent)]
    assert widest - len("four ") < max(map(len, lines)) <= widest


def test_libraries_that_cannot_be_loaded_are_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of another Python's, or one that was half removed."""
    monkeypatch.delattr(engine, "codec")
    monkeypatch.setitem(sys.modules, "nbdzram.engine.codec", None)
    _, libraries = diagnosis.versions(Patient(QUIET, None))
    assert (libraries.level, "nbdzram.engine.codec" in libraries.says) == (Level.FAIL, True)
    assert libraries.remedy == "pip install --force-reinstall lz4 xxhash zstandard"


def test_versions_are_told_first(monkeypatch: pytest.MonkeyPatch) -> None:
    version, libraries = diagnosis.versions(Patient(QUIET, None))
    assert (version.level, version.subject) == (Level.OK, "version")
    assert version.says.startswith("nbdzram 0.1.0 on Python 3.")
    assert (libraries.level, libraries.subject) == (Level.OK, "libraries")
    for name in ("lz4 1.", "xxhash ", "zstd 1.", "; a block came back whole"):
        assert name in libraries.says
    monkeypatch.setattr(codec, "decompress_lz4", lambda _: b"changed")
    _, libraries = diagnosis.versions(Patient(QUIET, None))
    assert (libraries.level, "a block came back changed" in libraries.says) == (Level.FAIL, True)
    assert libraries.remedy == "pip install --force-reinstall lz4 xxhash zstandard"
