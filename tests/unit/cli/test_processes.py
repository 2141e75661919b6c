"""A server and the processes around it: the command that it runs, its parent, and who looks for its number."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nbdzram.cli.announce import the_end
from nbdzram.cli.processes import parent_watched, pid_file, told_to_commands
from nbdzram.config import ServerConfig
from nbdzram.errors import UserError
from nbdzram.ready import readable
from tests.support.nbd_client import Client
from tests.unit.cli.conftest import NBDZRAM, Done, Server, clean_environment, run
from tests.unit.records import SERVER

Start = Callable[..., Server]


def private(directory: Path, *words: str) -> Done:
    """A server of one command, its temporary files in `directory`."""
    environment = clean_environment() | {"TMPDIR": str(directory)}
    done = subprocess.run(
        [*NBDZRAM, "serve", *words], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    return Done(done.returncode, done.stdout, done.stderr)


# -- --run -----------------------------------------------------------------------------------------------------------


def test_a_command_finds_the_server_and_its_status_is_the_servers(tmp_path: Path) -> None:
    asks = f"{sys.executable} -m nbdzram exports list"
    done = private(
        tmp_path, "-e", "disk=1M", "--run", f'echo "$uri" "$unixsocket" "[$port]" "$exportname"; {asks}; exit 7'
    )
    first, *listed = done.out.splitlines()
    uri, path, port, name = first.split()
    assert (uri, port, name) == (f"nbd+unix:///disk?socket={path}", "[]", "disk")
    assert Path(path).parent.parent == tmp_path
    assert listed[1].split()[0] == "disk"  # the command line asks this server
    assert done.code == 7
    assert list(tmp_path.iterdir()) == []  # its place is gone with it


def test_a_command_s_server_listens_where_a_socket_has_room(tmp_path: Path) -> None:
    """Temporary files may lie deeper than the path of a socket may be long."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    done = private(deep, "-e", "disk=1M", "--run", 'echo "$unixsocket"')
    assert done.code == 0
    path = Path(done.out.strip())
    assert (path.parent.parent, path.parent.exists()) == (Path("/tmp"), False)


def test_a_command_that_a_signal_ended_gives_what_shells_give(tmp_path: Path) -> None:
    assert private(tmp_path, "-e", "disk=1M", "--run", "kill -9 $$").code == 128 + signal.SIGKILL
    assert private(tmp_path, "-e", "disk=1M", "--run", "true").code == 0


def test_a_command_finds_the_address_that_was_asked_for(tmp_path: Path) -> None:
    with_port = private(
        tmp_path, "-e", "a=1M", "-e", "b=1M", "--default-export", "b", "-p", "0", "--run", "echo $uri $port"
    )
    uri, port = with_port.out.split()
    assert (int(port) > 0, uri) == (True, f"nbd://127.0.0.1:{port}/b")
    path = tmp_path / "n.sock"
    assert private(tmp_path, "-U", str(path), "--run", 'echo "$unixsocket [$exportname]"').out == f"{path} []\n"


