"""A takeover that fails or is refused leaves the old server serving, its clients attached."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdzram.cli.takeover import Takeover
from nbdzram.control.client import ControlClient
from nbdzram.errors import UserError
from nbdzram.server.handover import FORMAT, SERVING, Handover
from tests.support.nbd_client import Client
from tests.support.pki import Pki
from tests.support.server import START_SECONDS, Nbdzram, free_port
from tests.support.takeover import MIB, PATIENT, PLAIN, SIZE, Line, ask, beating, ends_when_it_is_to_take, listening
from tests.wire import CMD_WRITE, SIMPLE_REPLY, request

pytestmark = pytest.mark.interop


def ends_when_it_has_taken(line: Line, place: Path) -> None:
    with listening(place) as listener:
        ask(line, place)
        with listener.accept()[0] as giver:
            Handover.take(giver).close()


def says_something_else(line: Line, place: Path) -> None:
    with listening(place) as listener:
        ask(line, place)
        with listener.accept()[0] as giver:
            taken = Handover.take(giver)
            giver.sendall(b"x" * len(SERVING))
            taken.close()


def cannot_bind_its_metrics(line: Line, _: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        metrics = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(AssertionError, match="cannot listen on"):
            line.take_over(["--metrics", metrics])


def cannot_read_its_certificate(line: Line, _: Path) -> None:
    missing = str(line.directory / "missing")
    with pytest.raises(AssertionError, match="missing"):
        line.take_over(["--tls", "on", "--tls-certificate", missing, "--tls-key", missing])


def has_no_descriptors(line: Line, _: Path) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(line.last.client()) for _ in range(60)]
        with pytest.raises(AssertionError, match="raise LimitNOFILE="):
            line.take_over(behind=["prlimit", "--nofile=64:64"])
        line.servers[0].wait_until(lambda: "going on" in line.servers[0].log, START_SECONDS)
        for client in clients:
            assert client.read(0, 4096) == bytes(4096)


def cannot_open_the_pools(line: Line, _: Path) -> None:
    """Its state directory is the same, and one of its pools is no arena."""
    (Path(line.state) / "other.pool").write_bytes(b"no arena" * 4096)
    with pytest.raises(AssertionError, match="is not an nbdzram arena"):
        line.take_over(["--pool", "other"])


def has_an_image_to_load(line: Line, _: Path) -> None:
    """Which takes minutes, and clients would wait as long."""
    image = line.directory / "image"
    image.write_bytes(bytes(MIB))
    with pytest.raises(AssertionError, match="'loaded' is to be loaded from an image, which only a start does"):
        line.take_over(["-e", f"loaded=@{image}"])


@pytest.mark.parametrize(
    "fails",
    [
        ends_when_it_is_to_take,
        ends_when_it_has_taken,
        says_something_else,
        cannot_bind_its_metrics,
        cannot_read_its_certificate,
        has_no_descriptors,
        cannot_open_the_pools,
        has_an_image_to_load,
    ],
)
def test_a_successor_that_fails_leaves_the_old_server_serving(
    either_line: Line, fails: Callable[[Line, Path], None]
) -> None:
    line = either_line
    if not line.state and fails is cannot_open_the_pools:
        pytest.skip("no file of a pool lies anywhere")
    with beating(line) as beater:
        fails(line, line.directory / "s")
        server = line.servers[0]
        server.wait_until(lambda: "going on" in server.log, START_SECONDS)
        beater.beat()
        assert line.attached() == (61 if fails is has_no_descriptors else 1), "its client had to connect again"
        with Client(server.unix_path, "disk") as newcomer:
            newcomer.read(0, 4096)
        assert server.command_line("stat").returncode == 0
        line.servers[1:] = []
        line.take_over()
        beater.beat()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"speaks": FORMAT + 1}, "restart it instead"),
        ({"state": "/somewhere/else"}, "and not in /somewhere/else"),
        ({"state": ""}, "and not in memory"),
        ({"knows": []}, "which the one that asks does not know"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_happens(line: Line, given: dict[str, object], says: str) -> None:
    with beating(line) as beater:
        with pytest.raises(UserError, match=says):
            ask(line, line.directory / "s", **given)  # type: ignore[arg-type]
        beater.beat()
    assert "going on" not in line.last.log


@pytest.mark.parametrize("held", [0, 1])
def test_disks_in_memory_are_not_given_to_who_has_a_directory_nor_the_other_way(tmp_path: Path, held: int) -> None:
    line = Line(tmp_path, exports={"disk": "1M"}, in_memory=not held)
    with pytest.raises(UserError, match="and not in"):
        ask(line, tmp_path / "s", state="" if held else str(tmp_path))
    line.last.stop()


def test_one_takeover_at_a_time_and_who_asks_meanwhile_is_answered_by_the_next(tmp_path: Path) -> None:
    line, payload = Line(tmp_path, program=PATIENT), b"p" * MIB
    with line.last.client() as client, listening(line.directory / "s") as listener:
        client.socket.sendall(request(CMD_WRITE, 0, MIB, cookie=1) + payload[: MIB // 2])
        ask(line, line.directory / "s")
        with pytest.raises(UserError, match="it is ending already"):
            ask(line, line.directory / "t")
        client.socket.sendall(payload[MIB // 2 :])
        with listener.accept()[0] as giver:
            taken = Handover.take(giver)
            with contextlib.ExitStack() as stack:  # nobody accepts it now, and it is not refused either
                waiting = stack.enter_context(ControlClient(line.control))
                taken.close()
                giver.close()
                line.last.wait_until(
                    lambda: [export.name for export in waiting.status().exports] == ["disk"], START_SECONDS
                )
        assert SIMPLE_REPLY.unpack(client.receive(SIMPLE_REPLY.size))[1:] == (0, 1)
    line.last.stop()


def test_a_server_that_is_told_to_stop_while_it_gives_stops_where_that_fails(line: Line) -> None:
    with listening(line.directory / "s") as listener:
        ask(line, line.directory / "s")
        with listener.accept()[0] as giver:
            Handover.take(giver).close()
            line.last.process.send_signal(signal.SIGTERM)
    assert line.last.process.wait(START_SECONDS) == 0, line.last.log


def test_who_goes_on_needs_nothing_that_is_not_there_any_more(tmp_path: Path) -> None:
    """Neither certificates that are broken by now, which may be why nobody could take over, nor its metrics' port."""
    pki = Pki(tmp_path)
    certificate, key = pki.issue("localhost", file="server", alternatives="DNS:localhost")
    files = ["--tls-certificate", str(certificate), "--tls-key", str(key)]
    port = free_port()
    line = Line(tmp_path, ["--tls", "on", *files, "--metrics", f"127.0.0.1:{port}"], in_memory=True)
    with beating(line) as beater, listening(line.directory / "s") as listener:
        ask(line, line.directory / "s")
        with listener.accept()[0] as giver:
            taken = Handover.take(giver)
            certificate.write_text("broken")
            with socket.create_server(("127.0.0.1", port)):
                taken.close()
                giver.close()
                line.last.wait_until(lambda: "going on without metrics" in line.last.log, START_SECONDS)
                beater.beat()
    assert line.attached() == 1
    line.last.stop()


