"""Recompression: smaller encodings behind the same handles, folding across codecs, nothing lost."""

from __future__ import annotations

import mmap
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nbdzram.engine.check import Check
from nbdzram.engine.dictionary import dictionary_of
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.errors import EngineError, UserError
from tests.unit.engine.blocks import BLOCK, half_random, noise, prose, run, text

SIZE = 64 << 20


def test_idle_objects_get_smaller_and_read_back() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    contents = [prose(number) for number in range(300)] + [noise(number) for number in range(20)] + [text(1)] * 5
    disk.write(0, b"".join(contents))
    before = pool.stats()
    report = run(Recompress(pool))
    after = pool.stats()
    assert after.compr_data_size < before.compr_data_size * 0.9
    assert report.bytes_before - report.bytes_after == before.compr_data_size - after.compr_data_size
    assert before.mem_used_total - after.mem_used_total == report.pages_returned * BLOCK > 0
    assert after.compr_by_codec["zstd"] == report.bytes_after
    assert after.objects_recompressed == report.objects_recompressed >= 300
    assert after.huge_pages == 20
    assert disk.read(0, len(contents) * BLOCK) == b"".join(contents)
    pool.check()
    run(Check(pool))


@pytest.mark.parametrize("freed_handles", [0, 40])
def test_dry_run_predicts_the_fold_of_twins_in_several_encodings(freed_handles: int) -> None:
    """Five copies of each block, the first known one still LZ4: a fold keeps the shortest and frees the others.

    Handles that were freed are taken first: then the copies have lower ones than the block that they equal.
    """
    pool = Pool()
    old, first, twins = (pool.create(name, SIZE) for name in ("old", "first", "twins"))
    old.write(0, b"".join(noise(number) for number in range(freed_handles)))
    contents = b"".join(prose(number) for number in range(10))
    first.write(0, contents)
    pool.delete(old)
    twins.write(0, contents * 4)
    pool.set_clock(10_000)
    first.read(0, len(contents))
    assert run(Recompress(pool, idle_seconds=5_000)).objects_recompressed == 40
    before = pool.stats()
    predicted = [run(Fold(pool, dry_run=True)) for _ in range(2)]
    pool.check()
    run(Fold(pool))
    freed = before.compr_data_size - pool.stats().compr_data_size
    assert [(report.objects_merged, report.bytes_freed) for report in predicted] == [(40, freed)] * 2


@pytest.mark.parametrize("stronger", [{"level": 12}, {"level": 1, "dictionary": True}], ids=["level", "dictionary"])
def test_a_stronger_run_tries_what_a_weaker_one_made_smaller(stronger: dict[str, Any]) -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    contents = b"".join(prose(number) for number in range(400))
    disk.write(0, contents)
    assert run(Recompress(pool, level=1)).objects_recompressed == 400
    before = pool.stats()
    report = run(Recompress(pool, **stronger))
    after = pool.stats()
    assert report.objects_seen == 400
    assert report.objects_recompressed > 100
    assert report.bytes_before - report.bytes_after == before.compr_data_size - after.compr_data_size > 0
    assert bool(report.dictionary_bytes) == ("dictionary" in stronger)
    for weaker in (stronger, {"level": 1}):
        assert run(Recompress(pool, **weaker)).objects_seen == 0
    assert disk.read(0, len(contents)) == contents
    run(Check(pool))


def test_what_did_not_shrink_is_not_tried_again_until_it_changes() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    disk.write(0, b"".join(noise(number) for number in range(50)))
    assert run(Recompress(pool)).objects_seen == 50
    assert run(Recompress(pool)).objects_seen == 0
    disk.write(0, noise(100))
    assert run(Recompress(pool)).objects_seen == 1
    assert run(Recompress(pool, level=9)).objects_seen == 50


def test_a_recompressed_block_folds_with_its_lz4_twin_and_the_smaller_stays() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    disk.write(0, b"".join(prose(number) for number in range(20)))
    run(Recompress(pool))
    small = pool.stats().compr_data_size
    disk.write(20 * BLOCK, b"".join(prose(number) for number in range(20)))
    assert run(Fold(pool)).objects_merged == 20
    stats = pool.stats()
    assert (stats.objects, stats.compr_data_size, stats.compr_by_codec["lz4"]) == (20, small, 0)
    assert disk.read(20 * BLOCK, 20 * BLOCK) == disk.read(0, 20 * BLOCK)
    pool.check()