def test_a_server_that_is_told_to_stop_tells_its_command_and_waits_for_it(tmp_path: Path) -> None:
    said = tmp_path / "said"
    command = f"trap 'echo told > {said}; exit 3' TERM; echo up; while :; do sleep 0.01; done"
    process = subprocess.Popen(
        [*NBDZRAM, "serve", "-e", "disk=1M", "--run", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert (process.returncode, said.read_text()) == (3, "told\n"), told


def test_a_server_on_standard_input_runs_no_command(tmp_path: Path) -> None:
    for words in (("--run", "true"), ("--exit-with-parent",)):
        done = private(tmp_path, "--stdin", *words)
        assert (done.code, f"leave out {words[0]}" in done.err) == (2, True)


def test_a_server_that_no_address_leads_to_tells_empty_ones() -> None:
    told = told_to_commands(replace(SERVER, uris=("nbd+vsock://1:10809",)), None, Path("c.sock"))
    assert (told["unixsocket"], told["port"], told["exportname"]) == ("", "", SERVER.exports[0].name)
    assert told_to_commands(replace(SERVER, uris=(), exports=()), "gone", Path("c.sock")) == {
        "uri": "",
        "unixsocket": "",
        "port": "",
        "exportname": "",
        "NBDZRAM_CONTROL": "c.sock",
    }


# -- --pidfile -------------------------------------------------------------------------------------------------------


def test_the_process_number_stands_in_a_file_while_it_serves(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "nbdzram.pid"
    file.write_text("4194304\n")  # of one that was killed
    server = start("-e", "disk=1M", "--pidfile", str(file))
    assert file.read_text() == f"{server.process.pid}\n"  # whoever has read the greeting finds it
    assert server.stop() == 0
    assert list(tmp_path.glob("*nbdzram.pid*")) == []


def test_a_file_that_is_another_servers_by_now_stays(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    with pid_file(file):
        file.write_text("1\n")
    assert file.read_text() == "1\n"


def test_a_server_whose_number_cannot_be_written_does_not_serve(tmp_path: Path) -> None:
    done = private(tmp_path, "-e", "disk=1M", "--pidfile", str(tmp_path / "no" / "pid"), "--run", "echo served")
    assert (done.code, done.out) == (1, "")
    assert "cannot write the process's number to" in done.err.splitlines()[-1]
    assert "name another file with --pidfile" in done.err


@pytest.mark.parametrize("file", ["/", ".", ".."])
def test_a_directory_is_no_file_for_the_number(tmp_path: Path, file: str) -> None:
    done = private(tmp_path, "-e", "disk=1M", "--pidfile", file, "--run", "echo served")
    assert (done.code, done.out) == (1, "")
    assert done.err.splitlines()[-1].startswith(f"nbdzram: cannot write the process's number to {file}: ")


@pytest.mark.parametrize("through_a_link", [False, True])
def test_what_is_no_file_is_not_replaced_by_the_number(tmp_path: Path, through_a_link: bool) -> None:
    """As root, --pidfile /dev/null took that from every program."""
    device, file = tmp_path / "null", tmp_path / "null"
    os.mkfifo(device)
    if through_a_link:
        file = tmp_path / "link"
        file.symlink_to(device)
    with pytest.raises(UserError, match="something that is no file stands there"), pid_file(file):
        pass
    assert device.is_fifo()
    assert file.is_symlink() == through_a_link
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("held", [b"format = 1\n", b"\x00" * 5, b"1" * 65])
def test_a_file_that_holds_something_else_is_not_replaced_by_the_number(tmp_path: Path, held: bytes) -> None:
    """--pidfile STATE_DIR/default.pool left no disk."""
    file = tmp_path / "default.pool"
    file.write_bytes(held)
    with pytest.raises(UserError, match="a file stands there that holds no such number"), pid_file(file):
        pass
    assert file.read_bytes() == held
    file.write_bytes(b"")
    with pid_file(file):
        assert file.read_text() == f"{os.getpid()}\n"


def test_the_number_is_written_through_no_link_that_lies_where_it_is_made(tmp_path: Path) -> None:
    """In a directory that others may write, they know under which name it is made, and may lay a link there."""
    precious, made = tmp_path / "precious", tmp_path / f".nbdzram.{os.getpid()}"
    precious.write_text("much\n")
    made.symlink_to(precious)
    with pid_file(tmp_path / "pid"):
        assert (tmp_path / "pid").read_text() == f"{os.getpid()}\n"
        assert not (tmp_path / "pid").is_symlink()
    assert precious.read_text() == "much\n"


def test_a_pipe_that_took_the_numbers_place_is_not_read_at_the_end(tmp_path: Path) -> None:
    """Nobody writes to it: the server would never end."""
    file = tmp_path / "pid"
    with pid_file(file):
        file.unlink()
        os.mkfifo(file)
    assert file.is_fifo()


# -- --exit-with-parent ----------------------------------------------------------------------------------------------


def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    path, file = tmp_path / "n.sock", tmp_path / "pid"
    words = ["serve", "-e", "disk=1M", "-U", str(path), "--metrics", "off", "--control", str(tmp_path / "c.sock")]
    code = f"""
import subprocess, sys
served = subprocess.Popen({[*NBDZRAM, *words, "--exit-with-parent", "--pidfile", str(file)]}, stdout=subprocess.PIPE)
served.stdout.readline()
"""
    ours, theirs = os.pipe()  # ends when all have ended who hold it
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True, timeout=60, env=clean_environment())
    os.close(theirs)
    with os.fdopen(ours) as told:
        assert "the process that started this one has ended; stopping" in told.read()
    assert not path.exists()
    assert not file.exists()


def test_a_server_ends_with_its_parent_while_it_starts(tmp_path: Path) -> None:
    """A start may read for hours, or, from a pipe, for ever."""
    place = tmp_path / "stream"
    os.mkfifo(place)
    words = ["serve", "--restore", str(place), "-U", str(tmp_path / "n"), "--metrics", "off"]
    words += ["--control", str(tmp_path / "c"), "--exit-with-parent"]
    code = f"import subprocess, sys; subprocess.Popen({[*NBDZRAM, *words]}); sys.stdin.read()"
    ours, theirs = os.pipe()
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=theirs, env=clean_environment()
    )
    os.close(theirs)
    with os.fdopen(ours) as told, place.open("wb"):  # once it is read, which the server does by then
        parent.communicate()
        assert readable(told.fileno(), seconds=30)
        assert "the process that started this one has ended; stopping" in told.readline()
        assert f"reading {place} was interrupted" in told.read()


def test_a_parent_that_had_ended_before_is_found_out() -> None:
    child = subprocess.Popen(["true"])
    child.wait()

    async def look(parent: int) -> bool:
        ended = asyncio.Event()
        with parent_watched(parent, ended.set):
            return ended.is_set()

    assert asyncio.run(look(child.pid))
    assert asyncio.run(look(os.getpid()))  # somebody, but not our parent
    assert not asyncio.run(look(os.getppid()))


def test_a_machine_that_cannot_watch_a_process_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(_: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "pidfd_open", refuses)

    async def look() -> None:
        with parent_watched(os.getppid(), lambda: None):
            pass

    with pytest.raises(UserError, match="leave out --exit-with-parent"):
        asyncio.run(look())


# -- what a stop says ------------------------------------------------------------------------------------------------


def test_ctrl_c_says_what_it_does_and_what_it_did(start: Start, tmp_path: Path) -> None:
    server = start("-e", "disk=1M", "--log-level", "info")
    client = Client(server.socket, "disk")
    with client.socket:
        client.write(0, b"x" * 4096)
        server.process.send_signal(signal.SIGINT)
        server.process.communicate(timeout=60)
    assert server.process.returncode == 0
    told = server.log.read_text()
    assert "SIGINT: stopping once 1 client has the answers to what was begun, 10 s at most; a second signal" in told
    assert "stopped; 4K of content is gone with it: --state-dir keeps disks" in told
    kept = start("-e", "disk=1M", "--state-dir", str(tmp_path / "state"))
    assert kept.stop() == 0
    assert "SIGTERM: nobody is attached; stopping; a second signal ends at once" in kept.log.read_text()
    assert f"stopped; the disks stay in {tmp_path / 'state'}" in kept.log.read_text()


def test_a_stop_says_that_the_last_checkpoint_has_the_disks_or_that_it_failed(start: Start, tmp_path: Path) -> None:
    place = tmp_path / "kept"
    server = start("-e", "disk=1M", "--checkpoint", str(place), "--log-level", "info")
    with Client(server.socket, "disk") as client:
        client.write(0, b"x" * 4096)
    assert server.stop() == 0
    assert f"stopped; the disks, 4K of content, are in the last checkpoint in {place}" in server.log.read_text()
    again = start("-e", "disk=1M", "--checkpoint", str(place), "--log-level", "info")
    with Client(again.socket, "disk") as client:
        assert client.read(0, 4096) == b"x" * 4096
        client.write(0, b"y" * 4096)
    place.rename(tmp_path / "gone")
    place.write_text("no directory")
    assert again.stop() == 0
    assert f"stopped; the last checkpoint in {place} failed, and what was written since" in again.log.read_text()


def test_disks_that_systemd_keeps_are_not_said_to_be_gone() -> None:
    told = the_end(ServerConfig(exports=()), SERVER, None, systemd_keeps=True)
    assert told == "stopped; systemd keeps the disks for the next process of the unit, unless it stops that"


# -- --log -----------------------------------------------------------------------------------------------------------


def test_a_log_may_go_nowhere(tmp_path: Path) -> None:
    assert private(tmp_path, "-e", "disk=1M", "--log", "null", "--run", "true").err == ""
    assert private(tmp_path, "-e", "disk=1M", "--run", "true").err != ""


def test_a_log_of_another_kind_is_a_usage_error() -> None:
    done = run("serve", "--log", "paper", "--check-config")
    assert (done.code, "it is one of stderr, syslog, null" in done.err) == (2, True)


def test_nobody_watches_a_parent_behind_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever had the descriptor's number next would have ended the server."""
    opened: list[int] = []
    watched = os.pidfd_open

    def keep(process: int) -> int:
        opened.append(watched(process))
        return opened[-1]

    monkeypatch.setattr(os, "pidfd_open", keep)

    async def story() -> None:
        with parent_watched(os.getppid(), lambda: None):
            pass
        assert not asyncio.get_running_loop().remove_reader(opened[0])

    asyncio.run(story())