IMPATIENT = """
import os
import nbdzram.server.handover as handover
from nbdzram.__main__ import main
real = handover.receive_exactly
def receive(take, *what):
    handover.receive_exactly = real
    open(os.environ["AT_STEP"]).close()
    take.__self__.settimeout(0.001)
    return real(take, *what)
handover.receive_exactly = receive
main()
"""
"""A server whose patience with its first successor ends when the test opens a pipe, however long that takes to come to
its step."""


@pytest.mark.parametrize("step", ["new takes", "new has opened", "new is ready"])
@pytest.mark.parametrize("in_memory", [False, True], ids=["directory", "memory"])
def test_a_successor_that_hangs_is_ended_and_the_old_server_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, *, in_memory: bool
) -> None:
    """It may have the arenas already, and keep them: then neither of the two would serve."""
    at_step = tmp_path / "at_step"
    os.mkfifo(at_step)
    monkeypatch.setenv("AT_STEP", str(at_step))
    line = Line(tmp_path, in_memory=in_memory, program=["-c", IMPATIENT])
    old, place = line.last, tmp_path / "step"
    words = ["serve", "--takeover", "-e", f"disk={SIZE}", "--control", str(line.control), "--metrics", "off"]
    with beating(line) as beater, listening(place) as steps, (tmp_path / "new.log").open("w") as log:
        hanging = subprocess.Popen(
            [sys.executable, "-m", "tests.support.held", step, str(place), *words, *line.arguments],
            env=Nbdzram.environment(old),
            stdout=log,
            stderr=log,
        )
        try:
            with steps.accept()[0], contextlib.ExitStack() as impatient:
                impatient.callback(os.close, os.open(at_step, os.O_RDWR))  # which waits for nobody
                assert hanging.wait(START_SECONDS) == -signal.SIGKILL
        finally:
            hanging.kill()
            hanging.wait()
        old.wait_until(lambda: "going on" in old.log, START_SECONDS)
        beater.beat()
    assert line.attached() == 1, "its client had to connect again"
    line.take_over()
    line.last.stop()


