"""Copies of several disks at one moment, which become visible together or not at all."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdzram.engine import moment
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.engine.publish import kill_at_publish
from nbdzram.errors import EngineError, ExportExists
from tests.support.threads import in_threads
from tests.unit.engine.blocks import BLOCK, noise, text

MIB = 1 << 20


def offered(pool: Pool) -> list[str]:
    return [disk.name for disk in pool.disks()]


def named(pool: Pool, name: str) -> Disk:
    return next(disk for disk in pool.all_disks() if disk.name == name)


def test_copies_of_a_moment_hold_what_was_there_and_are_not_offered_until_revealed() -> None:
    with Pool() as pool:
        disks = [pool.create(f"disk{number}", MIB) for number in range(3)]
        for number, disk in enumerate(disks):
            disk.write(0, text(number))
        copies = moment.snapshot_together(disks, ["a", "b", "c"])
        disks[0].write(0, text(9))
        assert offered(pool) == ["disk0", "disk1", "disk2"]
        pool.check()
        for copy in copies:
            moment.finish(copy)
            moment.reveal(copy)
        assert offered(pool)[3:] == ["a", "b", "c"]
        assert [copy.read(0, BLOCK) for copy in copies] == [text(0), text(1), text(2)]
        assert all(copy.read_only for copy in copies)
        pool.check()


def test_a_moment_is_one_point_over_several_pools() -> None:
    """A writer numbers its writes and alternates between two disks: a later number is never in a copy without the one
    before it."""
    pools = [Pool(), Pool()]
    disks = [pool.create("disk", MIB) for pool in pools]
    over = threading.Event()

    def write() -> None:
        number = 0
        while not over.is_set():
            number += 1
            disks[number % 2].write(0, number.to_bytes(8, "little") * 512)

    def look() -> None:
        for turn in range(200):
            copies = moment.snapshot_together(disks, [f"copy{turn}"] * 1 + [f"other{turn}"])
            numbers = [int.from_bytes(copy.read(0, 8), "little") for copy in copies]
            assert abs(numbers[0] - numbers[1]) == 1 or numbers == [0, 0], numbers
            moment.discard(copies)
        over.set()

    in_threads(write, look)
    for pool in pools:
        pool.check()
        pool.close()


def test_a_moment_is_of_as_many_pools_as_there_are() -> None:
    """Checkpoints and the journal take one of all of them; beyond 64 each was refused."""
    with contextlib.ExitStack() as opened:
        disks = [opened.enter_context(Pool()).create("disk", MIB) for _ in range(70)]
        for number, disk in enumerate(disks):
            disk.write(0, text(number))
        copies = moment.snapshot_together(disks, [f"copy{number}" for number in range(70)])
        assert [copy.read(0, BLOCK) for copy in copies] == [text(number) for number in range(70)]
        disks[69].write(0, text(99))
        later = moment.snapshot_changed(disks, copies, ["later"] * 70)
        assert later[:69] == [None] * 69
        assert later[69] is not None
        assert later[69].read(0, BLOCK) == text(99)


def test_the_locks_of_several_pools_are_taken_once_for_a_moment_of_all() -> None:
    """Between two holds a write could be in one copy and the one before it not in the other."""
    with Pool() as one, Pool() as other:
        disks = [pool.create("disk", MIB) for pool in (one, other)]

        def turns(*sources: Disk) -> int:
            before = one.turns()
            copies = moment.snapshot_together(list(sources), [f"copy{number}" for number in range(len(sources))])
            taken = one.turns() - before
            moment.discard(copies)
            return taken

        assert turns(*disks) == turns(disks[0])


def test_a_disk_that_is_what_its_copy_holds_needs_no_other_copy() -> None:
    with Pool() as pool:
        disks = [pool.create(f"disk{number}", MIB) for number in range(4)]
        disks[0].write(0, text(0))
        first = moment.snapshot_changed(disks, [None] * 4, ["a", "b", "c", "d"])
        assert None not in first
        disks[1].write(0, text(1))
        disks[2].write(0, text(2))
        disks[2].trim(0, BLOCK)
        then = moment.snapshot_changed(disks, first, ["e", "f", "g", "h"])
        assert [copy is not None for copy in then] == [False, True, False, False]
        assert then[1] is not None
        assert then[1].read(0, BLOCK) == text(1)
        disks[0].trim(0, BLOCK)
        last = moment.snapshot_changed(disks, [first[0], then[1], *first[2:]], ["i", "j", "k", "l"])
        assert [copy is not None for copy in last] == [True, False, False, False]
        pool.delete(disks[3])
        with pytest.raises(EngineError, match="disk3"):
            moment.snapshot_changed(disks, first, ["m", "n", "o", "p"])
        assert len(pool.all_disks()) == 3 + 4 + 1 + 1
        pool.check()


def test_what_changes_while_a_moment_is_made_ready_is_in_it() -> None:
    """As above, with copies from the moment before for what did not change; making others ready takes a while."""
    dice = random.Random(1)
    with Pool() as pool:
        disks = [pool.create(f"disk{number}", MIB) for number in range(2)]
        others = [pool.create(f"other{number}", MIB) for number in range(20)]
        over = threading.Event()

        def write() -> None:
            number = 0
            while not over.is_set():
                number += 1
                disks[number % 2].write(0, number.to_bytes(8, "little") * 512)
                for _ in range(dice.randrange(4000)):
                    pass

        def look() -> None:
            kept: list[Disk | None] = [None] * 22
            sources = [disks[0], *others, disks[1]]
            for turn in range(500):
                for other in others:
                    other.write(0, turn.to_bytes(8, "little") * 512)
                copies = moment.snapshot_changed(sources, kept, [f"copy{turn} {number}" for number in range(22)])
                gone = [before for before, copy in zip(kept, copies, strict=True) if copy and before]
                kept = [copy or before for before, copy in zip(kept, copies, strict=True)]
                moment.discard(gone)
                numbers = [int.from_bytes(copy.read(0, 8), "little") for copy in (kept[0], kept[-1]) if copy]
                assert abs(numbers[0] - numbers[1]) == 1 or numbers == [0, 0], numbers

        def look_and_end() -> None:
            try:
                look()
            finally:
                over.set()

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            in_threads(write, look_and_end)
        finally:
            sys.setswitchinterval(interval)
        pool.check()


def test_what_a_pool_holds_is_told_without_disks_that_are_not_offered(tmp_path: Path) -> None:
    """Copies that a stream or a checkpoint takes would double it."""
    path = str(tmp_path / "arena")
    with Pool(path=path) as pool:
        disk = pool.create("disk", MIB)
        disk.write(0, text(1) + b"8 bytes!" * 512)
        copies = moment.snapshot_together([disk, disk], ["a", "b"])
        assert (pool.stats().orig_data_size, pool.stats().same_pages) == (2 * BLOCK, 1)
        pool.check()
        copies[0].write(2 * BLOCK, text(2))
        moment.discard(copies[1:])
        assert pool.stats().orig_data_size == 2 * BLOCK
        pool.check()
        moment.finish(copies[0])
    with Pool(path=path) as pool:
        assert pool.stats().orig_data_size == 2 * BLOCK
        pool.check()
        moment.reveal(named(pool, "a"))
        assert (pool.stats().orig_data_size, pool.stats().same_pages) == (5 * BLOCK, 2)
        pool.check()
        pool.delete(named(pool, "a"))
        assert (pool.stats().orig_data_size, pool.stats().same_pages) == (2 * BLOCK, 1)


def test_a_deleted_source_leaves_no_copy_of_the_others() -> None:
    with Pool() as pool:
        disks = [pool.create("one", MIB), pool.create("two", MIB)]
        disks[0].write(0, noise(1))
        pool.delete(disks[1])
        with pytest.raises(EngineError, match="cannot copy export 'two': it was deleted"):
            moment.snapshot_together(disks, ["a", "b"])
        assert [disk.name for disk in pool.all_disks()] == ["one"]
        pool.check()
        pool.create("a", MIB)


def test_a_concealed_disk_has_its_name_to_itself() -> None:
    with Pool() as pool:
        moment.prepare(pool, "coming", MIB)
        with pytest.raises(ExportExists):
            pool.create("coming", MIB)
        with pytest.raises(ExportExists):
            moment.snapshot_together([pool.create("disk", MIB)], ["coming"])
        with pytest.raises(ExportExists):
            moment.prepare(pool, "disk", MIB)


def fill(pool: Pool) -> Disk:
    disk = moment.prepare(pool, "coming", MIB)
    disk.write(0, noise(7))
    return disk


def finish(pool: Pool) -> None:
    moment.finish(fill(pool))


def reveal(pool: Pool) -> None:
    finish(pool)
    moment.reveal(named(pool, "coming"))


def delete(pool: Pool) -> None:
    finish(pool)
    pool.delete(named(pool, "coming"))


@pytest.mark.parametrize(
    ("story", "concealed", "exports"),
    [(fill, [], ["disk"]), (finish, ["coming"], ["disk"]), (reveal, [], ["disk", "coming"]), (delete, [], ["disk"])],
)
def test_what_is_whole_is_kept_concealed_by_the_next_opening_and_what_is_not_goes(
    tmp_path: Path, story: Callable[[Pool], object], concealed: list[str], exports: list[str]
) -> None:
    path = str(tmp_path / "arena")
    with Pool(path=path) as pool:
        pool.create("disk", MIB).write(0, text(1))
        story(pool)
    with Pool(path=path) as pool:
        pool.check()
        assert offered(pool) == exports
        assert [disk.name for disk in moment.concealed(pool)] == concealed
        for disk in moment.concealed(pool):
            assert disk.read(0, BLOCK) == noise(7)
            moment.reveal(disk)
            assert disk.read(0, BLOCK) == noise(7)
        held = pool.stats().objects
    with Pool(path=path) as pool:
        assert offered(pool) == exports + concealed
        assert pool.stats().objects == held == len(offered(pool))
        pool.check()


@pytest.mark.parametrize("begin", [finish, reveal])
def test_a_disk_whose_deletion_was_killed_is_not_kept_though_it_was_whole(
    tmp_path: Path, begin: Callable[[Pool], None]
) -> None:
    """From behind the first store on, which says that it is being deleted."""
    for number in range(2, 80):
        path = str(tmp_path / f"arena{number}")
        child = os.fork()
        if child == 0:
            pool = Pool(path=path)
            begin(pool)
            kill_at_publish(number)
            pool.delete(named(pool, "coming"))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        with Pool(path=path) as pool:
            assert pool.all_disks() == []
            assert pool.stats().objects == 0
        if status == 0:
            return
    raise AssertionError("a deletion has fewer stores")


def test_an_entry_that_was_concealed_is_an_export_like_any_other_when_it_is_used_again(tmp_path: Path) -> None:
    path = str(tmp_path / "arena")
    with Pool(path=path) as pool:
        disk = fill(pool)
        moment.finish(disk)
        disk.identify(5)
        pool.delete(disk)
        number = disk.number
        assert disk.identity == 0
        del disk
        fresh = pool.create("fresh", MIB)
        assert (fresh.number, fresh.identity) == (number, 0)
    with Pool(path=path) as pool:
        assert offered(pool) == ["fresh"]


def test_an_identity_outlives_the_process_and_can_be_taken_away(tmp_path: Path) -> None:
    path = str(tmp_path / "arena")
    identity = moment.new_identity()
    with Pool(path=path) as pool:
        disk = pool.create("disk", MIB)
        assert disk.identity == 0
        disk.identify(identity)
        clone = pool.clone(disk, "clone")
        assert clone.identity == 0
    with Pool(path=path) as pool:
        disk = named(pool, "disk")
        assert disk.identity == identity
        disk.identify(0)
        assert disk.identity == 0


def test_the_hold_of_a_moment_grows_by_a_microsecond_or_so_a_disk() -> None:
    """Not timed: counted is that the content's size plays no part, since only roots are shared."""
    with Pool() as pool:
        disks = [pool.create(f"disk{number}", 64 * MIB) for number in range(8)]
        for disk in disks:
            disk.write(0, b"".join(noise(number) for number in range(64)))
        before = pool.stats()
        moment.snapshot_together(disks, [f"copy{number}" for number in range(8)])
        after = pool.stats()
        assert after.objects == before.objects
        assert after.metadata - before.metadata <= 2 * BLOCK  # the directory's page
