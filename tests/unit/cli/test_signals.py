"""What signals do: one drains, the second ends at once, SIGHUP ends nothing, and none is a traceback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdzram.control.client import ControlClient
from tests.support.nbd_client import Client
from tests.unit.cli.conftest import NBDZRAM, Server, clean_environment
from tests.wire import CMD_DISC, CMD_READ, OPT_GO, client_hello, name_and_infos, option, request

Start = Callable[..., Server]
FORCED_EXIT = 128 + signal.SIGTERM


def test_a_server_that_drains_is_not_healthy_and_a_second_sigterm_ends_it(start: Start, tmp_path: Path) -> None:
    """A client that asked for much and reads nothing keeps the drain going, for longer than a command may take here."""
    (tmp_path / "patient.toml").write_text("[limits]\ndrain_seconds = 600\n")
    server = start("-e", "disk=64M", "-c", str(tmp_path / "patient.toml"))
    client = Client(server.socket, "disk")
    with client.socket:
        client.send(CMD_READ, 0, 32 << 20)
        client.socket.recv(1)  # it is being answered
        server.process.send_signal(signal.SIGTERM)
        with ControlClient(server.control) as control:
            while not control.status().draining:
                os.sched_yield()
        health = [*NBDZRAM, "health", "--control", str(server.control)]
        told = subprocess.run(health, capture_output=True, text=True, env=clean_environment(), check=False)
        assert (told.returncode, "drains" in told.stderr) == (1, True), told.stderr
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        server.process.communicate(timeout=60)
        assert server.process.returncode == FORCED_EXIT


@pytest.mark.parametrize("begins_from", ["a stream", "a checkpoint"])
def test_sigterm_ends_a_start_that_reads_from_a_pipe_for_ever(tmp_path: Path, begins_from: str) -> None:
    """Only a second one did; and of a large checkpoint, only behind its end."""
    place = tmp_path / "00000001-full.stream"
    os.mkfifo(place)
    words = ["--restore", str(place)] if begins_from == "a stream" else ["--checkpoint", str(tmp_path)]
    command = [*NBDZRAM, "serve", *words, "-U", str(tmp_path / "n"), "--control", str(tmp_path / "c")]
    with (
        subprocess.Popen(
            [*command, "--metrics", "off"], stderr=subprocess.PIPE, text=True, env=clean_environment()
        ) as process,
        place.open("wb"),
    ):  # until it is read, by whom signals are heard
        process.send_signal(signal.SIGTERM)
        try:
            said = process.communicate(timeout=30)[1].splitlines()
        finally:
            process.kill()
    assert process.returncode == 1
    assert said[-1].endswith(f"reading {place} was interrupted; nothing of it is kept")
    assert sorted(path.name for path in tmp_path.iterdir()) == [place.name]


def test_sighup_ends_no_server_on_standard_input() -> None:
    """inetd's children live with their parent's signals; there is nothing to read again, and nobody to lose a disk."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # Whoever runs the tests may ignore it, as nohup does, and then the server would too.
        command = ["env", "--default-signal=HUP", *NBDZRAM, "serve", "--stdin", "-e", "disk=1M"]
        process = subprocess.Popen(command, stdin=theirs.fileno(), stderr=subprocess.PIPE, env=clean_environment())
        theirs.close()
        assert process.stderr is not None
        ours.settimeout(60)
        ours.sendall(client_hello() + option(OPT_GO, name_and_infos(b"disk")))
        assert ours.recv(18, socket.MSG_WAITALL)[:8] == b"NBDMAGIC"
        process.send_signal(signal.SIGHUP)
        assert ours.recv(20 + 12 + 20, socket.MSG_WAITALL)
        ours.sendall(request(CMD_READ, 0, 512, cookie=1))
        assert len(ours.recv(16 + 512, socket.MSG_WAITALL)) == 16 + 512
        ours.sendall(request(CMD_DISC, 0, 0, cookie=2))
        _, complaints = process.communicate(timeout=60)
        assert (process.returncode, b"Traceback" in complaints) == (0, False), complaints