def test_a_successor_that_is_told_to_stop_before_it_serves_leaves_the_old_server_serving(tmp_path: Path) -> None:
    """It would take all clients over, and end with them, and with their disks."""
    line = Line(tmp_path, in_memory=True)
    old, place, said = line.last, tmp_path / "step", tmp_path / "new.log"
    words = ["serve", "--takeover", "-e", f"disk={SIZE}", "--control", str(line.control), "--metrics", "off"]
    with beating(line) as beater, listening(place) as steps, said.open("w") as log:
        new = subprocess.Popen(
            [sys.executable, "-m", "tests.support.held", "new has opened", str(place), *words, *line.arguments],
            env=Nbdzram.environment(old),
            stdout=log,
            stderr=log,
        )
        try:
            with steps.accept()[0]:
                new.send_signal(signal.SIGTERM)
                old.wait_until(lambda: "SIGTERM" in said.read_text(), START_SECONDS)
            assert new.wait(START_SECONDS) == 1
        finally:
            new.kill()
            new.wait()
        assert "told to stop before this server served, so the other goes on" in said.read_text()
        old.wait_until(lambda: "going on" in old.log, START_SECONDS)
        beater.beat()
    assert line.attached() == 1, "its client had to connect again"
    line.last.stop()


def test_who_is_given_up_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its word finds no way any more, and the one that gave it up lives."""
    monkeypatch.setattr("nbdzram.server.handover.ENDING_SECONDS", 0.0)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.shutdown(socket.SHUT_RDWR)
        told: list[bool] = []
        taken = Takeover(Handover(), theirs, os.pidfd_open(os.getpid()), lambda: told.append(True))
        with pytest.raises(UserError, match="the other server goes on"):
            taken.confirm()
    assert not told


@pytest.mark.parametrize("stops", [False, True], ids=["serves", "serves-if-only-to-end-in-order"])
def test_who_took_over_from_a_server_that_died_serves(*, stops: bool) -> None:
    with subprocess.Popen(["true"]) as died:
        process = os.pidfd_open(died.pid)
    ours, theirs = socket.socketpair()
    ours.close()
    told: list[bool] = []
    with theirs:
        Takeover(Handover(), theirs, process, lambda: told.append(True), told_to_stop=lambda: stops).confirm()
    assert told


@pytest.mark.parametrize("where", ["memory", "directory"])
def test_a_state_directory_that_a_reload_read_of_counts_from_the_next_start_and_for_no_takeover(
    tmp_path: Path, where: str
) -> None:
    """Who took over went on in the new one, with empty disks; or failed, and the old server went on there, or ended."""
    config = tmp_path / "nbdzram.toml"
    before = "" if where == "memory" else f"state_dir = '{tmp_path / 'before'}'\n"
    config.write_text(before)
    line = Line(tmp_path, ["--config", str(config)], in_memory=True)
    with line.last.client() as client, beating(line) as beater:
        client.write(0, b"a" * 4096)
        config.write_text(f"state_dir = '{tmp_path / 'behind'}'\n")
        for _ in range(2):
            assert "state_dir takes effect at the next start" in line.last.command_line("reload").stdout
        with pytest.raises(
            AssertionError, match=f"its disks lie in {'memory' if where == 'memory' else before[13:-2]}"
        ):
            line.take_over()
        beater.beat()
        config.write_text(before)
        line.take_over()
        beater.beat()
        assert client.read(0, 4096) == b"a" * 4096
    assert line.attached() == 2, "its clients had to connect again"
    line.last.stop()


@pytest.mark.parametrize("how", ["arena removed", "directory replaced"])
def test_disks_whose_files_are_not_there_any_more_are_not_taken_over_as_empty_ones(tmp_path: Path, how: str) -> None:
    """Clients that keep their connections would find zeroes, and write to what nobody looks for."""
    line = Line(tmp_path)
    arena, away = Path(line.state) / "default.pool", tmp_path / "away"
    with line.last.client() as client, beating(line) as beater:
        client.write(0, b"a" * 4096)
        if how == "arena removed":
            arena.rename(away)
        else:
            Path(line.state).rename(away)
            Path(line.state).mkdir()
        with pytest.raises(AssertionError, match="is not the file that is served"):
            line.take_over()
        beater.beat()
        assert client.read(0, 4096) == b"a" * 4096
        assert not arena.exists(), "it was made"
        assert "takes over" not in line.last.log, "clients waited"
        if how == "arena removed":
            away.rename(arena)
        else:
            shutil.rmtree(line.state)  # the log of what was refused
            away.rename(line.state)
        line.take_over()
        beater.beat()
        assert client.read(0, 4096) == b"a" * 4096
    line.last.stop()


def test_who_sees_another_file_system_where_the_disks_lie_takes_nothing_over(tmp_path: Path) -> None:
    """It is in a mount namespace of its own, as a unit or a container may be."""
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    line = Line(tmp_path)
    over = f'mount -t tmpfs tmpfs {line.state} && exec "$@"'
    with line.last.client() as client, beating(line) as beater:
        client.write(0, b"a" * 4096)
        with pytest.raises(AssertionError, match="is not the file that is served"):
            line.take_over(behind=["unshare", "--mount", "sh", "-c", over, "sh"])
        line.last.wait_until(lambda: "going on" in line.last.log, START_SECONDS)
        beater.beat()
        assert client.read(0, 4096) == b"a" * 4096
    assert line.attached() == 2, "its clients had to connect again"
    line.last.stop()


def test_who_ended_before_anything_was_given_to_him_is_told_to_nobody(line: Line) -> None:
    """Whoever asks has to listen: nothing ends before he was reached."""
    with beating(line) as beater:
        with pytest.raises(UserError, match="is it still there"):
            ask(line, line.directory / "s")
        beater.beat()
    assert "going on" not in line.last.log


def test_a_server_that_is_killed_before_it_gives_is_followed_by_one_that_starts(tmp_path: Path) -> None:
    """With a state directory it has what the killed one had."""
    place = tmp_path / "step"
    line = Line(tmp_path, program=["-m", "tests.support.held", "old ended runs", str(place)])
    with line.last.client() as client:
        client.write(0, b"a" * 4096)
    with listening(place) as steps:
        starting = threading.Thread(target=lambda: line.servers.append(line._server(["--takeover"])))
        starting.start()
        with steps.accept()[0]:
            line.servers[0].kill()
        starting.join()
    assert "ended before it gave anything away; starting" in line.last.log
    with line.last.client() as client:
        assert client.read(0, 4096) == b"a" * 4096
    line.last.stop()


NO_PROGRAM = ("-c", "import sys; from nbdzram.cli.main import run; sys.exit(run(sys.argv[1:]))")
"""A server within a process of somebody else's, which was not begun to go first where memory runs out."""


@pytest.mark.parametrize("program", [PLAIN, NO_PROGRAM], ids=["program", "embedded"])
def test_where_no_server_runs_one_starts(tmp_path: Path, program: tuple[str, ...]) -> None:
    line = Line(tmp_path, ["--takeover"], program=program)
    with line.last.client() as client:
        client.write(0, b"a" * 4096)
    assert "no server runs here that could be taken over" in line.last.log
    line.last.stop()
    assert not list(tmp_path.glob(f".{os.getpid()}*"))
