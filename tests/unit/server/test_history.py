"""The last hours of a server, kept by it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nbdzram.config import EVERYONE
from nbdzram.server import history
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