INTERRUPTED_AT = """
import os, signal, sys
class Moment:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            sys.meta_path.remove(self)
            come()
sys.meta_path.insert(0, Moment())
def come():
    os.kill(os.getpid(), signal.SIGINT)
{before}
import nbdzram.__main__
nbdzram.__main__.main()
"""
IN_A_CALLBACK = """
class Ending:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
come = Ending
"""
AT_AN_ATTRIBUTE = """
class Attribute:
    def __set_name__(self, owner, name):
        os.kill(os.getpid(), signal.SIGINT)
def come():
    class Owner:
        attribute = Attribute()
"""
BEHIND_THE_COMMAND = """
import nbdzram.cli.main
def run(words, first, run=nbdzram.cli.main.run):
    run(words, first)
    come()
    return 0
nbdzram.cli.main.run = run
"""
AT_THE_END = """
import gc
gc.freeze = come
"""
BY_THE_SYSTEM = -signal.SIGINT  # a shell says 130


@pytest.mark.parametrize(
    ("words", "name", "before", "code"),
    [
        (["version"], "gc", "", BY_THE_SYSTEM),
        (["version"], "click", "", BY_THE_SYSTEM),
        (["version"], "nbdzram.cli.version", IN_A_CALLBACK, BY_THE_SYSTEM),
        (["serve", "--help"], "nbdzram.cli.serve", "", BY_THE_SYSTEM),
        (["serve", "-e", "d=1M", "--run", "true"], "uvloop", "", 130),
        (["serve", "-e", "d=1M", "--run", "true"], "uvloop", IN_A_CALLBACK, BY_THE_SYSTEM),
        (["serve", "-e", "d=1M", "--run", "true"], "uvloop", AT_AN_ATTRIBUTE, 130),
        (["completion", "bash"], "", BEHIND_THE_COMMAND, 130),
        (["completion", "bash"], "", AT_THE_END, BY_THE_SYSTEM),
    ],
    ids=[
        "first import",
        "import of a package",
        "end of an object in an import",
        "import of a command",
        "import by a command",
        "end of an object in an import by a command",
        "class made by an import by a command",
        "behind the command",
        "end",
    ],
)
def test_ctrl_c_is_no_traceback_however_early_or_late_it_comes(
    words: list[str], name: str, before: str, code: int
) -> None:
    """Python's own start aside, which is not ours. The import of a module waits for the signal, or the end does."""
    script = INTERRUPTED_AT.format(name=name, before=before)
    command = ["env", "--default-signal=INT", sys.executable, "-c", script, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean_environment(), timeout=60)
    assert (done.returncode, done.stderr.strip()) == (code, "")


def test_who_is_started_with_ctrl_c_ignored_ignores_it() -> None:
    """What a script started in the background: it is not meant when what runs in front is interrupted."""
    command = ["env", "--ignore-signal=INT", sys.executable, "-c"]
    for name in ("gc", "click", "nbdzram.cli.completion"):
        script = INTERRUPTED_AT.format(name=name, before="")
        done = subprocess.run([*command, script, "completion", "bash"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert "nbdzram" in done.stdout


def test_a_stop_takes_the_last_checkpoint(start: Start, tmp_path: Path) -> None:
    server = start("-e", "disk=1M", "--checkpoint", str(tmp_path / "kept"), "--checkpoint-interval", "1d")
    assert not list((tmp_path / "kept").glob("*.stream"))
    assert server.stop() == 0
    assert len(list((tmp_path / "kept").glob("*.stream"))) == 1


def test_a_stream_of_json_that_somebody_ends_is_json_to_its_end(start: Start) -> None:
    """A table for people came behind it, and on a terminal the whole view."""
    server = start("-e", "disk=1M")
    words = ["top", "--json", "--interval", "0.1", "--control", str(server.control)]
    command = ["env", "--default-signal=INT", *NBDZRAM, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=clean_environment()) as process:
        assert process.stdout is not None
        told = [process.stdout.readline()]
        process.send_signal(signal.SIGINT)
        told += process.stdout.read().splitlines()
    assert process.returncode == 0
    assert all(json.loads(line)["schema"] == 1 for line in told)
