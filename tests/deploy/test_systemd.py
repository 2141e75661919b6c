"""The units, by systemd's own tools; and the server itself, started and confined as they say."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from nbdzram.config import ExportConfig, Limits, MaintenanceConfig, PoolConfig, ServerConfig, Trigger
from nbdzram.settings import KEYS, load
from tests.deploy.grafana import DEPLOY
from tests.support.nbd_client import Client
from tests.support.programs import require_program, run
from tests.support.server import DRAIN_SECONDS, START_SECONDS, Nbdzram, free_port
from tests.unit.cli.conftest import run as run_cli

UNITS = DEPLOY / "systemd"
SERVICE = UNITS / "nbdzram.service"
RESTARTER = UNITS / "nbdzram-restart.service"
KEEPER = UNITS / "nbdzram-attach@.service"
EXAMPLE = UNITS / "nbdzram.toml"
MAX_EXPOSURE = 1.5
ROOT = DEPLOY.parent


def _settings(name: str) -> list[str]:
    """The values of one key of the service, in order."""
    return re.findall(rf"^{name}=(.*)$", SERVICE.read_text(), re.MULTILINE)


def test_units_are_correct(tmp_path: Path) -> None:
    """systemd-analyze verify has nothing to say. It wants programs that exist, and the users of this machine."""
    for unit in (*UNITS.glob("nbdzram.s[eo]*"), KEEPER, RESTARTER):
        text = (
            unit.read_text()
            .replace("/usr/bin/systemctl", "/bin/true")
            .replace("/usr/bin/nbdzram", shutil.which("true") or "/bin/true")
        )
        text = re.sub(r"^(User|Group|SocketUser|SocketGroup)=.*$", "", text, flags=re.M)
        (tmp_path / unit.name.replace("@", "@nbd0")).write_text(text)
    verify = [require_program("systemd-analyze", package="systemd"), "verify", "--man=no"]
    process = subprocess.run(
        [
            *verify,
            *(
                tmp_path / name
                for name in (
                    "nbdzram.service",
                    "nbdzram.socket",
                    "nbdzram-restart.service",
                    "nbdzram-attach@nbd0.service",
                )
            ),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ) | {"SYSTEMD_LOG_LEVEL": "warning"},
    )
    assert process.returncode == 0, process.stderr
    assert str(tmp_path) not in process.stderr, process.stderr


def test_a_restart_that_checks_first_does_what_a_start_would_refuse_before_it_stops_anything(tmp_path: Path) -> None:
    """The check is the one that a start of the service makes, as the same user; systemd goes no further where it fails
    (systemd.service(5), Type=oneshot). A mistake in the file does fail it."""
    text = RESTARTER.read_text()
    check, restart = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    assert [check] == _settings("ExecStartPre")
    assert re.findall(r"^(?:User|Group)=.*$", text, re.MULTILINE) == ["User=nbdzram", "Group=nbdzram"]
    assert _settings("User") == _settings("Group") == ["nbdzram"]
    assert restart == "+/usr/bin/systemctl try-restart nbdzram.service"
    file = tmp_path / "nbdzram.toml"
    words = check.removeprefix("/usr/bin/nbdzram ").replace("/etc/nbdzram/nbdzram.toml", str(file)).split()
    for content, code in (("[exports.disk]\nsize = '1M'\n", 0), ("[exports.disk]\nsice = '1M'\n", 2)):
        file.write_text(content)
        assert run_cli(*words).code == code


def test_the_keepers_unit_asks_for_what_the_command_takes() -> None:
    """Its line, with what an operator writes, is read by the command itself, up to where it would need a kernel."""
    (line,) = re.findall(r"^ExecStart=/usr/bin/nbdzram (.*)$", KEEPER.read_text(), re.MULTILINE)
    given = {"${EXPORT}": "disk", "${URI}": "nbds://192.0.2.1", "$OPTIONS": "-C 4 --dead-timeout 3600", "%i": "nbd0"}
    for name, value in given.items():
        line = line.replace(name, value)
    done = run_cli(*line.split())
    assert (done.code, done.err.count("which the kernel does not speak")) == (1, 1), done.err


def test_service_is_hardly_exposed() -> None:
    """systemd's own figure, 0 to 10; what is left is the network and unix sockets, which it is there for."""
    systemd_analyze = require_program("systemd-analyze", package="systemd")
    command = [systemd_analyze, "security", "--offline=true", "--no-pager", str(SERVICE)]
    found = re.search(r"Overall exposure level for \S+: (\S+)", run(command))
    assert found
    assert float(found[1]) <= MAX_EXPOSURE


