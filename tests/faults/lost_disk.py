"""A server whose checkpoints lie on a file system that fails under it: what tests play in a mount namespace.

python -m tests.faults.lost_disk STORY DIRECTORY
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.faults.power.test_served import listens
from tests.support.nbd_client import Client, RequestFailed
from tests.unit.cli.conftest import NBDZRAM, clean_environment
from tests.unit.engine.blocks import BLOCK, noise

PATIENCE_SECONDS = 60
BLOCKS = 64


class Served:
    """A server with one disk, killed at the end."""

    def __init__(self, place: Path, kept: Path, *words: str, **environment: str) -> None:
        place.mkdir()
        self.place = place
        self.socket = place / "socket"
        given = ["serve", "-e", f"disk={BLOCKS * BLOCK}", "-U", str(self.socket), "--control", str(place / "control")]
        given += ["--metrics", "off", "--checkpoint", str(kept), "--checkpoint-interval", "1s", *words]
        with (place / "log").open("wb") as log:
            known = {**clean_environment(), **environment}
            self.process = subprocess.Popen([*NBDZRAM, *given], env=known, stdout=log, stderr=log)
        until(lambda: listens(self.socket) or self.process.poll() is not None)

    @property
    def log(self) -> str:
        return (self.place / "log").read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def served(place: Path, kept: Path, *words: str, **environment: str) -> Iterator[Served]:
    server = Served(place, kept, *words, **environment)
    try:
        assert server.process.poll() is None, server.log
        yield server
    finally:
        server.kill()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)  # between two looks


def flushed(client: Client) -> bool:
    """Whether a flush was answered, and not as an error."""
    try:
        client.flush()
    except RequestFailed:
        return False
    return True


def mounted(options: str, kept: Path) -> bool:
    """Whether it could be."""
    return subprocess.run(["mount", "-o", options, kept], check=False, capture_output=True).returncode == 0


def content(server: Served) -> bytes:
    with Client(server.socket, "disk") as client:
        return client.read(0, BLOCKS * BLOCK)


def full(kept: Path, place: Path) -> None:
    """Flushes fail while there is no room, and are answered again when there is; what was flushed is there."""
    with served(place / "first", kept, "--durability", "flush") as server, Client(server.socket, "disk") as client:
        client.write(0, noise(0))
        assert flushed(client)
        with (kept / "fill").open("wb", buffering=0) as fill, suppress(OSError):
            while True:
                fill.write(bytes(65536))
        written = 1
        while flushed(client):
            client.write(written % BLOCKS * BLOCK, noise(written))
            written += 1
            assert written < 100_000
        assert client.read(0, BLOCK), "reads and writes go on"
        assert not flushed(client)
        (kept / "fill").unlink()
        until(lambda: flushed(client))
        held = client.read(0, BLOCKS * BLOCK)
    with served(place / "second", kept, "--durability", "flush") as server:
        assert content(server) == held


def read_only(kept: Path, place: Path) -> None:
    """Checkpoints fail and are counted while the file system cannot be written, and go on when it can; a server that
    starts meanwhile is refused in a sentence."""
    with served(place / "first", kept) as server, Client(server.socket, "disk") as client:
        client.write(0, noise(0))
        until(lambda: any(kept.glob("*.stream")))
        until(
            lambda: (
                subprocess.run(["mount", "-o", "remount,ro", kept], check=False, capture_output=True).returncode == 0
            )
        )
        client.write(BLOCK, noise(1))
        until(lambda: "a checkpoint failed: " in server.log)
        count = len(list(kept.glob("*.stream")))
        assert mounted("remount,rw", kept)
        until(lambda: len(list(kept.glob("*.stream"))) > count)
        assert client.read(0, 2 * BLOCK) == noise(0) + noise(1)
    assert mounted("remount,ro", kept)
    refused = Served(place / "refused", kept)
    assert refused.process.wait(PATIENCE_SECONDS) == 1
    assert "cannot keep checkpoints in" in refused.log, refused.log
    assert "its file system is read-only" in refused.log, refused.log
    assert mounted("remount,rw", kept)
    with served(place / "second", kept) as server:
        assert content(server)[: 2 * BLOCK] == noise(0) + noise(1)


def shut_down(kept: Path, place: Path) -> None:
    """ext4 meets an error and goes read-only below an open journal: flushes fail, and what was flushed is there."""
    found = kept.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(found)}:{os.minor(found)}").resolve().name
    with served(place / "first", kept, "--durability", "flush") as server, Client(server.socket, "disk") as client:
        for number in range(10):
            client.write(number * BLOCK, noise(number))
            assert flushed(client)
        Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("1")
        client.write(10 * BLOCK, noise(10))
        assert not flushed(client)
        assert client.read(10 * BLOCK, BLOCK) == noise(10), "reads and writes go on"
        until(lambda: "(Read-only file system): FLUSH and FUA are I/O errors" in server.log)
    subprocess.run(["umount", kept], check=True)
    subprocess.run(["mount", kept.parent / "image", "-o", "loop", kept], check=True)
    with served(place / "second", kept, "--durability", "flush") as server:
        assert content(server)[: 10 * BLOCK] == b"".join(map(noise, range(10)))


STORIES = {"full": full, "read_only": read_only, "shut_down": shut_down}


if __name__ == "__main__":
    STORIES[sys.argv[1]](Path(sys.argv[2]) / "kept", Path(sys.argv[2]))
