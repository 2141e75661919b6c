"""What a restart finds: nothing stored is lost, run-time changes hold until their declaration changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdzram.config import ExportConfig, PoolConfig
from nbdzram.errors import ConfigError, UserError
from nbdzram.server.inventory import Placed, open_pools, place_exports
from nbdzram.server.state import ExportChange, State

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
        yield {placed.config.name: placed for placed in place_exports(exports, opened, state)}
    finally:
        for pool in opened.values():
            pool.close()


def change(directory: Path, name: str, *, size: int, declared: int | None, removed: bool = False) -> None:
    State(directory).remember_export(
        name,
        ExportChange(
            pool="default",
            size_bytes=size,
            read_only=False,
            description="",
            removed=removed,
            declared_size_bytes=declared,
        ),
    )


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


def test_a_smaller_declaration_is_refused_because_shrinking_destroys(tmp_path: Path) -> None:
    with started(tmp_path, declare(size=16 * MIB)):
        pass
    with pytest.raises(ConfigError, match="has 16M, but is declared with 8M"), started(tmp_path, declare()):
        pass


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


def test_an_export_in_another_pool_than_declared_is_refused(tmp_path: Path) -> None:
    with started(tmp_path, declare()):
        pass
    moved = declare(pool="fast")
    with (
        pytest.raises(ConfigError, match="lies in the pool 'default', but is declared in 'fast'"),
        started(tmp_path, moved, pools=("default", "fast")),
    ):
        pass


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