def test_twins_written_before_recompression_fold_after_it() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    disk.write(0, b"".join(prose(number % 20) for number in range(60)))
    recompression = Recompress(pool)
    recompression.step(30)  # some twins are Zstandard now, some LZ4
    del recompression
    run(Fold(pool))
    assert pool.stats().objects == 20
    assert disk.read(0, 60 * BLOCK) == b"".join(prose(number % 20) for number in range(60))
    pool.check()


def test_shared_objects_stay_shared_and_their_saving_is_counted_anew() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    disk.write(0, b"".join(prose(number % 10) for number in range(100)))
    twin = pool.clone(disk, "twin")
    run(Fold(pool))
    run(Recompress(pool))
    stats = pool.stats()
    assert stats.objects == 10
    assert stats.compr_data_size == stats.compr_by_codec["zstd"]
    pool.check()
    pool.delete(disk)
    assert twin.read(0, 100 * BLOCK) == b"".join(prose(number % 10) for number in range(100))
    pool.check()


def test_only_blocks_that_rested_are_touched() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    pool.set_clock(100_000)
    disk.write(0, b"".join(prose(number) for number in range(10)))
    pool.set_clock(110_000)
    disk.read(0, BLOCK * 4)
    disk.write(4 * BLOCK, prose(77))
    pool.set_clock(112_000)
    assert run(Recompress(pool, idle_seconds=10_000)).objects_seen == 5
    assert run(Recompress(pool, idle_seconds=2_001)).objects_seen == 0
    assert run(Recompress(pool, idle_seconds=1_900)).objects_seen == 5


@pytest.mark.parametrize("restarted", [False, True])
def test_a_strong_run_tries_what_only_a_weaker_one_has_tried_since_the_last(tmp_path: Path, *, restarted: bool) -> None:
    path = str(tmp_path / "arena")
    pool = Pool(path=path)
    disk = pool.create("disk", SIZE)
    for count, level in ((20, 9), (30, 1)):
        disk.write(0, b"".join(prose(100 * level + number) for number in range(count)))
        assert run(Recompress(pool, level=level)).objects_seen == count
    if restarted:
        pool.close()
        pool = Pool(path=path)
    assert run(Recompress(pool, level=9)).objects_seen == 30
    assert run(Recompress(pool, level=9)).objects_seen == 0
    pool.check()


def test_untried_bytes_are_those_of_lz4_objects_that_no_run_has_looked_at() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    stubborn = [random.Random(number).randbytes(3000) + bytes(BLOCK - 3000) for number in range(20)]
    disk.write(0, b"".join(stubborn) + b"".join(prose(number) for number in range(20)) + noise(1))
    fresh = pool.stats()
    assert fresh.recompress_untried == fresh.compr_by_codec["lz4"] > 0
    run(Recompress(pool))
    tried = pool.stats()
    assert tried.recompress_untried == 0 < tried.compr_by_codec["lz4"]
    disk.write(0, prose(100))  # in place of a stubborn one
    later = pool.stats()
    assert later.recompress_untried > 0
    disk.write(BLOCK, stubborn[7])  # a twin of one that was tried, and its forward when they are folded
    run(Fold(pool))
    assert pool.stats().recompress_untried == later.recompress_untried
    run(Recompress(pool, level=19))  # stronger: the others are tried again
    assert pool.stats().recompress_untried == 0
    disk.trim(0, SIZE)
    assert pool.stats().recompress_untried == 0


def test_huge_only_leaves_lz4_objects_alone() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    choose = random.Random(1)
    skewed = bytes(choose.choices(range(256), weights=[40 if value < 80 else 1 for value in range(256)], k=BLOCK))
    disk.write(0, skewed + prose(1))
    assert pool.stats().huge_pages == 1
    report = run(Recompress(pool, huge_only=True))
    assert (report.objects_seen, report.objects_recompressed) == (1, 1)
    assert pool.stats().huge_pages == 0
    assert disk.read(0, 2 * BLOCK) == skewed + prose(1)


