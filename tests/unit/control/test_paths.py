"""Where the control socket is: the server's is in a directory of its own, and a client finds no stranger's."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdzram.control import paths
from nbdzram.control.paths import socket_for_client, socket_for_server
from nbdzram.errors import ConfigError, NoServerHere, ServerUnreachable, UserError
from tests.support.reach import let_others_pass


def test_the_runtime_directory_is_ours_alone(tmp_path: Path) -> None:
    found = socket_for_server({"XDG_RUNTIME_DIR": str(tmp_path)})
    assert found == tmp_path / "nbdzram" / "nbdzram.sock"
    assert stat.S_IMODE(found.parent.stat().st_mode) == 0o700
    for mode in (0o777, 0o770, 0o707):
        found.parent.chmod(mode)
        assert socket_for_server({"XDG_RUNTIME_DIR": str(tmp_path)}) != found
    found.parent.chmod(0o755)
    assert socket_for_server({"XDG_RUNTIME_DIR": str(tmp_path)}) == found


def test_of_the_runtime_directories_that_systemd_names_the_first_is_ours(tmp_path: Path) -> None:
    named = ":".join(str(tmp_path / name) for name in ("first", "second"))
    assert socket_for_server({"RUNTIME_DIRECTORY": named}) == tmp_path / "first" / "nbdzram.sock"


def test_a_client_finds_the_socket_or_says_where_it_looked(tmp_path: Path) -> None:
    environment = {"XDG_RUNTIME_DIR": str(tmp_path)}
    if not any(Path(known).exists() for known in ("/run/nbdzram/nbdzram.sock", f"/tmp/nbdzram-{os.geteuid()}")):
        with pytest.raises(ServerUnreachable, match=str(tmp_path)):
            socket_for_client(environment)
    path = socket_for_server(environment)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        assert socket_for_client(environment) == path
    assert socket_for_client({"NBDZRAM_CONTROL": "/named"}) == Path("/named")


def test_of_other_users_sockets_only_that_of_the_service_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below /run root alone makes a directory."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files to another user")
    monkeypatch.setattr(paths, "SYSTEM_DIRECTORY", tmp_path / "run")
    with contextlib.ExitStack() as held:
        for directory in (tmp_path / "nbdzram", tmp_path / "run"):
            directory.mkdir()
            server = held.enter_context(socket.socket(socket.AF_UNIX))
            server.bind(str(directory / "nbdzram.sock"))
            os.chown(directory / "nbdzram.sock", 65534, -1)
        assert socket_for_client({"XDG_RUNTIME_DIR": str(tmp_path)}) == tmp_path / "run" / "nbdzram.sock"


def test_a_client_asks_at_the_socket_that_the_configuration_names(tmp_path: Path) -> None:
    """The file that NBDZRAM_CONFIG names, which `serve` reads too; one that cannot be read names nothing."""
    file = tmp_path / "nbdzram.toml"
    environment = {"NBDZRAM_CONFIG": str(file), "XDG_RUNTIME_DIR": str(tmp_path)}
    beside = socket_for_server(environment)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(beside))
        for content in ("", "control = 7\n", "no TOML"):
            file.write_text(content)
            assert socket_for_client(environment) == beside
        file.unlink()
        assert socket_for_client(environment) == beside
        file.write_text('control = "/elsewhere/own.sock"\n')
        assert socket_for_client(environment) == Path("/elsewhere/own.sock")
        assert socket_for_client(environment | {"NBDZRAM_CONTROL": "/named"}) == Path("/named")


def a_file(place: Path) -> None:
    place.touch()


def a_link(place: Path) -> None:
    place.symlink_to(place.parent)


def anothers(place: Path) -> None:
    place.mkdir()
    os.chown(place, 65534, -1)


def nowhere(place: Path) -> None:
    place.parent.rmdir()


WRONG: dict[Callable[[Path], None], str] = {
    a_file: "File exists",
    a_link: "is not a directory",
    anothers: "belongs to another user",
    nowhere: "No such file",
}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
@pytest.mark.parametrize("make", WRONG, ids=lambda make: make.__name__)
def test_a_directory_that_is_not_ours_is_passed_over_and_where_there_is_no_other_why_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]
) -> None:
    wrong, usable = tmp_path / "above" / "wrong", tmp_path / "usable"
    wrong.parent.mkdir()
    make(wrong)
    monkeypatch.setattr(paths, "_directories", lambda _: iter([wrong, usable]))
    assert socket_for_server({}) == usable / "nbdzram.sock"
    monkeypatch.setattr(paths, "_directories", lambda _: iter([wrong, wrong]))
    with pytest.raises(UserError, match=rf"({WRONG[make]}.*){{2}}; name one with --control PATH"):
        socket_for_server({})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_socket_where_one_may_not_look_is_told_unless_there_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_others_pass(tmp_path)
    closed, other = tmp_path / "closed", tmp_path / "open"
    for place, mode in ((closed, 0o700), (other, 0o755)):
        place.mkdir()
        place.chmod(mode)
    monkeypatch.setattr(paths, "_directories", lambda _: iter([tmp_path / "none", closed, other]))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(other / "nbdzram.sock"))
        os.chown(other / "nbdzram.sock", 65534, -1)
        os.setresuid(65534, 65534, 0)
        try:
            assert socket_for_client({}) == other / "nbdzram.sock"
            monkeypatch.setattr(paths, "_directories", lambda _: iter([closed, tmp_path / "none"]))
            with pytest.raises(ServerUnreachable, match=rf"{closed}/nbdzram.sock may not be opened by user 65534"):
                socket_for_client({})
        finally:
            os.setresuid(0, 0, 0)


def test_the_socket_that_a_dead_server_left_hides_no_server_that_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was killed in a login's runtime directory stood before that of the service."""
    places = [tmp_path / name for name in ("first", "second", "third")]
    sockets = [place / "nbdzram.sock" for place in places]
    monkeypatch.setattr(paths, "_directories", lambda _: iter(places))
    with contextlib.ExitStack() as held:
        for place, path in zip(places, sockets, strict=True):
            place.mkdir()
            server = held.enter_context(socket.socket(socket.AF_UNIX))
            server.bind(str(path))
            if path is sockets[1]:
                server.listen()
        assert socket_for_client({}) == sockets[1]
        sockets[1].unlink()
        assert socket_for_client({}) == sockets[0]
        sockets[0].unlink()
        assert socket_for_client({}) == sockets[2]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
