"""An export gets another name: with all that it is, and whole or not at all. Kills: faults/test_moments.py."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import pytest

from nbdzram.engine.pool import Pool
from nbdzram.errors import ArenaError, EngineError, ExportExists, UserError
from tests.support.arena import CURRENT_AT, EXPORTS_AT, HEAD_SIZE, HEADS_AT, NAME_AT
from tests.unit.engine.blocks import BLOCK, noise

SIZE = 64 * BLOCK
PLACE_AT = 32  # of its name, in a head


def names(path: Path) -> list[str]:
    with Pool(path=str(path)) as pool:
        pool.check()
        return [disk.name for disk in pool.disks()]


def test_a_renamed_export_keeps_what_it_is_and_whoever_uses_it_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", SIZE, read_only=True, private=True)
        disk.write(0, noise(1))
        pool.rename(disk, "other")
        assert (disk.name, [each.name for each in pool.disks()]) == ("other", ["other"])
        assert disk.read(0, BLOCK) == noise(1)
        disk.write(BLOCK, noise(2))
        disk.resize(2 * SIZE)  # another head is written behind the new name
        pool.create("disk", SIZE)  # its name is free
    with Pool(path=str(path)) as pool:
        found, fresh = pool.disks()
        assert (found.name, found.read_only, found.private, found.size_bytes) == ("other", True, True, 2 * SIZE)
        assert found.read(0, 2 * BLOCK) == noise(1) + noise(2)
        assert (fresh.name, fresh.stats().stored) == ("disk", 0)
        pool.check()


def test_names_of_every_length_follow_one_another(tmp_path: Path) -> None:
    """Each lies beside the one before it, at the other end of the room."""
    path = tmp_path / "arena"
    lengths = (1, 255, 1, 100, 156, 100, 128, 128, 3, 253, 2)
    wanted = [f"{number % 10}" * length for number, length in enumerate(lengths)]
    Pool(path=str(path)).close()
    with Pool(path=str(path)) as pool:
        pool.create(wanted[0], SIZE)
    for before, name in itertools.pairwise(wanted):
        with Pool(path=str(path)) as pool:
            pool.rename(pool.disks()[0], name)
        assert names(path) == [name], (len(before), len(name))


def test_an_export_that_has_no_room_for_both_names_keeps_its_own(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        disk = pool.create("a" * 100, SIZE)
        with pytest.raises(UserError, match="over 256 bytes together; give it a short name first"):
            pool.rename(disk, "b" * 157)
        assert disk.name == "a" * 100
    assert names(path) == ["a" * 100]


def test_an_entry_that_was_renamed_serves_another_export_later(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", SIZE)
        pool.rename(disk, "a longer name")
        pool.delete(disk)
        number = disk.number
        del disk
        again = pool.create("n" * 255, SIZE)
        assert again.number == number
    assert names(path) == ["n" * 255]


def test_what_cannot_be_renamed_is_refused(tmp_path: Path) -> None:
    with Pool(path=str(tmp_path / "arena")) as pool, Pool() as other:
        disk, twin = pool.create("disk", SIZE), pool.create("twin", SIZE)
        with pytest.raises(ExportExists):
            pool.rename(disk, "twin")
        with pytest.raises(ValueError, match="none of this pool"):
            other.rename(disk, "name")
        pool.delete(twin)
        with pytest.raises(EngineError, match="it was deleted"):
            pool.rename(twin, "name")
        assert [each.name for each in pool.disks()] == ["disk"]
    with pytest.raises(EngineError, match="its pool was closed"):
        pool.rename(disk, "name")


def test_a_name_that_was_damaged_is_refused_and_its_room_beside_it_is_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        pool.rename(pool.create("disk", SIZE), "other")
    sound = path.read_bytes()
    at, room = EXPORTS_AT + NAME_AT, 256
    assert (sound[at : at + 4], sound[at + room - 5 : at + room]) == (b"disk", b"other")
    path.write_bytes(sound[:at] + b"junk" + sound[at + 4 :])
    assert names(path) == ["other"]
    path.write_bytes(sound[: at + room - 5] + b"O" + sound[at + room - 4 :])
    with pytest.raises(ArenaError, match="damaged"):
        Pool(path=str(path))


def test_a_place_of_a_name_that_is_none_is_refused_before_it_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        pool.rename(pool.create("disk", SIZE), "other")
    for which in range(2):
        damaged = bytearray(path.read_bytes())
        struct.pack_into("<I", damaged, EXPORTS_AT + HEADS_AT + which * HEAD_SIZE + PLACE_AT, (1 << 32) - 1)
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            Pool(path=str(tmp_path / "damaged")).close()  # the head that does not count
        except ArenaError as error:
            assert "damaged" in str(error)
        else:
            which_counts = struct.unpack_from("<Q", damaged, EXPORTS_AT + CURRENT_AT)[0] >> 16 & 1
            assert which != which_counts
