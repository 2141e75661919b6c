"""Who asks to take over waits for the server that agreed, and for nobody else."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdzram.cli.takeover import GiverEnded, _accept, _ask, _take, take_over
from nbdzram.errors import ServerUnreachable, UserError
from nbdzram.ready import readable
from nbdzram.server.handover import reach

CONNECT = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.recv(1)"


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen(2)
        yield listening


def test_a_stranger_who_connects_is_hung_up_on_and_the_server_is_waited_for(listener: socket.socket) -> None:
    with (
        subprocess.Popen([sys.executable, "-c", CONNECT, listener.getsockname()]) as stranger,
        socket.socket(socket.AF_UNIX) as server,
    ):
        assert readable(listener.fileno())  # the stranger is there, and first
        server.connect(listener.getsockname())
        giver, number = _accept(listener, {os.getpid()})
        assert number == os.getpid()
        with giver:
            server.send(b"x")
            assert giver.recv(1) == b"x"
        assert stranger.wait() == 0


def test_a_server_that_may_give_nothing_to_another_user_says_so(listener: socket.socket) -> None:
    place, root = Path(listener.getsockname()), os.geteuid() == 0
    place.chmod(0)
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=r"Permission denied; run both as one user$"):
            reach(place)
    finally:
        if root:
            os.seteuid(0)


def test_who_finds_no_server_leaves_nothing_where_it_waited_for_one(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        (tmp_path / f".{os.getpid()}").write_text("of one that was killed and had our number")
        with take_over(tmp_path / "control.sock", None, None) as taken:
            assert taken is None
            assert list(tmp_path.iterdir()) == []
        assert os.umask(0) == 0o027  # what it makes from now on is for whom it was
        with (
            pytest.raises(UserError, match="cannot make a socket beside the control socket"),
            take_over(tmp_path / "nowhere" / "control.sock", None, None),
        ):
            pass
        assert os.umask(0) == 0
    finally:
        os.umask(before)


@pytest.mark.parametrize("agrees", [True, False])
def test_a_server_that_agreed_and_whose_answer_is_lost_gives_all_the_same(
    listener: socket.socket, tmp_path: Path, agrees: bool
) -> None:
    """It ends its control connections as soon as it has come to rest, before or behind its answer; one that is killed
    before it agreed gives nothing."""
    with socket.socket(socket.AF_UNIX) as control, socket.socket(socket.AF_UNIX) as server:
        control.bind(str(tmp_path / "control"))
        control.listen()

        def end() -> None:
            with control.accept()[0] as asked:
                asked.recv(1 << 16)
                if agrees:
                    server.connect(listener.getsockname())
                    server.send(b"x")

        ending = threading.Thread(target=end)
        ending.start()
        try:
            if agrees:
                giver, process = _ask(tmp_path / "control", listener, tmp_path / "s", None, [])
                with giver:
                    assert giver.recv(1) == b"x"
                assert process is not None
                os.close(process)
            else:
                with pytest.raises(ServerUnreachable):
                    _ask(tmp_path / "control", listener, tmp_path / "s", None, [])
        finally:
            ending.join()


LEAVES_UNASKED = """
import socket, sys
with socket.socket(socket.AF_UNIX) as control:
    control.bind(sys.argv[1])
    control.listen()
    print(flush=True)
    with control.accept()[0]:
        print(flush=True)
        sys.stdin.read()
