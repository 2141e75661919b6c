"""What a server held at a moment is there again after the power failed, from what is whole on the disk."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdzram.bounds import UNBOUND, Bounds
from nbdzram.config import ExportConfig, PoolConfig
from nbdzram.engine.check import Check
from nbdzram.engine.compact import Compact
from nbdzram.engine.pool import Pool
from nbdzram.engine.purse import Purse
from nbdzram.errors import PoolFull, UserError
from nbdzram.server import source
from nbdzram.server.restore import Restore
from nbdzram.server.state import FILE_NAME, State
from tests.unit.engine.blocks import BLOCK, half_random, noise, run, text
from tests.unit.server.lasting import (
    ADDED,
    AS_IT_IS,
    MIB,
    as_the_power_left_it,
    asked,
    begun_from,
    checkpointing,
    disk,
    files,
    flushing,
    journal,
    of,
    play,
    whole,
)


def test_a_server_begins_from_the_newest_checkpoint_and_says_of_when_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            disk(service).write(0, text(1) + noise(2))
            await service.changes.add_export("other", MIB, **{**ADDED, "allow_addresses": ["10.0.0.0/8"]})
            await service.changes.take_moment("monday")
            await of(service).take()
            disk(service, "disk@monday").identify(5)  # it was sent, and its blocks are what they were
            await of(service).take()
            disk(service).write(BLOCK, half_random(3))
            disk(service, "other").write(0, text(4))
            await of(service).take()
            held = {export.name: whole(export.disk) for export in service._exports}
            told = service.status().checkpoint
            assert told is not None
            assert told.stream_bytes > 2000
            disk(service).write(0, noise(9))
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with checkpointing(left) as service:
            assert {export.name: whole(export.disk) for export in service._exports} == held
            assert service._exports.get("other").access.addresses == ("10.0.0.0/8",)
            assert service._exports.get("disk@monday").read_only
            assert disk(service, "disk@monday").identity == 5
            found = service.status().checkpoint
            assert found == replace(told, seconds=0.0, stream_bytes=0)
            assert len(service._pools["default"].pool.all_disks()) == 4

    play(story)
    assert "4 exports restored from the checkpoint of 20" in caplog.text


def test_what_nobody_declares_comes_back_no_more_open_than_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Who may attach, whether to write, and what it may take; what is declared holds as declared, and that is told."""
    limits = {"quota_bytes": MIB, "iops": 500, "iops_burst": 5, "bandwidth_bytes": 4 * MIB}
    asked = {**AS_IT_IS, "read_only": True, "allow_addresses": ["10.0.0.0/8"], "bounds": limits}

    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            await service.changes.add_export("other", MIB, **asked, pool=None)
            await service.changes.copy_export("other", "clone", read_only=False)
            for name in ("disk", "clone"):
                await service.changes.change_export(name, **{**asked, "bounds": {"iops": 7}})
            await of(service).take()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with checkpointing(left) as service:
            other, clone = (service._exports.get(name) for name in ("other", "clone"))
            assert other.bounds == Bounds(**limits)
            assert (other.read_only, other.access.addresses) == (True, ("10.0.0.0/8",))
            assert other.disk.quota_bytes == MIB
            assert clone.bounds == Bounds(**{**limits, "iops": 7})
            left = as_the_power_left_it(left, tmp_path / "left again")
        (left / FILE_NAME).unlink()  # which knows what was declared then
        async with checkpointing(left) as service:
            declared = service._exports.get("disk")
            assert declared.bounds == UNBOUND
            assert (declared.read_only, declared.access.addresses) == (True, ("10.0.0.0/8",))
            assert service._exports.get("other").access.addresses == ("10.0.0.0/8",)

    play(story)
    assert "of the export 'disk' holds as declared, and not as it was: what it may take\n" in caplog.text
    assert "of the export other" not in caplog.text


def test_a_number_of_nine_digits_is_one_like_any_other(tmp_path: Path) -> None:
    """What is written by it is found again: with one a second that is so after three years."""

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            disk(service).write(0, text(1))
            await journal(service).synced()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        (left / "00000001-full.stream").rename(left / "99999999-full.stream")
        (left / "00000001.journal").rename(left / "99999999.journal")
        async with flushing(left, begun=False) as service:
            disk(service).write(BLOCK, text(2))
            await of(service).take()
            disk(service).write(2 * BLOCK, text(3))
            await of(service).take()
            disk(service).write(3 * BLOCK, text(4))
            await journal(service).synced()
            cut = as_the_power_left_it(left, tmp_path / "cut")
        assert any(name.startswith("10000000") and "-since-10000000" in name for name in files(cut))
        assert (await begun_from(cut))[: 4 * BLOCK] == text(1) + text(2) + text(3) + text(4)

    play(story)


