"""What can be read of arenas that nobody could open is in a stream, and what cannot is listed; nothing is changed."""

from __future__ import annotations

import io
import mmap
import os
import random
from pathlib import Path

import pytest

from nbdzram.bounds import Bounds
from nbdzram.config import Access
from nbdzram.engine import moment
from nbdzram.engine.pool import Pool
from nbdzram.errors import ArenaError, UserError
from nbdzram.server.salvage import Lost, Salvaged, salvage
from nbdzram.server.state import ExportRecord, State
from tests.faults.damage import Image, damaged
from tests.support.arena import HEAD_SIZE, HEADS_AT, PAGE, UNIT, Arena
from tests.unit.engine.blocks import BLOCK, half_random, noise, prose, text
from tests.unit.engine.test_scrub import bend
from tests.unit.stream import roads

MIB = 1 << 20
SIZE = 8 * MIB


def fill(directory: Path) -> dict[str, bytes]:
    """A state directory with one arena, and what its exports hold."""
    directory.mkdir(exist_ok=True)
    state = State(directory)
    state.remember_exports(
        {
            "disk": ExportRecord(
                pool="default",
                size_bytes=SIZE,
                read_only=False,
                description="the one",
                access=Access(addresses=("10.0.0.0/8",), certificates=()),
                bounds=Bounds(iops=500),
                removed=False,
                declared=None,
            )
        }
    )
    with Pool(path=state.arena_path("default")) as pool:
        disk = pool.create("disk", SIZE)
        disk.write(0, half_random(1) + half_random(2) + text(3) + noise(4) + b"8 bytes!" * 512 + bytes(BLOCK))
        disk.write(5 * MIB, noise(5) + half_random(1) + prose(6))
        twin = pool.clone(disk, "twin", read_only=True)
        alone = pool.create("alone", MIB, private=True)
        alone.write(0, half_random(1) + half_random(9))
        return {one.name: one.read(0, one.size_bytes) for one in (disk, twin, alone)}


def stream_of(directory: Path) -> tuple[Salvaged, bytes]:
    out = io.BytesIO()

    def write(content: bytes) -> None:
        out.write(content)

    return salvage(directory, write), out.getvalue()


def salvaged(directory: Path) -> tuple[Salvaged, dict[str, bytes]]:
    """What was read, received by a new pool."""
    outcome, stream = stream_of(directory)
    with Pool() as pool:
        disks = roads.revealed(pool, stream)
        pool.check()
        return outcome, {name: disk.read(0, disk.size_bytes) for name, disk in disks.items()}


def test_of_what_was_on_its_way_to_be_an_export_only_what_was_whole_is_offered(tmp_path: Path) -> None:
    """As a start does, which deletes the other."""
    held = fill(tmp_path / "state")
    with Pool(path=str(tmp_path / "state" / "default.pool")) as pool:
        for name in ("whole", "half"):
            disk = moment.prepare(pool, name, MIB)
            disk.write(0, noise(7))
            if name == "whole":
                moment.finish(disk)
    _, found = salvaged(tmp_path / "state")
    assert found == {**held, "whole": noise(7).ljust(MIB, b"\0")}


def test_a_sound_directory_is_read_whole_with_its_rules_and_nothing_is_changed(tmp_path: Path) -> None:
    held = fill(tmp_path / "state")
    path = tmp_path / "state" / "default.pool"
    before, stamp = path.read_bytes(), path.stat()
    for place in (path, tmp_path / "state"):
        place.chmod(0o500)
    outcome, found = salvaged(tmp_path / "state")
    (tmp_path / "state").chmod(0o700)
    assert found == held
    assert outcome.whole
    assert path.read_bytes() == before
    assert (path.stat().st_mtime_ns, path.stat().st_blocks) == (stamp.st_mtime_ns, stamp.st_blocks)
    with Pool() as pool:
        parts = {one.part.name: one.part for one in roads.receive(pool, stream_of(tmp_path / "state")[1])}
    assert parts["disk"].addresses == ("10.0.0.0/8",)
    assert parts["disk"].description == "the one"
    assert not parts["disk"].admits_nobody
    assert parts["disk"].bounds == Bounds(iops=500)
    assert parts["twin"].admits_nobody, "who may attach to it is not known"
    assert (parts["twin"].read_only, parts["disk"].read_only) == (True, False)
    assert (parts["alone"].domain != 0, parts["disk"].domain) == (True, 0)


