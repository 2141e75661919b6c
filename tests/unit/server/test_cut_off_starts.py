"""Starts that end before they have brought back what checkpoints hold: the next one does. And those whose state
directory has lost its pools, and remembers something."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from shutil import copy

import pytest

from nbdzram.config import PoolConfig
from nbdzram.engine.compact import Compact
from nbdzram.engine.pool import Pool
from nbdzram.errors import UserError
from nbdzram.server import restore as restore_module
from nbdzram.server.replay import apply_all
from nbdzram.server.service import Service
from nbdzram.server.state import FILE_NAME
from nbdzram.stream.journal import Group
from tests.unit.engine.blocks import BLOCK, noise, text
from tests.unit.server.lasting import (
    MIB,
    as_the_power_left_it,
    asked,
    checkpointing,
    disk,
    flushing,
    journal,
    of,
    play,
    whole,
)


def test_a_start_that_was_cut_off_leaves_pools_of_which_the_next_one_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their files are there then, and it looked as if they told of themselves: no pool was known that was added at run
    time, and no server started."""
    start = Service.start

    async def cut_off(service: Service, *, listen: bool = True) -> None:
        service.told_to_stop.set()
        await start(service, listen=listen)

    async def story() -> None:
        async with checkpointing(tmp_path / "kept", state_dir=tmp_path / "lost") as service:
            await asked(service, "pools.add", name="fast")
            await asked(service, "exports.add", name="other", size_bytes=MIB, pool="fast")
            disk(service, "other").write(0, text(1))
            await of(service).take()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        with monkeypatch.context() as patch:
            patch.setattr(Service, "start", cut_off)
            with pytest.raises(UserError, match="was interrupted"):
                async with checkpointing(left, state_dir=tmp_path / "state"):
                    raise AssertionError
        assert (tmp_path / "state" / "fast.pool").exists()
        async with checkpointing(left, state_dir=tmp_path / "state") as service:
            assert whole(disk(service, "other"))[:BLOCK] == text(1)

    play(story)


def test_a_start_that_is_told_to_stop_applies_no_further_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be tens of thousands, and who stopped it waited for the last."""
    starting = list[Service]()
    applied = list[Group]()
    start = Service.start

    async def noted(service: Service, *, listen: bool = True) -> None:
        starting.append(service)
        await start(service, listen=listen)

    def told_behind_the_first(groups: Iterable[Group], apply: Callable[[Group], None]) -> int:
        def apply_one(group: Group) -> None:
            apply(group)
            applied.append(group)
            starting[-1].told_to_stop.set()

        return apply_all(groups, apply_one)

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            for number in range(3):
                disk(service).write(number * BLOCK, text(number))
                await journal(service).synced()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        with monkeypatch.context() as patch:
            patch.setattr(Service, "start", noted)
            patch.setattr(restore_module, "apply_all", told_behind_the_first)
            with pytest.raises(UserError, match="was interrupted"):
                async with flushing(left, begun=False):
                    raise AssertionError
        assert len(applied) == 1
        async with flushing(left, begun=False) as service:
            assert whole(disk(service))[: 3 * BLOCK] == text(0) + text(1) + text(2)

    play(story)


def test_a_start_that_is_told_to_stop_moves_no_further_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came is compacted below its limit, which may take minutes."""
    starting, steps = list[Service](), list[int]()
    start = Service.start

    async def noted(service: Service, *, listen: bool = True) -> None:
        starting.append(service)
        await start(service, listen=listen)

    class Compacting:
        def __init__(self, pool: Pool) -> None:
            self.compaction = Compact(pool)

        def step(self) -> bool:
            steps.append(self.compaction.step())
            starting[-1].told_to_stop.set()
            return len(steps) < 10

    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            disk(service).write(0, b"".join(noise(number) for number in range(300)))
            await of(service).take()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        with monkeypatch.context() as patch:
            patch.setattr(Service, "start", noted)
            patch.setattr(restore_module, "Compact", Compacting)
            with pytest.raises(UserError, match="making what came fit the pool 'default' was interrupted; "):
                async with checkpointing(left, pools=(PoolConfig(mem_limit=MIB),)):
                    raise AssertionError
        assert len(steps) == 1
        async with checkpointing(left) as service:
            assert whole(disk(service))[:BLOCK] == noise(0)

    play(story)


@pytest.mark.parametrize("remembered", ["older", "newer"])
def test_pools_of_a_checkpoint_are_known_though_the_state_directory_remembers_others(
    tmp_path: Path, remembered: str
) -> None:
    """As of a backup, or where a pool was removed behind the checkpoint, and the others' files are damaged and moved
    away: no server started."""

    async def story() -> None:
        kept, state, left = tmp_path / "kept", tmp_path / "state", tmp_path / "again"
        left.mkdir()
        async with checkpointing(kept, state_dir=state) as service:
            copy(state / FILE_NAME, left)
            await asked(service, "pools.add", name="fast")
            await asked(service, "exports.add", name="other", size_bytes=MIB, pool="fast", allow_addresses=["10.0.0.1"])
            disk(service, "other").write(0, text(1))
            await of(service).take()
            if remembered == "newer":
                await asked(service, "exports.remove", name="other", force=True)
                await asked(service, "pools.remove", name="fast")
                copy(state / FILE_NAME, left)
            cut = as_the_power_left_it(kept, tmp_path / "left")
        async with checkpointing(cut, state_dir=left) as service:
            assert whole(disk(service, "other"))[:BLOCK] == text(1)
            (other,) = (export for export in service._exports if export.name == "other")
            assert other.access.admits == "listed"

    play(story)
