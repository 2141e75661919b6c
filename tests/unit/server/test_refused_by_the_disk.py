"""What the file system, or a pool, refuses a journal and checkpoints: who waits is told, and the next one goes on."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdzram.errors import EngineError, StreamError, UserError, reason_of
from nbdzram.server import checkpoints as checkpoints_module
from nbdzram.server import journal as journal_module
from nbdzram.server import segments as segments_module
from nbdzram.server.chains import checkpoints_in, next_number, segments_in
from nbdzram.server.service import Service
from tests.unit.engine.blocks import noise
from tests.unit.server.lasting import (
    as_the_power_left_it,
    begun_from,
    checkpointing,
    disk,
    flushing,
    groups,
    journal,
    of,
    play,
)

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Refusing:
    """In the place of a function: refuses as long as it has an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, error: Exception) -> None:
        self.error: Exception | None = error
        self.refused = 0
        real: Callable[..., Any] = getattr(place, name)

        def ask(*given: Any, **named: Any) -> Any:
            if self.error is None:
                return real(*given, **named)
            self.refused += 1
            raise self.error

        monkeypatch.setattr(place, name, ask)


async def flushed_content(service: Service, number: int) -> bytes:
    """Written, and on the disk."""
    content = noise(number)
    disk(service).write(0, content)
    await journal(service).synced()
    return content


def test_a_flush_waits_for_a_journal_that_cannot_begin_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where there is room for the first checkpoint alone, as for none: nobody was promised anything."""
    refusing = Refusing(monkeypatch, journal_module, "begin_segment", FULL)

    async def story() -> None:
        async with flushing(tmp_path / "kept", begun=False) as service:
            content = noise(1)
            disk(service).write(0, content)
            flush = asyncio.ensure_future(journal(service).synced())
            await of(service).take()
            assert refusing.refused > 0
            status = of(service).status
            assert status is not None
            assert status.failures > 0
            assert "a checkpoint failed: " in caplog.text
            assert (journal(service).status.usable, journal(service).status.trouble) == (False, "")
            assert not flush.done()
            refusing.error = None
            await of(service).take()
            await flush
            assert (journal(service).status.usable, journal(service).status.trouble) == (True, "")
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
            await flushed_content(service, 2)
        assert (await begun_from(left)).startswith(content)

    play(story)


@pytest.mark.parametrize("error", [FULL, UserError("cannot look")], ids=["system", "sentence"])
def test_an_old_journal_that_stays_is_told_and_goes_with_the_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            await flushed_content(service, 1)
            refusing = Refusing(monkeypatch, journal_module, "retire_segments", error)
            await of(service).take()
            assert (
                f"old journals in {tmp_path / 'kept'} stay until the next checkpoint: {reason_of(error)}" in caplog.text
            )
            assert len(segments_in(tmp_path / "kept")) == 2
            assert journal(service).status.usable
            refusing.error = None
            await flushed_content(service, 2)
            await of(service).take()
            assert len(segments_in(tmp_path / "kept")) == 1

    play(story)


def test_an_old_journal_that_nobody_wants_stays_until_it_can_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            await flushed_content(service, 1)
        refusing = Refusing(monkeypatch, checkpoints_module, "forget_journal", FULL)
        async with checkpointing(tmp_path / "kept") as service:
            for content in (b"a", b"b"):
                disk(service).write(0, content)
                await of(service).take()
                assert len(segments_in(tmp_path / "kept")) == (refusing.error is not None)
                refusing.error = None
        assert "an old journal in" in caplog.text
        assert "stays until the next checkpoint: No space left on device" in caplog.text

    play(story)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("take", UserError("no place")),
        ("take", EngineError("exports are changed all the time")),
        ("take", MemoryError()),
        ("write_readable", StreamError("too long")),
        ("write_readable", EngineError("not what was written")),
        ("write_readable", MemoryError("none")),
    ],
)
def test_a_group_that_cannot_be_made_fails_its_flushes_alone_and_the_next_has_what_it_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, error: Exception
) -> None:
    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            await flushed_content(service, 1)
            before, count = journal(service).status, groups(tmp_path / "kept")
            refusing = Refusing(monkeypatch, journal(service)._moments, name, error)
            disk(service).write(4096, noise(2))
            with pytest.raises(OSError, match=reason_of(error)) as told:
                await journal(service).synced()
            assert told.value.errno == errno.EIO
            refusing.error = None
            status = journal(service).status
            assert (status.usable, status.trouble, status.failures) == (True, "", before.failures + 1)
            assert f"FLUSH fails: what changed could not be written to the journal: {reason_of(error)}" in caplog.text
            await journal(service).synced()
            assert groups(tmp_path / "kept") == count + 1
            await flushed_content(service, 3)
            kept = (disk(service).read(0, 8192), await begun_from_a_copy(tmp_path))
        assert kept[0] == kept[1][:8192]

    play(story)


async def begun_from_a_copy(tmp_path: Path) -> bytes:
    left = tmp_path / "left"
    left.mkdir()
    for file in (tmp_path / "kept").iterdir():
        (left / file.name).write_bytes(file.read_bytes())
    return await begun_from(left)


def test_a_group_that_is_larger_than_the_room_ahead_has_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice: by less than is had ahead each time, and by more."""
    monkeypatch.setattr(segments_module, "ROOM_BYTES", 64 << 10)

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            (path,) = segments_in(tmp_path / "kept").values()
            for blocks in (17, 64, 3):
                disk(service).write(0, b"".join(noise(blocks * 100 + number) for number in range(blocks)))
                await journal(service).synced()
                assert path.stat().st_size > journal(service).status.segment_bytes - 512 > blocks * 4096
            content = disk(service).read(0, 64 * 4096)
            assert (await begun_from_a_copy(tmp_path))[: len(content)] == content

    play(story)


