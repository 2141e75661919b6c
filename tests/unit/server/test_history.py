"""The last hours of a server, kept by it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from nbdzram.config import EVERYONE
from nbdzram.rates import Rates
from nbdzram.server import history
from nbdzram.server.chronicle import EXPORTS, SAMPLE_BYTES, Chronicle
from nbdzram.server.exports import Export
from nbdzram.server.history import KEPT, History
from tests.unit.server.conftest import Play, Stage

BLOCK = bytes(range(256)) * 16


async def write(stage: Stage, name: bytes, times: int) -> None:
    client = await stage.client(name)
    for _ in range(times):
        await client.write(0, BLOCK)
    await client.close()


def test_a_sample_tells_what_happened_since_the_last(play: Play) -> None:
    async def story(stage: Stage) -> None:
        kept = History(stage.exports, lambda: 4711, None)
        await kept.sample(10.0)
        await write(stage, b"disk", 3)
        await kept.sample(2.0)
        await kept.sample(2.0)
        first, busy, quiet = kept.samples
        assert (first.requests, busy.requests, quiet.requests) == (0.0, 1.5, 0.0)
        assert (busy.read_bytes, busy.write_bytes) == (0.0, 3 * 4096 / 2)
        assert 0 < busy.median_seconds <= busy.p99_seconds
        assert busy.memory_bytes == 4711

    play(story)


def test_a_clock_that_is_set_back_sets_back_what_was_before(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs had samples of tomorrow, and lines that led back."""

    async def story(stage: Stage) -> None:
        kept, clock = History(stage.exports, lambda: 0, None), 1000.0
        monkeypatch.setattr(time, "time", lambda: clock)
        for set_by in (0.0, 0.0, -86400.0, 0.0, 3600.0):
            clock += 10.0 + set_by
            await kept.sample(10.0)
        last = clock
        assert [last - sample.at for sample in kept.samples] == [3640.0, 3630.0, 3620.0, 3610.0, 0.0]

    play(story)


def test_an_export_that_goes_or_comes_again_disturbs_nothing(play: Play) -> None:
    """Sums over all exports fall when a used one is removed; what each of them did does not."""

    async def story(stage: Stage) -> None:
        other = Export(
            name="other",
            disk=stage.pool.create("other", 1 << 20),
            pool_name="default",
            access=EVERYONE,
            read_only=False,
        )
        stage.exports.add(other)
        kept = History(stage.exports, lambda: 0, None)
        await write(stage, b"other", 50)
        await kept.sample(1.0)
        stage.exports.remove("other")
        await write(stage, b"disk", 3)
        await kept.sample(1.0)
        assert kept.samples[-1].requests == 3.0
        stage.exports.add(Export(name="other", disk=other.disk, pool_name="default", access=EVERYONE, read_only=False))
        await write(stage, b"other", 5)
        await kept.sample(1.0)
        assert kept.samples[-1].requests == 0.0  # it is new: what it did before its first sample is told by none
        await kept.sample(1.0)
        assert kept.samples[-1].requests == 0.0

    play(story)


def test_each_export_has_a_history_of_its_own(play: Play) -> None:
    async def story(stage: Stage) -> None:
        other = added(stage, "other")
        kept = History(stage.exports, lambda: 0, None)
        await kept.sample(10.0)
        await write(stage, b"disk", 3)
        await kept.sample(2.0)
        await write(stage, b"other", 4)
        await kept.sample(2.0)
        await kept.sample(2.0)
        moments = [sample.at for sample in kept.samples]
        disk, of_other = kept.of(stage.exports.get("disk")), kept.of(other)
        assert [sample.at for sample in disk] == [sample.at for sample in of_other] == moments
        assert [sample.requests for sample in disk] == [0.0, 1.5, 0.0, 0.0]
        assert [sample.write_bytes for sample in of_other] == [0.0, 0.0, 4 * 4096 / 2, 0.0]
        assert 0 < disk[1].median_seconds <= disk[1].p99_seconds
        stage.exports.remove("other")
        await kept.sample(2.0)
        assert (len(kept.of(stage.exports.get("disk"))), kept.of(other)) == (5, ())

    play(story)


def test_the_histories_of_exports_are_bounded_and_an_idle_one_gives_way(stage: Stage) -> None:
    """Their memory is stated, and stands whatever is offered and done."""
    exports = {added(stage, f"disk{number}"): None for number in range(EXPORTS + 2)}
    first, second, *others = exports
    newcomer, *rest = others[1:]
    assert len(rest) == EXPORTS - 2
    kept, busy = 5, Rates(read_bytes=1.0, requests=1.0)
    one = Chronicle(kept)

    def requests(export: Export) -> list[float]:
        return [sample.requests for sample in one.of(export, [1.0, 2.0, 3.0, 4.0, 5.0])]

    one.add({first: busy, second: busy}, exports)
    one.add(dict.fromkeys(rest, busy), exports)
    one.add({first: busy}, exports)
    assert [sample.at for sample in one.of(first, [7.0, 8.0, 9.0])] == [7.0, 8.0, 9.0]
    one.add({newcomer: busy}, exports)  # there is no room: the one that did nothing for the longest time gives way
    assert requests(second) == requests(others[0]) == []
    assert (requests(first), requests(newcomer)) == ([1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0])
    one.add({second: busy}, exports)
    assert (requests(rest[0]), requests(second)) == ([], [0.0, 0.0, 0.0, 0.0, 1.0])
    for _ in range(2):
        one.add({first: busy}, exports)
    assert (requests(first), requests(rest[1])) == ([1.0, 0.0, 0.0, 1.0, 1.0], [0.0] * kept)  # a round later
    assert EXPORTS * KEPT * SAMPLE_BYTES <= 3.7e6
    assert sum(map(len, one._rings.values())) <= EXPORTS * kept * SAMPLE_BYTES


def added(stage: Stage, name: str) -> Export:
    disk = stage.pool.create(name, 1 << 20)
    export = Export(name=name, disk=disk, pool_name="default", access=EVERYONE, read_only=False)
    stage.exports.add(export)
    return export


def test_two_hours_are_kept_and_no_more(stage: Stage) -> None:
    async def act() -> None:
        kept = History(stage.exports, lambda: 0, None)
        for _ in range(KEPT + 5):
            await kept.sample(1.0)
        assert len(kept.samples) == KEPT
        assert KEPT * history.SAMPLE_SECONDS == 7200

    asyncio.run(act())


@pytest.mark.parametrize("there", [True, False])
def test_it_looks_at_the_state_directorys_room(stage: Stage, tmp_path: Path, there: bool) -> None:
    async def act() -> None:
        kept = History(stage.exports, lambda: 0, tmp_path if there else tmp_path / "gone")
        kept.start()
        while not kept.samples:  # noqa: ASYNC110 - what it does by itself, it tells nobody
            await asyncio.sleep(0)
        kept.stop()
        assert (0 < kept.state_dir_free_bytes <= kept.state_dir_size_bytes) is there

    asyncio.run(act())
