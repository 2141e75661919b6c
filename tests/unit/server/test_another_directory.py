"""What lies in another directory at the checkpoints' path, as one that is mounted late, is not ours to let go."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from nbdzram.errors import UserError
from nbdzram.server import segments
from tests.unit.engine.blocks import BLOCK, text
from tests.unit.server.lasting import (
    CHANGED,
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


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are copied each time."""
    monkeypatch.setattr(segments, "ROOM_BYTES", 64 << 10)


def told(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".new"}


@pytest.mark.parametrize("opened", [checkpointing, flushing])
def test_a_server_that_began_empty_leaves_what_is_mounted_over_its_checkpoints_as_it_is(
    tmp_path: Path, opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The file system came late; a start behind that has what was there, journal and rules too."""
    kept, real = tmp_path / "kept", tmp_path / "real"

    async def story() -> None:
        async with opened(real) as service:
            disk(service).write(0, text(1))
            await of(service).take()
            await asked(service, "pools.add", name="fast")
            await asked(service, "exports.change", name="disk", **CHANGED)
            disk(service).write(BLOCK, text(2))
            if of(service).journal is not None:
                await journal(service).synced()
            left = as_the_power_left_it(real, tmp_path / "left")
        before = told(left)
        async with opened(kept) as service:
            disk(service).write(0, text(7))
            await of(service).take()
            kept.rename(tmp_path / "below")
            left.rename(kept)
            with pytest.raises(UserError, match=r"^it (is done, and not|cannot be noted)"):
                await asked(service, "pools.add", name="second")
            for _ in range(3):
                await of(service).take()
            with pytest.raises(UserError, match="it is done, and not on the disk"):
                await asked(service, "exports.add", name="other", size_bytes=MIB)
            assert told(kept) == before
        assert told(kept) == before
        async with opened(kept) as service:
            assert whole(disk(service))[:BLOCK] == text(1)
            assert (whole(disk(service))[BLOCK : 2 * BLOCK] == text(2)) == (opened is flushing)
            assert service._exports.get("disk").read_only
            assert "fast" in service._pools

    play(story)
    assert "this server did not begin from what lies there (00000001-full.stream)" in caplog.text


@pytest.mark.parametrize("opened", [checkpointing, flushing])
@pytest.mark.parametrize("how", ["comes back", "a copy", "moved away"])
def test_what_a_server_wrote_itself_is_gone_on_from_in_another_directory(tmp_path: Path, opened: Any, how: str) -> None:
    """One that is mounted again, one that was copied to a larger disk, and one whose files somebody moved away."""
    kept = tmp_path / "kept"

    async def story() -> None:
        async with opened(kept) as service:
            disk(service).write(0, text(1))
            await of(service).take()
            if how == "comes back":
                kept.rename(tmp_path / "away")
                disk(service).write(0, text(3))
                await of(service).take()
                disk(service).write(0, text(1))
                kept.rename(tmp_path / "below")
                (tmp_path / "away").rename(kept)
            elif how == "a copy":
                shutil.copytree(kept, tmp_path / "copy")
                kept.rename(tmp_path / "away")
                (tmp_path / "copy").rename(kept)
            else:
                kept.rename(tmp_path / "away")
                kept.mkdir()
                (kept / "00000077-full.stream").write_bytes(b"of somebody else")
                await of(service).take()
                assert service.status().checkpoint.failures == 1
                (kept / "00000077-full.stream").unlink()
            disk(service).write(BLOCK, text(2))
            await of(service).take()
            await asked(service, "exports.add", name="other", size_bytes=MIB)
            left = as_the_power_left_it(kept, tmp_path / "left")
        async with opened(left) as service:
            assert whole(disk(service))[: 2 * BLOCK] == text(1) + text(2)

    play(story)


def test_a_checkpoint_goes_on_from_no_file_that_has_the_name_of_one_elsewhere(tmp_path: Path) -> None:
    """The directory was away for the first checkpoint of a server, and is back: it has one of that number, of a server
    before. What went on from that was none that a start could use, and what was told meanwhile was lost."""
    kept, away = tmp_path / "kept", tmp_path / "away"

    async def story() -> None:
        async with checkpointing(kept) as service:
            disk(service).write(0, text(1))
        async with checkpointing(kept) as service:
            kept.rename(away)
            disk(service).write(0, text(2))
            await of(service).take()
            kept.rename(tmp_path / "below")
            away.rename(kept)
            disk(service).write(BLOCK, text(3))
            await of(service).take()
            left = as_the_power_left_it(kept, tmp_path / "left")
        async with checkpointing(left) as service:
            assert whole(disk(service))[: 2 * BLOCK] == text(2) + text(3)

    play(story)
