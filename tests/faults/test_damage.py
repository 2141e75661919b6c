"""Whatever happens to the bytes of an arena: it is refused and stays as it is, or what is read is right, or an error.

Each damage (damage.py) is done to a fresh copy and tried in a process of its own, so that a crash or a hang is that of
one seed. Format 1 has no checks but its fingerprints: what its tables or cells lost cannot be told, and is counted.
"""

from __future__ import annotations

import collections
import lzma
import mmap
import os
import random
import resource
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdzram.engine.check import Check
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.errors import ArenaError, EngineError, StreamError
from tests.faults.contents import BLOCK, FAR, NEAR, SIZE, expected, tell
from tests.faults.damage import Damage, Image, damaged, flipped, flips, use
from tests.support.arena import FIRST_UNIT, UNIT
from tests.unit.stream.roads import receive, sent

HOLE = bytes(BLOCK)
RANGES = ((0, NEAR + 200), (FAR - 20, FAR + 100))
PROCESSOR_SECONDS = 20  # of one opening and reading, which take 0.05: what takes longer hangs
QUICK, THOROUGH = 60, 1000
FLIPS_WHILE_OPEN, FLIPS_BEFORE, FLIPS_OF_STREAMS = 5000, 2500, 2500  # ten thousand in all

REFUSED, TOLD, RIGHT, SILENT, CHANGED = "refused", "told", "right", "silent", "changed by a refused opening"
OUTCOMES = (REFUSED, TOLD, RIGHT, SILENT, CHANGED)

Expected = dict[str, dict[int, bytes]]


def arena_of(form: int, place: Path) -> Image:
    """An arena with every kind of content, written by a program of that format."""
    path = place / f"format {form}"
    if form == 1:
        with lzma.open(Path(__file__).with_name("format-1.arena.xz")) as packed:
            path.write_bytes(packed.read())
    else:
        with Pool(path=str(path)) as pool:
            tell(pool)
    image = Image.of(path)
    path.unlink()
    return image


def wrong_blocks(disk: Disk, blocks: dict[int, bytes]) -> tuple[int, int]:
    """How many blocks read as something else, and how many are errors."""
    wrong = errors = 0
    for first, end in RANGES:
        for block in range(first, end):
            try:
                wrong += disk.read(block * BLOCK, BLOCK) != blocks.get(block, HOLE)
            except EngineError:
                errors += 1
    return wrong, errors


def read_all(pool: Pool, exports: Expected) -> str:
    if {disk.name for disk in pool.disks()} != set(exports) or any(disk.size_bytes != SIZE for disk in pool.disks()):
        return SILENT
    found = [wrong_blocks(disk, exports[disk.name]) for disk in pool.disks()]
    if sum(wrong for wrong, _ in found):
        return SILENT
    return TOLD if sum(errors for _, errors in found) else RIGHT


def try_out(path: Path, image: Image, exports: Expected, seed: int) -> str:
    """What becomes of one damaged arena."""
    try:
        pool = Pool(path=str(path))
    except ArenaError:
        return REFUSED if Image.of(path) == image else CHANGED
    with pool:
        outcome = read_all(pool, exports)
        use(pool, seed)
    return outcome


def outcome_of(damage: Damage, path: Path, exports: Expected, seed: int) -> str:
    """The same, in a process of its own."""
    damage.image.write(path)
    try:
        return apart(lambda: try_out(path, damage.image, exports, seed))
    finally:
        path.unlink(missing_ok=True)


