"""Which pools and disks there are when a server starts.

Three voices speak: the configuration declares, the arenas hold what was stored before, and the state remembers what
was changed at run time, and who may attach. The rules, in this order:

1. What an arena holds is offered, as it is: a disk that nobody declares any more, one that is smaller in its
   declaration (shrinking destroys content, and only `nbdzram exports resize` does that), one that lies in another pool.
   Where that is not what was asked for, a warning says so; it is no reason to refuse the other disks.
2. A value that was changed at run time holds until its declaration changes (state.py).
3. Who may attach is what was declared or remembered. Where neither is known, nobody may.
4. What is declared and not there is made. What is declared larger grows.
5. Disks that were to be offered together (engine/moment), and are whole, are if they are remembered; the rest goes.
6. What was remembered and not done, because the server was killed between the two, is told and forgotten, or finished;
   a removal never of a disk that only has the removed one's name, and lies in another pool. Renaming is finished first:
   of a declared disk that was renamed the old name is remembered as removed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from nbdzram.bounds import Bounds
from nbdzram.config import NOBODY, Access, ExportConfig, ServerConfig
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.errors import ConfigError, EngineError, UserError
from nbdzram.server.exports import Export
from nbdzram.server.rollback import put_in_place
from nbdzram.server.state import Declared, ExportRecord, State
from nbdzram.status import default_trouble
from nbdzram.units import format_sizes

REMOVED_AT_RUN_TIME = "export '%s' is declared but was removed at run time; `nbdzram exports add` brings it back"

log = logging.getLogger("nbdzram.server")

Several = TypeVar("Several", Access, Bounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A disk in its pool, with what is to be remembered of it, and so what clients are told."""

    name: str
    disk: Disk
    record: ExportRecord

    def export(self) -> Export:
        """What clients are offered."""
        return Export(
            name=self.name,
            disk=self.disk,
            pool_name=self.record.pool,
            access=self.record.access,
            read_only=self.record.read_only,
            description=self.record.description,
            bounds=self.record.bounds,
        )


def require_trust(pool: str, rules: Iterable[Access], *, tells_sharing: bool) -> None:
    """Refuse inline folding between exports that admit different clients, unless the pool tells sharing anyway.

    `rules` are those of its exports that are not private, which are never found inline. How long a write takes tells
    whether somebody else has the block: nothing is compressed then. Raises UserError.
    """
    known = {access for access in rules if not access.nobody}
    if len(known) > 1 and not tells_sharing:
        raise UserError(
            f"the pool '{pool}' folds inline, and its exports would admit different clients: the time of a write tells "
            'each what the others store; use dedup = "fold", one access list, a pool for each, or say '
            "tell_sharing = true for the pool in the configuration, or `nbdzram pools tell-sharing`"
        )


def require_loaded(declared: Iterable[ExportConfig], pools: Mapping[str, Pool], state: State) -> None:
    """Refuse a disk that would have to be loaded from its image first, for who has clients. Raises ConfigError."""
    there = {disk.name for pool in pools.values() for disk in pool.disks()}
    for config in declared:
        known = state.changes.exports.get(config.name)
        if config.image is not None and config.name not in there and not effective(config, known).removed:
            raise only_a_start_loads(config.name)


def only_a_start_loads(name: str) -> ConfigError:
    """Why an export that is declared with an image cannot come while clients are served."""
    return ConfigError(
        f"the export '{name}' is to be loaded from an image, which only a start does; restart, or add it with "
        "`nbdzram exports add` and copy the image to it"
    )


def look_for_the_default(config: ServerConfig, there: Iterable[Export]) -> None:
    """Say where no disk has the default export's name. Who starts a server that keeps nothing said so already."""
    if config.state_dir is not None or config.checkpoint.directory is not None:
        declared = {export.name for export in config.exports}  # an image is loaded in a moment
        trouble = default_trouble(config.default_export, declared | {export.name for export in there})
        if trouble is not None:
            log.warning("%s; %s", *trouble)


