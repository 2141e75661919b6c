"""What is kept of streams that broke goes: by time, by number, on request, and with the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from nbdzram.server import interrupted
from nbdzram.server.interrupted import Kept, Shelf


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
        await shelf.keep(kept(1, gone), 0.0)
        await shelf.keep(kept(2, gone), 3600.0)
        while not gone:  # noqa: ASYNC110 - it is the shelf that is watched
            await asyncio.sleep(0)
        assert [told.exports for told in shelf.status()] == [("disk2",)]
        assert shelf.take(kept(1, gone).identity) is None
        await shelf.stop()
        assert gone == [1, 2]

    asyncio.run(story())


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
