"""What a later version of this program wrote is no damage, and nobody begins without it: that version has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nbdzram import values
from nbdzram.errors import UserError
from nbdzram.server.state import FILE_NAME
from nbdzram.stream import journal as journal_format
from nbdzram.stream import layout
from tests.unit.engine.blocks import text
from tests.unit.server.lasting import (
    MIB,
    as_the_power_left_it,
    asked,
    checkpointing,
    disk,
    flushing,
    of,
    play,
)

Patch = Callable[[pytest.MonkeyPatch], None]


def later_stream(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layout, "VERSION", layout.VERSION + 1)


def with_a_feature(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layout, "FEATURES", 3)
    patch.setattr(layout, "features_of", lambda _: 2)


def later_journal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(journal_format, "VERSION", journal_format.VERSION + 1)


def with_a_flag(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(journal_format, "ALL_EXPORTS", 3)


@pytest.mark.parametrize("later", [later_stream, with_a_feature])
def test_no_older_checkpoint_takes_the_place_of_one_that_a_later_version_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: Patch
) -> None:
    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            disk(service).write(0, text(0))
            await of(service).take()
            with monkeypatch.context() as patch:
                later(patch)
                disk(service).write(0, text(1))
                await of(service).take()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        with pytest.raises(
            UserError, match=r"00000002-(since-00000001|full)\.stream is of a later version, .* start that"
        ):
            async with checkpointing(left):
                raise AssertionError

    play(story)


def test_no_older_checkpoint_takes_the_place_of_one_with_a_name_that_only_a_later_python_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = values.export_name

    def prints_less(value: object) -> str:
        if value == "other":
            raise ValueError("'other' is not an export's name")
        return printed(value)

    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            await of(service).take()
            await asked(service, "exports.add", name="other", size_bytes=MIB)
            await of(service).take()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        (left / FILE_NAME).unlink()  # which holds names to the same rule
        monkeypatch.setattr(values, "export_name", prints_less)
        with pytest.raises(UserError, match=r"of a later version, of this or of Python: .* 'other' cannot be offered"):
            async with checkpointing(left):
                raise AssertionError

    play(story)


@pytest.mark.parametrize("later", [later_stream, with_a_feature, later_journal, with_a_flag])
def test_what_a_later_version_flushed_is_no_end_of_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: Patch
) -> None:
    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            with monkeypatch.context() as patch:
                later(patch)
                disk(service).write(0, text(1))
                if later is later_journal:
                    await of(service).take()
                disk(service).write(0, text(2))
                await asked(service, "exports.change", name="disk", description="so that all exports are told")
                left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        with pytest.raises(
            UserError, match=r"cannot read the journal in .*, which a later version wrote: .* start that"
        ):
            async with flushing(left, begun=False):
                raise AssertionError

    play(story)
