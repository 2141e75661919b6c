"""What a server knows of its disks beyond what their arenas hold, remembered in the state directory.

The arena knows which disks there are and what they hold; this file knows the rest: who may attach, descriptions,
removals of declared exports, sizes that were changed. A value that was changed at run time holds until its declaration
changes: each entry keeps what was declared when it was written.

    STATE_DIR/NAME.pool     the arena of the pool NAME
    STATE_DIR/changes.json  this file; replaced whole, so that a crash leaves the old or the new one

Without a state directory arenas are files without names: they end with the process, unless another one takes them over,
or somebody keeps them for the next (Kept). So does what is remembered, unless a file is named that ends when they do.

Format 1 knew no rules. An export that it remembers as added at run time admitted everyone, and still does; what it
says of one that was declared says nothing of its rules, which are unknown then: nobody is admitted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from nbdzram import values
from nbdzram.bounds import UNBOUND, Bounds
from nbdzram.config import EVERYONE, NOBODY, Access
from nbdzram.engine.arena import holds_nothing, unnamed_file
from nbdzram.errors import UserError
from nbdzram.status import from_json, to_json

FILE_NAME = "changes.json"
ARENA_SUFFIX = ".pool"
FORMAT = 2
FORMAT_WITHOUT_RULES = 1
ADDED: dict[str, Any] = {"renamed_from": None, "rolled_back_from": None, "bounds": dataclasses.asdict(UNBOUND)}
"""To an export's entry, later: what one without it means."""

FORMER_MAX = 4096  # as many as a pool has exports; of more, those that went first are forgotten
REMEDY = "restore it, or remove it: run-time changes are forgotten then, and nobody may attach to undeclared disks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """What the configuration said of an export when its entry was written."""

    size_bytes: int
    read_only: bool
    description: str
    access: Access
    bounds: Bounds = UNBOUND


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRecord:
    """One export as it is to be offered."""

    pool: str
    size_bytes: int
    read_only: bool
    description: str
    access: Access
    bounds: Bounds = UNBOUND
    removed: bool
    declared: Declared | None  # None: the configuration did not know the export
    renamed_from: str | None = None  # the name that its disk may still have: it is being renamed
    rolled_back_from: str | None = None  # the name of the disk that is to take its disk's place


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolChange:
    """One pool that was added or changed at run time."""

    mem_limit: int
    dedup: str
    verify: bool | None = None  # this and the next, None: as declared
    tell_sharing: bool | None = None
    declared: str | None  # what the configuration said then (opening.declared_as); None: it did not know the pool


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """Everything that is remembered."""

    format: int = FORMAT
    exports: dict[str, ExportRecord] = field(default_factory=dict)
    pools: dict[str, PoolChange] = field(default_factory=dict)
    former: dict[str, Access] = field(default_factory=dict)  # whom disks admitted that are gone, and nobody declares
    kept_in: str | None = None  # the identity of the directory that has their checkpoints (place.py); "": none has;
    # None: nobody knows, as where this was lost, or an older version wrote it
    came_from: str = ""  # the one that the directory had when they came from there, until it has theirs
    kept_before: tuple[str, ...] = ()  # the identities that it had before this, with these disks; the newest is last


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted(Remembered):
    """What lies beside checkpoints: that, with the directory's own identity, and what one may bring back though it went
    since."""

    went: dict[str, ExportRecord] = field(default_factory=dict)  # disks by the names that the checkpoint has for them
    went_since: int = 0  # its number; a later one has them no more


FileId = tuple[int, int]
"""Device and inode. While somebody has the file open, no other has the same."""


Read = TypeVar("Read", bound=Remembered)


class Keeper(Protocol):
    """Who keeps arenas while no server has them, and gives them to the next."""

    def keep(self, pool: str, descriptor: int) -> None:
        """This one too, from now on; the descriptor stays the caller's. Once more changes nothing."""

    def drop(self, pool: str) -> None:
        """Not any more: there is no such pool."""


