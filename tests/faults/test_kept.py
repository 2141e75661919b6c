"""Disks in memory, whose arenas a supervisor keeps (sd_notify(3), FDSTORE=1): what a process's end leaves of them.

The supervisor is the test; under systemd itself: tests/deploy/test_booted.py.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.nbd_client import Client
from tests.support.server import START_SECONDS, Nbdzram

GIVE = 'export LISTEN_PID=$$; exec "$@"'


class Supervisor:
    """What systemd does for a unit: it listens, keeps descriptors by name, and gives them to the next process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store: dict[str, int] = {}
        self.messages: list[str] = []
        self.most = 64  # FileDescriptorStoreMax=; what is over it is dropped, and nobody is told
        self._numbers = itertools.count()
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(directory / "notify"))
        self._notify.setblocking(False)

    def hear(self) -> None:
        """All that was said so far."""
        while True:
            try:
                message, descriptors, _, _ = socket.recv_fds(self._notify, 4096, 8)
            except BlockingIOError:
                return
            said = dict(line.split("=", 1) for line in message.decode().splitlines())
            self.messages.append(message.decode())
            name = said.get("FDNAME", "")
            if "FDSTOREREMOVE" in said or ("FDSTORE" in said and name in self.store):
                self._forget(name)
            if "FDSTORE" in said and len(self.store) < self.most:
                self.store[name] = descriptors.pop()
            for descriptor in descriptors:
                os.close(descriptor)

    def start(self, *arguments: str) -> Nbdzram:
        """The unit's next process, once it has said that it is ready."""
        supervisor, place = self, self.directory / str(next(self._numbers))
        place.mkdir()
        self.messages.clear()
        kept = {name: os.dup(descriptor) for name, descriptor in self.store.items()}

        class Member(Nbdzram):
            pass_fds = tuple(kept.values())

            def environment(self) -> dict[str, str]:
                places = " ".join(f"{number}<&{fd}" for number, fd in enumerate(kept.values(), 103))
                moved = " ".join(f"{number}<&{number + 100}" for number in range(3, 3 + len(kept)))
                script = f"exec {places}; exec {moved}; {GIVE}" if kept else GIVE
                self.command[:0] = ["bash", "-c", script, "unit"]
                return super().environment() | {
                    "NOTIFY_SOCKET": str(supervisor.directory / "notify"),
                    "RUNTIME_DIRECTORY": str(supervisor.directory),
                    "LISTEN_FDS": str(len(kept)),
                    "LISTEN_FDNAMES": ":".join(kept),
                }

        server = Member(place, {"disk": "1M"}, arguments=arguments)
        for descriptor in kept.values():
            os.close(descriptor)
        server.wait_until(self.is_ready, START_SECONDS)
        return server

    def keeps(self, name: str) -> bool:
        self.hear()
        return name in self.store

    def noted(self) -> str:
        """What is remembered for the next process."""
        return (self.directory / "changes.json").read_text()

    def is_ready(self) -> bool:
        self.hear()
        return "READY=1" in self.messages

    def _forget(self, name: str) -> None:
        if name in self.store:
            os.close(self.store.pop(name))

    def close(self) -> None:
        for name in list(self.store):
            self._forget(name)
        self._notify.close()


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    made = Supervisor(tmp_path)
    yield made
    made.close()


def command(server: Nbdzram, words: str) -> None:
    done = server.command_line(*words.split())
    assert done.returncode == 0, done.stderr


def test_disks_in_memory_outlive_a_server_that_is_killed_and_one_that_stops(supervisor: Supervisor) -> None:
    """With what was changed at run time: exports, pools, rules."""
    first = supervisor.start()
    command(first, "pools add more --mem-limit 64M")
    command(first, "exports add new 2M --pool more --allow-address 192.0.2.0/24")
    for name in ("disk", "new"):
        with first.client(name) as client:
            client.write(4096, name.encode().ljust(4096, b"."))
    first.kill()
    supervisor.hear()
    second = supervisor.start()
    for _ in range(2):
        for name in ("disk", "new"):
            with second.client(name) as client:
                assert client.read(4096, 4096) == name.encode().ljust(4096, b".")
        assert "192.0.2.0/24" in second.command_line("exports", "list", "--json").stdout
        second.stop()
        supervisor.hear()
        second = supervisor.start()
    second.stop()


