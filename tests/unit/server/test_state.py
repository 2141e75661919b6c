"""Changes at run time are remembered whole, or refused in one sentence."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdzram.config import Access
from nbdzram.errors import UserError
from nbdzram.server.state import FILE_NAME, ExportRecord, Kept, PoolChange, State, remembered_in
from nbdzram.status import to_json

CHANGE = ExportRecord(
    pool="default",
    size_bytes=4096,
    read_only=True,
    description="x",
    access=Access(addresses=("10.0.0.0/8",), certificates=("vm1.example",)),
    removed=False,
    declared=None,
)


def of_pool(name: str = "p", **given: object) -> str:
    entry = {"mem_limit": 0, "dedup": "fold", "declared": None, **given}
    return json.dumps({"format": 2, "exports": {}, "pools": {name: entry}})


def of_export(name: str = "a", **given: object) -> str:
    entry = {**json.loads(to_json(CHANGE)), **given}
    return json.dumps({"format": 2, "exports": {name: entry}, "pools": {}})


def of_former(**given: object) -> str:
    entry = {"addresses": [], "certificates": [], "nobody": False, **given}
    return json.dumps({"format": 2, "exports": {}, "pools": {}, "former": {"a": entry}})


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


@pytest.mark.parametrize("in_memory", [True, False], ids=["memory", "directory"])
def test_who_gave_away_in_vain_writes_again_what_it_knows(tmp_path: Path, *, in_memory: bool) -> None:
    """Another version may have written there what this one does not read; whoever starts next reads the file."""
    directory, file = (None if in_memory else tmp_path), tmp_path / FILE_NAME
    state = State(directory, Kept(file=file))
    state.remember_export("disk", CHANGE)
    file.write_text('{"format": 99}')
    again = State(directory, state.surrender())
    assert again.changes == remembered_in(tmp_path) == state.changes
    file.unlink()
    State(directory, Kept(file=file))  # who goes on from nobody writes nothing
    assert not file.exists()


def test_another_file_in_the_place_of_an_arena_is_refused_also_by_who_goes_on(tmp_path: Path) -> None:
    """As an arena that is not there would be made, and served to clients that have another."""
    state = State(tmp_path)
    arena, away = tmp_path / "p.pool", tmp_path / "away"
    arena.write_bytes(b"stored")
    state.require_arena("p")  # nobody knows of any
    state.opened_arena("p")
    following = State(tmp_path, state.surrender())
    for one in (state, following):
        one.require_arenas()
        arena.rename(away)
        with pytest.raises(UserError, match=r"p\.pool is not the file that is served: .* `nbdzram send`"):
            one.require_arenas()
        arena.write_bytes(b"stored")
        with pytest.raises(UserError, match="put back what was there"):
            one.require_arena("p")
        away.replace(arena)
        one.require_arenas()
    following.remove_arena("p")
    following.require_arenas()


FORMER = Access(addresses=("10.0.0.0/8",), certificates=())


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.remember_removal("gone", None, FORMER),
        lambda state: state.remember_exports(state.changes.exports, gone=["disk"]),
        lambda state: state.remember_exports({}),
        lambda state: state.remember_renaming("new", CHANGE, "old", None),
        lambda state: state.remember_pool("fast", PoolChange(mem_limit=5, dedup="inline", declared=None)),
        lambda state: state.remember_export("disk", None),
    ],
    ids=["gone and not known", "gone among all", "exports alone", "another name", "pool", "forgotten"],
)
def test_whatever_changed_is_written_and_what_did_not_is_not(tmp_path: Path, change: Callable[[State], None]) -> None:
    """Also whom an export admitted that is gone, and nothing beside it."""
    state = State(tmp_path)
    state.remember_export("disk", CHANGE)
    before = state.changes
    change(state)
    assert state.changes != before
    assert remembered_in(tmp_path) == state.changes
    written = (tmp_path / FILE_NAME).stat().st_ino
    state.remember_exports(state.changes.exports)
    for name, pool in state.changes.pools.items():
        state.remember_pool(name, pool)
    assert (tmp_path / FILE_NAME).stat().st_ino == written


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
        ("[" * 20_000, "nested without end"),
        (of_export(size_bytes="9" * 5000), r"lacks or misplaces '9{12}\.{3}9{13}' \(not int\)"),
        (of_pool(mem_limit=-5), r"is damaged: pools\.p: -5"),
        (of_pool(mem_limit=10**30), r"is damaged: pools\.p: 10{30}"),
        (of_pool(dedup="later"), r"is damaged: pools\.p: 'later' is not allowed"),
        (of_pool(name="../p"), r"is damaged: pools\.\.\./p: "),
        (of_export(size_bytes=513), r"is damaged: exports\.a: '513'"),
        (of_export(description="\ud800"), r"is damaged: exports\.a: .*not UTF-8"),
        (of_export(pool="/"), r"is damaged: exports\.a: '/'"),
        (of_export(name="a\nb"), "is damaged: exports"),
        (of_export(access={"addresses": ["10.0.0.1/8"], "certificates": [], "nobody": False}), "host bits"),
        (of_export(access={"addresses": [], "certificates": [""], "nobody": False}), "certificate's name"),
        (of_former(addresses=["10.0.0.1/8"]), r"former\.a: .*host bits"),
        (of_former(certificates=[""]), r"former\.a: .*certificate's name"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_and_left_alone(tmp_path: Path, text: str, clue: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(UserError, match=clue):
        State(tmp_path)
    assert (tmp_path / FILE_NAME).read_text() == text


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "directory"])
def test_what_is_no_file_in_its_place_is_refused_and_not_waited_for(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / FILE_NAME)
    with pytest.raises(UserError, match=r"changes\.json is no regular file; restore it"):
        State(tmp_path)


def test_what_could_not_be_written_whole_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full file system the half of it would take the last."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    state = State(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; free some"):
        state.remember_export("disk", CHANGE)
    assert list(tmp_path.iterdir()) == []


def test_a_state_directory_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot use the state directory .*: (File exists|Not a directory)"):
        State(tmp_path / "file")


def test_who_remembers_something_on_another_thread_forgets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose checkpoints lie where is remembered beside an administrator's change: the later one wrote it away."""
    state, other = State(tmp_path), list[threading.Thread]()
    asked, sync = threading.Event(), os.fsync

    class Turn:
        """Tells that somebody waits for it."""

        def __init__(self) -> None:
            self.lock = threading.Lock()

        def __enter__(self) -> None:
            if other:
                asked.set()
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()

    def remember() -> None:
        state.remember_kept_in("0123456789abcdef", "", ("before",))

    def fsync(descriptor: int) -> None:
        if not other:
            other.append(threading.Thread(target=remember))
            other[0].start()
            assert asked.wait(60)
        asked.set()
        sync(descriptor)

    monkeypatch.setattr(state, "_turn", Turn())
    monkeypatch.setattr(os, "fsync", fsync)
    state.remember_export("disk", CHANGE)
    other[0].join()
    found = State(tmp_path).changes
    assert (found.exports, found.kept_in, found.kept_before) == ({"disk": CHANGE}, "0123456789abcdef", ("before",))
