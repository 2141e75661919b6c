"""Private exports that share blocks where they are sent, and share none where they arrive, as they came apart."""

from __future__ import annotations

import pytest

from nbdzram.engine.pool import Pool
from nbdzram.errors import StreamError
from tests.unit.engine.blocks import BLOCK, half_random
from tests.unit.stream.roads import revealed, sent, whole
from tests.unit.stream.test_streams import MIB, snapshot

DOMAIN = 7


def test_what_came_apart_is_sent_apart(pool: Pool, other: Pool) -> None:
    disk = pool.create("disk", MIB, private=True)
    disk.write(0, half_random(1))
    twin = pool.clone(disk, "twin")
    bases = {"disk@2": snapshot(disk, "disk@1"), "twin@2": snapshot(twin, "twin@1")}
    domains = dict.fromkeys(("disk@1", "twin@1", "disk@2", "twin@2"), DOMAIN)
    for base in bases.values():
        revealed(other, sent(base, domains=domains))
    disk.write(BLOCK, half_random(2))
    twin.write(BLOCK, half_random(2))
    now = [snapshot(disk, "disk@2"), snapshot(twin, "twin@2")]
    before = other.disks()
    with pytest.raises(StreamError, match=r"'twin@2' shares blocks .* came in a stream of its own; send it alone"):
        revealed(other, sent(*now, bases=bases, domains=domains))
    assert other.all_disks() == before
    for one in now:
        assert whole(revealed(other, sent(one, bases=bases, domains=domains))[one.name]) == whole(one)