def test_who_fails_to_take_over_does_not_tell_that_the_unit_stops(supervisor: Supervisor) -> None:
    """Else systemd would wait for the old one's end, and then bring it about."""
    server = supervisor.start()
    with server.client() as client, socket.create_server(("127.0.0.1", 0)) as taken:
        client.write(0, b"a" * 4096)
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        words = ["serve", "-e", "disk=1M", "--takeover", "--control", str(server.control), "--metrics", place]
        environment = server.environment() | {"NOTIFY_SOCKET": str(supervisor.directory / "notify")}
        failed = subprocess.run(
            [sys.executable, "-m", "nbdzram", *words], env=environment, capture_output=True, text=True, check=False
        )
        assert "cannot listen on" in failed.stderr
        server.wait_until(lambda: "going on" in server.log, START_SECONDS)
        supervisor.hear()
        assert "STOPPING=1" not in supervisor.messages
        assert client.read(0, 4096) == b"a" * 4096
    server.stop()
    supervisor.hear()
    assert "STOPPING=1" in supervisor.messages


def test_who_fails_to_take_over_leaves_no_arena_and_no_rules_of_its_own(supervisor: Supervisor) -> None:
    """It made a pool that nobody else knows, and noted what nobody else declares."""
    server = supervisor.start()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        words = ["serve", "-e", "disk=1M", "--pool", "other", "-e", "more=1M,pool=other", "--takeover"]
        failed = subprocess.run(
            [sys.executable, "-m", "nbdzram", *words, "--control", str(server.control), "--metrics", place],
            env=server.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert "cannot listen on" in failed.stderr
    server.wait_until(lambda: "going on" in server.log, START_SECONDS)
    server.wait_until(lambda: "more" not in supervisor.noted(), START_SECONDS)
    assert supervisor.keeps("pool-default")
    assert not supervisor.keeps("pool-other")
    server.stop()


def test_a_pool_that_is_removed_is_not_kept(supervisor: Supervisor) -> None:
    server = supervisor.start()
    command(server, "pools add more --mem-limit 64M")
    server.wait_until(lambda: supervisor.keeps("pool-more"), START_SECONDS)
    command(server, "pools remove more")
    server.wait_until(lambda: not supervisor.keeps("pool-more"), START_SECONDS)
    assert set(supervisor.store) == {"pool-default"}
    server.stop()


def test_what_was_kept_in_memory_is_let_go_where_disks_are_in_a_directory_now(supervisor: Supervisor) -> None:
    first = supervisor.start()
    with first.client() as client:
        client.write(0, b"m" * 4096)
    first.stop()
    supervisor.hear()
    second = supervisor.start("--state-dir", str(supervisor.directory / "state"))
    with second.client() as client:
        assert client.read(0, 4096) == bytes(4096)
    assert "the pool default was kept in memory" in second.log
    assert not supervisor.store
    second.stop()


def test_who_may_attach_is_not_known_where_changes_are_lost_and_nobody_may(supervisor: Supervisor) -> None:
    first = supervisor.start()
    command(first, "exports add new 2M --allow-address 192.0.2.0/24")
    first.kill()
    supervisor.hear()
    (supervisor.directory / "changes.json").unlink()
    second = supervisor.start()
    with pytest.raises(Exception, match=r"refused|unknown"), Client(second.unix_path, "new"):
        pass
    assert "nobody may" in second.log
    second.stop()


def test_a_pool_that_the_store_had_no_room_for_is_told_of_and_the_others_are_there(supervisor: Supervisor) -> None:
    supervisor.most = 1
    first = supervisor.start("--pool", "other", "-e", "declared=1M,pool=other")
    command(first, "exports add added 2M --pool other")
    with first.client() as client:
        client.write(0, b"m" * 4096)
    first.kill()
    supervisor.hear()
    second = supervisor.start("--pool", "other", "-e", "declared=1M,pool=other")
    kept = next(name.removeprefix("pool-") for name in supervisor.store)
    (lost,) = {"default", "other"} - {kept}
    assert f"the memory of the pool {lost} was not kept, as of others, and its disks are gone or empty" in second.log
    assert f"the memory of the pool {kept} was" not in second.log
    with second.client() as client:
        assert client.read(0, 4096) == (b"m" * 4096 if kept == "default" else bytes(4096))
    second.stop()