def place_exports(
    declared: Iterable[ExportConfig],
    pools: Mapping[str, Pool],
    state: State,
    *,
    removed: Mapping[str, ExportRecord] = MappingProxyType({}),
) -> list[Placed]:
    """Every disk that is to be offered, made or found, and remembered with its rules. Raises UserError.

    `removed`: what else is declared, and was removed at run time. Writes and syncs a file, and may make or grow disks:
    not on an event loop.
    """
    found = _found(pools)
    _finish_rollback(found, state)
    _finish_renaming(found, pools, state)
    placed: list[Placed] = []
    removed = dict(removed)
    unmade: list[UserError] = []
    for config in declared:
        known = state.changes.exports.get(config.name)
        record = effective(config, known)
        if record.removed and not _is_another(config.name, known, found):
            log.info(REMOVED_AT_RUN_TIME, config.name)
            removed[config.name] = record
            if config.name in found:
                _finish_removal(config.name, found.pop(config.name), pools)
        elif config.name in found:
            record = dataclasses.replace(record, removed=False)
            placed.append(_find_again(config, record, *found.pop(config.name)))
        elif config.image is None:  # or else it is made when it is loaded: server/loading.py
            try:
                disk = pools[record.pool].create(
                    config.name, record.size_bytes, read_only=record.read_only, private=config.private
                )
            except UserError as error:
                log.error("export '%s' is declared and cannot be made: %s", config.name, error)
                unmade.append(error)
            else:
                placed.append(Placed(name=config.name, disk=disk, record=record))
    for name, (disk, pool_name) in found.items():
        known = state.changes.exports.get(name)
        if known is not None and known.removed and not _is_another(name, known, found):
            _finish_removal(name, (disk, pool_name), pools)
        else:
            placed.append(_keep(name, disk, pool_name, known))
    if unmade and not placed:
        raise unmade[0]  # there is nothing that could be served instead
    _remember(placed, removed, pools, state)
    for pool_name, pool in pools.items():
        _fold_later_between_strangers(pool_name, pool, placed)
    return placed


def _fold_later_between_strangers(name: str, pool: Pool, placed: Iterable[Placed]) -> None:
    if pool.inline_dedup:
        try:
            mixed = (part for part in placed if part.record.pool == name and not part.disk.private)
            require_trust(name, (part.record.access for part in mixed), tells_sharing=pool.tells_sharing)
        except UserError as error:
            log.error("%s; until then it folds when a fold runs", error)
            pool.inline_dedup = False


def effective(config: ExportConfig, known: ExportRecord | None) -> ExportRecord:
    """The declaration, with what was changed at run time and has not been declared otherwise since."""
    declared = declared_export(config)
    record = ExportRecord(
        pool=config.pool,
        size_bytes=declared.size_bytes,
        read_only=declared.read_only,
        description=declared.description,
        access=declared.access,
        bounds=declared.bounds,
        removed=False,
        declared=declared,
    )
    then = known.declared if known is not None else None
    if known is None or then is None:
        return record
    same_size = then.size_bytes == declared.size_bytes
    return dataclasses.replace(
        record,
        removed=known.removed and same_size,
        size_bytes=known.size_bytes if same_size else record.size_bytes,
        read_only=known.read_only if then.read_only == declared.read_only else record.read_only,
        description=known.description if then.description == declared.description else record.description,
        access=_access_held(known.access, then.access, declared.access),
        bounds=_held(known.bounds, then.bounds, declared.bounds),
    )


def _access_held(known: Access, then: Access, declared: Access) -> Access:
    """The same of both lists: whom one keeps out, another one does not let in. Where nobody knew who may attach, a
    declaration that was not there before says it."""
    return declared if known.nobody and then != declared else _held(known, then, declared)


def _held(known: Several, then: Several, declared: Several) -> Several:
    """Of several values in one those that were changed at run time, but for what has been declared otherwise since."""
    names = [field.name for field in dataclasses.fields(declared)]
    held = [name for name in names if getattr(then, name) == getattr(declared, name)]
    return dataclasses.replace(declared, **{name: getattr(known, name) for name in held})


def declared_export(config: ExportConfig) -> Declared:
    """An export's declaration as the state remembers it."""
    return Declared(
        size_bytes=config.size_bytes,
        read_only=config.read_only,
        description=config.description,
        access=config.access,
        bounds=config.bounds,
    )


def _found(pools: Mapping[str, Pool]) -> dict[str, tuple[Disk, str]]:
    found: dict[str, tuple[Disk, str]] = {}
    for pool_name, pool in pools.items():
        for disk in pool.disks():
            if disk.name in found:
                raise UserError(
                    f"the export '{disk.name}' lies in the pool '{pool_name}' and in the pool '{found[disk.name][1]}'; "
                    f"move one of the two .pool files out of the state directory"
                )
            found[disk.name] = (disk, pool_name)
    return found


def _is_another(name: str, known: ExportRecord | None, found: Mapping[str, tuple[Disk, str]]) -> bool:
    """Whether what was found under the name of a removed disk is not that disk, which lay in another pool."""
    return known is not None and known.removed and name in found and found[name][1] != known.pool


