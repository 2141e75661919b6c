"""What is kept of streams that broke goes: by time, by number, on request, and with the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from nbdzram.engine.pool import Pool
from nbdzram.errors import PoolFull
from nbdzram.server import interrupted, streams
from nbdzram.server.interrupted import Kept, Shelf
from nbdzram.server.streams import Streams
from tests.unit.engine.blocks import noise


async def at_once(work: Callable[[], None]) -> None:
    work()


def kept(number: int, gone: list[int]) -> Kept[int]:
    return Kept(
        identity=number.to_bytes(16, "little"),
        subject=number,
        exports=(f"disk{number}",),
        pools=(),
        discard=lambda: gone.append(number),
        records=1,
        stream_bytes=100,
        token=None,
    )


def test_it_goes_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupted, "LOOK_SECONDS", 0.0)

    async def story() -> None:
        gone: list[int] = []
        shelf: Shelf[int] = Shelf("sent", at_once)
        await shelf.keep(kept(1, gone), -1.0)
        await shelf.keep(kept(2, gone), 3600.0)
        assert shelf.status()[0].seconds_left == 0.0, "nobody has looked yet"
        while not gone:  # noqa: ASYNC110 - it is the shelf that is watched
            await asyncio.sleep(0)
        assert [told.exports for told in shelf.status()] == [("disk2",)]
        assert shelf.take(kept(1, gone).identity) is None
        await shelf.stop()
        assert gone == [1, 2]

    asyncio.run(story())


def test_what_broke_does_not_make_room_for_what_came_to_its_end() -> None:
    """That is kept for minutes, in case what is between breaks; nobody may have seen yet that the other one did."""

    async def story() -> None:
        gone: list[int] = []
        shelf: Shelf[int] = Shelf("sent", at_once)
        await shelf.keep(kept(1, gone))
        for number in range(2, 7):
            await shelf.keep(kept(number, gone), interrupted.SENT_SECONDS)
        assert gone == [2, 3]
        for number in range(7, 11):
            await shelf.keep(kept(number, gone))
        assert gone == [2, 3, 4, 5, 6, 1]
        await shelf.stop()

    asyncio.run(story())


def test_who_watches_for_writes_without_room_takes_no_lock_of_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for a stream under way nor for what is kept of one; it hears of the write all the same."""
    monkeypatch.setattr(interrupted, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(streams, "WATCH_SECONDS", 0.0)
    reasons: list[str] = []

    async def story() -> None:
        gone: list[int] = []
        pool = Pool(mem_limit=256 << 10)
        disk = pool.create("disk", 1 << 20)
        shelf: Shelf[int] = Shelf("sent", at_once)
        await shelf.keep(replace(kept(1, gone), pools=(pool,)))
        taken: Any = SimpleNamespace(pools=[("default", pool, [])])
        pipe: Any = SimpleNamespace(cancel=reasons.append)
        watch = asyncio.create_task(Streams._watch(SimpleNamespace(), taken, pipe))  # type: ignore[arg-type]
        turns = pool.turns()
        for _ in range(100):
            await asyncio.sleep(0)
        assert pool.turns() == turns
        assert not gone
        assert not reasons
        with pytest.raises(PoolFull):
            disk.write(0, b"".join(noise(number) for number in range(256)))
        await watch
        while not gone:  # noqa: ASYNC110 - it is the shelf that is watched
            await asyncio.sleep(0)
        await shelf.stop()

    asyncio.run(story())
    assert reasons == [streams.ROOM_SAYS]


def test_of_one_stream_that_broke_twice_the_later_part_is_kept() -> None:
    """What a stream is called is what it says itself: it may come a second time, to other names."""

    async def story() -> None:
        gone: list[int] = []
        shelf: Shelf[int] = Shelf("received", at_once)
        await shelf.keep(kept(1, gone))
        await shelf.keep(replace(kept(2, gone), identity=kept(1, gone).identity))
        assert gone == [1]
        assert [told.exports for told in shelf.status()] == [("disk2",)]
        await shelf.stop()
        assert gone == [1, 2]

    asyncio.run(story())


def test_a_look_that_fails_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupted, "LOOK_SECONDS", 0.0)

    async def story() -> None:
        gone: list[int] = []
        shelf: Shelf[int] = Shelf("sent", at_once)

        def fail() -> None:
            raise KeyError("a mistake of ours")

        await shelf.keep(replace(kept(1, gone), discard=fail), 0.0)
        await shelf.keep(kept(2, gone), 0.0)
        while not gone:  # noqa: ASYNC110 - it is the shelf that is watched
            await asyncio.sleep(0)
        await shelf.stop()

    asyncio.run(asyncio.wait_for(story(), 30))


def test_what_goes_on_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupted, "LOOK_SECONDS", 0.0)

    async def story() -> None:
        gone: list[int] = []
        shelf: Shelf[int] = Shelf("sent", at_once)
        await shelf.keep(kept(1, gone))
        assert shelf.holder_of("disk1") is not None
        taken = shelf.take(kept(1, gone).identity)
        assert taken is not None
        assert (taken.subject, shelf.status(), shelf.holder_of("disk1")) == (1, [], None)
        assert not await shelf.let_go(taken.identity)
        await shelf.keep(taken)  # it broke again
        assert await shelf.let_go(taken.identity)
        assert gone == [1]
        await shelf.stop()

    asyncio.run(story())
