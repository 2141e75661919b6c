"""What was changed at run time, remembered in the state directory.

The arena knows which disks there are and what they hold; this file knows the rest: descriptions, removals of declared
exports, sizes that were changed. A change holds until the declaration itself changes: each entry keeps the size that
was declared when it was made. Without a state directory nothing is remembered, as nothing of the disks is.

    STATE_DIR/NAME.pool     the arena of the pool NAME
    STATE_DIR/changes.json  this file; replaced whole, so that a crash leaves the old or the new one
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from nbdzram.errors import UserError
from nbdzram.status import from_json

FILE_NAME = "changes.json"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportChange:
    """One export as it was last changed at run time."""

    pool: str
    size_bytes: int
    read_only: bool
    description: str
    removed: bool
    declared_size_bytes: int | None  # what the configuration said then; None: it did not know the export


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolChange:
    """One pool that was added or changed at run time."""

    mem_limit: int
    dedup: str
    declared: str | None  # what the configuration said then (inventory.declared_as); None: it did not know the pool


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """Everything that is remembered."""

    format: int = FORMAT
    exports: dict[str, ExportChange] = field(default_factory=dict)
    pools: dict[str, PoolChange] = field(default_factory=dict)


class State:
    """The state directory's memory of changes, or none."""

    def __init__(self, directory: Path | None) -> None:
        """Make the directory if need be and read what it remembers. Raises UserError."""
        self.directory = directory
        self.changes = Remembered()
        if directory is None:
            return
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(directory, os.W_OK | os.X_OK):
                raise UserError(
                    f"the state directory {directory} may not be written by user {os.geteuid()}; give it to that user, "
                    "mount it writable, or name another"
                )
            self.changes = _read(directory / FILE_NAME)
        except OSError as error:
            raise UserError(
                f"cannot use the state directory {directory}: {error.strerror}; "
                f"name a directory that this user may write, such as /dev/shm/nbdzram"
            ) from error

    def arena_path(self, pool: str) -> str | None:
        """Where the arena of `pool` lives; None for anonymous memory."""
        return None if self.directory is None else str(self.directory / f"{pool}.pool")

    def remove_arena(self, pool: str) -> None:
        """Remove the file of a pool that is closed. Raises UserError."""
        path = self.arena_path(pool)
        if path is not None:
            try:
                Path(path).unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"cannot remove {path}: {error.strerror}") from error

    def remember_export(self, name: str, change: ExportChange | None) -> None:
        """Note a change durably, or forget the export. Raises UserError."""
        exports = {other: kept for other, kept in self.changes.exports.items() if other != name}
        if change is not None:
            exports[name] = change
        self._save(dataclasses.replace(self.changes, exports=exports))

    def remember_pool(self, name: str, change: PoolChange | None) -> None:
        """The same for a pool. Raises UserError."""
        pools = {other: kept for other, kept in self.changes.pools.items() if other != name}
        if change is not None:
            pools[name] = change
        self._save(dataclasses.replace(self.changes, pools=pools))

    def _save(self, changes: Remembered) -> None:
        if self.directory is not None:
            try:
                _replace(self.directory / FILE_NAME, json.dumps(dataclasses.asdict(changes), indent=1) + "\n")
            except OSError as error:
                raise UserError(f"cannot remember the change in {self.directory}: {error.strerror}") from error
        self.changes = changes


def _read(path: Path) -> Remembered:
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Remembered()
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or remove it to forget run-time changes") from None
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise UserError(
            f"{path} is not of format {FORMAT}; start the version that wrote it, "
            "or remove the file to forget run-time changes"
        )
    return from_json(Remembered, payload, f"the file {path}")


def _replace(path: Path, text: str) -> None:
    """Write, sync, rename, sync the directory: the order that survives a power cut."""
    fresh = path.with_suffix(".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