@dataclass(slots=True)
class Kept:
    """The state of a server without a state directory, on its way to another process."""

    remembered: Remembered = field(default_factory=Remembered)
    arenas: dict[str, int] = field(default_factory=dict)  # descriptors of files without names, by pool
    keeper: Keeper | None = None
    file: Path | None = None  # where changes are written, for whoever gets the arenas from the keeper
    ours: Remembered | None = None  # what is remembered, by the process that goes on with it itself
    files: dict[str, FileId] = field(default_factory=dict)  # that its arenas are, by pool

    def close(self) -> None:
        """Let the arenas go: what they hold is gone, unless another process has them."""
        while self.arenas:
            os.close(self.arenas.popitem()[1])


def remembered_in(directory: Path) -> Remembered:
    """What a directory remembers, read and no more. Raises UserError, OSError."""
    return _read(directory / FILE_NAME, Remembered)


def noted_in(directory: Path) -> Noted:
    """The same of one with checkpoints. Raises UserError, OSError."""
    return _read(directory / FILE_NAME, Noted)


def note_in(directory: Path, changes: Remembered) -> None:
    """What a directory remembers, replaced and synced. Raises OSError, and then it is what it was."""
    _replace(directory / FILE_NAME, json.dumps(dataclasses.asdict(changes), indent=1) + "\n")


def remembered_from(payload: object, source: str) -> Remembered:
    """What another process remembers, be it of a version before. Raises UserError, which names the source."""
    if isinstance(payload, dict):
        _add_what_came_later(payload)
    return from_json(Remembered, payload, source)


