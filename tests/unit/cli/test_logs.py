"""What a whole server does with its log: nobody reads it, strangers write it, the journal wants it its own way."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

from nbdzram.control.client import ControlClient
from nbdzram.server.logbook import LINES_A_MINUTE
from tests.support.nbd_client import Client
from tests.support.programs import require_program
from tests.unit.cli.conftest import NBDZRAM, Server, clean_environment, make_certificate, run

Start = Callable[..., Server]

PATIENCE_SECONDS = 20  # for a server that stands still
STARTTLS, GO = 5, 7
NO_SUCH_EXPORT = struct.pack(">I", 6) + b"nobody" + b"\0\0"  # as GO has it: the name's length, the name, no requests


def knock(path: Path, option: int = GO, content: bytes = NO_SUCH_EXPORT, times: int = 1) -> None:
    """One handshake with an option several times, each answered, and then gone."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE_SECONDS)
        client.connect(str(path))
        client.recv(18, socket.MSG_WAITALL)
        client.sendall(struct.pack(">I", 3))
        for _ in range(times):
            client.sendall(b"IHAVEOPT" + struct.pack(">II", option, len(content)) + content)
            header = client.recv(20, socket.MSG_WAITALL)
            client.recv(struct.unpack(">I", header[16:])[0], socket.MSG_WAITALL)


def test_a_log_that_nobody_reads_stops_no_client_no_command_and_no_end(tmp_path: Path) -> None:
    control, path = tmp_path / "control.sock", tmp_path / "nbd.sock"
    reader, writer = os.pipe()
    words = ["serve", "-e", "disk=1M", "-U", str(path), "--control", str(control), "--metrics", "off"]
    with subprocess.Popen(
        [*NBDZRAM, *words, "--log-level", "debug"],
        stdout=subprocess.PIPE,
        stderr=writer,
        text=True,
        env=clean_environment(),
    ) as server:
        try:
            assert server.stdout is not None
            assert any(line.startswith("  qemu-img") for line in server.stdout)
            os.set_blocking(writer, False)  # the server's end too: both are one open file description
            try:
                while os.write(writer, b"\n" * 4096):
                    pass
            except BlockingIOError:
                os.set_blocking(writer, True)
            for _ in range(40):
                knock(path, times=100)
            with Client(path, "disk") as client:
                client.write(0, b"still here".ljust(4096))
                assert client.read(0, 10) == b"still here"
            with ControlClient(control) as asked:
                assert asked.status().exports[0].stored_bytes == 4096
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=PATIENCE_SECONDS)
        except BaseException:
            server.kill()
            raise
    os.close(writer)
    os.close(reader)
    assert server.returncode == 0


def test_a_crowd_of_strangers_writes_some_lines_and_a_number(start: Start) -> None:
    server = start("-e", "disk=1M")
    for _ in range(20):
        knock(server.socket, times=100)
    assert server.stop() == 0
    lines = server.log.read_text().splitlines()
    refused = [line for line in lines if "option refused" in line]
    assert len(refused) == LINES_A_MINUTE + 1
    assert f"{20 * 100 - LINES_A_MINUTE} more like this within a minute" in refused[-1]
    assert len(lines) <= 2 * (LINES_A_MINUTE + 1) + 2  # and what the stop says


def test_a_renewal_that_cannot_be_used_is_told_once_for_all_that_connect(start: Start, tmp_path: Path) -> None:
    make_certificate(tmp_path, "localhost")
    tls = ("--tls", "on", "--tls-certificate", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem"))
    server = start("-e", "disk=1M", *tls)
    for broken in ("garbage", None):
        if broken is None:
            (tmp_path / "cert.pem").unlink()
        else:
            (tmp_path / "cert.pem").write_text(broken)
        before = server.log.read_text().count("keeping the old ones")
        for _ in range(30):
            knock(server.socket, STARTTLS, b"")
        server.wait_for_log("keeping the old ones")
        server.process.send_signal(signal.SIGHUP)  # asked for by a person: told again
        while server.log.read_text().count("keeping the old ones") < before + 2:
            os.sched_yield()
        assert server.log.read_text().count("keeping the old ones") == before + 2


def test_a_reload_reads_files_that_look_unchanged(start: Start, tmp_path: Path) -> None:
    make_certificate(tmp_path, "localhost")
    tls = ("--tls", "on", "--tls-certificate", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem"))
    server = start("-e", "disk=1M", *tls)
    server.process.send_signal(signal.SIGHUP)
    server.wait_for_log("TLS files reloaded")


def test_log_format_json_makes_every_line_an_object(start: Start) -> None:
    server = start("-e", "disk=1M", "--log-format", "json")
    knock(server.socket)
    with Client(server.socket, "disk"):
        pass
    assert server.stop() == 0
    told = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert {"option refused" in one["message"] for one in told} == {True, False}
    assert [one["logger"] for one in told if "attached to export 'disk'" in one["message"]] == ["nbdzram.attached"]
    assert all(set(one) == {"time", "level", "logger", "message"} for one in told)


def test_under_the_journal_levels_stand_in_front_and_no_time(tmp_path: Path) -> None:
    """The shell tells the server which file its standard error is, as systemd does."""
    log, path = tmp_path / "log", tmp_path / "nbd.sock"
    words = ["serve", "-e", "disk=1M", "-U", str(path), "--control", str(tmp_path / "c.sock"), "--metrics", "off"]
    with log.open("wb") as errors:
        status = os.fstat(errors.fileno())
        environment = clean_environment() | {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        with subprocess.Popen(
            [*NBDZRAM, *words], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as server:
            assert server.stdout is not None
            assert any(line.startswith("  qemu-img") for line in server.stdout)
            knock(path)
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=60)
    assert log.read_text().startswith("<4>WARNING nbdzram.server: unix client (pid ")


def test_a_key_with_a_pass_phrase_is_one_sentence_everywhere_and_nobody_is_asked(tmp_path: Path) -> None:
    """On a terminal OpenSSL would ask, and wait: `script` gives each command one."""
    make_certificate(tmp_path, "localhost")
    openssl = require_program("openssl", package="openssl")
    script = require_program("script", package="bsdutils")
    locked = tmp_path / "locked.pem"
    for kind in ("pkey", "ec"):  # PKCS#8, and OpenSSL's own older form
        make = [openssl, kind, "-in", str(tmp_path / "key.pem"), "-aes256", "-passout", "pass:secret", "-out", locked]
        subprocess.run(make, check=True, capture_output=True)
        tls = f"NBDZRAM_TLS_MODE=on NBDZRAM_TLS_CERTIFICATE={tmp_path}/cert.pem NBDZRAM_TLS_KEY={locked}"
        for words in ("serve --check-config", f"serve -e disk=1M -U {tmp_path}/nbd.sock --metrics off", "doctor"):
            command = f"env {tls} NBDZRAM_CONTROL={tmp_path}/c.sock COLUMNS=1000 {' '.join(NBDZRAM)} {words}"
            done = subprocess.run(
                [script, "-qec", command, "/dev/null"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=PATIENCE_SECONDS,
                check=False,
                env=clean_environment(),
            )
            assert "is encrypted" in " ".join(done.stdout.split()), (words, done.stdout)
            assert "pass phrase:" not in done.stdout
    assert run("serve", "--help").code == 0