def test_rot_costs_the_blocks_that_lead_to_it(tmp_path: Path) -> None:
    held = fill(tmp_path)
    bend(tmp_path / "default.pool", 1)
    outcome, found = salvaged(tmp_path)
    second = 5 * MIB // BLOCK + 1
    assert outcome.lost == [
        Lost("disk", 0, 1),
        Lost("disk", second, 1),
        Lost("twin", 0, 1),
        Lost("twin", second, 1),
    ] or (
        outcome.lost == [Lost("disk", 0, 1), Lost("twin", 0, 1)]  # if the two were not folded
    )
    assert found["alone"] == held["alone"]
    assert found["disk"][BLOCK : 5 * MIB] == held["disk"][BLOCK : 5 * MIB]
    assert found["disk"][:BLOCK] == bytes(BLOCK)


def test_entries_that_stand_in_each_others_places_cost_their_blocks(tmp_path: Path) -> None:
    """What they lead to is right, and is not what was written there."""
    held = fill(tmp_path)
    with (tmp_path / "default.pool").open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        arena = Arena(view)
        for one, other in ((0, 1), (4, 5)):  # objects; a word, and a hole
            places = arena.word_at(one), arena.word_at(other)
            words = [arena.word(place) for place in places]
            for place, word in zip(places, reversed(words), strict=True):
                arena.set_word(place, word)
    outcome, found = salvaged(tmp_path)
    assert outcome.lost == [Lost(name, first, 2) for name in ("disk", "twin") for first in (0, 4)]
    for name in ("disk", "twin"):
        assert found[name][2 * BLOCK : 4 * BLOCK] == held[name][2 * BLOCK : 4 * BLOCK]
        assert not any(found[name][: 2 * BLOCK] + found[name][4 * BLOCK : 6 * BLOCK])
    assert found["alone"] == held["alone"]


def test_a_node_that_opening_refuses_costs_what_lies_below_it(tmp_path: Path) -> None:
    held = fill(tmp_path)
    with (tmp_path / "default.pool").open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        arena = Arena(view)
        place = arena.word_at(0, level=1)
        arena.set_word(place, arena.word(place) ^ 1 << 40)
    with pytest.raises(ArenaError, match="block table"):
        Pool(path=str(tmp_path / "default.pool"))
    outcome, found = salvaged(tmp_path)
    assert outcome.lost == [Lost("disk", 0, 512), Lost("twin", 0, 512)]
    assert found["disk"][2 * MIB :] == held["disk"][2 * MIB :]
    assert found["alone"] == held["alone"]


def test_a_node_of_another_disk_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    held = fill(tmp_path)
    with Pool(path=str(tmp_path / "default.pool")) as pool:
        pool.disks()[0].write(0, text(9))  # from here on they have leaves of their own
    with (tmp_path / "default.pool").open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        arena = Arena(view)
        ours, other = arena.word_at(0, level=1), arena.word_at(0, level=1, export=1)
        arena.set_word(ours, arena.word(ours) & 0xFFFFFFFF | arena.word(other) >> 32 << 32)
    outcome, found = salvaged(tmp_path)
    assert outcome.lost == [Lost("disk", 0, 512)]
    assert found["twin"] == held["twin"]


def test_an_entry_that_is_not_right_costs_its_block(tmp_path: Path) -> None:
    held = fill(tmp_path)
    with (tmp_path / "default.pool").open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        arena = Arena(view)
        leaf = arena.leaf()
        arena.set_word(leaf + 16, arena.word(leaf + 16) ^ 1 << 40)  # block 2 of the common leaf
    outcome, found = salvaged(tmp_path)
    assert outcome.lost == [Lost("disk", 2, 1), Lost("twin", 2, 1)]
    assert found["disk"][3 * BLOCK :] == held["disk"][3 * BLOCK :]


def test_an_export_whose_entry_is_damaged_is_counted_and_the_others_are_read(tmp_path: Path) -> None:
    held = fill(tmp_path)
    with (tmp_path / "default.pool").open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        arena = Arena(view)
        for at in range(0, 512, 8):
            arena.set_word(arena.entry(1) + at, arena.word(arena.entry(1) + at) ^ 0x55)
    with pytest.raises(ArenaError, match="directory"):
        Pool(path=str(tmp_path / "default.pool"))
    outcome, found = salvaged(tmp_path)
    assert outcome.lost_exports == 1
    assert found == {name: held[name] for name in ("disk", "alone")}


def test_an_export_that_nobody_could_receive_does_not_cost_the_others(tmp_path: Path) -> None:
    """A name that no list could show, made by who writes into arenas; one of ours is the copy of a rollback."""
    held = fill(tmp_path)
    with Pool(path=str(tmp_path / "default.pool")) as pool:
        pool.create("\x7frollback", MIB)
        pool.create("cleared\x1b[2J", MIB)
    outcome, found = salvaged(tmp_path)
    assert outcome.lost_exports == 2
    assert len(outcome.notes) == 2
    assert all(note.isprintable() and "default.pool is left out" in note for note in outcome.notes)
    assert found == held