class State:
    """What the state directory remembers, or without one this process. Files are synced: not on an event loop."""

    def __init__(self, directory: Path | None, kept: Kept | None = None) -> None:
        """Make the directory if need be and read what it remembers; without one, go on from `kept`, which is ours now.

        Who gave the directory away in vain knows what it remembers, and writes that again: another version may have
        written there meanwhile what this one does not read. Raises UserError.
        """
        self.directory = directory
        self.changes = Remembered()
        self._turn = threading.Lock()  # of whoever remembers something
        self._kept = kept or Kept()
        self._files = dict(self._kept.files)
        self._serves = False
        weakref.finalize(self, self._kept.close)
        if directory is None:
            self.changes = self._kept.remembered
            self._write_again()
            return
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(directory, os.W_OK | os.X_OK):
                raise UserError(
                    f"the state directory {directory} may not be written by user {os.geteuid()}; give it to that user, "
                    "mount it writable, or name another"
                )
            self.changes = self._kept.ours or _read(directory / FILE_NAME, Remembered)
            self._write_again()
        except OSError as error:
            raise UserError(
                f"cannot use the state directory {directory}: {error.strerror}; "
                f"name a directory that this user may write, such as /var/lib/nbdzram"
            ) from error

    def _write_again(self) -> None:
        if self._kept.ours is not None:
            with contextlib.suppress(UserError):  # or else the next change writes it
                self._save()

    def begin_to_serve(self) -> None:
        """From now on clients store something: whoever keeps arenas has all that there are, and that come.

        One that does not get so far, as it fails to take over, leaves none there that nobody would ever ask for.
        """
        if self._serves:
            return
        self._serves = True
        for pool, descriptor in self._kept.arenas.items():
            self._keep(pool, descriptor)

    def go_on_from(self, changes: Remembered) -> None:
        """No arena is there: what is noted beside checkpoints of pools, and who was admitted, where nothing is
        remembered of these. What that knows of exports is told with their disks (restore.py).

        What is remembered may be older, as of a backup; or newer by the removal of a pool in which a checkpoint still
        has an export. It is remembered before an arena is made: a start that is cut off leaves those, and the next one
        must know it.
        """
        now = dataclasses.replace(
            self.changes, pools=changes.pools | self.changes.pools, former=changes.former | self.changes.former
        )
        if now != self.changes and not self.arenas():
            self.changes = now
            with contextlib.suppress(UserError):
                self._save()

    def arena_path(self, pool: str) -> str | None:
        """Where the arena of `pool` lives; None for anonymous memory."""
        return None if self.directory is None else str(self.directory / f"{pool}{ARENA_SUFFIX}")

    def require_arena(self, pool: str) -> None:
        """Refuse a file that is not the one that was served until now, be it by another process.

        A path leads elsewhere once something is mounted over the directory, or it was replaced; an arena that is not
        there is made, and clients who kept their connections would go on with an empty disk. Raises UserError.
        """
        known, path = self._files.get(pool), self.arena_path(pool)
        if known is not None and path is not None and file_at(path) != known:
            raise UserError(
                f"{path} is not the file that is served: that was removed or replaced, or something is mounted over "
                f"it; put back what was there, or save the disks of the pool '{pool}' first with `nbdzram send`"
            )

    def require_arenas(self) -> None:
        """The same of all pools that were opened. Raises UserError."""
        for pool in tuple(self._files):
            self.require_arena(pool)

    def opened_arena(self, pool: str) -> None:
        """Note which file it is."""
        path = self.arena_path(pool)
        found = None if path is None else file_at(path)
        if found is not None:
            self._files[pool] = found

    def forget_arena(self, pool: str) -> None:
        """It is not served any more, whatever becomes of its file."""
        self._files.pop(pool, None)

    def arena_memory(self, pool: str) -> int | None:
        """The file without a name that is the arena of `pool`, made if there is none yet, and ours.

        None: its arena has a name, or the system cannot make such files; its memory ends with this process then.
        """
        if self.directory is None and pool not in self._kept.arenas:
            made = unnamed_file(f"nbdzram-{pool}")
            if made is not None:
                self._kept.arenas[pool] = made
                self._keep(pool, made)
        return self._kept.arenas.get(pool)

    def surrender(self) -> Kept:
        """All that a process needs which goes on without a state directory: the caller's from now on."""
        kept = dataclasses.replace(
            self._kept,
            remembered=self.changes if self.directory is None else Remembered(),
            arenas=dict(self._kept.arenas),
            ours=self.changes,
            files=dict(self._files),
        )
        self._kept.arenas.clear()
        return kept

    def _keep(self, pool: str, descriptor: int) -> None:
        if self._kept.keeper is not None and self._serves:
            self._kept.keeper.keep(pool, descriptor)

    def arenas(self) -> set[str]:
        """The names of the pools whose arenas lie in the directory, or were kept. Raises UserError."""
        if self.directory is None:
            return set(self._kept.arenas)
        try:
            return {path.stem for path in self.directory.iterdir() if path.suffix == ARENA_SUFFIX}
        except OSError as error:
            raise UserError(f"cannot list the state directory {self.directory}: {error.strerror}") from error

    def holds_nothing(self, pool: str) -> bool:
        """Its file in the directory is there, and nothing was stored in it: of a copy for which there was no room, or
        of a server that was killed as it made it. False where nobody can tell: whoever opens it says why.
        """
        path = self.arena_path(pool)
        if path is None:
            return False
        try:
            with open(path, "rb") as file:  # noqa: PTH123 - as above
                return holds_nothing(file.fileno())
        except OSError:
            return False

    def remove_arena(self, pool: str) -> None:
        """Remove the file of a pool that is closed. Raises UserError."""
        path = self.arena_path(pool)
        self.forget_arena(pool)
        if pool in self._kept.arenas:
            if self._kept.keeper is not None:
                self._kept.keeper.drop(pool)
            os.close(self._kept.arenas.pop(pool))
        if path is not None:
            try:
                Path(path).unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"cannot remove {path}: {error.strerror}") from error

    def remember_export(self, name: str, record: ExportRecord | None) -> None:
        """Note an export durably, or forget it. Raises UserError, and then nothing is noted."""
        exports = {
            other: dataclasses.replace(kept, renamed_from=None, rolled_back_from=None)  # done or undone by now
            for other, kept in self.changes.exports.items()
            if other != name
        }
        if record is not None:
            exports[name] = record
        self.remember_exports(exports)

    def remember_removal(self, name: str, record: ExportRecord | None, access: Access) -> None:
        """Note durably that an export is gone, and whom it admitted: a new one of its name is not opened to others.

        `record`: what is known of one that is declared. Of others the last one is known on as removed: pools without a
        disk would be taken for new ones (restore.py). Raises UserError, and then nothing is noted.
        """
        exports = {other: kept for other, kept in self.changes.exports.items() if other != name}
        if record is not None:
            exports[name] = record
        elif name in self.changes.exports and all(kept.removed for kept in exports.values()):
            exports[name] = dataclasses.replace(self.changes.exports[name], removed=True, declared=None)
        former = _former(self.changes.former, name, None if record is not None else access)
        if exports != self.changes.exports or list(former.items()) != list(self.changes.former.items()):
            self._save(exports=exports, former=former)

    def remember_renaming(self, name: str, record: ExportRecord, old: str, of_old: ExportRecord | None) -> None:
        """Note durably that the export `old` is to be `name`, and what is known of `old` then. Raises UserError."""
        exports = {other: kept for other, kept in self.changes.exports.items() if other not in (name, old)}
        exports[name] = dataclasses.replace(record, renamed_from=old)
        if of_old is not None:
            exports[old] = of_old
        former = _former(self.changes.former, old, None if of_old is not None else record.access)
        self._save(exports=exports, former=former)

    def remember_exports(self, exports: Mapping[str, ExportRecord], gone: Iterable[str] = ()) -> None:
        """Note all exports at once, unless that is what is noted already, and who else is gone. Raises UserError."""
        former = self.changes.former
        for name in gone:
            former = _former(former, name, self.changes.exports[name].access)
        if (exports, former) != (self.changes.exports, self.changes.former):
            self._save(exports=dict(exports), former=former)

    def remember_kept_in(self, identity: str, came_from: str, before: tuple[str, ...] = ()) -> None:
        """Note durably which directory of checkpoints has the disks. Raises UserError, and then nothing is noted."""
        known = self.changes
        if (identity, came_from, before) != (known.kept_in, known.came_from, known.kept_before):
            self._save(kept_in=identity, came_from=came_from, kept_before=before)

    def know_kept_nowhere(self) -> None:
        """The same, that none has the disks that come: noted with the first of them."""
        self.changes = dataclasses.replace(self.changes, kept_in="", came_from="", kept_before=())

    def remember_pool(self, name: str, change: PoolChange | None) -> None:
        """The same for a pool. Raises UserError."""
        pools = {other: kept for other, kept in self.changes.pools.items() if other != name}
        if change is not None:
            pools[name] = change
        if pools != self.changes.pools:
            self._save(pools=pools)

    def _save(self, **changed: Any) -> None:
        """With all else as it is: who remembers something else meanwhile, on another thread, comes before or behind."""
        with self._turn:
            changes = dataclasses.replace(self.changes, format=FORMAT, **changed)
            file = self._kept.file if self.directory is None else self.directory / FILE_NAME
            if file is not None:
                try:
                    _replace(file, json.dumps(dataclasses.asdict(changes), indent=1) + "\n")
                except OSError as error:
                    raise UserError(
                        f"cannot remember the change in {file.parent}: {error.strerror}; free some space there, or "
                        "make it writable again"
                    ) from error
            self.changes = changes


