"""An arena in a file without a name: opened again by whoever has its descriptor, and by one at a time."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdzram.engine.arena import unnamed_file
from nbdzram.engine.pool import Pool
from nbdzram.errors import ArenaError

NAME = "nbdzram-of-this-test"
MIB = 1 << 20


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = unnamed_file(NAME)
    assert descriptor is not None
    yield descriptor
    os.close(descriptor)


def test_what_was_stored_is_there_when_it_is_opened_again(memory: int) -> None:
    with Pool(memory=memory) as pool:
        disk = pool.create("disk", 64 * MIB)
        for offset in range(0, 32 * MIB, MIB):
            disk.write(offset, os.urandom(4096))
        disk.write(MIB, b"a" * 4096)
        assert pool.path is None
        assert not pool.is_private
    with Pool(memory=memory) as pool:
        (disk,) = pool.disks()
        assert disk.read(MIB, 4096) == b"a" * 4096
        pool.check()
        disk.write(MIB, b"b" * 4096)
    with Pool(memory=memory) as pool:
        assert pool.disks()[0].read(MIB, 4096) == b"b" * 4096


def test_one_pool_at_a_time_opens_it(memory: int) -> None:
    with Pool(memory=memory), pytest.raises(ArenaError, match="the arena in memory is in use by another process"):
        Pool(memory=memory)
    with Pool(memory=memory):
        pass


def test_one_for_which_there_is_no_descriptor_is_not_said_to_be_anothers(memory: int) -> None:
    """Whoever takes over, and may have few, is told what to raise, and not to ask for what is his."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(memory)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        with pytest.raises(ArenaError, match="in memory: Too many open files; raise LimitNOFILE= of the unit"):
            Pool(memory=memory)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_core_dumps_leave_it_out_new_and_opened_again(memory: int) -> None:
    for _ in range(2):
        with Pool(memory=memory) as pool:
            if not pool.disks():
                disk = pool.create("disk", 64 * MIB)
                for offset in range(0, 32 * MIB, 4096):
                    disk.write(offset, os.urandom(4096))
            flags = flags_of(NAME)
            assert flags
            assert all("dd" in words for words in flags), flags


def flags_of(name: str) -> list[list[str]]:
    """Of the mappings of a file without a name (proc(5), smaps)."""
    found, ours = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = f"/memfd:{name}" in line
        elif ours and line.startswith("VmFlags:"):
            found.append(line.split()[1:])
    return found


def test_pages_that_are_trimmed_go_back(memory: int) -> None:
    with Pool(memory=memory) as pool:
        disk = pool.create("disk", 16 * MIB)
        for offset in range(0, 16 * MIB, 4096):
            disk.write(offset, os.urandom(4096))
        full = os.fstat(memory).st_blocks
        disk.trim(0, 16 * MIB)
        assert os.fstat(memory).st_blocks < full // 4


def test_a_pool_of_its_own_has_memory_of_its_own() -> None:
    with Pool() as pool:
        assert pool.is_private


def a_pipe() -> int:
    reads, writes = os.pipe()
    os.close(writes)
    return reads


def of(content: bytes) -> int:
    made = os.memfd_create("kept")
    os.write(made, content)
    return made


@pytest.mark.parametrize(
    "kept",
    [a_pipe, lambda: os.open("/dev/null", os.O_RDWR), lambda: of(b"x" * 100), lambda: of(b"x" * (64 << 10))],
    ids=["pipe", "device", "no whole unit", "no superblock"],
)
def test_what_was_kept_and_is_no_arena_is_refused_by_its_name_with_the_remedy(kept: Callable[[], int]) -> None:
    """No file lies anywhere that could be removed, nor has memory run out."""
    descriptor = kept()
    with pytest.raises(ArenaError, match=r"what was kept in memory is not an nbdzram arena.*systemctl stop"):
        Pool(memory=descriptor)
    os.close(descriptor)


def test_a_limit_of_files_is_none_of_disks_in_memory() -> None:
    """Units that are to write no files have LimitFSIZE=0."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
    try:
        memory = unnamed_file(NAME)
        with Pool(memory=memory) as pool:
            disk = pool.create("disk", 64 * MIB)
            for offset in range(0, 32 * MIB, MIB):
                disk.write(offset, os.urandom(MIB))
            assert pool.is_private
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
