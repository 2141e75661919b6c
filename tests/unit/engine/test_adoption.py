"""What is found in an arena that is opened again, and derived of it, is the same, however many threads do that."""

from __future__ import annotations

import dataclasses
import random
import shutil
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nbdzram.engine.fold import Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.publish import pause_at_publish
from nbdzram.engine.stats import CUMULATIVE, PoolStats
from nbdzram.errors import ArenaError
from tests.faults.contents import tell
from tests.faults.damage import Image, damaged
from tests.support.arena import SEGMENTS_AT, UNIT
from tests.unit.engine.blocks import AT_HAND, BLOCK, run, text

SEGMENT = 65536  # cells, of which each share is one
COMMON = 1000  # blocks of one content: more holders than a cell counts by itself
AT_ONCE = 1024
BEHIND = 1 << 32  # bytes: where nothing is written yet
SINCE_OPENING = (*CUMULATIVE, "mem_used_max", "mem_used_total", "metadata", "zspages")
"""What an opened pool counts anew, or has less of by what threads had at hand."""


def numbered(number: int) -> bytes:
    """A block that compresses to some thirty bytes and is quickly made."""
    return struct.pack("<QQ", number, 1) + bytes(BLOCK - 16)


def on_threads(count: int) -> Callable[[Sequence[Callable[[], None]]], None]:
    def together(functions: Sequence[Callable[[], None]]) -> None:
        with ThreadPoolExecutor(count) as threads:
            for ended in [threads.submit(function) for function in functions]:
                ended.result()

    return together


def opened(path: Path, threads: int) -> Pool:
    return Pool(path=str(path), together=on_threads(threads))