def file_at(path: str | Path) -> FileId | None:
    """None: nothing is there that could be looked at."""
    try:
        found = os.stat(path)  # noqa: PTH116 - the engine wants paths as text
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _former(known: Mapping[str, Access], name: str, access: Access | None) -> dict[str, Access]:
    """Whom disks admitted that are gone, when another one is; None: that is known otherwise."""
    former = {other: kept for other, kept in known.items() if other != name}
    if access is not None and access != EVERYONE:
        former[name] = access
    for oldest in list(former)[: max(0, len(former) - FORMER_MAX)]:
        del former[oldest]
    return former


def _read(path: Path, kind: type[Read]) -> Read:
    if path.exists() and not path.is_file():  # a pipe would let its reader wait for ever, and a device has no end
        raise UserError(f"{path} is no regular file; {REMEDY}")
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return kind()
    except RecursionError:
        raise UserError(f"{path} is damaged (it is nested without end); {REMEDY}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {REMEDY}") from None
    found = payload.get("format") if isinstance(payload, dict) else None
    if found not in (FORMAT_WITHOUT_RULES, FORMAT):
        raise UserError(
            f"{path} is not of format {FORMAT}; start the version that wrote it, or remove it: run-time changes are "
            "forgotten then, and nobody may attach to undeclared disks"
        )
    if found == FORMAT_WITHOUT_RULES:
        _add_unknown_rules(payload)
    _add_what_came_later(payload)
    remembered = from_json(kind, payload, f"the file {path}")
    try:
        _validate(remembered)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; {REMEDY}") from None
    return remembered