def test_a_damaged_checkpoint_is_passed_over_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            disk(service).write(MIB, b"".join(noise(number) for number in range(100, 120)))
            for number in range(3):
                disk(service).write(number * BLOCK, noise(number))
                await of(service).take()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        newest = left / "00000003-since-00000002.stream"
        bent = bytearray(newest.read_bytes())
        bent[len(bent) // 2] ^= 1
        newest.write_bytes(bent)
        async with checkpointing(left) as service:
            assert disk(service).read(0, 3 * BLOCK) == noise(0) + noise(1) + bytes(BLOCK)
            assert len(service._pools["default"].pool.all_disks()) == 1
            await of(service).take()
            assert files(left)[-1] == "00000004-full.stream"  # its number is no other's
        first = left / "00000001-full.stream"
        (left / "00000004-full.stream").unlink(missing_ok=True)
        for name in files(left):
            if name > "00000004":
                (left / name).unlink()
        first.write_bytes(first.read_bytes()[:-1])
        with pytest.raises(UserError, match=r"no checkpoint in .* can be used: the stream .*; repair them"):
            async with checkpointing(left):
                raise AssertionError

    play(story)
    assert "cannot be used: the stream is damaged" in caplog.text


def test_what_goes_on_from_a_damaged_checkpoint_is_passed_over_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Or a start would read a whole one for each of the 63 that may follow: hours, of a large one."""
    opened, read = source.open_source, list[str]()

    def note(path: Path, told_to_stop: threading.Event) -> Any:
        read.append(path.name)
        return opened(path, told_to_stop)

    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            disk(service).write(MIB, b"".join(noise(number) for number in range(100, 120)))
            for number in range(5):
                disk(service).write(number * BLOCK, noise(number))
                await of(service).take()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        second = left / "00000002-since-00000001.stream"
        second.write_bytes(second.read_bytes()[:-1])
        monkeypatch.setattr("nbdzram.server.restore.open_source", note)
        async with checkpointing(left) as service:
            assert disk(service).read(0, 2 * BLOCK) == noise(0) + bytes(BLOCK)
        assert [name for name in read if name.endswith("full.stream")] == ["00000001-full.stream"] * 2
        assert len(list(left.glob("*.damaged"))) == 5

    play(story)
    assert caplog.text.count("cannot be used: it goes on from one that cannot") == 3


def test_a_checkpoint_whose_disk_lost_a_part_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that is damaged: an older one is whole."""

    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            for number in range(2):
                disk(service).write(number * BLOCK, noise(number))
                await of(service).take()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        opened = source.open_source

        def lost(path: Path, told_to_stop: threading.Event) -> Any:
            if path.name == "00000002-since-00000001.stream":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return opened(path, told_to_stop)

        monkeypatch.setattr("nbdzram.server.restore.open_source", lost)
        async with checkpointing(left) as service:
            assert disk(service).read(0, 2 * BLOCK) == noise(0) + bytes(BLOCK)

    play(story)
    assert "cannot be used: cannot read" in caplog.text


def test_a_pool_that_was_full_is_filled_again(tmp_path: Path) -> None:
    """From a whole checkpoint and what changed, which lies between what it replaces; and takes no more than it did."""
    full: dict[str, Any] = {
        "pools": (PoolConfig(mem_limit=8 * MIB),),
        "exports": (ExportConfig(name="disk", size_bytes=32 * MIB),),
    }

    async def story() -> None:
        async with checkpointing(tmp_path / "kept", **full) as service:
            found, pool = disk(service), service._pools["default"].pool
            with pytest.raises(PoolFull):
                for number in range(8192):
                    found.write(number * BLOCK, half_random(number))
            await of(service).take()
            for number in range(0, 8192, 2):
                found.trim(number * BLOCK, BLOCK)
            await of(service).take()  # whose copy holds none of them
            run(Compact(pool))
            with pytest.raises(PoolFull):
                for number in range(0, 8192, 2):
                    found.write(number * BLOCK, half_random(8192 + number, 1400))
            await of(service).take()
            assert pool.stats().memory_used > 7 * MIB
            held = whole(found)
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        assert files(left)[-1] == "00000003-since-00000002.stream"
        async with checkpointing(left, **full) as service:
            assert whole(disk(service)) == held
            pool = service._pools["default"].pool
            assert pool.mem_limit == 8 * MIB
            assert pool.stats().memory_used < 8 * MIB + MIB // 2

    play(story)


def test_a_pool_that_was_larger_when_the_chain_began_is_filled_again(tmp_path: Path) -> None:
    """What had more room than the pool has now was removed before there was less."""

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            disk(service).write(0, b"".join(noise(number) for number in range(1024)))
            await of(service).take()
            await asked(service, "exports.remove", name="disk")
            await asked(service, "pools.change", name="default", mem_limit=MIB)
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with flushing(left, begun=False) as service:
            assert service._pools["default"].pool.mem_limit == MIB
            assert not len(service._exports)

    play(story)


def test_a_pool_that_is_declared_too_small_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            disk(service).write(0, b"".join(noise(number) for number in range(700)))
        with pytest.raises(UserError, match=r"does not fit the pool 'default': it would take .*, and mem_limit is 2M"):
            async with checkpointing(tmp_path / "kept", pools=(PoolConfig(mem_limit=2 * MIB),)):
                raise AssertionError

    play(story)


def test_a_checkpoint_for_which_memory_is_too_short_is_no_reason_to_begin_from_an_older_one(tmp_path: Path) -> None:
    """It is whole, and what the exports are; the one before would fit."""

    async def story() -> None:
        async with checkpointing(tmp_path) as service:
            disk(service).write(0, text(1))
            await of(service).take()
            disk(service).write(0, b"".join(noise(number) for number in range(300)))
            await of(service).take()

    play(story)
    with Pool() as pool:
        purse = Purse()
        pool.share(purse)
        purse.ceiling = purse.used + 100 * BLOCK
        with pytest.raises(UserError, match="no mem_limit holds while this comes"):
            Restore([], {"default": pool}, State(None)).from_newest(tmp_path)
        purse.ceiling = 0
        assert Restore([], {"default": pool}, State(None)).from_newest(tmp_path)
        assert pool.disks()[0].read(0, BLOCK) == noise(0)


@pytest.mark.parametrize("pool", ["default", "fast"])
def test_a_pool_whose_limit_was_lowered_below_what_it_holds_is_served(
    tmp_path: Path, pool: str, caplog: pytest.LogCaptureFixture
) -> None:
    """While the server ran: it had all of that, and nobody could raise the limit of a server that does not start."""
    content = b"".join(noise(number) for number in range(700))

    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            if pool == "fast":
                await asked(service, "pools.add", name="fast", mem_limit=64 * MIB)
            await asked(service, "exports.add", name="new", size_bytes=4 * MIB, pool=pool)
            disk(service, "new").write(0, content)
            await asked(service, "pools.change", name=pool, mem_limit=MIB)
            await of(service).take()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with checkpointing(left) as service:
            assert whole(disk(service, "new")).startswith(content)
            assert service._pools[pool].pool.mem_limit == MIB
            with pytest.raises(PoolFull):
                disk(service, "new").write(3 * MIB, noise(1000))

    play(story)
    assert f"the pool '{pool}' takes" in caplog.text


def test_a_file_to_restore_does_not_come_before_what_a_checkpoint_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The flag stands in a unit, and is there at each start behind a power failure too."""
    caplog.set_level(logging.INFO)

    async def story() -> None:
        async with checkpointing(tmp_path / "first") as service:
            disk(service).write(0, text(1))
        backup = tmp_path / "backup.stream"
        shutil.copy(tmp_path / "first" / "00000001-full.stream", backup)
        for held in (text(1), text(2)):
            async with checkpointing(tmp_path / "kept", restore_from=backup) as service:
                assert disk(service).read(0, BLOCK) == held
                disk(service).write(0, text(2))

    play(story)
    assert f"{tmp_path}/backup.stream is not restored: what a checkpoint has was served here last" in caplog.text


def test_what_a_kill_left_half_written_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / "00000001-full.new").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")

    async def story() -> None:
        async with checkpointing(tmp_path) as service:
            assert files(tmp_path) == ["notes.txt"]
            await of(service).take()

    play(story)


def test_pools_that_hold_disks_are_left_alone(tmp_path: Path) -> None:
    async def story() -> None:
        state = {"state_dir": tmp_path / "state"}
        async with checkpointing(tmp_path / "kept", **state) as service:
            disk(service).write(0, text(1))
            await of(service).take()
            disk(service).write(0, text(2))
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with checkpointing(left, **state) as service:
            assert disk(service).read(0, BLOCK) == text(2)

    play(story)


def test_a_start_that_fails_lets_the_directory_go(tmp_path: Path) -> None:
    async def story() -> None:
        (tmp_path / "00000001-full.stream").write_bytes(b"damaged")
        for _ in range(2):
            with pytest.raises(UserError, match=r"no checkpoint in .* can be used"):
                async with checkpointing(tmp_path):
                    pass

    play(story)


def test_a_checkpoint_from_which_others_go_on_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is older is begun from, and that is told; where the whole one is missing, nothing is."""

    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            disk(service).write(MIB, b"".join(noise(number) for number in range(100, 120)))
            for number in range(4):
                disk(service).write(number * BLOCK, noise(number))
                await of(service).take()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        (left / "00000003-since-00000002.stream").unlink()
        async with checkpointing(left) as service:
            assert disk(service).read(0, 4 * BLOCK) == noise(0) + noise(1) + bytes(2 * BLOCK)
        for name in files(left):
            if "full" in name:
                (left / name).unlink()
        with pytest.raises(UserError, match=r"can be used: .* goes on from the checkpoint 00000001"):
            async with checkpointing(left):
                raise AssertionError

    play(story)
    lost = "00000004-since-00000003.stream goes on from the checkpoint 00000003, which is missing"
    assert f"00000004-since-00000003.stream cannot be used: {lost}" in caplog.text


@pytest.mark.parametrize("private", [False, True], ids=["two pools", "two folding domains"])
def test_what_was_received_where_it_was_sent_is_told_from_itself(tmp_path: Path, private: bool) -> None:
    """Both have one identity, and lie in two pools, or in two folding domains of one; then clients write to both."""
    second = "default" if private else "second"
    given: dict[str, Any] = {"pools": (PoolConfig(name="default"), PoolConfig(name="second")), "exports": ()}

    async def story() -> None:
        async with checkpointing(tmp_path / "kept", **given) as service:
            for name, pool in (("a", "default"), ("b", second)):
                await service.changes.add_export(name, MIB, **{**ADDED, "pool": pool}, private=private)
                disk(service, name).write(0, noise(1) + noise(2))
                await service.changes.copy_export(name, f"{name}@monday", read_only=True)
                disk(service, f"{name}@monday").identify(5)
            await of(service).take()
            await service.changes.rename_export("b@monday", "received")
            await of(service).take()
            for name in ("a", "a@monday", "b", "received"):
                await service.changes.change_export(name, **{**AS_IT_IS, "read_only": False})
                disk(service, name).write(BLOCK, noise(3) + text(len(name)))
            await of(service).take()
            held = {export.name: (export.pool_name, whole(export.disk)) for export in service._exports}
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
            assert files(left)[-1] == "00000003-since-00000002.stream"
        async with checkpointing(left, **given) as service:
            assert {export.name: (export.pool_name, whole(export.disk)) for export in service._exports} == held
            domains = {export.name: export.disk.domain for export in service._exports}
            assert domains["a"] == domains["a@monday"]
            assert domains["b"] == domains["received"]
            assert (domains["a"] != domains["b"]) == private
            for found in service._pools.values():
                run(Check(found.pool))

    play(story)


@pytest.mark.parametrize(
    ("opened", "is_flushed"), [(checkpointing, False), (flushing, True)], ids=["a checkpoint", "a journal"]
)
def test_a_pool_that_is_gone_keeps_no_server_from_starting(
    tmp_path: Path, opened: Callable[..., Any], is_flushed: bool
) -> None:
    """Exports lay in it when the chain began; whoever removed them, and it, was told that it is done."""

    async def story() -> None:
        async with opened(tmp_path / "kept") as service:
            await asked(service, "pools.add", name="second")
            await asked(service, "exports.add", name="brief", size_bytes=MIB, pool="second")
            disk(service, "brief").write(0, noise(1))
            disk(service).write(0, b"".join(noise(number) for number in range(20)))
            await of(service).take()
            await asked(service, "exports.remove", name="brief")
            await asked(service, "pools.remove", name="second")
            disk(service).write(0, text(1))
            await (journal(service).synced() if is_flushed else of(service).take())
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        given: dict[str, Any] = {"begun": False} if is_flushed else {}
        async with opened(left, **given) as service:
            assert [export.name for export in service._exports] == ["disk"]
            assert whole(disk(service))[: 2 * BLOCK] == text(1) + noise(1)
            assert list(service._pools) == ["default"]

    play(story)


def test_exports_of_a_pool_that_nobody_declares_are_not_begun_without(tmp_path: Path) -> None:
    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            await service.changes.add_pool("second", 0, "fold")
            await service.changes.add_export("brief", MIB, **{**ADDED, "pool": "second"})
        (tmp_path / "kept" / FILE_NAME).unlink()
        for _ in range(2):
            with pytest.raises(UserError, match="'brief' lay in the pool 'second', and no such pool is declared"):
                async with checkpointing(tmp_path / "kept"):
                    raise AssertionError

    play(story)