@dataclasses.dataclass(frozen=True)
class Ended:
    """An arena that ended cleanly, and what the pool counted that wrote it."""

    path: Path
    stats: PoolStats


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Two segments of cells with the same content in the same order, so that threads meet in the index; one object of a
    thousand handles; gaps in both."""
    path = tmp_path_factory.mktemp("ended") / "a.pool"
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", 1 << 40)
        for number in range(COMMON):
            disk.write(number * BLOCK, text(0))
        run(Fold(pool))
        for first in range(COMMON, 2 * SEGMENT + COMMON, AT_ONCE):
            disk.write(first * BLOCK, b"".join(numbered(n % SEGMENT) for n in range(first, first + AT_ONCE)))
        for number in range(2 * COMMON, 2 * SEGMENT, SEGMENT // 7):
            disk.trim(number * BLOCK, 300 * BLOCK)
        stats = pool.stats()
    with Pool(path=str(path)) as pool:
        # A suspect whose equal has gone is none any more, which only a fold or an opening finds out.
        assert 0 < pool.stats().fold_pending < stats.fold_pending
        stats = dataclasses.replace(stats, fold_pending=pool.stats().fold_pending)
    return Ended(path, stats)


@pytest.fixture
def arena(ended: Ended, tmp_path: Path) -> Ended:
    shutil.copyfile(ended.path, tmp_path / "a.pool")
    return Ended(tmp_path / "a.pool", ended.stats)


def cells(path: Path) -> list[int]:
    """The words of all cells, from handle 0 to the highest that is in use."""
    view = path.read_bytes()
    words: list[int] = []
    for unit in struct.unpack_from("<8I", view, SEGMENTS_AT):
        words += struct.unpack_from(f"<{2 * SEGMENT}Q", view, unit * UNIT)[::2] if unit else ()
    while words[-1] == 0:
        words.pop()
    return words


def cell_at(path: Path, handle: int) -> int:
    """Where in the file a handle's cell lies."""
    unit: int = struct.unpack_from("<I", path.read_bytes(), SEGMENTS_AT + handle // SEGMENT * 4)[0]
    return unit * UNIT + handle % SEGMENT * 16


def outcome(path: Path, threads: int) -> object:
    """Why an arena is refused, which it stays as it is for; or what is counted of it."""
    before = path.read_bytes()
    try:
        pool = opened(path, threads) if threads else Pool(path=str(path))
    except ArenaError as refusal:
        assert path.read_bytes() == before
        return str(refusal)
    with pool:
        return pool.stats()


def kept(stats: PoolStats) -> dict[str, object]:
    return {name: value for name, value in dataclasses.asdict(stats).items() if name not in SINCE_OPENING}


@pytest.mark.parametrize("threads", [1, 4])
def test_objects_holders_and_suspects_are_counted_as_they_were(arena: Ended, threads: int) -> None:
    with opened(arena.path, threads) as pool:
        assert kept(pool.stats()) == kept(arena.stats)
        pool.check()
        run(Fold(pool))
        assert pool.stats().objects_folded == arena.stats.fold_pending
        pool.check()


def test_threads_that_come_between_a_look_and_its_exchange_lose_no_object(arena: Ended) -> None:
    """Both segments have the same content: each object is found by the other thread's, or finds it."""
    pause_at_publish(True)
    try:
        pool = opened(arena.path, 4)
    finally:
        pause_at_publish(False)
    with pool:
        assert pool.stats().fold_pending == arena.stats.fold_pending
        pool.check()


def test_handles_that_are_free_in_any_share_are_used_before_new_ones(arena: Ended) -> None:
    words = cells(arena.path)
    free = words[1:].count(0)
    assert min(words[:SEGMENT].count(0), words[SEGMENT:].count(0)) > 10 * AT_HAND
    with opened(arena.path, 4) as pool:
        (disk,) = pool.disks()
        for number in range(free - AT_HAND):
            disk.write(BEHIND + number * BLOCK, text(number + 1))
    assert len(cells(arena.path)) == len(words)


def test_the_arena_is_the_same_to_the_byte_however_many_threads_opened_it(arena: Ended, tmp_path: Path) -> None:
    """And after what was written then: handles and slots that are free are taken in the same order."""
    found = []
    for threads in (1, 4):
        shutil.copyfile(arena.path, tmp_path / "copy.pool")
        with opened(tmp_path / "copy.pool", threads) as pool:
            (disk,) = pool.disks()
            for number in range(3 * COMMON):
                disk.write(BEHIND + number * BLOCK, text(number))
        found.append((tmp_path / "copy.pool").read_bytes())
    assert found[0] == found[1]


def test_an_arena_that_was_opened_and_not_written_to_is_opened_again_without_a_change(arena: Ended) -> None:
    before = arena.path.read_bytes()
    opened(arena.path, 4).close()
    assert arena.path.read_bytes() == before


@pytest.mark.parametrize("stage", range(4))
def test_an_opening_whose_threads_fail_is_none(arena: Ended, stage: int) -> None:
    """Over leaves, objects, cells, or what exports share. The next one finds all."""
    left = stage

    def fails(functions: Sequence[Callable[[], None]]) -> None:
        nonlocal left
        for function in functions[: None if left else -1]:
            function()
        left -= 1
        if left < 0:
            raise ArenaError("no thread")

    with pytest.raises(ArenaError, match="no thread"):
        Pool(path=str(arena.path), together=fails)
    with opened(arena.path, 2) as pool:
        assert kept(pool.stats()) == kept(arena.stats)
        pool.check()


def test_a_pool_takes_no_word_that_it_does_not_know() -> None:
    with pytest.raises(TypeError):
        Pool(mem_limt=1)  # type: ignore[call-arg]


# -- the survey -------------------------------------------------------------------------------------------------------


@pytest.fixture
def every_kind(tmp_path: Path) -> Image:
    """Every kind of content, and clones that share leaves below branches of their own."""
    path = tmp_path / "every kind"
    with Pool(path=str(path)) as pool:
        tell(pool)
        plain = next(disk for disk in pool.disks() if disk.name == "plain")
        for number in range(4):
            pool.clone(plain, f"sibling {number}").write((number + 4 << 9) * BLOCK, text(number))
    return Image.of(path)


def test_every_kind_of_content_is_found_by_any_number_of_threads(every_kind: Image, tmp_path: Path) -> None:
    """Which of them finds a node that several have is chance, and so is whose its blocks are counted for at first."""
    found, bytes_found = [], []
    for threads in (1, 2, 5):
        every_kind.write(tmp_path / "arena")
        pause_at_publish(threads > 1)
        try:
            pool = opened(tmp_path / "arena", threads)
        finally:
            pause_at_publish(False)
        with pool:
            pool.check()
            found.append((pool.stats(), [disk.usage() for disk in pool.disks()]))
        bytes_found.append((tmp_path / "arena").read_bytes())
    assert found[0] == found[1] == found[2]
    assert bytes_found[0] == bytes_found[1] == bytes_found[2]


def test_damages_are_refused_with_the_same_words_by_any_number_of_threads(every_kind: Image, tmp_path: Path) -> None:
    """Several at once: which of them threads meet first is chance."""
    first = random.randrange(1 << 30)
    refusals = 0
    for seed in range(first, first + 10):
        image = every_kind
        for number in range(4):
            damage = damaged(every_kind, 4 * seed + number)
            for place in damage.places if damage.kind != "truncated" else ():
                image = image.with_word(place, damage.image.word(place))
        outcomes = []
        for threads in (0, 2, 5):
            image.write(tmp_path / "arena")
            outcomes.append(outcome(tmp_path / "arena", threads))
        assert outcomes[0] == outcomes[1] == outcomes[2], f"seed {seed}"
        refusals += isinstance(outcomes[0], str)
    assert refusals > 0, f"seed {first}"


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_slot_of_two_objects_is_refused_and_the_higher_handle_is_named(arena: Ended, threads: int) -> None:
    """The last of one segment and the first of the next: who begins with that finds the lower one to be the second."""
    words = cells(arena.path)
    low = next(handle for handle in range(SEGMENT - 1, 0, -1) if words[handle])
    high = next(handle for handle in range(SEGMENT, 2 * SEGMENT) if words[handle])
    view = bytearray(arena.path.read_bytes())
    struct.pack_into("<Q", view, cell_at(arena.path, high), words[low])
    arena.path.write_bytes(view)
    assert f"object {high} lies where none can be" in str(outcome(arena.path, threads))


def test_no_holder_of_an_object_is_lost_between_threads(tmp_path: Path) -> None:
    """All blocks of two branches, which two threads look at, hold one object. Its cell is in the second segment."""
    with Pool(path=str(tmp_path / "arena"), inline_dedup=True) as pool:
        disk = pool.create("disk", 1 << 40)
        for first in range(0, SEGMENT + AT_ONCE, AT_ONCE):
            disk.write(BEHIND + first * BLOCK, b"".join(map(numbered, range(first, first + AT_ONCE))))
        for first in range(0, 64 * AT_ONCE, AT_ONCE):
            disk.write(first * BLOCK, text(1) * AT_ONCE)
            disk.write((1 << 30) + first * BLOCK, text(1) * AT_ONCE)
    for _ in range(4):
        with opened(tmp_path / "arena", 2) as pool:
            pool.check()
