"""What a stream tells an export from: whatever the receiver has then that its blocks have most in common with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest

from nbdzram.bounds import UNBOUND
from nbdzram.config import EVERYONE
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.server.exports import Export
from nbdzram.server.telling import CLOSEST_OF, FEW_LEAVES, Base, Seen, tell
from tests.unit.engine.blocks import BLOCK, noise, text

MIB = 1 << 20
LEAF = 512 * BLOCK


def seen(disk: Disk) -> Seen:
    return Seen(
        export=cast("Export", None),
        name=disk.name,
        pool_name="default",
        disk=disk,
        size_bytes=disk.size_bytes,
        read_only=False,
        description="",
        access=EVERYONE,
        bounds=UNBOUND,
        identity=0,
    )


def origins(*disks: Disk, has: Sequence[Disk] = ()) -> dict[str, str]:
    """By the name of each, that of its origin; `has`: what the receiver has, none of which it has by that name."""
    bases = [Base(disk.name, 1 + number, disk) for number, disk in enumerate(has)]
    told = tell(
        [seen(disk) for disk in disks], {disk: disk for disk in disks}, {}, dict.fromkeys(disks, 0), also_there=bases
    )
    return {source.part.name: source.part.origin_name for _, _, sources in told for source in sources}


def made(pool: Pool, name: str, first: int, *, step: int = BLOCK, private: bool = False) -> Disk:
    """Eight blocks, or a block in each of twice as many leaves as are few."""
    disk = pool.create(name, 2 * FEW_LEAVES * LEAF, private=private)
    for number in range(8 if step == BLOCK else 2 * FEW_LEAVES):
        disk.write(number * step, noise(first + number))
    return disk


@pytest.mark.parametrize("step", [BLOCK, LEAF], ids=["few blocks", "many leaves"])
def test_a_clone_is_told_from_the_closest_of_those_before_it(step: int) -> None:
    with Pool() as pool:
        disk, other = made(pool, "disk", 0, step=step), made(pool, "other", 100, step=step)
        near, far = pool.clone(disk, "near"), pool.clone(disk, "far")
        for number in range(6):
            far.write(number * step, text(number))
        for number in range(2):
            near.write(number * step, text(number))
        nearer = pool.clone(near, "nearer")
        nearer.write(0, text(9))
        assert origins(disk, other, near, nearer, far) == {
            "disk": "",
            "other": "",
            "near": "disk",
            "nearer": "near",
            "far": "disk",
        }


def test_it_is_looked_for_among_those_that_were_told_last() -> None:
    """A clone comes behind what it was made of."""
    with Pool() as pool:
        first = made(pool, "first", 0)
        others = [made(pool, f"other{number}", 100 * number) for number in range(1, CLOSEST_OF)]
        last = made(pool, "last", 5000)
        twins = [pool.clone(disk, f"twin of {disk.name}") for disk in (last, others[0], first)]
        told = origins(first, *others, last, *twins)
        assert {name: told[name] for name in told if "twin" in name} == {
            "twin of last": "last",
            "twin of other1": "",  # as many were told since
            "twin of first": "",
        }


def test_what_the_receiver_has_is_an_origin_where_it_may_share_with_it() -> None:
    with Pool() as pool, Pool() as another:
        disk, mine = made(pool, "disk", 0), made(pool, "mine", 0, private=True)
        elsewhere = made(another, "elsewhere", 0)
        twin, my_twin = pool.clone(disk, "twin"), pool.clone(mine, "my twin")
        has = (elsewhere, made(pool, "other", 100), mine, disk)
        assert origins(twin, my_twin, has=has) == {"twin": "disk", "my twin": "mine"}
        assert origins(twin, my_twin, has=(elsewhere,)) == {"twin": "", "my twin": ""}
        assert origins(disk, mine, twin, my_twin) == {"disk": "", "mine": "", "twin": "disk", "my twin": "mine"}
