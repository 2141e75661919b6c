"""Texts made in slices: whole, and with room for others between the slices."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from nbdzram.slices import SLICE_SECONDS, join_in_slices
from nbdzram.status import to_json, to_json_pieces
from tests.unit.records import REPORT, SERVER, USAGE


def test_others_run_between_two_slices() -> None:
    """Each piece takes a slice to make, so whoever waits has a turn after every one of them."""
    turns: list[int] = []

    def pieces() -> Iterator[str]:
        for number in range(5):
            until = time.perf_counter() + SLICE_SECONDS
            while time.perf_counter() < until:
                pass
            yield f"{number},{len(turns)};"

    async def other() -> None:
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    async def both() -> bytearray:
        beside = asyncio.create_task(other())
        await asyncio.sleep(0)
        turns.clear()
        text = await join_in_slices(pieces(), partial(asyncio.sleep, 0))
        beside.cancel()
        return text

    assert asyncio.run(both()) == b"0,0;1,1;2,2;3,3;4,4;"


def test_who_had_a_long_piece_does_not_pause_behind_each_short_one() -> None:
    pauses: list[int] = []

    def pieces() -> Iterator[str]:
        until = time.perf_counter() + SLICE_SECONDS
        while time.perf_counter() < until:
            pass
        for number in range(50):
            yield str(len(pauses) - number)

    async def pause() -> None:
        pauses.append(1)

    asyncio.run(join_in_slices(pieces(), pause))
    assert 1 <= len(pauses) < 50


@pytest.mark.parametrize("value", [SERVER, {"disk": USAGE}, (REPORT, REPORT), {}, (), None, {"a": {"b": {"c": [1]}}}])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_a_records_pieces_are_its_json(value: Any, depth: int) -> None:
    assert "".join(to_json_pieces(value, depth)) == to_json(value)


def test_what_an_iterator_gives_is_written_as_a_list_and_made_when_its_turn_comes() -> None:
    made: list[int] = []

    def give() -> Iterator[int]:
        for number in range(2):
            made.append(number)
            yield number

    pieces = to_json_pieces({"a": give(), "b": iter(())})
    assert (next(pieces), made) == ('{"a":', [])
    assert (next(pieces) + next(pieces), made) == ("[0", [0])
    assert "".join(pieces) == ',1],"b":[]}'


def test_an_export_is_one_piece_of_a_servers_status() -> None:
    assert list(to_json_pieces(SERVER)).count(to_json(SERVER.exports[0])) == 1
