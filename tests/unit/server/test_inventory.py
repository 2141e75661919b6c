"""What a restart finds: nothing stored is lost, run-time changes hold until their declaration changes."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdzram.bounds import Bounds
from nbdzram.config import EVERYONE, NOBODY, Access, ExportConfig, PoolConfig, ServerConfig
from nbdzram.engine.pool import Pool
from nbdzram.errors import ArenaInUse, UserError
from nbdzram.server.inventory import Placed, effective, look_for_the_default, place_exports
from nbdzram.server.opening import open_pool, open_pools
from nbdzram.server.state import FILE_NAME, Declared, ExportRecord, State
from tests.unit.engine.blocks import BLOCK, noise
from tests.unit.server.lasting import spoil

MIB = 1 << 20


def declare(name: str = "disk", size: int = 8 * MIB, pool: str = "default") -> ExportConfig:
    return ExportConfig(name=name, size_bytes=size, pool=pool)


@contextlib.contextmanager
def started(
    directory: Path, *exports: ExportConfig, pools: tuple[str, ...] = ("default",)
) -> Iterator[dict[str, Placed]]:
    """What a server that starts with this state directory and these declarations offers."""
    state = State(directory)
    opened = open_pools([PoolConfig(name=name) for name in pools], state)
    try:
        yield {placed.name: placed for placed in place_exports(exports, opened, state)}
    finally:
        for pool in opened.values():
            pool.close()


def change(directory: Path, name: str, *, size: int, declared: int | None, removed: bool = False) -> None:
    said = Declared(size_bytes=declared, read_only=False, description="", access=EVERYONE) if declared else None
    record = ExportRecord(
        pool="default",
        size_bytes=size,
        read_only=False,
        description="",
        access=EVERYONE,
        removed=removed,
        declared=said,
    )
    State(directory).remember_export(name, record)


def test_a_declared_export_is_made_once_and_found_again_with_its_content(tmp_path: Path) -> None:
    with started(tmp_path, declare()) as offered:
        offered["disk"].disk.write(4096, b"x" * 4096)
    with started(tmp_path, declare()) as offered:
        assert offered["disk"].disk.read(4096, 4096) == b"x" * 4096


def test_a_disk_that_nobody_declares_any_more_is_still_offered(tmp_path: Path) -> None:
    with started(tmp_path, declare()) as offered:
        offered["disk"].disk.write(0, b"y" * 512)
    with started(tmp_path) as offered:
        assert offered["disk"].disk.read(0, 512) == b"y" * 512


def test_a_larger_declaration_grows_the_disk_and_keeps_its_content(tmp_path: Path) -> None:
    with started(tmp_path, declare()) as offered:
        offered["disk"].disk.write(0, b"z" * 512)
    with started(tmp_path, declare(size=16 * MIB)) as offered:
        assert offered["disk"].disk.size_bytes == 16 * MIB
        assert offered["disk"].disk.read(0, 512) == b"z" * 512


def test_a_smaller_declaration_is_told_and_destroys_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with started(tmp_path, declare(size=16 * MIB)) as offered:
        offered["disk"].disk.write(12 * MIB, b"t" * 512)
    for _ in range(2):  # the second start tells it too
        caplog.clear()
        with started(tmp_path, declare()) as offered:
            assert offered["disk"].disk.size_bytes == 16 * MIB
            assert offered["disk"].disk.read(12 * MIB, 512) == b"t" * 512
        assert "'disk' has 16M, but 8M is declared" in caplog.text


def test_a_disk_declared_a_sector_smaller_is_told_to_the_byte(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with started(tmp_path, declare()):
        pass
    with started(tmp_path, declare(size=8 * MIB - 512)):
        assert "'disk' has 8388608 bytes, but 8388096 bytes is declared" in caplog.text


@pytest.mark.parametrize("named", [None, "kept", "an image", "nowhere"])
def test_where_disks_are_kept_the_server_says_whether_its_default_export_is_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, named: str | None
) -> None:
    """A declared image is loaded later than the others."""
    config = ServerConfig(state_dir=tmp_path, exports=(declare("an image"),), default_export=named)
    with started(tmp_path, declare("kept")) as offered:
        look_for_the_default(config, [one.export() for one in offered.values()])
    assert ("no export has that name" in caplog.text) == (named == "nowhere")
    caplog.clear()
    look_for_the_default(replace(config, state_dir=None), ())
    assert not caplog.text, "whoever started it said so"


def test_a_disk_that_cannot_have_its_size_is_offered_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its last block held more before, and is not what was written. Others have theirs."""
    with started(tmp_path, declare(), declare("other")) as offered:
        disk = offered["disk"].disk
        disk.write(0, noise(1))
        disk.write(5 * BLOCK, noise(2))
        spoil(tmp_path / "default.pool", lambda arena: arena.object_of(1) + BLOCK // 2)
        disk.resize(512)
    with started(tmp_path, declare(), declare("other", 16 * MIB)) as offered:
        assert "the export 'disk' keeps its size: cannot grow export 'disk'" in caplog.text
        assert [offered[name].disk.size_bytes for name in ("disk", "other")] == [512, 16 * MIB]
        offered["disk"].disk.write(0, noise(3)[:512])
    with started(tmp_path, declare(), declare("other", 16 * MIB)) as offered:
        assert offered["disk"].disk.read(0, 6 * BLOCK) == noise(3)[:512].ljust(6 * BLOCK, b"\0")


def test_a_size_changed_at_run_time_holds_until_the_declaration_changes(tmp_path: Path) -> None:
    with started(tmp_path, declare()) as offered:
        offered["disk"].disk.resize(32 * MIB)
    change(tmp_path, "disk", size=32 * MIB, declared=8 * MIB)
    with started(tmp_path, declare()) as offered:
        assert offered["disk"].disk.size_bytes == 32 * MIB
    with started(tmp_path, declare(size=64 * MIB)) as offered:
        assert offered["disk"].disk.size_bytes == 64 * MIB


def test_a_declared_export_removed_at_run_time_stays_removed_until_its_declaration_changes(tmp_path: Path) -> None:
    change(tmp_path, "disk", size=8 * MIB, declared=8 * MIB, removed=True)
    with started(tmp_path, declare()) as offered:
        assert offered == {}
    with started(tmp_path, declare(size=16 * MIB)) as offered:
        assert set(offered) == {"disk"}


def test_a_removal_that_a_crash_interrupted_is_finished(tmp_path: Path) -> None:
    with started(tmp_path, declare()) as offered:
        offered["disk"].disk.write(0, b"gone" * 1024)
    change(tmp_path, "disk", size=8 * MIB, declared=None, removed=True)
    with started(tmp_path) as offered:
        assert offered == {}
    State(tmp_path).remember_export("disk", None)
    with started(tmp_path) as offered:
        assert offered == {}


@pytest.mark.parametrize("there", ["default", "fast"])
@pytest.mark.parametrize("is_declared", [True, False])
def test_a_removal_that_was_interrupted_is_finished_in_whichever_pool_it_was(
    there: str, tmp_path: Path, *, is_declared: bool
) -> None:
    pools, disk = ("default", "fast"), declare(pool=there)
    with started(tmp_path, disk, declare("other", pool=there), pools=pools) as offered:
        offered["disk"].disk.write(0, b"gone" * 1024)
    record = State(tmp_path).changes.exports["disk"]
    record = replace(record, removed=True, declared=record.declared if is_declared else None)
    State(tmp_path).remember_export("disk", record)
    declared = (disk, declare("other", pool=there)) if is_declared else ()
    with started(tmp_path, *declared, pools=pools) as offered:
        assert list(offered) == ["other"]
        assert [disk.name for disk in offered["other"].disk.pool.all_disks()] == ["other"]


def test_a_renaming_takes_no_disk_of_the_former_name_in_another_pool(tmp_path: Path) -> None:
    """The one that was to be renamed is lost, with its pool's file."""
    pools = ("default", "old")
    with started(tmp_path, declare(pool="old"), pools=pools) as offered:
        offered["disk"].disk.write(0, b"o" * 512)
    record = State(tmp_path).changes.exports["disk"]
    lost = replace(record, pool="default", declared=None, renamed_from="disk")
    State(tmp_path).remember_export("second", lost)
    with started(tmp_path, pools=pools) as offered:
        assert {name: part.record.pool for name, part in offered.items()} == {"disk": "old"}


@pytest.mark.parametrize("declared", [(), (declare(),)], ids=["undeclared", "declared"])
def test_a_removal_takes_no_disk_of_the_same_name_in_another_pool(
    tmp_path: Path, declared: tuple[ExportConfig, ...]
) -> None:
    """An older one, of a pool that was not known when its namesake was removed."""
    with started(tmp_path, declare(pool="old"), pools=("default", "old")) as offered:
        offered["disk"].disk.write(0, b"o" * 512)
    change(tmp_path, "disk", size=8 * MIB, declared=8 * MIB, removed=True)
    for _ in range(2):
        with started(tmp_path, *declared, pools=("default", "old")) as offered:
            assert offered["disk"].record.pool == "old"
            assert offered["disk"].disk.read(0, 512) == b"o" * 512
            assert offered["disk"].record.access == (EVERYONE if declared else NOBODY)


def test_an_export_in_another_pool_than_declared_is_offered_where_it_lies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with started(tmp_path, declare()) as offered:
        offered["disk"].disk.write(0, b"p" * 512)
    with started(tmp_path, declare(pool="fast"), pools=("default", "fast")) as offered:
        assert offered["disk"].disk.read(0, 512) == b"p" * 512
        assert offered["disk"].export().pool_name == "default"
    assert "lies in the pool 'default', but is declared in 'fast'" in caplog.text


def ruled(*addresses: str, read_only: bool = False, description: str = "") -> ExportConfig:
    return ExportConfig(
        name="disk", size_bytes=8 * MIB, allow_addresses=addresses, read_only=read_only, description=description
    )


def test_a_disk_keeps_its_rules_when_nobody_declares_it_any_more(tmp_path: Path) -> None:
    with started(tmp_path, ruled("10.0.0.0/8", read_only=True, description="golden")):
        pass
    for _ in range(2):
        with started(tmp_path) as offered:
            export = offered["disk"].export()
            assert export.access == Access(addresses=("10.0.0.0/8",))
            assert (export.read_only, export.description) == (True, "golden")


def test_a_disk_of_which_nothing_is_known_admits_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with started(tmp_path, declare()):
        pass
    (tmp_path / FILE_NAME).unlink()
    with started(tmp_path) as offered:
        assert offered["disk"].export().access == NOBODY
    assert "nobody may, until `nbdzram exports change disk` says who" in caplog.text


def test_each_value_changed_at_run_time_holds_until_its_own_declaration_changes(tmp_path: Path) -> None:
    with started(tmp_path, ruled("10.0.0.0/8")) as offered:
        record = replace(offered["disk"].record, read_only=True, access=Access(addresses=("10.1.0.0/16",)))
    State(tmp_path).remember_export("disk", record)
    with started(tmp_path, ruled("10.0.0.0/8", description="new")) as offered:
        export = offered["disk"].export()
        assert (export.access.addresses, export.read_only, export.description) == (("10.1.0.0/16",), True, "new")
    with started(tmp_path, ruled("10.2.0.0/16", description="new")) as offered:
        export = offered["disk"].export()
        assert (export.access.addresses, export.read_only) == (("10.2.0.0/16",), True)


CLOSED = Access(addresses=("10.1.0.0/16",), certificates=("alice",))
BOUND = Bounds(quota_bytes=2 * MIB, iops=100)


@pytest.mark.parametrize(
    ("now", "access", "bounds"),
    [
        ({}, CLOSED, BOUND),
        ({"allow_addresses": ("10.2.0.0/16",)}, replace(CLOSED, addresses=("10.2.0.0/16",)), BOUND),
        ({"allow_certificates": ("bob",)}, replace(CLOSED, certificates=("bob",)), BOUND),
        ({"iops": 50}, CLOSED, replace(BOUND, iops=50)),
        ({"bandwidth": MIB}, CLOSED, replace(BOUND, bandwidth_bytes=MIB)),
    ],
    ids=str,
)
def test_a_list_or_bound_that_is_declared_otherwise_takes_no_other_back(
    now: dict[str, Any], access: Access, bounds: Bounds
) -> None:
    """Who asked for a certificate at run time does not let everybody in from the network that the file names since."""
    record = replace(effective(ruled("10.0.0.0/8"), None), access=CLOSED, bounds=BOUND)
    found = effective(replace(ruled("10.0.0.0/8"), **now), record)
    assert (found.access, found.bounds) == (access, bounds)


def test_a_list_that_is_declared_since_nobody_knew_who_may_attach_says_it() -> None:
    record = replace(effective(ruled(), None), access=NOBODY)
    assert effective(ruled(), record).access == NOBODY
    assert effective(ruled("10.0.0.0/8"), record).access == Access(addresses=("10.0.0.0/8",))


def test_what_was_remembered_and_never_made_is_told_and_forgotten(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with started(tmp_path, declare()):
        pass
    change(tmp_path, "half", size=8 * MIB, declared=None)
    with started(tmp_path, declare()) as offered:
        assert set(offered) == {"disk"}
    assert "'half' is remembered and not there" in caplog.text
    assert set(State(tmp_path).changes.exports) == {"disk"}


def test_exports_of_a_pool_that_is_not_open_are_not_forgotten(tmp_path: Path) -> None:
    with started(tmp_path, declare(pool="fast"), pools=("default", "fast")):
        pass
    with started(tmp_path):
        pass
    assert set(State(tmp_path).changes.exports) == {"disk"}


def test_a_growth_that_a_kill_interrupted_is_finished_and_a_shrinking_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with started(tmp_path, declare()):
        pass
    change(tmp_path, "disk", size=16 * MIB, declared=8 * MIB)
    with started(tmp_path, declare()) as offered:
        assert offered["disk"].disk.size_bytes == 16 * MIB
    change(tmp_path, "disk", size=4 * MIB, declared=8 * MIB)
    with started(tmp_path, declare()) as offered:
        assert offered["disk"].disk.size_bytes == 16 * MIB
    assert "has 16M, but 4M is declared or was asked for last" in caplog.text


def test_a_state_that_cannot_be_written_is_told_and_the_disks_are_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with started(tmp_path, declare()):
        pass
    (tmp_path / "changes.new").mkdir()  # the file that the next change is written to cannot be made
    with started(tmp_path, ruled("10.0.0.0/8")) as offered:
        assert offered["disk"].export().access.addresses == ("10.0.0.0/8",)
    assert "cannot remember the change" in caplog.text


def test_a_declared_disk_that_cannot_be_made_keeps_the_others_from_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with started(tmp_path, declare()) as offered:
        for number in range(4095):
            offered["disk"].disk.pool.create(f"d{number}", 512)
    with started(tmp_path, declare(), declare("one-too-many")) as offered:
        assert "disk" in offered
        assert "one-too-many" not in offered
    assert "'one-too-many' is declared and cannot be made" in caplog.text


def test_an_older_state_file_opens_no_disk_whose_declaration_is_gone(tmp_path: Path) -> None:
    """Format 1 knew no rules: what was added at run time admitted everyone, what was declared may have had some."""
    with started(tmp_path, ruled("10.0.0.0/8")) as offered:
        offered["disk"].disk.pool.create("added", 1 * MIB)
    entry = {"pool": "default", "size_bytes": 8 * MIB, "read_only": False, "description": "", "removed": False}
    exports = {
        "disk": {**entry, "declared_size_bytes": 8 * MIB},
        "added": {**entry, "size_bytes": 1 * MIB, "declared_size_bytes": None},
    }
    older = json.dumps({"format": 1, "exports": exports, "pools": {}})
    (tmp_path / FILE_NAME).write_text(older)
    with started(tmp_path) as offered:
        assert offered["disk"].export().access == NOBODY
        assert offered["added"].export().access == EVERYONE
    (tmp_path / FILE_NAME).write_text(older)
    with started(tmp_path, ruled("10.0.0.0/8")) as offered:
        assert offered["disk"].export().access.addresses == ("10.0.0.0/8",)


def test_a_pool_that_nobody_knows_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with started(tmp_path, declare(pool="fast"), pools=("default", "fast")):
        pass
    with started(tmp_path) as offered:
        assert offered == {}
    assert "holds the pool 'fast', which is neither declared nor remembered" in caplog.text


def test_two_pools_that_hold_the_same_name_are_told_apart_by_the_operator(tmp_path: Path) -> None:
    with started(tmp_path, declare()):
        pass
    (tmp_path / "other.pool").write_bytes((tmp_path / "default.pool").read_bytes())
    with (
        pytest.raises(UserError, match=r"move one of the two \.pool files"),
        started(tmp_path, pools=("default", "other")),
    ):
        pass


def test_a_state_directory_in_use_by_another_server_is_refused(tmp_path: Path) -> None:
    with started(tmp_path, declare()), pytest.raises(UserError, match=r"default\.pool"), started(tmp_path, declare()):
        pass


def test_an_arena_that_an_ending_process_still_has_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = State(tmp_path)
    holder = Pool(path=state.arena_path("default"))
    looked: list[float] = []

    def wait(seconds: float) -> None:
        looked.append(seconds)
        holder.close()

    monkeypatch.setattr("nbdzram.server.opening.time.sleep", wait)
    open_pool(PoolConfig(name="default"), state).close()
    assert len(looked) == 1


def test_an_arena_that_another_server_has_is_refused_in_a_while(tmp_path: Path) -> None:
    state = State(tmp_path)
    with (
        Pool(path=state.arena_path("default")),
        pytest.raises(ArenaInUse, match="stop that server first"),
    ):
        open_pool(PoolConfig(name="default"), state)


def test_disks_are_found_again_where_no_thread_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with started(tmp_path, declare()) as found:
        found["disk"].disk.write(0, b"kept" * 1024)

    def none(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("nbdzram.machine.Machine.processors", lambda _: 4)
    monkeypatch.setattr(threading.Thread, "start", none)
    with started(tmp_path, declare()) as found:
        assert found["disk"].disk.read(0, 4096) == b"kept" * 1024