def _add_unknown_rules(payload: dict[str, Any]) -> None:
    """Make format 2 of format 1, as far as it has the shape of one: from_json complains about the rest."""
    exports = payload.get("exports")
    for entry in exports.values() if isinstance(exports, dict) else ():
        if not isinstance(entry, dict):
            continue
        size = entry.get("declared_size_bytes")
        access = json.loads(to_json(EVERYONE if size is None else NOBODY))
        said = {key: entry.get(key) for key in ("read_only", "description")}
        entry["access"] = access
        entry["declared"] = None if size is None else {**said, "size_bytes": size, "access": access}


def _add_what_came_later(payload: dict[str, Any]) -> None:
    """Of format 2, what its first writers did not know."""
    payload.setdefault("former", {})
    payload.setdefault("kept_in", None)
    payload.setdefault("came_from", "")
    payload.setdefault("kept_before", [])
    payload.setdefault("went", {})
    payload.setdefault("went_since", 0)
    pools = payload.get("pools")
    for entry in pools.values() if isinstance(pools, dict) else ():
        if isinstance(entry, dict):
            for name in ("verify", "tell_sharing"):
                entry.setdefault(name, None)
    for entry in [entry for part in ("exports", "went") for entry in _entries(payload.get(part))]:
        if isinstance(entry, dict):
            for name, value in ADDED.items():
                entry.setdefault(name, value)
            if isinstance(entry.get("declared"), dict):
                entry["declared"].setdefault("bounds", ADDED["bounds"])


def _entries(part: object) -> Iterable[object]:
    return part.values() if isinstance(part, dict) else ()


def _validate(remembered: Remembered) -> None:
    """Hold every value to what flags, TOML and control are held to. Raises ValueError, which names the entry."""
    went = remembered.went if isinstance(remembered, Noted) else {}
    for name, record in (*remembered.exports.items(), *went.items()):
        checks = [
            *((values.export_size, part.size_bytes) for part in (record, record.declared) if part is not None),
            (values.export_name, name),
            (values.pool_name, record.pool),
            (values.description, record.description),
            *((values.export_name, old) for old in (record.renamed_from,) if old is not None),
            *_access_checks(record.access),
            *((read, getattr(record.bounds, bound)) for bound, read in values.BOUNDS.items()),
        ]
        _hold(f"exports.{name[:80]}", checks)
    for name, change in remembered.pools.items():
        _hold(
            f"pools.{name[:80]}",
            [(values.pool_name, name), (values.memory, change.mem_limit), (values.dedup, change.dedup)],
        )

    for name, access in remembered.former.items():
        _hold(f"former.{name[:80]}", [(values.export_name, name), *_access_checks(access)])


def _access_checks(access: Access) -> list[tuple[Callable[[Any], Any], Any]]:
    return [
        (values.several(values.network), list(access.addresses)),
        (values.several(values.certificate_name), list(access.certificates)),
    ]


def _hold(entry: str, checks: list[tuple[Callable[[Any], Any], Any]]) -> None:
    for read, value in checks:
        try:
            read(value)
        except ValueError as error:
            raise ValueError(f"{entry}: {error}") from None


def _replace(path: Path, text: str) -> None:
    """Write, sync, rename, sync the directory: the order that survives a power cut. Raises OSError; then what was there
    is there again, unless the disk refuses that as well: what could not be remembered is not done.
    """
    fresh = path.with_suffix(".new")
    with contextlib.ExitStack() as held:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        held.callback(os.close, directory)
        before = held.enter_context(path.open("rb")) if path.is_file() else None
        try:
            _write(fresh, text.encode())
            fresh.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                fresh.unlink()  # where there is no room, what was begun takes the last of it
            raise
        try:
            os.fsync(directory)
        except OSError:
            with contextlib.suppress(OSError):
                if before is None:
                    path.unlink()
                else:
                    _write(fresh, before.read())
                    fresh.replace(path)
            raise


def _write(path: Path, content: bytes) -> None:
    """A file of its own, which is on the disk then. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK  # of a pipe there an error, and no wait for a reader
    descriptor = os.open(path, flags, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