@pytest.mark.parametrize(
    ("count", "least_bytes"), [(2000, 1000), (6000, (64 << 10) + 1)], ids=["small", "of two units"]
)
def test_a_dictionary_saves_more_and_outlives_the_process(tmp_path: Path, count: int, least_bytes: int) -> None:
    path = str(tmp_path / "arena")
    pool = Pool(path=path)
    disk = pool.create("disk", SIZE)
    contents = [prose(number) for number in range(count)]
    disk.write(0, b"".join(contents))
    run(Recompress(pool))
    without = pool.stats().compr_data_size
    disk.write(0, b"".join(contents))
    report = run(Recompress(pool, dictionary=True))
    stats = pool.stats()
    assert report.dictionary_bytes >= least_bytes
    assert stats.compr_by_codec["zstd-dict"] > 0
    assert stats.compr_data_size < without * 0.95
    pool.check()
    run(Check(pool))
    pool.close()
    again = Pool(path=path)
    assert again.disks()[0].read(0, count * BLOCK) == b"".join(contents)
    run(Check(again))
    again.disks()[0].write(0, prose(7000))
    report = run(Recompress(again, dictionary=True))
    assert (report.objects_seen, report.objects_recompressed) == (1, 1)  # what was made small is known
    again.close()
    again = Pool(path=path)
    assert again.disks()[0].read(BLOCK, (count - 1) * BLOCK) == b"".join(contents[1:])
    again.disks()[0].trim(0, SIZE)
    again.close()
    empty = Pool(path=path)
    assert empty.stats().metadata < stats.metadata - 2 * report.dictionary_bytes
    empty.close()


def test_a_dictionary_that_helps_some_blocks_and_not_others_loses_none() -> None:
    """A block that is no shorter with the dictionary leaves the next one's encoding, and what names it, right."""
    pool = Pool()
    disk = pool.create("disk", SIZE)
    contents = [half_random(number, 1500) if number % 3 == 0 else prose(number) for number in range(2000)]
    disk.write(0, b"".join(contents))
    assert run(Recompress(pool, dictionary=True)).dictionary_bytes > 1000
    assert pool.stats().compr_by_codec["zstd-dict"] > pool.stats().compr_data_size // 4
    assert disk.read(0, len(contents) * BLOCK) == b"".join(contents)
    run(Check(pool))


def test_compaction_after_recompression_returns_the_pages() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    disk.write(0, b"".join(prose(number) for number in range(2000)))
    run(Recompress(pool))
    run(Compact(pool))
    stats = pool.stats()
    assert stats.mem_used_total <= stats.compr_data_size * 1.03 + 40 * BLOCK
    pool.check()


def test_recompression_at_the_limit_changes_nothing_that_is_stored() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    disk.write(0, b"".join(prose(number) for number in range(200)))
    pool.mem_limit = 1
    run(Recompress(pool))
    assert disk.read(0, 200 * BLOCK) == b"".join(prose(number) for number in range(200))
    pool.check()


def test_a_step_encodes_a_few_objects_however_many_it_may_pass_over() -> None:
    """Its budget grows with handles and entries that are passed over in nanoseconds: in encodings it was minutes, in
    which nobody could pause or cancel the run, and its share of the processor was all of it."""
    pool = Pool()
    disk = pool.create("disk", 400 * BLOCK)
    disk.write(0, b"".join(map(text, range(400))))
    recompression, seen = Recompress(pool, level=1), [0]
    while recompression.step(8 << 10):
        seen.append(recompression.report().objects_seen)
    assert seen[-1] == recompression.report().objects_seen == 400
    assert max(after - before for before, after in pairwise(seen)) == 8


def test_a_level_outside_the_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"level 23 is outside 1 \.\. 22"):
        Recompress(Pool(), level=23)


def test_a_dictionary_that_is_not_what_was_written_is_given_to_nobody(tmp_path: Path) -> None:
    """A stream would carry it on, with objects that nobody can decode any more."""
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", SIZE)
        disk.write(0, b"".join(prose(number) for number in range(300)))
        run(Recompress(pool, dictionary=True))
        content = dictionary_of(pool, 0)
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            place = view.find(content)
            view[place + len(content) - 1] ^= 1
            with pytest.raises(EngineError, match="dictionary 0 is not what was written"):
                dictionary_of(pool, 0)
            view[place + len(content) - 1] ^= 1
        assert dictionary_of(pool, 0) == content
        with pytest.raises(EngineError, match="the pool has no dictionary 1"):
            dictionary_of(pool, 1)
