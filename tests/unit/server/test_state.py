"""Changes at run time are remembered whole, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdzram.config import Access
from nbdzram.errors import UserError
from nbdzram.server.state import FILE_NAME, ExportRecord, PoolChange, State

CHANGE = ExportRecord(
    pool="default",
    size_bytes=4096,
    read_only=True,
    description="x",
    access=Access(addresses=("10.0.0.0/8",), certificates=("vm1.example",)),
    removed=False,
    declared=None,
)


def test_what_is_remembered_is_there_after_a_restart(tmp_path: Path) -> None:
    state = State(tmp_path / "new" / "state")
    state.remember_export("disk", CHANGE)
    state.remember_pool("fast", PoolChange(mem_limit=5, dedup="inline", declared=None))
    again = State(tmp_path / "new" / "state")
    assert again.changes == state.changes
    assert again.changes.exports == {"disk": CHANGE}
    again.remember_export("disk", None)
    assert State(tmp_path / "new" / "state").changes.exports == {}


def test_without_a_directory_changes_last_as_long_as_the_process() -> None:
    state = State(None)
    state.remember_export("disk", CHANGE)
    assert state.changes.exports == {"disk": CHANGE}
    assert state.arena_path("default") is None


def test_a_change_that_cannot_be_written_is_not_half_made(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.remember_export("disk", CHANGE)
    (tmp_path / "changes.new").mkdir()  # the file that the next change is written to cannot be made
    with pytest.raises(UserError, match="cannot remember the change"):
        state.remember_export("other", CHANGE)
    assert state.changes.exports == {"disk": CHANGE}
    assert State(tmp_path).changes.exports == {"disk": CHANGE}


@pytest.mark.parametrize(
    ("text", "clue"),
    [
        ("{", "is damaged"),
        ('{"format": 99}', "is not of format 2"),
        ('{"format": 1, "exports": {"a": {}}, "pools": {}}', "lacks or misplaces 'pool'"),
        ('{"format": 1, "exports": {"a": 3}, "pools": {}}', r"lacks or misplaces 3 \(not an object\)"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_and_left_alone(tmp_path: Path, text: str, clue: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(UserError, match=clue):
        State(tmp_path)
    assert (tmp_path / FILE_NAME).read_text() == text


def test_a_state_directory_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot use the state directory .*: (File exists|Not a directory)"):
        State(tmp_path / "file")
