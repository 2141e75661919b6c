"""The file system below checkpoints fails under a server: full, read-only, with an error of its own. And its clock."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.docs.pages import ROOT
from tests.faults.lost_disk import served, until
from tests.support.nbd_client import Client
from tests.unit.engine.blocks import BLOCK, noise

CLOCK = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    char text[32] = "";
    int file, failed = (int)syscall(SYS_clock_gettime, clock, now);
    if (failed || clock != CLOCK_REALTIME) return failed;
    if ((file = open(getenv("SET_BACK_BY"), O_RDONLY | O_CLOEXEC)) < 0) return 0;
    if (read(file, text, sizeof text - 1) > 0) now->tv_sec -= atol(text);
    close(file);
    return 0;
}
"""
SECONDS = 300
DAY = 86400
ANYBODY = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
ROOT_ALONE = ["unshare", "--mount", "sh", "-ec"]


def play(story: str, place: Path, isolated: list[str], mount: str) -> None:
    """On a file system of its own; `mount` is a command."""
    (place / "kept").mkdir()
    given: list[str | Path] = [
        "sh",
        place / "kept",
        place / "image",
        sys.executable,
        "-m",
        "tests.faults.lost_disk",
        story,
        place,
    ]
    look = subprocess.run([*isolated, mount, *given[:3]], capture_output=True, check=False)
    if look.returncode != 0:
        pytest.skip(f"cannot be mounted here: {look.stderr.decode()[:80]}")
    script = f'{mount}; shift 2; exec "$@"'
    child = subprocess.run(
        [*isolated, script, *given], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert (child.returncode, child.stderr) == (0, "")


@pytest.mark.parametrize("story", ["full", "read_only"])
def test_checkpoints_go_on_behind_a_file_system_that_failed_for_a_while(tmp_path: Path, story: str) -> None:
    play(story, tmp_path, ANYBODY, 'mount -t tmpfs -o size=40M none "$1"')


def test_what_was_flushed_outlives_a_file_system_that_shuts_itself_down(tmp_path: Path) -> None:
    with (tmp_path / "image").open("wb") as image:
        image.truncate(128 << 20)
    made = subprocess.run(["mkfs.ext4", "-q", tmp_path / "image"], capture_output=True, check=False)
    if made.returncode != 0:
        pytest.skip("no mkfs.ext4")
    play("shut_down", tmp_path, ROOT_ALONE, 'mount -o loop,errors=remount-ro "$2" "$1"')


def test_a_clock_that_goes_back_makes_no_older_checkpoint_the_newest(tmp_path: Path) -> None:
    """Which is the newest, and what follows it, is told by numbers."""
    (tmp_path / "clock.c").write_text(CLOCK)
    built, by = tmp_path / "clock.so", tmp_path / "by"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", built, tmp_path / "clock.c"], check=True, capture_output=True)
    shifted = {"LD_PRELOAD": str(built), "SET_BACK_BY": str(by)}
    kept, durable = tmp_path / "kept", ("--durability", "flush")
    with served(tmp_path / "first", kept, *durable, **shifted) as server, Client(server.socket, "disk") as client:
        client.write(0, noise(0))
        client.flush()
        by.write_text(str(DAY))
        client.write(BLOCK, noise(1))
        client.flush()
        count = len(list(kept.glob("*.stream")))
        until(lambda: len(list(kept.glob("*.stream"))) > count)  # one whose moment is a day before the first's
        client.write(2 * BLOCK, noise(2))
        client.flush()
    with served(tmp_path / "second", kept, *durable, **shifted) as server, Client(server.socket, "disk") as client:
        assert client.read(0, 3 * BLOCK) == noise(0) + noise(1) + noise(2)
        yesterday = time.strftime("%Y-%m-%d", time.gmtime(time.time() - DAY))
        assert f"restored from the checkpoint of {yesterday}" in server.log, server.log
        by.unlink()
        client.write(0, noise(3))
        client.flush()
    with served(tmp_path / "third", kept, *durable) as server, Client(server.socket, "disk") as client:
        assert client.read(0, 3 * BLOCK) == noise(3) + noise(1) + noise(2)
