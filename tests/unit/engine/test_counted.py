"""What each act of the engine answers, counts and leaves, every counter of it, as it was: counted.txt.

python -m tests.unit.engine.test_counted        writes it anew, after a change that is meant
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lz4
import zstandard

from nbdzram.engine import moment
from nbdzram.engine.absorb import Absorber
from nbdzram.engine.arena import fail_allocation
from nbdzram.engine.check import Check
from nbdzram.engine.dictionary import dictionary_of
from nbdzram.engine.disk import Disk, Extent
from nbdzram.engine.estimate import Estimate
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.purse import Purse
from nbdzram.engine.recompress import Recompress
from nbdzram.engine.run import Run
from nbdzram.engine.salvage import Salvage
from nbdzram.engine.scrub import Scrub
from nbdzram.engine.walk import Told, Walk, blocks_apart, leaves_apart
from nbdzram.errors import NbdzramError
from tests.support.arena import Arena
from tests.unit.engine.blocks import BLOCK, half_random, noise, prose, text

COUNTED = Path(__file__).with_name("counted.txt")
MIB, LEAF, FAR = 1 << 20, 2 << 20, 3 << 30
SIZE = 4 << 30
FEW = 12  # exports that are looked at
MANY = 515  # holders: a cell counts 511
DICTIONARIES = 4  # places for them in a pool
MASKS = (Extent.HOLE, Extent.SHARED, Extent.HUGE, Extent.SAME_FILLED, *map(Extent, (3, 31)))
SAME, PATTERN = b"\1\2\3\4\5\6\7\0" * 512, b"abcd" * 1024

Act = tuple[str, Callable[[], object]]  # what it is called, and what it does


def seen(outcome: object) -> str:
    """In few words: long bytes by their sum."""
    if isinstance(outcome, bytes | bytearray):
        return outcome.hex() if len(outcome) <= 24 else f"{len(outcome)} bytes {zlib.crc32(outcome):08x}"
    if isinstance(outcome, Disk):
        return f"disk {outcome.name}"
    if isinstance(outcome, list | tuple) and not hasattr(outcome, "_fields"):
        return f"[{' '.join(map(seen, outcome))}]"
    return str(outcome)


def state(pool: Pool) -> Iterator[tuple[str, object]]:
    """All that a pool tells of itself."""
    stats = pool.stats()
    for field in dataclasses.fields(stats):
        if not isinstance(figure := getattr(stats, field.name), dict):
            yield field.name, figure
    yield from stats.compr_by_codec.items()
    yield from zip(("declined by a limit", "declined by the system"), pool.declined(), strict=True)
    yield "turns", pool.turns()
    yield "turns behind", pool.turns_behind()
    yield from zip(("alone", "waited for that"), pool.taken_alone(), strict=True)
    yield from zip(("looked again", "looked again for bytes"), pool.readers_looked_again(), strict=True)
    yield "buckets", pool.buckets()
    yield "rot", pool.last_rot()
    for disk in pool.all_disks()[:FEW]:
        marks = [name for name in ("read_only", "private", "damaged", "concealed") if getattr(disk, name)]
        yield disk.name, (disk.number, disk.domain, disk.quota_bytes, *marks, *disk.stats())
        yield f"{disk.name} uses", tuple(dataclasses.astuple(disk.usage()))


def whole(pool: Pool) -> str:
    """All that is not zero, but for turns, which are counted for as long as the process lives."""
    figures = {name: figure for name, figure in state(pool) if figure and "turns" not in name}
    return ", ".join(f"{name} {seen(figure)}" for name, figure in figures.items())


def told(pool: Pool, acts: Iterator[Act]) -> Iterator[str]:
    """A line an act: what it answered or raised, and what is another figure now, by how much."""
    before = dict(state(pool))
    for name, act in acts:
        try:
            outcome = seen(act())
        except (NbdzramError, ValueError) as error:
            outcome = f"{type(error).__name__}: {error}"
        after = dict(state(pool))
        chance = {"turns behind"} if "agree" in name else set()  # a check's holds in the index end where buckets do
        changes = [
            f"{key} {change(before.get(key), after.get(key))}"
            for key in {**before, **after}
            if before.get(key) != after.get(key) and key not in chance
        ]
        yield f"{name}: {outcome}{' | ' if changes else ''}{', '.join(changes)}"
        before = after


def change(before: object, after: object) -> str:
    if isinstance(before, int) and isinstance(after, int):
        return f"{after - before:+}"
    return seen(after)


def steps(run: Run[Any], budget: int) -> str:
    """How far it is after each step, and what it reports."""
    way = [f"{run.done}/{run.total}"]
    while run.step(budget):
        way.append(f"{run.done}/{run.total}")
    return f"{' '.join(way)} {run.done}/{run.total} {run.report()}"


def totals(run: Check) -> str:
    """The same of a check, whose steps through the index end where its buckets do: they are of chance."""
    way = [run.total]
    while run.step(500):
        if run.total != way[-1]:
            way.append(run.total)
    return f"{way} {run.done} {run.report()}"


def writes(disk: Disk) -> Iterator[Act]:
    """Blocks of each kind, whole and in parts, over each other."""
    kinds = {
        "text": text(1),
        "noise": noise(1),
        "half": half_random(1),
        "word": SAME,
        "pattern": PATTERN,
        "zeroes": bytes(BLOCK),
    }
    for place, (kind, content) in enumerate(kinds.items()):
        yield f"write {kind}", partial(disk.write, place * BLOCK, content)
        yield f"write {kind} again", partial(disk.write, place * BLOCK, content)
        yield f"write {kind} elsewhere", partial(disk.write, FAR + place * BLOCK, content)
    for place, kind in enumerate(kinds):
        yield f"a part over {kind}", partial(disk.write, place * BLOCK + 100, b"part")
    yield "over three blocks", lambda: disk.write(20 * BLOCK - 3, text(2)[:6] + text(3) + b"tail")
    yield "a hundred", lambda: disk.write(LEAF - 50 * BLOCK, b"".join(half_random(n % 40, 700) for n in range(100)))
    yield "at the end", lambda: disk.write(SIZE - BLOCK, text(4))
    yield "behind the end", lambda: disk.write(SIZE - 1, b"ab")
    yield "nothing", lambda: disk.write(0, b"")


def looks(disk: Disk) -> Iterator[Act]:
    yield "read", lambda: disk.read(0, 64 * BLOCK)
    yield "read a part", lambda: disk.read(BLOCK - 3, 6)
    yield "read far", lambda: disk.read(FAR, 8 * BLOCK)
    yield "read behind the end", lambda: disk.read(SIZE - 1, 2)
    for mask in MASKS:
        yield f"extents {mask:d}", partial(disk.extents, 0, SIZE, 20, mask)
    yield "two extents", lambda: disk.extents(BLOCK, 30 * BLOCK, 2)
    yield "unreadable", lambda: disk.first_unreadable(0)


def takes(disk: Disk) -> Iterator[Act]:
    """What makes room."""
    yield "trim less than a block", lambda: disk.trim(BLOCK + 1, BLOCK)
    yield "trim two and parts", lambda: disk.trim(BLOCK - 1, 2 * BLOCK + 2)
    yield "zero parts", lambda: disk.zero(20 * BLOCK - 1, BLOCK + 3)
    yield "zero with no hole", lambda: disk.zero(19 * BLOCK, 3 * BLOCK, no_hole=True)
    yield "zero all of a leaf", lambda: disk.zero(0, LEAF)
    yield "trim far", lambda: disk.trim(FAR, SIZE - FAR)
    yield "clear", disk.clear


def runs(pool: Pool) -> Iterator[Act]:
    yield "a dry fold", lambda: steps(Fold(pool, dry_run=True), 7)
    yield "fold", lambda: steps(Fold(pool), 7)
    yield "fold again", lambda: steps(Fold(pool), 7)
    yield "a dry compaction", lambda: steps(Compact(pool, dry_run=True), 7)
    yield "compact", lambda: steps(Compact(pool), 7)
    yield "an hour later", lambda: pool.set_clock(7200)
    yield "recompress what is huge", lambda: steps(Recompress(pool, huge_only=True), 50)
    yield "recompress what is old", lambda: steps(Recompress(pool, idle_seconds=7200), 50)
    yield "recompress", lambda: steps(Recompress(pool, idle_seconds=3600), 50)
    yield "recompress again", lambda: steps(Recompress(pool), 50)
    yield "recompress harder", lambda: steps(Recompress(pool, level=9), 50)
    yield "check", lambda: totals(Check(pool))
    yield "check no contents", lambda: totals(Check(pool, contents=False))
    yield "scrub", lambda: steps(Scrub(pool), 50)
    yield "agree", pool.check


def acts_on_exports(pool: Pool) -> Iterator[Act]:
    """What an export lives through."""
    disk = pool.create("disk", SIZE)
    made: dict[str, Any] = {}

    def keep(name: str, value: object) -> object:
        made[name] = value
        return value

    yield from writes(disk)
    yield from looks(disk)
    yield "clone", lambda: keep("clone", pool.clone(disk, "clone"))
    yield "clone with a name that is taken", lambda: pool.clone(disk, "clone")
    yield "write on a clone", lambda: made["clone"].write(0, text(9))
    yield "trim on a clone", lambda: made["clone"].trim(LEAF, LEAF)
    yield "a private one", lambda: keep("private", pool.create("private", MIB, private=True))
    yield "a private one's clone", lambda: keep("of private", pool.clone(made["private"], "of private", read_only=True))
    yield "write what others have", lambda: made["private"].write(0, noise(1) + noise(1) + half_random(1))
    yield from runs(pool)
    yield "rename", lambda: pool.rename(made["clone"], "renamed")
    yield "rename to what is taken", lambda: pool.rename(made["clone"], "disk")
    yield "a quota", lambda: setattr(made["clone"], "quota_bytes", made["clone"].stats().stored + BLOCK)
    yield "the last of a quota", lambda: made["clone"].write(100 * BLOCK, noise(20))
    yield "more than a quota", lambda: made["clone"].write(101 * BLOCK, noise(21))
    yield "over what is there", lambda: made["clone"].write(100 * BLOCK, noise(22))
    yield "shrink", lambda: made["clone"].resize(LEAF + 5 * BLOCK + 77)
    yield "grow", lambda: made["clone"].resize(SIZE)
    yield "read where it was cut", lambda: made["clone"].read(LEAF + 4 * BLOCK, 3 * BLOCK)
    yield from moments(pool, disk)
    yield "delete a clone", lambda: pool.delete(made["clone"])
    yield "delete it again", lambda: pool.delete(made["clone"])
    yield "read what is gone", lambda: made["clone"].read(0, 1)
    yield "delete a private one", lambda: pool.delete(made["private"])
    yield "delete its clone", lambda: pool.delete(made["of private"])
    yield from takes(disk)
    yield "delete the last", lambda: pool.delete(disk)
    yield "agree on nothing", pool.check


def moments(pool: Pool, disk: Disk) -> Iterator[Act]:
    """Copies of a moment, what is told of them, and what comes of that in another pool."""
    copies: list[Any] = []

    def keep(made: Sequence[Disk | None]) -> Sequence[Disk | None]:
        copies.extend(made)
        return made

    yield "a moment", lambda: keep(moment.snapshot_together([disk], ["first"]))
    yield "whole", lambda: moment.finish(copies[0])
    yield "nothing changed", lambda: moment.snapshot_changed([disk], [copies[0]], ["second"])
    yield "alike", lambda: moment.are_alike(disk, copies[0])
    yield "a change", lambda: disk.write(FAR + 9 * BLOCK, noise(30) + SAME + bytes(BLOCK) + text(30) * 3)
    yield "not alike", lambda: moment.are_alike(disk, copies[0])
    yield "what changed", lambda: keep(moment.snapshot_changed([disk], [copies[0]], ["second"]))
    yield "apart", lambda: (leaves_apart(copies[1], copies[0], 99), blocks_apart(copies[1], copies[0], 99))
    yield "apart at most", lambda: (leaves_apart(copies[1], None, 2), blocks_apart(copies[1], None, 5))
    known = Told()
    yield "the first is told", lambda: walked(copies[0], None, known)
    yield "the second is told", lambda: walked(copies[1], copies[0], known)
    yield "all is told again", lambda: walked(copies[1], None, Told(), first=10)
    yield "is received", lambda: received(pool, copies[0])
    yield "is offered", lambda: moment.reveal(copies[0])
    yield "is offered no more", lambda: pool.delete(copies[0])
    yield "is discarded", lambda: moment.discard(copies)


def walked(copy: Disk, origin: Disk | None, known: Told, first: int = 0) -> list[str]:
    walk = Walk(copy, origin, known, first)
    told = []
    while (step := walk.step()) is not None:
        told.append(f"{seen(step)} {seen(walk.numbers)} {walk.position} {walk.progress:.6f}")
    return told


def received(pool: Pool, copy: Disk, *, dictionaries: int = 0) -> str:
    """In a pool that has some of it, and so many dictionaries."""
    with Pool() as other:
        for number in range(dictionaries):
            Absorber(other).dictionary(number, text(number) * 2)
        other.create("before", MIB).write(0, noise(1) + half_random(1))
        staging = moment.prepare(other, "staging", SIZE)
        disk = moment.prepare(other, "disk", SIZE, alike=staging)
        absorber, walk = Absorber(other), Walk(copy, None, Told())
        while (step := walk.step()) is not None:
            first, _, needed, objects, runs = step
            for number in range(DICTIONARIES):
                if needed >> number & 1:
                    absorber.dictionary(number, dictionary_of(pool, number))
            absorber.take_objects(staging, objects)
            absorber.take_blocks(disk, staging, first, runs)
        absorber.end_disk(disk)
        moment.discard([staging])
        figures = [absorber.objects, absorber.object_bytes, absorber.objects_folded, absorber.objects_encoded_again]
        same = disk.read(0, LEAF) == copy.read(0, LEAF) and disk.read(FAR, LEAF) == copy.read(FAR, LEAF)
        other.check()
        return f"{figures} {absorber.blocks} {same} {other.stats()}"


def acts_without_room(pool: Pool) -> Iterator[Act]:
    """What is refused for want of memory, and what is kept then."""
    disk = pool.create("disk", SIZE)
    purse = Purse()
    yield "a limit of less than there is", lambda: setattr(pool, "mem_limit", 1)
    yield "too high a limit", lambda: setattr(pool, "mem_limit", 1 << 60)
    yield "a limit", lambda: setattr(pool, "mem_limit", pool.stats().memory_used + 40 * BLOCK)
    yield "more than the limit", lambda: disk.write(0, b"".join(noise(number) for number in range(64)))
    yield "a word more", lambda: disk.write(70 * BLOCK, SAME)
    yield "a leaf more", lambda: disk.write(FAR, SAME)
    yield "room is made", lambda: disk.trim(3 * BLOCK, 20 * BLOCK)
    yield "some that compress", lambda: disk.write(64 * BLOCK, b"".join(half_random(n, 500) for n in range(90)))
    for place in range(64, 154, 3):
        yield "a gap", partial(disk.trim, place * BLOCK, BLOCK)
    yield "gaps are closed", lambda: disk.write(3 * BLOCK, b"".join(noise(number) for number in range(64, 80)))
    yield "clone", lambda: pool.clone(disk, "clone")
    yield "a leaf of its own", lambda: disk.write(3 * LEAF, text(7))
    yield "no more than there is", lambda: setattr(pool, "mem_limit", pool.stats().memory_used)
    yield "many more", lambda: setattr(pool, "mem_limit", 4 * MIB)
    yield "all that there is room for", partial(filled, disk, 3 * LEAF + 100 * BLOCK)
    room: Sequence[tuple[str, int, int]] = (("a block of a leaf of both goes", 3, 1), ("a leaf of both goes", 0, 512))
    for at, (goes, first, count) in enumerate(room):
        yield goes, partial(disk.trim, first * BLOCK, count * BLOCK)
        yield "what was kept is kept", partial(filled, disk, 3 * LEAF + (1 + 40 * at) * BLOCK)
    yield "much goes", lambda: disk.trim(3 * LEAF + 100 * BLOCK, 4 * LEAF)
    yield "no more than there is now", lambda: setattr(pool, "mem_limit", pool.stats().memory_used)
    for place in range(1, 8):
        yield "one more of its own", partial(disk.write, 3 * LEAF + place * BLOCK, noise(290 + place))
    for place in range(8):
        yield "one more", partial(disk.write, LEAF + place * 512 * LEAF, noise(300 + place))
    yield "a little more than that", lambda: setattr(pool, "mem_limit", pool.stats().memory_used + 8 * BLOCK)
    yield "a leaf that was of both", lambda: disk.write(0, text(1) * 30)
    yield "no limit", lambda: setattr(pool, "mem_limit", 0)
    yield "a purse", lambda: pool.share(purse)
    yield "what was taken of it", lambda: purse.used - pool.stats().memory_used
    yield "its ceiling", lambda: setattr(purse, "ceiling", purse.used + 8 * BLOCK)
    yield "more than the purse has", lambda: disk.write(FAR, b"".join(noise(number) for number in range(100, 120)))
    yield "some of that goes", lambda: disk.trim(FAR, 20 * BLOCK)
    yield "what is taken of it", lambda: purse.used - pool.stats().memory_used
    yield "none", lambda: pool.share(None)
    yield "what is taken of a purse of nobody", lambda: purse.used
    for after in range(4):
        yield f"allocation {after} fails", partial(fail_allocation, after)
        yield "a write then", partial(disk.write, FAR + (after + 1) * 512 * LEAF, noise(after) + text(after))
        yield "a clone then", partial(pool.clone, disk, f"clone {after}")
    yield "no more", lambda: fail_allocation(-1)
    yield from runs(pool)


def acts_with_dictionaries(pool: Pool) -> Iterator[Act]:
    """Objects that only a dictionary decodes, here and where they are received."""
    disk = pool.create("disk", SIZE)
    copies: list[Disk] = []
    yield "prose", lambda: disk.write(0, b"".join(prose(number % 290) for number in range(600)))
    yield "a dictionary is trained", lambda: steps(Recompress(pool, dictionary=True), 500)
    yield "and used again", lambda: disk.write(FAR, b"".join(prose(number) for number in range(200, 400)))
    yield "by what was written meanwhile", lambda: steps(Recompress(pool, dictionary=True), 500)
    yield "folded", lambda: steps(Fold(pool), 500)
    yield "compacted", lambda: steps(Compact(pool), 500)
    yield "read", lambda: disk.read(0, LEAF)
    yield "a part", lambda: disk.write(BLOCK + 9, b"part")
    yield "a moment", lambda: copies.extend(moment.snapshot_together([disk], ["copy"]))
    yield "told", lambda: walked(copies[0], None, Told())
    for there in range(DICTIONARIES + 1):
        yield f"received where there are {there}", lambda there=there: received(pool, copies[0], dictionaries=there)  # type: ignore[misc]
    yield "scrub", lambda: steps(Scrub(pool), 500)


def acts_on_rot(pool: Pool) -> Iterator[Act]:
    """Entries and bytes that are not what was written."""
    path = Path(str(pool.path))
    disk, other = pool.create("disk", 8 * MIB), pool.create("other", MIB)
    disk.write(0, b"".join(half_random(number) for number in range(40)) + SAME + noise(41))
    other.write(0, noise(1) * 3)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        arena = Arena(view)
        for block, bit in ((3, 40), (5, 3), (40, 20), (100, 5)):
            arena.set_word(arena.word_at(block), arena.word(arena.word_at(block)) ^ 1 << bit)
        place = arena.object_of(arena.word(arena.word_at(41)) >> 32)
        arena.set_word(place, arena.word(place) ^ 1 << 9)
    clone: list[Disk] = []
    for verify in (True, False):
        yield f"verify {verify}", partial(setattr, pool, "verify", verify)
        for block in (0, 3, 5, 40, 41, 100):
            yield f"read {block}", partial(disk.read, block * BLOCK, BLOCK)
            yield f"a part of {block}", partial(disk.write, block * BLOCK + 3, b"part")
            yield f"extents of {block}", partial(disk.extents, block * BLOCK, BLOCK, 9)
    yield "the first that cannot be read", lambda: disk.first_unreadable(0)
    yield "read", lambda: disk.read(0, 50 * BLOCK)
    yield "extents", lambda: disk.extents(0, 8 * MIB, 100)
    yield "usage", disk.usage
    yield "clone", lambda: clone.append(pool.clone(disk, "clone"))
    yield "fold", lambda: steps(Fold(pool), 50)
    yield "recompress", lambda: steps(Recompress(pool), 50)
    yield "scrub", lambda: steps(Scrub(pool), 50)
    yield "check", pool.check
    yield "check all", lambda: totals(Check(pool))
    yield "written anew", lambda: disk.write(3 * BLOCK, text(3) * 3)
    yield "trimmed", lambda: disk.trim(38 * BLOCK, 40 * BLOCK)
    yield "read again", lambda: disk.read(0, 50 * BLOCK)
    yield "the copy is not", lambda: clone[0].read(41 * BLOCK, BLOCK)
    yield "it goes", lambda: pool.delete(clone[0])
    yield "all goes", lambda: disk.trim(0, 8 * MIB)
    yield "the disk goes", lambda: pool.delete(disk)


def filled(disk: Disk, first: int) -> int:
    """How many blocks find room."""
    for count in range(4 * MIB // BLOCK):
        try:
            disk.write(first + count * BLOCK, noise(5000 + count))
        except NbdzramError:
            return count
    return -1


def acts_of_many(pool: Pool) -> Iterator[Act]:
    """More holders than a cell counts, of what is merged and of what it is merged with."""
    first, later = pool.create("first", MIB), pool.create("later", MIB)
    yield "one", lambda: first.write(0, half_random(1) + text(2))
    yield "its equal", lambda: later.write(0, half_random(1) + text(2) + text(3))
    for number in range(MANY):
        copy = pool.clone(later, f"copy {number}")
        copy.trim(2 * BLOCK, BLOCK)  # which copies the leaf
    yield "agree on many", pool.check
    yield "folded", lambda: steps(Fold(pool), 50)
    yield "agree", pool.check
    for number in range(MANY):
        pool.delete(next(disk for disk in pool.disks() if disk.name == f"copy {number}"))
    yield "agree on few", pool.check
    yield "the equal goes", later.clear
    yield "the last goes", first.clear


def within_limits() -> Iterator[str]:
    """The first writes of a pool that may have hardly a page."""
    for pages in range(11, 26):
        with Pool(mem_limit=pages * BLOCK) as pool:
            disk = pool.create("disk", SIZE)
            outcomes = []
            for place, content in enumerate((SAME, PATTERN, text(1), noise(1), half_random(1))):
                try:
                    disk.write(place * 700 * BLOCK, content)
                    outcomes.append("stored")
                except NbdzramError:
                    outcomes.append("refused")
            pool.check()
            stats = pool.stats()
            used = f"{stats.memory_used // BLOCK} used, {stats.failed_writes} failed"
            yield f"a limit of {pages} pages: {' '.join(outcomes)}, {used}"


def before_anybody_looks() -> Iterator[str]:
    """What comes by a thread's own means, and goes by the pool's, before anybody has summed it up."""
    for blocks in (1, 20, 60, 70, 3000):
        with Pool() as pool:
            disk = pool.create("disk", SIZE)
            disk.write(0, b"".join(half_random(number, 60) for number in range(blocks)))
            ways = [pool.buckets()]
            pool.clone(disk, "clone").write(0, text(1))
            ways.append(pool.buckets())
            pool.delete(disk)
            ways.append(pool.buckets())
            pool.disks()[0].resize(0)
            ways.append(pool.buckets())
            yield f"{blocks} blocks come and go: {ways} buckets, then {pool.stats().objects} objects, {pool.buckets()}"


def of_a_file(directory: Path) -> Iterator[str]:
    """What an arena has when it is opened again: counted anew from what stands in it."""
    path = str(directory / "arena")
    with Pool(path=path) as pool:
        disk = pool.create("disk", SIZE)
        for _, act in writes(disk):
            with contextlib.suppress(ValueError):
                act()
        pool.clone(disk, "clone", read_only=True).identify(77)
        pool.create("private", MIB + 512, private=True).write(0, noise(1) + prose(1))
        prepared = moment.snapshot_together([disk], ["kept"])
        moment.finish(prepared[0])
        moment.prepare(pool, "not whole", MIB).write(0, text(5))
        disk.write(9 * BLOCK, b"".join(prose(number % 60) for number in range(120)))
        steps(Recompress(pool, dictionary=True), 50)
        steps(Fold(pool), 50)
        yield f"left: {whole(pool)}"
    with Pool(path=path, clock=9000, verify=False, tell_sharing=True, inline_dedup=True) as pool:
        yield f"opened: {whole(pool)}"
        yield from told(pool, looks(pool.disks()[0]))
        yield from told(pool, runs(pool))
        yield from told(pool, takes(pool.disks()[0]))
        damaged = Path(path)
    with Pool(path=path) as pool:
        yield f"opened again: {whole(pool)}"
    yield from salvaged(damaged)
    for act in (pool.stats, lambda: pool.create("a", BLOCK), pool.check, pool.disks):
        try:
            yield f"closed: {seen(act())}"
        except NbdzramError as error:
            yield f"closed: {error}"


def salvaged(path: Path) -> Iterator[str]:
    salvage = Salvage(str(path))
    exports, lost = salvage.exports()
    yield f"salvaged: {exports} {lost}"
    for number, *_ in exports:
        for first, count, entries in salvage.leaves(number):
            kinds = [] if entries is None else [kind for kind, _ in entries]
            contents = {value: salvage.content(value) for kind, value in entries or () if kind == 2}
            sums = sum(zlib.crc32(content or b"") for content in contents.values())
            yield f"salvaged leaf: {number} {first} {count} {zlib.crc32(bytes(kinds)):08x} {len(contents)} {sums}"


def estimated() -> Iterator[str]:
    content = b"".join([text(1), noise(1), SAME, half_random(1), half_random(1), prose(1), bytes(BLOCK)] * 3)
    for sample in (1, 2, 1000):
        estimate = Estimate(sample=sample)
        estimate.feed(content + prose(2)[:700])
        try:
            yield f"estimate 1 in {sample}: {estimate.figures()}"
        except NbdzramError as error:
            yield f"estimate 1 in {sample}: {error}"


def lines() -> Iterator[str]:
    yield f"encoded by LZ4 {lz4.library_version_string()} and Zstandard {zstandard.ZSTD_VERSION}: others may be longer"
    stories: Mapping[str, tuple[Callable[[Pool], Iterator[Act]], dict[str, Any]]] = {
        "folding": (acts_on_exports, {}),
        "inline, telling, not verifying": (
            acts_on_exports,
            {"inline_dedup": True, "tell_sharing": True, "verify": False},
        ),
        "without room": (acts_without_room, {}),
        "inline without room": (acts_without_room, {"inline_dedup": True}),
        "dictionaries": (acts_with_dictionaries, {}),
        "many": (acts_of_many, {}),
        "rot": (acts_on_rot, {"path": "arena"}),
    }
    with tempfile.TemporaryDirectory() as directory:
        for story, (acts, options) in stories.items():
            if "path" in options:
                options["path"] = str(Path(directory) / "rotten")
            with Pool(clock=3600, **options) as pool:
                for line in told(pool, acts(pool)):
                    yield f"{story}: {line}"
        yield from of_a_file(Path(directory))
    yield from estimated()
    yield from within_limits()
    yield from before_anybody_looks()


def test_each_act_counts_and_answers_what_it_did() -> None:
    assert list(lines()) == COUNTED.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    COUNTED.write_text("".join(f"{line}\n" for line in lines()), encoding="utf-8")