def test_several_arenas_are_one_stream_and_what_they_lost_is_added_up(tmp_path: Path) -> None:
    """Objects are told some at a time, each once; blocks that two exports lost are not one stretch."""
    held = fill(tmp_path)
    held |= {name: b"".join(noise(seed + block) for block in range(256)) for name, seed in (("one", 100), ("two", 400))}
    with Pool(path=str(tmp_path / "fast.pool")) as pool:
        for name in ("gone", "one", "two"):
            pool.create(name, MIB).write(0, held.get(name, b""))
    for name, forged in (("default", 1), ("fast", 0)):
        with (tmp_path / f"{name}.pool").open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            arena = Arena(view)
            arena.set_word(arena.entry(forged) + HEADS_AT, 0)
            arena.set_word(arena.entry(forged) + HEADS_AT + HEAD_SIZE, 0)
            for export, block in ((1, 3), (2, 4)) if name == "fast" else ():
                place = arena.word_at(block, export=export)
                arena.set_word(place, arena.word(place) ^ 1 << 40)
    outcome, found = salvaged(tmp_path)
    assert outcome.lost_exports == 2
    assert outcome.lost == [Lost("one", 3, 1), Lost("two", 4, 1)]
    assert found.keys() == held.keys() - {"twin"}
    assert is_honest(outcome, found, held)
    assert outcome.stream_bytes < 2.1 * MIB


def test_a_name_that_is_no_text_is_counted(tmp_path: Path) -> None:
    """Its checks agree with it: somebody forged it."""
    held = fill(tmp_path)
    with (tmp_path / "default.pool").open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        Arena(view).forge_name(1, b"tw\xffn")
    with pytest.raises(ArenaError, match="the name of export number 1 is no text"):
        Pool(path=str(tmp_path / "default.pool"))
    outcome, found = salvaged(tmp_path)
    assert outcome.lost_exports == 1
    assert found == {name: held[name] for name in ("disk", "alone")}


def test_a_file_that_broke_off_is_read_up_to_there(tmp_path: Path) -> None:
    held = fill(tmp_path)
    path = tmp_path / "default.pool"
    last = max(at for at in range(0, path.stat().st_size, UNIT) if any(path.read_bytes()[at : at + UNIT]))
    os.truncate(path, last + PAGE)
    outcome, found = salvaged(tmp_path)
    assert set(found) == set(held)
    assert is_honest(outcome, found, held)


def test_what_is_no_arena_and_an_arena_in_use_are_refused(tmp_path: Path) -> None:
    (tmp_path / "default.pool").write_bytes(b"x" * UNIT)
    with pytest.raises(UserError, match="hardly anything of it is left"):
        salvaged(tmp_path)
    (tmp_path / "default.pool").write_bytes(b"x" * 64 * UNIT)
    with pytest.raises(UserError, match="superblock"):
        salvaged(tmp_path)
    (tmp_path / "default.pool").unlink()
    with pytest.raises(UserError, match="there is no arena"):
        salvaged(tmp_path)
    fill(tmp_path)
    with Pool(path=str(tmp_path / "default.pool")), pytest.raises(UserError, match="in use by another process"):
        salvaged(tmp_path)


def is_honest(outcome: Salvaged, found: dict[str, bytes], held: dict[str, bytes]) -> bool:
    """Whether each block is what it was, or a hole that is told."""
    lost = {(one.export, block) for one in outcome.lost for block in range(one.first, one.first + one.count)}
    return all(
        content[at : at + BLOCK] == (bytes(BLOCK) if (name, at // BLOCK) in lost else held[name][at : at + BLOCK])
        for name, content in found.items()
        for at in range(0, len(content), BLOCK)
    )


def test_whatever_is_damaged_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    held = fill(tmp_path)
    image = Image.of(tmp_path / "default.pool")
    seed = random.randrange(1 << 20)
    print(f"seeds from {seed}")
    missing = 0
    for number in range(seed, seed + 50):
        damage = damaged(image, number)
        damage.image.write(tmp_path / "default.pool")
        try:
            outcome, found = salvaged(tmp_path)
        except UserError:
            missing += 1
            continue
        assert is_honest(outcome, found, held), (number, damage.kind)
        assert found.keys() <= held.keys(), (number, damage.kind)
        assert outcome.lost_exports or found.keys() == held.keys(), (number, damage.kind)
    assert missing < 30, "most damage leaves something to read"