def test_a_socket_of_another_user_is_told_and_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was passed over, and said not to be there."""
    path = tmp_path / "nbdzram.sock"
    monkeypatch.setattr(paths, "_directories", lambda _: iter([tmp_path]))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        os.chown(path, 65534, -1)
        with pytest.raises(ServerUnreachable, match=rf"{path} belongs to user 65534, .*; --control {path} asks it"):
            socket_for_client({})


def test_servers_of_other_users_are_told_where_none_of_ones_own_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks by sudo learns where the server is that he started as himself."""
    monkeypatch.setattr(paths, "_directories", lambda _: iter([tmp_path / "none"]))
    monkeypatch.setattr(paths, "ELSEWHERE", (f"{tmp_path}/*/nbdzram"[1:], f"{tmp_path}/nbdzram-*"[1:]))
    with contextlib.ExitStack() as held:
        for name in ("1000/nbdzram", "nbdzram-7", "nbdzram-8", "nbdzram-\n9", "nbdzram-none"):
            (tmp_path / name).mkdir(parents=True)
            if name != "nbdzram-none":
                server = held.enter_context(socket.socket(socket.AF_UNIX))
                server.bind(str(tmp_path / name / "nbdzram.sock"))
                if name != "nbdzram-8":
                    server.listen()
        with pytest.raises(ServerUnreachable) as refused:
            socket_for_client({})
        told = [
            f"user {os.geteuid()} runs one, which --control {tmp_path}/{name}/nbdzram.sock asks"
            for name in ("1000/nbdzram", "nbdzram-7")
        ]
        assert str(refused.value).split("; ")[2:] == told
    monkeypatch.setattr(paths, "ELSEWHERE", (f"{tmp_path}/nbdzram-*"[1:],))
    with pytest.raises(NoServerHere, match=r"or name it with --control$"):
        socket_for_client({})


def test_a_home_directory_is_meant_where_a_variable_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `serve` reads it, to which the shell gives the whole path."""
    monkeypatch.setenv("HOME", "/home/me")
    assert socket_for_client({"NBDZRAM_CONTROL": "~/a.sock"}) == Path("/home/me/a.sock")
    with pytest.raises(
        ConfigError, match="NBDZRAM_CONTROL: '~nobody-has-it/a' begins with the home directory of nobody"
    ):
        socket_for_client({"NBDZRAM_CONTROL": "~nobody-has-it/a"})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_server_ends_well_whose_socket_lies_where_it_may_not_look_any_more() -> None:
    """Somebody took its directory from it meanwhile: there is no socket of its own to remove."""
    code = (
        "import asyncio, os, sys; from pathlib import Path; from nbdzram.control.server import ControlServer\n"
        "async def story():\n"
        "    server = ControlServer(Path(sys.argv[1], 'c'), {}); await server.start()\n"
        "    os.chmod(sys.argv[1], 0); await server.stop(); print('ended')\n"
        "os.setuid(65534); asyncio.run(story())"
    )
    with tempfile.TemporaryDirectory() as place:  # pytest's are root's alone
        os.chown(place, 65534, -1)
        done = subprocess.run([sys.executable, "-c", code, place], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
@pytest.mark.parametrize(("owner", "is_asked"), [(0, True), (4711, True), (4712, False)])
def test_a_user_asks_at_sockets_of_his_own_and_of_root(
    owner: int, is_asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    monkeypatch.setattr(paths, "SYSTEM_DIRECTORY", tmp_path / "none")
    place = tmp_path / "nbdzram" / "nbdzram.sock"
    place.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place))
        os.chown(place, owner, -1)
        found: Path | None = None
        with contextlib.suppress(ServerUnreachable):
            found = socket_for_client({"XDG_RUNTIME_DIR": str(tmp_path)})
    assert found == (place if is_asked else None)