def _find_again(config: ExportConfig, record: ExportRecord, disk: Disk, pool_name: str) -> Placed:
    name = config.name
    if config.private and not disk.private:
        log.warning(
            "the export '%s' is declared private, but was made without: its blocks may be shared with other exports; "
            "remove and add it, or copy its content to a private export",
            name,
        )
    elif disk.private and not config.private:
        log.warning(
            "the export '%s' was made private and stays so, though it is declared without: its blocks share objects "
            "with its own and its clones' alone; declare that, or remove and add it",
            name,
        )
    if pool_name != record.pool:
        log.warning(
            "the export '%s' lies in the pool '%s', but is declared in '%s'; it is offered where it lies: declare "
            "that, or copy its content to an export of another name",
            *(name, pool_name, record.pool),
        )
        record = dataclasses.replace(record, pool=pool_name)
    if record.size_bytes < disk.size_bytes:
        log.warning(
            "the export '%s' has %s, but %s is declared or was asked for last; it is offered as it is: declare its "
            "size, or shrink it with `nbdzram exports resize`",
            *(name, *format_sizes(disk.size_bytes, record.size_bytes)),
        )
    elif record.size_bytes > disk.size_bytes:
        try:
            disk.resize(record.size_bytes)
        except (EngineError, UserError) as error:
            log.warning("the export '%s' keeps its size: %s", name, error)
    return Placed(name=name, disk=disk, record=record)


def _keep(name: str, disk: Disk, pool_name: str, known: ExportRecord | None) -> Placed:
    """A disk that nobody declares."""
    if known is None or known.removed:  # of another disk, then
        log.warning(
            "the export '%s' is neither declared nor remembered, so who may attach is not known: nobody may, until "
            "`nbdzram exports change %s` says who",
            *(name, name),
        )
        known = ExportRecord(
            pool=pool_name,
            size_bytes=disk.size_bytes,
            read_only=disk.read_only,
            description="",
            access=NOBODY,
            removed=False,
            declared=None,
        )
    elif known.access.nobody:
        log.warning(
            "who may attach to the export '%s' is not known: nobody may, until `nbdzram exports change %s` says who",
            *(name, name),
        )
    if known.size_bytes != disk.size_bytes:
        log.warning(
            "the export '%s' was to be resized to %s when the server ended; it has %s",
            *(name, *format_sizes(known.size_bytes, disk.size_bytes)),
        )
    known = dataclasses.replace(known, renamed_from=None, rolled_back_from=None)
    record = dataclasses.replace(known, pool=pool_name, size_bytes=disk.size_bytes)
    return Placed(name=name, disk=disk, record=record)


def _finish_rollback(found: dict[str, tuple[Disk, str]], state: State) -> None:
    """The server ended between remembering that a copy takes a disk's place and the end of that."""
    for name, known in state.changes.exports.items():
        substitute = known.rolled_back_from
        if substitute in found and found[substitute][1] == known.pool:
            log.info("the rollback of the export '%s', which the server's end interrupted, is finished", name)
            copy, pool_name = found.pop(substitute)
            old = found.pop(name, (None, ""))[0]
            put_in_place(old, copy, name)
            found[name] = copy, pool_name


def _finish_renaming(found: dict[str, tuple[Disk, str]], pools: Mapping[str, Pool], state: State) -> None:
    """The server ended between remembering a new name and giving it to the disk."""
    for name, known in state.changes.exports.items():
        old = known.renamed_from
        if old is None or name in found or old not in found or found[old][1] != known.pool:
            continue
        log.info("the renaming of the export '%s' to '%s', which the server's end interrupted, is finished", old, name)
        disk, pool_name = found.pop(old)
        pools[pool_name].rename(disk, name)
        found[name] = disk, pool_name


def _finish_removal(name: str, where: tuple[Disk, str], pools: Mapping[str, Pool]) -> None:
    """The server ended between remembering the removal and doing it."""
    disk, pool_name = where
    log.info("the removal of the export '%s', which the server's end interrupted, is finished", name)
    pools[pool_name].delete(disk)


def _remember(
    placed: Iterable[Placed], removed: Mapping[str, ExportRecord], pools: Mapping[str, Pool], state: State
) -> None:
    """What is offered and what is removed, and of pools that are not open what was known of them."""
    records = dict(removed) | {part.name: part.record for part in placed}
    gone: list[str] = []
    is_empty = all(record.removed for record in (*records.values(), *state.changes.exports.values()))
    for name, known in state.changes.exports.items():
        if name in records:
            continue
        if known.pool not in pools:
            records[name] = known
        elif is_empty:  # and so that it is: State.remember_removal
            records[name] = dataclasses.replace(known, declared=None)
        elif not known.removed:
            log.warning("the export '%s' is remembered and not there: the server ended before it was made", name)
            gone.append(name)  # or as it was removed
    try:
        state.remember_exports(records, gone)
    except UserError as error:
        log.warning(
            "%s; until then a disk that is not declared any more admits whom it admitted before, or nobody", error
        )