def test_user_is_made_without_a_shell(tmp_path: Path) -> None:
    """systemd-sysusers, in a root of its own: the user and the group that the units name, and nothing to log in to."""
    (tmp_path / "etc").mkdir()
    systemd_sysusers = require_program("systemd-sysusers", package="systemd")
    run([systemd_sysusers, f"--root={tmp_path}", UNITS / "nbdzram.sysusers"])
    (line,) = (tmp_path / "etc/passwd").read_text().splitlines()
    name, _, _, _, _, home, shell = line.split(":")
    assert [name] == _settings("User")
    assert home == "/var/lib/nbdzram"
    assert shell.endswith("nologin")


def test_the_pages_lines_install_every_unit_on_a_system_that_has_none(tmp_path: Path) -> None:
    """A bare Debian has /etc/systemd/system, and not the other directories."""
    section = (DEPLOY / "README.md").read_text().split("## systemd, without the package\n")[1].split("\n## ")[0]
    root = tmp_path / "etc"
    (root / "systemd" / "system").mkdir(parents=True)
    lines = re.findall(r"^# (install [^#&\n]*)", section, re.MULTILINE)
    for line in lines:
        run(shlex.split(line.replace(" -g nbdzram", "").replace("/etc/", f"{root}/")), directory=ROOT)
    shipped = {path.name for path in UNITS.iterdir() if path.suffix in {".service", ".socket"}}
    assert {path.name for path in (root / "systemd" / "system").iterdir()} == shipped
    assert (root / "sysusers.d" / "nbdzram.conf").exists()
    assert (root / "nbdzram" / "nbdzram.toml").exists()


def test_no_unit_takes_the_disks_away_or_serves_where_nobody_asked() -> None:
    """systemd erases what a user has below /dev/shm when its unit stops with RemoveIPC; and what a socket requires is
    stopped with it, which empties disks. An address that comes later is no reason to listen nowhere."""
    assert _settings("RemoveIPC") == ["no"]
    assert (_settings("Requires"), _settings("BindsTo"), _settings("Wants")) == ([], [], ["nbdzram.socket"])
    assert _settings("PropagatesStopTo") == ["nbdzram.socket"]
    assert re.findall(r"^FreeBind=(.*)$", (UNITS / "nbdzram.socket").read_text(), re.MULTILINE) == ["yes"]


def test_example_configuration_is_valid_as_shipped() -> None:
    """It serves one disk on loopback, at half of the memory."""
    config = load(EXAMPLE, {}, {})
    assert [(export.name, export.size_bytes) for export in config.exports] == [("disk", 1 << 30)]
    assert all(address.host == "127.0.0.1" for address in (*config.tcp, config.metrics) if address)


def test_example_configuration_shows_every_key(tmp_path: Path) -> None:
    """With every `#key` uncommented it is still valid, and no key of the program is missing."""
    file = tmp_path / "nbdzram.toml"
    file.write_text(re.sub(r"^#(?=\w)", "", EXAMPLE.read_text(), flags=re.MULTILINE))
    config = load(file, {}, {})
    usual = ServerConfig()
    shown_as_usual = "what holds where nothing is said"
    assert config.limits == Limits(), shown_as_usual
    names = ("tcp", "metrics", "metrics_hosts", "list_exports", "threads", "swap", "log", "log_level", "log_format")
    for name in names:
        assert getattr(config, name) == getattr(usual, name), shown_as_usual
    assert [replace(pool, mem_limit=0) for pool in config.pools] == [PoolConfig()], shown_as_usual
    assert replace(config.checkpoint, directory=None) == usual.checkpoint, shown_as_usual
    chosen = MaintenanceConfig(fold=Trigger.AUTO, compact=Trigger.AUTO, scrub_seconds=7 * 86400.0)
    assert config.maintenance == chosen, shown_as_usual
    (disk,) = config.exports
    asked = ("pool", "read_only", "private", "snapshots_seconds", "snapshots_keep")
    declared = ExportConfig(name="disk", size_bytes=1)
    assert [getattr(disk, name) for name in asked] == [getattr(declared, name) for name in asked], shown_as_usual
    shown = set(_leaves(tomllib.loads(file.read_text())))
    for key in KEYS:
        pattern = re.compile(r"\.".join("[a-z]+" if part == "*" else re.escape(part) for part in key.path))
        assert any(pattern.fullmatch(leaf) for leaf in shown), f"{'.'.join(key.path)} is not in {EXAMPLE.name}"