def test_what_is_no_directory_is_not_looked_into(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for look in (checkpoints_in, segments_in, next_number):
        with pytest.raises(UserError, match=f"cannot look into {file}: Not a directory"):
            look(file)
        assert look(tmp_path / "gone") in ({}, 1)


def test_a_checkpoint_is_tried_where_there_is_room_for_the_least_that_it_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is stored, or what the last whole one took: what is between may find room, and trying says whether."""

    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            disk(service).write(0, noise(1))
            await of(service).take()
            disk(service).write(0, b"".join(noise(number) for number in range(64)))
            whole = next(iter(checkpoints_in(tmp_path / "kept").values())).path.stat().st_size
            real = os.statvfs
            for free, is_enough in ((whole + 8192, True), (4096, False), (0, False)):
                with monkeypatch.context() as patch:
                    patch.setattr(os, "statvfs", lambda path, free=free: _with_room(real(path), free))
                    if is_enough:
                        of(service)._require_room()
                        continue
                    with pytest.raises(OSError, match="No space left"):
                        of(service)._require_room()

    play(story)


def _with_room(found: os.statvfs_result, free: int) -> os.statvfs_result:
    return os.statvfs_result([1, 1, *found[2:4], free, *found[5:]])


@pytest.mark.parametrize(
    ("name", "checkpoint", "segment"),
    [
        ("00000001-full.stream", 1, None),
        ("00000012-since-00000011.stream", 12, None),
        ("123456789-full.stream", 123456789, None),
        ("00000007.journal", None, 7),
        *[
            (name, None, None)
            for whole in ("00000001-full.stream", "00000012-since-00000011.stream", "00000007.journal")
            for name in (f"{whole}.bak", f"{whole}~", f"{whole}\n", f".{whole}", f"a{whole}", whole[1:], whole[:-1])
        ],
        ("00000001-full.new", None, None),
        ("000000001-full.stream", None, None),
        ("00000001-since-1.stream", None, None),
    ],
)
def test_only_files_that_are_called_so_are_checkpoints_and_journals(
    name: str, checkpoint: int | None, segment: int | None, tmp_path: Path
) -> None:
    """Copies that an operator put beside them are his."""
    (tmp_path / name).touch()
    assert list(checkpoints_in(tmp_path)) == ([] if checkpoint is None else [checkpoint])
    assert list(segments_in(tmp_path)) == ([] if segment is None else [segment])
