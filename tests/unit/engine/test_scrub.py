"""A scrub looks at everything, names what cannot be read, and leaves it as it is."""

from __future__ import annotations

import mmap
from pathlib import Path

from nbdzram.engine import moment
from nbdzram.engine.fold import Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.reports import ScrubReport
from nbdzram.engine.scrub import Scrub
from tests.support.arena import Arena
from tests.unit.engine.blocks import BLOCK, half_random, noise, run, text
from tests.unit.engine.test_verify import FIRST_RANDOM

MIB = 1 << 20


def scrubbed(pool: Pool, budget: int = 64) -> Scrub:
    scrub = Scrub(pool)
    run(scrub, budget)
    assert scrub.finished
    return scrub


def bend(path: Path, handle: int) -> None:
    """Change a bit of the object of a handle."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        arena = Arena(view)
        place = arena.object_of(handle) + FIRST_RANDOM
        arena.set_word(place, arena.word(place) ^ 1 << 20)


def test_a_sound_pool_is_looked_at_whole() -> None:
    with Pool() as pool:
        disk, other = pool.create("disk", 8 * MIB), pool.create("other", MIB)
        disk.write(5 * MIB, b"".join(noise(number) for number in range(100)))
        other.write(0, text(1) + bytes(8) * 512 + b"8 bytes!" * 512)
        scrub = scrubbed(pool)
        assert scrub.report() == ScrubReport(
            objects_checked=101, objects_rotten=0, blocks_checked=scrub.blocks, blocks_rotten=0
        )
        assert scrub.blocks >= 102
        assert scrub.total == scrub.done


def test_every_block_of_every_export_that_leads_to_rot_is_named_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        disk, other = pool.create("disk", 16 * MIB), pool.create("other", 16 * MIB)
        disk.write(0, half_random(1) + half_random(2) + half_random(3))
        disk.write(9 * MIB, half_random(1))
        other.write(6 * MIB, half_random(1))
        pool.clone(disk, "clone")
        run(Fold(pool))
        copies = moment.snapshot_together([disk], ["\nconcealed"])
        bend(path, 1)
        for budget in (1, 64, 1 << 16):
            scrub = scrubbed(pool, budget)
            assert (scrub.report().objects_rotten, scrub.report().objects_checked) == (1, 3), "each is counted once"
            assert sorted(scrub.places) == [
                *(("clone", 0), ("clone", 9 * MIB // BLOCK)),
                *(("disk", 0), ("disk", 9 * MIB // BLOCK)),
                ("other", 6 * MIB // BLOCK),
            ]
            assert scrub.blocks_rotten == 5
        disk.write(0, half_random(7))
        assert ("disk", 0) not in scrubbed(pool).places
        moment.discard(copies)


def test_an_entry_that_is_not_right_is_a_block_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", 16 * MIB)
        disk.write(0, noise(1) + noise(2))
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            arena = Arena(view)
            arena.set_word(arena.leaf() + 8, arena.word(arena.leaf() + 8) ^ 1 << 40)
        scrub = scrubbed(pool)
        assert (scrub.places, scrub.objects_rotten) == ([("disk", 1)], 0)


def test_more_rot_than_is_remembered_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", 16 * MIB)
        disk.write(0, half_random(1))
        disk.write(4 * BLOCK, half_random(1) * 600)
        run(Fold(pool))
        bend(path, 1)
        scrub = scrubbed(pool)
        assert scrub.blocks_rotten == 601
        assert len(scrub.places) == 256


def test_a_handle_that_is_another_objects_by_then_is_no_rot(tmp_path: Path) -> None:
    """A client mended the block between the two phases, and its handle was used for what is written next."""
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", 16 * MIB)
        disk.write(0, half_random(1) + half_random(2))
        bend(path, 1)
        scrub = Scrub(pool)
        while scrub.objects < 2:
            scrub.step(1)
        assert scrub.report().objects_rotten == 1
        disk.write(0, half_random(3))
        pool.stats()  # takes back what is free
        for number in range(2, 400):
            disk.write(number * BLOCK, half_random(number))
        run(scrub)
        assert (scrub.places, scrub.blocks_rotten) == ([], 0)


def test_a_disk_that_is_deleted_meanwhile_is_passed_over() -> None:
    with Pool() as pool:
        disk, other = pool.create("disk", 16 * MIB), pool.create("other", 16 * MIB)
        for one in (disk, other):
            one.write(0, b"".join(noise(number) for number in range(300)))
        scrub = Scrub(pool)
        scrub.step(1)
        pool.delete(disk)
        run(scrub, 8)
        assert scrub.finished
        assert scrub.report().blocks_rotten == 0
