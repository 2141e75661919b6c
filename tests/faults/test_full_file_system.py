"""A state directory whose file system is full: an error, whatever is asked for, and never the process's end.

The tmpfs is a small one in a mount namespace of a child's own, which needs no root where user namespaces are allowed.
Reading a hole of a file on tmpfs takes a page too, so that opening an arena again is as dangerous as writing to it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

SECONDS = 120
PRELUDE = """
import pathlib, random, sys
from nbdzram.engine.pool import Pool
from nbdzram.errors import PoolFull, UserError
place = pathlib.Path(sys.argv[1])

def fill():
    with (place / "fill").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass

def noise(number):
    return random.Random(number).randbytes(4096)

def write_until_full(disk):
    for number in range(disk.size_bytes // 4096):
        try:
            disk.write(number * 4096, noise(number))
        except PoolFull:
            return number
    raise SystemExit("the file system never filled")

def holds(disk, blocks):
    assert all(disk.read(number * 4096, 4096) == noise(number) for number in range(blocks))
"""

REOPENED = """
with Pool(path=str(place / "arena")) as pool:
    written = write_until_full(pool.create("disk", 64 << 20))
del pool
fill()
with Pool(path=str(place / "arena")) as pool:
    (disk,) = pool.disks()
    holds(disk, written)
    disk.trim(0, 4096 * (written // 2))  # gives pages back
    assert write_until_full(disk) > 0
    pool.check()
print(written)
"""

EMPTY = """
with Pool(path=str(place / "arena")) as pool:
    pool.create("disk", 64 << 20)
del pool
fill()
with Pool(path=str(place / "arena")) as pool:
    (disk,) = pool.disks()
    assert write_until_full(disk) == 0
    holds(pool.disks()[0], 0)
    assert disk.read(0, 4096) == bytes(4096)
    pool.check()
"""

NO_ROOM = """
fill()
for _ in range(2):
    try:
        Pool(path=str(place / "arena"))
    except UserError as error:
        assert "the file system is full; free some of it" in str(error), error
    else:
        raise SystemExit("there was room")
(place / "fill").unlink()
Pool(path=str(place / "arena")).check()
"""

LIMITED = """
import resource
limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limit))
try:
    Pool(path=str(place / "arena"))
except UserError as error:
    assert "may write no file of more than 65536 bytes; raise ulimit -f" in str(error), error
else:
    raise SystemExit("there was room")
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
Pool(path=str(place / "arena")).check()
"""

SERVED = """
import logging, uvloop
from nbdzram.config import ExportConfig, ServerConfig
from nbdzram.server.service import Service
logging.disable()
config = ServerConfig(
    exports=(ExportConfig(name="disk", size_bytes=8 << 20), ExportConfig(name="two", size_bytes=8 << 20)),
    tcp=(), state_dir=place / "state",
)
alone = dict(read_only=None, description=None, allow_addresses=None, allow_certificates=None)

async def story():
    service = Service(config)
    await service.start()
    disks = {export.name: export.disk for export in service._exports}
    assert write_until_full(disks["two"]) > 100
    fill()
    changes = service.changes
    for change in (
        changes.resize_export("disk", 16 << 20, yes=False, force=False),
        changes.add_export("three", 1 << 20, pool=None, **alone),
        changes.copy_export("disk", "three", read_only=True),
        changes.change_export("disk", **alone | {"allow_addresses": ["10.0.0.0/8"]}),
    ):
        try:
            await change
        except UserError as error:
            assert "cannot remember the change" in str(error), error
        else:
            raise SystemExit("there was room")
    await service.stop()
    service = Service(config)  # nothing of it has happened, and a start needs no room either
    await service.start()
    assert [(export.name, export.size_bytes) for export in service._exports] == [("disk", 8 << 20), ("two", 8 << 20)]
    await service.changes.remove_export("two", force=False)  # makes the room that it is remembered in
    await service.changes.resize_export("disk", 16 << 20, yes=False, force=False)
    await service.stop()
    service = Service(config)
    await service.start()
    assert [(export.name, export.size_bytes) for export in service._exports] == [("disk", 16 << 20)]
    await service.stop()

uvloop.run(story())
"""


TOLD = """
import logging
from nbdzram.config import MaintenanceConfig
from nbdzram.server.pools import PoolService
told = []
logging.getLogger("nbdzram.server").addFilter(lambda record: told.append(record.getMessage()))
with Pool(path=str(place / "arena"), mem_limit=64 << 20) as pool:
    service = PoolService("one", pool, MaintenanceConfig(), now=0.0)
    write_until_full(pool.create("disk", 64 << 20))
    service.tell_refusals(1.0)
assert "arena the file system is full; free some of it, " in told[0] and "pools limit" not in told[0], told
"""

REFUSING = """
#define _GNU_SOURCE
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>
int refuse_with = 0;
int fallocate64(int file, int mode, off64_t from, off64_t length) {
    if (refuse_with && !(mode & 2)) { errno = refuse_with; return -1; }  /* holes are still made */
    return (int)syscall(SYS_fallocate, file, mode, from, length);
}
int fallocate(int file, int mode, off_t from, off_t length) { return fallocate64(file, mode, from, length); }
"""

SICK = """
import ctypes, errno, logging, os
from nbdzram.config import MaintenanceConfig
from nbdzram.server.pools import PoolService
refuse_with = ctypes.c_int.in_dll(ctypes.CDLL(os.environ["LD_PRELOAD"]), "refuse_with")
told = []
logging.getLogger("nbdzram.server").addFilter(lambda record: told.append(record.getMessage()))
said = ((errno.EIO, "Input/output error; the kernel's log"), (errno.EDQUOT, "quota exceeded; raise that"))
for reason, words in said:
    with Pool(path=str(place / f"arena-{reason}"), mem_limit=64 << 20) as pool:
        service = PoolService("one", pool, MaintenanceConfig(), now=0.0)
        disk = pool.create("disk", 64 << 20)
        refuse_with.value = reason
        written = write_until_full(disk)
        service.tell_refusals(1.0)
        assert words in told.pop() and not told, told
        try:
            for number in range(1000):
                pool.create(f"one more, {number}", 4096)
        except UserError as error:
            assert words in str(error), error
        else:
            raise SystemExit("there was room")
        refuse_with.value = 0
        holds(disk, written)
        disk.write(64 * 4096, noise(64))
        pool.check()
"""

WITHOUT_FALLOCATE = """
try:
    Pool(path=str(place / "arena"))
except UserError as error:
    assert "cannot allocate pages of a file ahead" in str(error) and "is full" not in str(error), error
else:
    raise SystemExit("it was served")
assert not (place / "arena").exists()
"""


@pytest.mark.parametrize(
    "story",
    [REOPENED, EMPTY, NO_ROOM, SERVED, LIMITED, TOLD],
    ids=["full of blocks", "full of others", "from the start", "below a server", "of a limited process", "told"],
)
def test_a_full_tmpfs_is_an_error_and_not_the_end(tmp_path: Path, story: str) -> None:
    """Before the first block, at every write, and when the arena is opened again; what was stored is still there."""
    tell(tmp_path, "tmpfs -o size=3M", story)


def test_a_file_system_without_fallocate_is_refused_as_that_and_keeps_no_file(tmp_path: Path) -> None:
    tell(tmp_path, "ramfs", WITHOUT_FALLOCATE)


def test_a_file_system_that_fails_is_told_as_that_and_not_as_full(tmp_path: Path) -> None:
    """As an error of its disk, or a quota: what it said last is what an administrator reads, and the rest goes on."""
    source, refusing = tmp_path / "refusing.c", tmp_path / "refusing.so"
    source.write_text(REFUSING)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", refusing, source], check=True, capture_output=True)
    (tmp_path / "place").mkdir()
    tell(tmp_path / "place", "tmpfs", SICK, LD_PRELOAD=str(refusing))


def tell(place: Path, file_system: str, story: str, **environment: str) -> None:
    """Run a story on a file system of its own."""
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    mount = f'mount -t {file_system} none "$1"; shift; exec "$@"'
    if subprocess.run([*mounted, mount, "sh", place, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no mount namespaces for this user")
    child = subprocess.run(
        [*mounted, mount, "sh", place, sys.executable, "-c", PRELUDE + story, place],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (child.returncode, child.stderr) == (0, "")