def _leaves(table: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_server_takes_the_sockets_of_the_socket_unit_and_says_when_it_is_ready(tmp_path: Path) -> None:
    """Started by systemd-socket-activate as nbdzram.socket would, it serves on both sockets and notifies."""
    activate = require_program("systemd-socket-activate", package="systemd")
    notify_path, unix_path, port = tmp_path / "notify", tmp_path / "nbd.sock", free_port()
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "NOTIFY_SOCKET": str(notify_path),
        "RUNTIME_DIRECTORY": str(tmp_path),
        "NBDZRAM_METRICS": "off",
    }
    passed = [word for name in environment for word in ("-E", name)]
    listen = ["-l", f"127.0.0.1:{port}", "-l", str(unix_path), "--fdname=nbd:nbd"]
    command = [activate, *listen, *passed, sys.executable, "-m", "nbdzram", "serve", "-c", str(EXAMPLE)]
    tmp_path.chmod(0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(notify_path))
        notify.settimeout(START_SECONDS)
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
            assert server.stderr is not None
            try:
                while "Listening on" not in server.stderr.readline() or not unix_path.exists():
                    assert server.poll() is None
                with Client(("127.0.0.1", port), "disk") as first:  # this connection starts it, and waits for it
                    assert notify.recv(4096).endswith(b"FDNAME=pool-default")
                    assert notify.recv(4096) == b"READY=1"
                    first.write(0, b"a" * 4096)
                    with Client(unix_path, "disk") as second:
                        assert second.read(0, 4096) == b"a" * 4096
                server.send_signal(signal.SIGTERM)
                assert notify.recv(4096) == b"STOPPING=1"
                server.communicate(timeout=DRAIN_SECONDS)
                assert server.returncode == 0
                assert unix_path.exists(), "the socket is systemd's, who still listens"
            finally:
                server.kill()


def _allowed_calls() -> set[str]:
    """What SystemCallFilter= comes to: lists are added in order, one that begins with ~ is taken away."""
    systemd_analyze = require_program("systemd-analyze", package="systemd")
    sets: dict[str, list[str]] = {}
    for line in run([systemd_analyze, "syscall-filter", "--no-pager"]).splitlines():
        word = line.strip()
        if line.startswith("@"):
            sets[name := word] = []
        elif word and not word.startswith("#") and sets:
            sets[name].append(word)

    def calls(word: str) -> set[str]:
        return set().union(*map(calls, sets[word])) if word in sets else {word}

    allowed: set[str] = set()
    for line in _settings("SystemCallFilter"):
        named = set().union(*map(calls, line.removeprefix("~").split()))
        allowed = allowed - named if line.startswith("~") else allowed | named
    return allowed


class Traced(Nbdzram):
    """A server under strace, which writes down every system call of every thread."""

    def environment(self) -> dict[str, str]:
        if self.command[0] == sys.executable:
            strace = require_program("strace", package="strace")
            self.command[:0] = [strace, "--follow-forks", f"--output={self.directory / 'calls'}"]
        return super().environment()

    @property
    def calls(self) -> list[str]:
        lines = (self.directory / "calls").read_text().splitlines()
        return [line.split(maxsplit=1)[1] for line in lines]


def test_server_at_work_makes_no_system_call_that_the_unit_forbids(tmp_path: Path) -> None:
    """Attach, write, read, trim, fold, compact, scrape and drain: every call, address family and page is allowed."""
    with Traced(tmp_path, {"disk": "64M"}, metrics=True) as server:
        with server.client() as client:
            for offset in range(0, 8 << 20, 1 << 20):
                client.write(offset, random.Random(offset % 3).randbytes(1 << 20))
                client.read(offset, 1 << 20)
            client.trim(0, 4 << 20)
        server.fold()
        server.compact()
        (child,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGTERM)
        server.process.wait(DRAIN_SECONDS)
    made = {call.split("(")[0] for call in server.calls if re.match(r"\w+\(", call)}
    assert {"read", "madvise", "accept4"} <= made, "strace saw too little to judge by"
    assert made <= _allowed_calls()
    families = {found[1] for call in server.calls if (found := re.match(r"socket\((\w+)", call))}
    assert families <= set(_settings("RestrictAddressFamilies")[0].split())
    assert not [call for call in server.calls if "PROT_WRITE|PROT_EXEC" in call], "MemoryDenyWriteExecute="