"""


def test_who_agreed_is_waited_for_and_not_who_left_before_he_was_asked(listener: socket.socket, tmp_path: Path) -> None:
    """Of two that take over at once the later asks the earlier one: whose end it waits for, if that does not give."""
    control, pipe = tmp_path / "control", subprocess.PIPE
    with (
        subprocess.Popen([sys.executable, "-c", LEAVES_UNASKED, str(control)], stdin=pipe, stdout=pipe) as before,
        socket.socket(socket.AF_UNIX) as agrees,
        socket.socket(socket.AF_UNIX) as server,
    ):
        assert before.stdin is not None
        assert before.stdout is not None
        before.stdout.readline()

        def follow() -> None:
            assert before.stdin is not None
            assert before.stdout is not None
            before.stdout.readline()
            control.unlink()
            agrees.bind(str(control))
            agrees.listen()
            before.stdin.close()
            with agrees.accept()[0] as asked:
                asked.recv(1 << 16)
                server.connect(listener.getsockname())
                server.send(b"x")

        following = threading.Thread(target=follow)
        following.start()
        giver, process = _ask(control, listener, tmp_path / "s", None, [])
        following.join()
        with giver:
            assert process is not None
            assert f"Pid:\t{os.getpid()}\n" in Path(f"/proc/self/fdinfo/{process}").read_text()
            os.close(process)


LISTENS = "import socket, sys; socket.socket(fileno=int(sys.argv[1])).listen()"


@pytest.mark.parametrize("says", [True, False], ids=["says who it is", "of before"])
def test_who_agrees_need_not_be_who_listened_there_when_he_was_asked(
    listener: socket.socket, tmp_path: Path, says: bool
) -> None:
    """Whoever asks while another one takes over is answered by that, on a socket of which the kernel names the process
    that listened first. A server that does not say its number is not waited for where it cannot be told."""
    with socket.socket(socket.AF_UNIX) as control, socket.socket(socket.AF_UNIX) as server:
        control.bind(str(tmp_path / "control"))
        number = control.fileno()
        subprocess.run([sys.executable, "-c", LISTENS, str(number)], pass_fds=[number], check=True)

        def agree() -> None:
            with control.accept()[0] as asked:
                asked.recv(1 << 16)
                server.connect(listener.getsockname())
                server.send(b"x")
                result = os.getpid() if says else None
                asked.sendall(json.dumps({"jsonrpc": "2.0", "id": 1, "result": result}).encode() + b"\n")

        agreeing = threading.Thread(target=agree)
        agreeing.start()
        try:
            if not says:
                with pytest.raises(UserError, match="the other server agreed, and is not here"):
                    _ask(tmp_path / "control", listener, tmp_path / "s", None, [])
                return
            giver, process = _ask(tmp_path / "control", listener, tmp_path / "s", None, [])
            with giver:
                assert giver.recv(1) == b"x"
            assert process is not None
            assert f"Pid:\t{os.getpid()}\n" in Path(f"/proc/self/fdinfo/{process}").read_text()
            os.close(process)
        finally:
            agreeing.join()


def test_who_gives_may_have_begun_in_another_directory(
    listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path of ours leads it elsewhere, unless it is whole."""
    monkeypatch.chdir(tmp_path)
    asked: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as control:
        control.bind("control")
        control.listen()

        def hear() -> None:
            with control.accept()[0] as connection:
                asked.append(connection.recv(1 << 16))

        hearing = threading.Thread(target=hear)
        hearing.start()
        with pytest.raises(ServerUnreachable):
            _ask(Path("control"), listener, Path(".7"), Path("state"), [])
        hearing.join()
    assert [str(tmp_path / name).encode() in asked[0] for name in (".7", "state")] == [True, True]


@pytest.mark.parametrize(("lives", "raises"), [(True, UserError), (False, GiverEnded)])
def test_who_hangs_up_while_he_gives_goes_on_unless_he_is_dead(
    monkeypatch: pytest.MonkeyPatch, lives: bool, raises: type[Exception]
) -> None:
    """Where he is dead nobody else goes on: whoever was to take starts."""
    monkeypatch.setattr("nbdzram.server.handover.ENDING_SECONDS", 0.0)
    giver, taker = socket.socketpair()
    with giver, taker, subprocess.Popen(["cat"], stdin=subprocess.PIPE) as old:  # it ends when its input does
        process = os.pidfd_open(old.pid)
        if not lives:
            old.kill()
            old.wait()
        giver.sendall(b"\0\0\0")
        giver.close()
        try:
            with pytest.raises(raises):
                _take(taker, process)
        finally:
            os.close(process)