def apart(act: Callable[[], str]) -> str:
    """What comes of it in a process of its own."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            code = OUTCOMES.index(act())
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        ended_by = os.WTERMSIG(status)
        return "hang" if ended_by in (signal.SIGXCPU, signal.SIGKILL) else signal.Signals(ended_by).name
    code = os.WEXITSTATUS(status)
    return OUTCOMES[code] if code < len(OUTCOMES) else "exception"


def cannot_be_told(form: int, damage: Damage, original: Image) -> bool:
    """Whether nothing in format 1 says that this was damage: tables, cells and directories have no checks there."""
    return form == 1 and not all(is_content(original, at) for at in damage.places)


def is_content(image: Image, at: int) -> bool:
    """Whether a word is an object's or a dictionary's, in which format 1 sees damage by fingerprints."""
    unit = at // UNIT
    used = [page for page in image.pages if page // UNIT == unit]
    return unit >= FIRST_UNIT and unit not in units_of_tables(image) and bool(used)


def units_of_tables(image: Image) -> set[int]:
    """Units of cells and nodes, as format 1 names them."""
    segment = int.from_bytes(image.pages[UNIT][:4], "little")
    nodes: set[int] = set()
    for entry in range(0, BLOCK, 512):
        head = image.pages[5 * UNIT][entry : entry + 24]
        if head[0]:
            nodes.update(nodes_below(image, int.from_bytes(head[16:20], "little"), 3))
    return {*range(segment, segment + 16), *(node // 16 for node in nodes)}


def nodes_below(image: Image, page: int, level: int) -> set[int]:
    if page == 0:
        return set()
    words = image.pages.get(page * BLOCK, HOLE)
    children = {int.from_bytes(words[at : at + 4], "little") for at in range(0, BLOCK, 4)} if level else set()
    return {page}.union(*(nodes_below(image, child, level - 1) for child in children))


def try_damages(form: int, place: Path, seeds: range) -> None:
    exports, original = expected(), arena_of(form, place)
    outcomes: collections.Counter[str] = collections.Counter()
    wrong = []
    for seed in seeds:
        damage = damaged(original, seed)
        outcome = outcome_of(damage, place / "damaged", exports, seed)
        if outcome == SILENT and cannot_be_told(form, damage, original):
            outcome = "silent, and nothing in format 1 says so"
        elif outcome not in (REFUSED, TOLD, RIGHT):
            wrong.append((seed, damage.kind, [hex(at) for at in damage.places], outcome))
        outcomes[outcome] += 1
    print(f"format {form}, seeds {seeds.start} to {seeds.stop - 1}: {dict(outcomes)}")
    assert not wrong, wrong
    assert min(outcomes[outcome] for outcome in (REFUSED, TOLD, RIGHT)) > 0, outcomes


@pytest.mark.parametrize("form", [1, 2])
def test_an_arena_that_nothing_happened_to_is_right(place: Path, form: int) -> None:
    arena_of(form, place).write(place / "arena")
    for _ in range(2):  # what was upgraded is opened again
        with Pool(path=str(place / "arena")) as pool:
            assert read_all(pool, expected()) == RIGHT
            check = Check(pool)
            while check.step(1000):
                pass
            assert pool.stats().blocks_rotten == 0


@pytest.mark.parametrize("form", [1, 2])
def test_damage_is_refused_or_told_and_never_delivered(place: Path, form: int) -> None:
    first = random.randrange(1 << 30)
    try_damages(form, place, range(first, first + QUICK))


@pytest.mark.slow
@pytest.mark.parametrize("form", [1, 2])
def test_a_thousand_damages_are_refused_or_told_and_never_delivered(place: Path, form: int) -> None:
    try_damages(form, place, range(THOROUGH))


# -- ten thousand single bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [QUICK, pytest.param(FLIPS_WHILE_OPEN, marks=pytest.mark.slow)])
def test_no_bit_that_flips_in_an_open_arena_lets_a_wrong_byte_be_served(place: Path, count: int) -> None:
    """In objects, cells, nodes, dictionaries, directory and superblock, each in turn, below a pool that reads on."""
    exports, image = expected(), arena_of(2, place)
    path = place / "open"
    image.write(path)
    outcomes: collections.Counter[str] = collections.Counter()
    with Pool(path=str(path)) as pool, path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        for seed, at, bit in flips(Image.of(path), range(count)):
            (word,) = struct.unpack_from("<Q", view, at)
            struct.pack_into("<Q", view, at, word ^ 1 << bit)
            outcome = apart(lambda: read_all(pool, exports))
            struct.pack_into("<Q", view, at, word)
            assert outcome in (TOLD, RIGHT), (seed, hex(at), bit, outcome)
            outcomes[outcome] += 1
        assert read_all(pool, exports) == RIGHT
    print(f"{count} bits of an open arena: {dict(outcomes)}, 0 wrong bytes")
    assert outcomes[TOLD] > count // 10, "most of them lie in nothing that is read"


@pytest.mark.slow
def test_no_bit_that_flipped_before_an_arena_is_opened_lets_a_wrong_byte_be_served(place: Path) -> None:
    exports, image = expected(), arena_of(2, place)
    outcomes: collections.Counter[str] = collections.Counter()
    for seed, at, bit in flips(image, range(FLIPS_BEFORE)):
        outcome = outcome_of(flipped(image, at, bit), place / "flipped", exports, seed)
        assert outcome in (REFUSED, TOLD, RIGHT), (seed, hex(at), bit, outcome)
        outcomes[outcome] += 1
    print(f"{FLIPS_BEFORE} bits of an arena that is opened: {dict(outcomes)}, 0 wrong bytes")


@pytest.mark.slow
def test_no_bit_that_flips_in_a_stream_lets_a_wrong_byte_be_received() -> None:
    with Pool() as pool, Pool() as other:
        tell(pool)
        stream = sent(*pool.disks(), origins={"copy": 0})
        for seed in range(FLIPS_OF_STREAMS):
            choose = random.Random(seed)
            bent = bytearray(stream)
            bent[choose.randrange(len(stream))] ^= 1 << choose.randrange(8)
            with pytest.raises(StreamError):
                receive(other, bytes(bent))
            assert (other.all_disks(), other.stats().objects) == ([], 0), seed
        assert len(receive(other, stream)) == 4
    print(f"{FLIPS_OF_STREAMS} bits of streams: all refused, 0 wrong bytes")
