"""The same with a real server and its clients: cut, and begun from by another one."""

from __future__ import annotations

import os
import random
import shutil
import socket as socket_module
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.faults.power.disk import Disk, recorded
from tests.faults.power.test_power import recorder
from tests.support.nbd_client import Client
from tests.unit.cli.conftest import NBDZRAM, clean_environment
from tests.unit.engine.blocks import BLOCK, noise

__all__ = ["recorder"]  # a fixture

BLOCKS = 64
ROUNDS, LIVES, CUTS = 60, 4, 5
PATIENCE_SECONDS = 60


def listens(path: Path) -> bool:
    """Whether somebody does: the file is there a moment before."""
    with socket_module.socket(socket_module.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@contextmanager
def served(place: Path, kept: Path, environment: Mapping[str, str]) -> Iterator[Path]:
    """The socket of a server with one disk, whose FLUSH waits for its journal in `kept`."""
    place.mkdir()
    socket = place / "socket"
    words = ["serve", "-e", f"disk={BLOCKS * BLOCK}", "-U", str(socket), "--control", str(place / "control")]
    words += ["--metrics", "off", "--checkpoint", str(kept), "--checkpoint-interval", "1s", "--durability", "flush"]
    with (place / "log").open("wb") as log:
        server = subprocess.Popen([*NBDZRAM, *words], env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not listens(socket):
                assert server.poll() is None, (place / "log").read_text()
                assert time.monotonic() < deadline
                os.sched_yield()
            yield socket
        finally:
            server.kill()
            server.wait()


def test_a_server_that_begins_from_a_cut_disk_has_what_clients_flushed(recorder: Path, tmp_path: Path) -> None:
    """A block is written in each round, and flushed, while servers are killed and begin again.

    What is there is that of a round, or of the one under way.
    """
    kept, log = tmp_path / "kept", tmp_path / "recorded"
    kept.mkdir()
    record = {"NBDZRAM_RECORD_DIRECTORY": str(kept), "NBDZRAM_RECORD_LOG": str(log), "LD_PRELOAD": str(recorder)}
    flushed: list[int] = []  # by round: how much had been recorded when its flush was answered
    for life in range(LIVES):
        with (
            served(tmp_path / f"life-{life}", kept, {**clean_environment(), **record}) as socket,
            Client(socket, "disk") as client,
        ):
            for number in range(life * ROUNDS // LIVES, (life + 1) * ROUNDS // LIVES):
                client.write(number % BLOCKS * BLOCK, noise(number))
                client.flush()
                flushed.append(log.stat().st_size)
    sizes, events = [0], list(recorded(log))
    for event in events:
        content = len(event.content)
        sizes.append(sizes[-1] + 40 + len(event.name.encode()) + len(event.other.encode()) + content)
    dice = random.Random()
    for cut in sorted(dice.sample(range(len(events) // 4, len(events) + 1), CUTS)):
        disk = Disk()
        for event in events[:cut]:
            disk.take(event)
        left = tmp_path / f"left-{cut}"
        disk.lay_out(left, dice)
        promised = sum(size <= sizes[cut] for size in flushed)
        with served(tmp_path / f"server-{cut}", left, clean_environment()) as socket, Client(socket, "disk") as client:
            found = client.read(0, BLOCKS * BLOCK)
        states = [
            b"".join(noise(number) for number in range(count)).ljust(BLOCKS * BLOCK, b"\0")
            for count in range(promised, min(promised + 2, ROUNDS) + 1)
        ]
        assert found in states, (cut, promised)
        shutil.rmtree(left)
