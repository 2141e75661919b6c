"""What an export may take of its pool and a second: declared, changed at run time, remembered, handed on to copies."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from typing import Any

import pytest

from nbdzram.bounds import UNBOUND, Bounds
from nbdzram.config import ExportConfig
from nbdzram.errors import UserError
from nbdzram.server.state import FILE_NAME
from tests.support.loop_client import WireClient
from tests.unit.engine.blocks import noise
from tests.unit.server.house import MIB, READ, UNCHANGED, WRITE, Delegate, House, tell
from tests.wire import request

BLOCK = 4096
ENOSPC = 28


def wanted(**bounds: int) -> dict[str, Any]:
    return {**UNCHANGED, "bounds": bounds}


async def write(client: WireClient, block: int, size: int = BLOCK) -> int:
    """The error on the wire."""
    return (await client.call(WRITE, block * BLOCK, size, payload=noise(block) * (size // BLOCK))).error


def test_over_its_quota_an_export_alone_has_no_space(house: House) -> None:
    """Blocks that it stores are written again; another export of the pool goes on; the causes are counted apart."""
    house.exports = (
        ExportConfig(name="disk", size_bytes=MIB, quota=2 * BLOCK),
        ExportConfig(name="other", size_bytes=MIB),
    )

    async def story() -> None:
        async with house.open() as changes:
            client, other = await house.client(), await house.client(b"other")
            assert [await write(client, block) for block in (0, 1, 2, 0)] == [0, 0, ENOSPC, 0]
            assert [await write(other, block) for block in range(8)] == [0] * 8
            assert house.found().operations["write"].errors == {"over_quota": 1}
            assert house.found().failed_writes == 1
            assert house.pool().stats().failed_writes == 0
            await changes.change_export("disk", **wanted(quota_bytes=3 * BLOCK))
            assert await write(client, 2) == 0
            await changes.change_export("disk", **wanted(quota_bytes=BLOCK))
            assert [await write(client, block) for block in (2, 3)] == [0, ENOSPC]
            await changes.change_export("disk", **wanted(quota_bytes=0))
            assert await write(client, 3) == 0
            await client.close()
            await other.close()

    tell(story())


def test_bounds_are_as_declared_until_they_are_changed_and_remembered_then(house: House) -> None:
    declared = Bounds(quota_bytes=MIB, iops=100)
    disk = ExportConfig(name="disk", size_bytes=MIB, quota=MIB, iops=100)
    house.exports = (disk,)

    async def first() -> None:
        async with house.open() as changes:
            assert house.found().bounds == declared
            await changes.change_export("disk", **wanted(iops=50, bandwidth_bytes=MIB))
            assert house.found().bounds == replace(declared, iops=50, bandwidth_bytes=MIB)
            await changes.add_export("mine", MIB, pool=None, **wanted(quota_bytes=8 * BLOCK))

    async def again() -> None:
        async with house.open():
            assert house.found().bounds == replace(declared, iops=50, bandwidth_bytes=MIB)
            assert house.found("mine").bounds == Bounds(quota_bytes=8 * BLOCK)
            assert house.service._exports.get("mine").disk.quota_bytes == 8 * BLOCK
        house.exports = (replace(disk, iops=70),)
        async with house.open():
            assert house.found().bounds == replace(declared, iops=70, bandwidth_bytes=MIB)  # that is declared as before

    tell(first())
    tell(again())


def test_each_bound_arrives_where_it_holds(house: House) -> None:
    """Five figures, each another one: at the disk, and in the four places of what lets requests wait."""

    async def story() -> None:
        async with house.open() as changes:
            export, asked = house.service._exports.get("disk"), list[Any]()
            real = export.throttle
            export.throttle = Delegate(real, limit=lambda *given: asked.append(given))  # type: ignore[assignment]
            bounds = {"iops": 50, "iops_burst": 7, "bandwidth_bytes": 3 * MIB, "bandwidth_burst_bytes": 5 * MIB}
            await changes.change_export("disk", **wanted(quota_bytes=8 * BLOCK, **bounds))
            export.throttle = real
            assert asked == [((50, 7), (3 * MIB, 5 * MIB))]
            assert export.disk.quota_bytes == 8 * BLOCK

    tell(story())


def test_a_server_from_before_bounds_is_understood(house: House) -> None:
    """What an entry does not say is no bound."""

    async def first() -> None:
        async with house.open() as changes:
            await changes.add_export("mine", MIB, pool=None, **wanted(quota_bytes=8 * BLOCK))
            await changes.change_export("disk", **{**UNCHANGED, "description": "kept"})

    async def again() -> None:
        async with house.open():
            assert (house.found("mine").bounds, house.found().bounds) == (UNBOUND, UNBOUND)
            assert house.found().description == "kept"

    tell(first())
    file = house.state_dir / FILE_NAME
    text = json.loads(file.read_text())
    for entry in text["exports"].values():
        del entry["bounds"]
        if entry["declared"]:
            del entry["declared"]["bounds"]
    file.write_text(json.dumps(text))
    tell(again())


@pytest.mark.parametrize(
    ("bound", "value"), [("quota_bytes", 100), ("iops", -1), ("iops_burst", 1 << 40), ("bandwidth_bytes", 1)]
)
def test_a_bound_that_makes_no_sense_is_refused_and_changes_nothing(house: House, bound: str, value: int) -> None:
    async def story() -> None:
        async with house.open() as changes:
            with pytest.raises(UserError, match=str(value)):
                await changes.change_export("disk", **wanted(**{bound: value}))
            assert house.found().bounds == UNBOUND

    tell(story())


def test_copies_are_bound_as_their_origin_is_and_a_rollback_changes_no_bound(house: House) -> None:
    house.exports = (ExportConfig(name="disk", size_bytes=MIB, quota=2 * BLOCK, iops=1000),)

    async def story() -> None:
        async with house.open() as changes:
            client = await house.client()
            assert [await write(client, block) for block in (0, 1)] == [0, 0]
            await client.close()
            await changes.copy_export("disk", "snap", read_only=True)
            await changes.copy_export("disk", "clone", read_only=False)
            assert house.found("clone").bounds == house.found("snap").bounds == house.found().bounds
            clone = await house.client(b"clone")
            assert [await write(clone, block) for block in (1, 2)] == [0, ENOSPC]
            await clone.close()
            await changes.rollback_export("disk", "snap", force=False)
            client = await house.client()
            assert [await write(client, block) for block in (1, 2)] == [0, ENOSPC]
            await client.close()

    tell(story())


def test_requests_beyond_a_burst_take_the_time_that_they_are_worth(house: House) -> None:
    """40 reads, 10 of them at once and 100 a second: no machine is so fast that it takes less than 0.3 s."""
    house.exports = (ExportConfig(name="disk", size_bytes=MIB, iops=100, iops_burst=10),)

    async def story() -> None:
        async with house.open():
            client = await house.client()
            began = time.monotonic()
            for cookie in range(40):
                client.ask(READ, 0, 512, cookie=cookie)
            for _ in range(40):
                await client.answer(read_length=512)
            assert time.monotonic() - began >= 0.3
            found = house.found()
            assert found.throttled_requests >= 1
            assert found.throttled_seconds > 0
            await client.close()

    tell(story())


def test_limits_that_are_lifted_at_run_time_serve_who_waits(house: House) -> None:
    """A debt of an hour, and then none."""
    house.exports = (ExportConfig(name="disk", size_bytes=16 * MIB, bandwidth=BLOCK),)

    async def story() -> None:
        async with house.open() as changes:
            client = await house.client()
            client.ask(READ, 0, 14 * MIB, cookie=1)
            client.ask(READ, 0, 512, cookie=2)
            await client.answer(read_length=14 * MIB)
            waiting = asyncio.ensure_future(client.answer(read_length=512))
            (attached,) = house.service.clients()
            assert (attached.requests, waiting.done()) == (1, False)
            await changes.change_export("disk", **wanted(bandwidth_bytes=0))
            await waiting
            await client.close()

    tell(story())


def test_a_stop_does_not_wait_for_limits(house: House) -> None:
    """What clients asked for is answered before the server ends, however long the limits would make them wait."""
    house.exports = (ExportConfig(name="disk", size_bytes=16 * MIB, bandwidth=BLOCK),)
    answers: list[Any] = []

    async def story() -> None:
        async with house.open():
            client = await house.client()
            both = request(READ, 0, 14 * MIB, cookie=1) + request(READ, 0, 512, cookie=2)
            client.send(both)  # at once: what a server that stops has not read it does not answer
            await client.answer(read_length=14 * MIB)
            answers.append(asyncio.ensure_future(client.answer(read_length=512)))
        await answers[0]
        await client.close()

    tell(story())
