"""A pool: one memory limit, one folding domain, one isolation boundary.

    Pool ── its arena, begun or opened again (opening.pyx)
         ── its exports: made, cloned, renamed, deleted    -> Disk (disk.pyx)
         -> PoolCore: all that they and runs share         core.pyx

Authoritative: superblock, both directories, block table nodes, cells, objects. Everything else is derived and rebuilt
when an arena is opened again. A process killed at any instruction leaves every block with its old or its new content,
as each change ends in one store of a word: a leaf's entry, a cell, a node's number or an export's state.
"""

cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

import os
import threading

from nbdzram.engine.blocks cimport SIZE_MAX
from nbdzram.engine.core cimport PoolCore
from nbdzram.engine.directory cimport STATE, Directory, ExportEntry
from nbdzram.engine.domain cimport COMMON_DOMAIN, DOMAIN_SHIFT, domain_of
from nbdzram.engine.drop cimport drop_tree
from nbdzram.engine.format cimport (
    ENTRY_FREE, ENTRY_LIVE, EXPORTS_MAX, FIRST_UNITS, NAME_MAX, NAME_ROOM, OLD_VERSION, READ_ONLY_FLAG, SEGMENTS_AT,
    VERSION, identity_of,
)
from nbdzram.engine.ledger cimport ledger_count
from nbdzram.engine.lock cimport LINGER_NAME, LINGERING, LOOKS, PAUSED, WATCHED, lock_leave, lock_take
from nbdzram.engine.must cimport must
from nbdzram.engine.opening cimport Opening
from nbdzram.engine.page cimport PAGE_SIZE, pages_for
from nbdzram.engine.publish cimport amend32, publish64
from nbdzram.engine.quiescence cimport grace_begin, grace_wait
from nbdzram.engine.store cimport HUGE_LENGTH, ObjectStore
from nbdzram.engine.table cimport TOP_LEVEL, Tables
from nbdzram.engine.upgrade cimport OldOpening
from nbdzram.engine.users cimport users_close, users_enter, users_leave

from nbdzram.engine.arena import BEGUN
from nbdzram.engine.check import Check
from nbdzram.engine.opening import run_in_turn
from nbdzram.engine.disk import _clear_behind, _longest_stripe, _open_disk, _test_stripes
from nbdzram.errors import ArenaError, EngineError, ExportExists, UserError

HUGE_THRESHOLD = HUGE_LENGTH
ARENA_FORMAT = VERSION

cdef bytes MAGIC = b"NBDZRAM\n"
cdef bytes BEGUN_MAGIC = BEGUN  # a process that is killed from there on leaves an arena that is begun anew


@cython.final
@cython.no_gc_clear
cdef class Pool(PoolCore):
    """See pool.pyi."""

    def __cinit__(self, *, mem_limit: int = 0, together=run_in_turn, **_):
        self.making = threading.RLock()
        if self.arena.opened:
            self._open_again(together)
            self.arena.ledger.used = self.pages_in_all()
            self._finish_shrinking()
        else:
            self._begin()
        self.mem_limit = mem_limit

    def close(self) -> None:
        """See pool.pyi. Users that are in are waited for; those that take long go by themselves (users.pxd)."""
        with nogil:
            amend32(&self.closing, 1)
            users_close(&self.users, &self.sides)
            grace_wait(grace_begin())
        self.share(None)
        for disk in self._disks:
            disk._retire(False)
        self._disks.clear()
        self.arena.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace) -> None:
        self.close()

    # -- the arena, new and opened again -------------------------------------------------------------------------

    def _begin(self):
        """Write the superblock; its magic last, as only that makes the file an arena."""
        self.arena.take_run(FIRST_UNITS)
        if self.arena.unit_high < FIRST_UNITS or not self.arena.commit(0, PAGE_SIZE):
            self.arena.discard()
            raise self._no_room()
        memset(self.arena.base, 0, PAGE_SIZE)
        self.superblock.version = VERSION
        self.superblock.page_size = PAGE_SIZE
        self.superblock.seed = int.from_bytes(os.urandom(8), "little")
        self._make_rooms()
        self.superblock.layout = self.store.slab.layout()
        self.superblock.identity = identity_of(self.superblock)
        publish64(<uint64_t*>self.superblock.magic, (<const uint64_t*><const char*>BEGUN_MAGIC)[0])
        if not self.store.cells.begin():
            refusal = self._no_room()
            self.arena.discard()
            raise refusal
        publish64(<uint64_t*>self.superblock.magic, (<const uint64_t*><const char*>MAGIC)[0])
        self.arena.ledger.used = self.pages_in_all()

    def _make_rooms(self):
        self.seed = self.superblock.seed
        self.store = ObjectStore(self.arena, SEGMENTS_AT)
        self.store.seed = self.seed
        self.store.fingerprint_mask = self.fingerprint_mask
        self.tables = Tables(self.store, self.seed)
        self.directory = Directory(self.arena, self.seed)

    def _open_again(self, together):
        """See opening.pyx; what the arena says is checked before it is used."""
        if self.arena.unit_high < FIRST_UNITS or not self.arena.holds(0) or (
                memcmp(self.superblock.magic, <const char*>MAGIC, 8) != 0):
            raise self._foreign()
        self._make_rooms()
        if self.superblock.version == OLD_VERSION:
            self._verify_layout()
            old = OldOpening(self.store, self.tables, self.directory)
            old.survey()
            old.upgrade(self.now)
            self._make_rooms()
        self._verify_layout()
        if self.superblock.identity != identity_of(self.superblock):
            raise ArenaError(
                f"the arena {self.arena.place} is damaged: its superblock is not what was written; "
                f"restore it, or {self.arena.instead}"
            )
        opening = Opening(self.store, self.tables, self.directory, together)
        if not opening.survey():  # whichever fault threads met: one that looks alone says the first
            self._make_rooms()
            opening = Opening(self.store, self.tables, self.directory)
            opening.survey()
        for number, stored, same in opening.rebuild():
            self.exports_high = number + 1
            self._disks.append(self._disk_of(number, stored, same))
            if not self._disks[len(self._disks) - 1].concealed:
                self.blocks_stored += stored
                self.blocks_same += same
        self.rotten += opening.wrong

    def _verify_layout(self):
        """Whether this program knows how to read the arena."""
        if self.superblock.version not in (OLD_VERSION, VERSION):
            raise ArenaError(
                f"the arena {self.arena.place} has format {self.superblock.version}, this program reads formats "
                f"{OLD_VERSION} and {VERSION}; copy its exports over with the program that wrote it, or "
                "restore it if it is damaged"
            )
        if (self.superblock.layout != self.store.slab.layout() or self.superblock.page_size != PAGE_SIZE
                or self.superblock.version == VERSION and self.superblock.features):
            raise ArenaError(
                f"the arena {self.arena.place} has size classes or features that this program does not know; copy its "
                "exports over with the program that wrote it, or restore it if it is damaged"
            )

    def _no_room(self):
        if self.arena.path is None:
            return ArenaError("no memory for a pool's first pages; end other programs, or raise ulimit -v")
        return ArenaError(f"no room for an arena at {self.arena.path}: {self.arena.lacks()}")

    def _foreign(self):
        return ArenaError(f"{self.arena.found} is not an nbdzram arena; {self.arena.instead}")

    def _finish_shrinking(self):
        """What an export stores behind its end is none of it: a process was killed while it shrank."""
        for disk in self._disks:
            _clear_behind(disk)

    # -- exports -------------------------------------------------------------------------------------------------

    def create(self, name: str, size_bytes: int, *, read_only: bool = False, private: bool = False):
        return self._add(name, size_bytes, read_only, private, None)

    def clone(self, source, name: str, *, read_only: bool = False):
        return self._add(name, source.size_bytes, read_only, False, source)

    def _add(self, name, size_bytes, read_only, private, source):
        if source is not None and source.pool is not self:
            raise ValueError(f"export {source.name!r} is none of this pool's")
        if not users_enter(&self.users):
            raise EngineError(f"export {name!r}: its pool was closed")
        try:
            with self.making:
                return self._make(name, size_bytes, read_only, private, source)
        finally:
            users_leave(&self.users)

    def _make(self, name, size_bytes, read_only, private, source):
        disk = self._written(name, size_bytes, read_only, private, source)
        if source is None:
            lock_take(&self.lock)
            self.directory.publish(disk.number, STATE, ENTRY_LIVE)
            lock_leave(&self.lock)
        elif not source._share_with(disk):
            raise EngineError(f"cannot clone export {source.name!r}: {source.why_not()}")
        self._disks.append(disk)
        return disk

    def _names(self):
        """Those of all exports: for whoever makes many, and holds `making` meanwhile."""
        return {disk.name for disk in self._disks}

    def _written(self, name, size_bytes, read_only, private, alike, names=None):
        """The disk of an entry that is written and no export yet, of the folding domain of `alike` if that is given.

        The caller holds `making` until the name is among those of _disks. names: see _names.
        """
        cdef bytes encoded = self._valid_name(name, names)
        cdef uint32_t number
        if not 0 <= size_bytes <= SIZE_MAX:
            raise UserError(f"export {name!r}: size {size_bytes} is outside 0 .. {SIZE_MAX} bytes")
        number = self._free_entry(name)
        cdef uint32_t flags = (self._free_domain() if private else COMMON_DOMAIN) << DOMAIN_SHIFT
        if alike is not None:
            flags = alike.domain << DOMAIN_SHIFT
        if read_only:
            flags |= READ_ONLY_FLAG
        lock_take(&self.lock)
        self.directory.write(number, <const char*>encoded, <uint32_t>len(encoded), size_bytes, flags)
        lock_leave(&self.lock)
        disk = self._disk_of(number, 0, 0)
        self._use_export_entry(number)
        return disk

    cdef uint32_t _free_domain(self):
        """A folding domain that no export has, also none that is still being deleted: its objects are there.

        There is one: numbers outnumber exports.
        """
        cdef uint32_t number
        cdef uint32_t domain = COMMON_DOMAIN + 1
        taken = {domain_of(self.directory.head(number).flags)
                 for number in range(self.exports_high) if self.directory.state(number) != ENTRY_FREE}
        while domain in taken:
            domain += 1
        return domain

    def _free_entry(self, name) -> int:
        """The number of an entry that is no export's, nor damaged, and of whose last one nobody holds the disk."""
        cdef uint32_t number
        for number in range(EXPORTS_MAX):
            if not self.directory.make_room(number):
                if self.arena.path is None:
                    raise UserError(f"export {name!r}: memory is exhausted; free some of it, or remove an export")
                raise UserError(f"export {name!r}: no room in {self.arena.path}: {self.arena.lacks()}")
            if (self.directory.state(number) == ENTRY_FREE and not self.held[number]
                    and self.directory.is_right(number)):
                return number
        raise UserError(f"export {name!r}: the pool has {EXPORTS_MAX} exports, its limit, and copies that are kept of "
                        "them count, as for checkpoints and streams; remove one, or use another pool")

    def _disk_of(self, number, stored, same):
        return _open_disk(self, number, stored, same)

    cdef void _use_export_entry(self, uint32_t number) noexcept nogil:
        """Count the pages of the directory up to this entry: at most 2 MiB, whatever the limit."""
        cdef uint64_t before = pages_for(self.exports_high * sizeof(ExportEntry))
        lock_take(&self.lock)
        self.exports_high = max(self.exports_high, number + 1)
        ledger_count(&self.arena.ledger, pages_for(self.exports_high * sizeof(ExportEntry)) - before)
        lock_leave(&self.lock)

    def _valid_name(self, name: str, names=None) -> bytes:
        encoded = name.encode()
        if len(encoded) > NAME_MAX or "\0" in name:
            raise UserError(f"export name {name[:40]!r}: {len(encoded)} bytes of UTF-8; at most {NAME_MAX}, none NUL")
        if name in (self._names() if names is None else names):
            raise ExportExists(f"export {name!r} exists in this pool; choose another name or remove it first")
        return encoded

    def rename(self, disk, name: str) -> None:
        if disk.pool is not self:
            raise ValueError(f"export {disk.name!r} is none of this pool's")
        if not users_enter(&self.users):
            raise EngineError(f"cannot rename export {disk.name!r}: its pool was closed")
        try:
            with self.making:
                if not disk._rename(name, self._valid_name(name)):
                    raise UserError(
                        f"cannot rename export {disk.name!r}: its name and the new one have over {NAME_ROOM} bytes "
                        "together; give it a short name first"
                    )
        finally:
            users_leave(&self.users)

    def delete(self, disk) -> None:
        cdef uint32_t number = disk.number
        cdef uint32_t left = LOOKS
        if disk.pool is not self:
            raise ValueError(f"export {disk.name!r} is none of this pool's")
        if not users_enter(&self.users):
            raise EngineError(f"cannot delete export {disk.name!r}: its pool was closed")
        try:
            if not disk._retire(True):
                raise EngineError(f"cannot delete export {disk.name!r}: it was deleted")
            self._disks.remove(disk)
            with nogil:
                self.keep_short()
                lock_take(&self.lock)
                if drop_tree(&self.lock, &self.users, self.store, self.tables,
                             &self.directory.entry(number).root, TOP_LEVEL + 1, number, &left):
                    self.directory.publish(number, STATE, ENTRY_FREE)
                lock_leave(&self.lock)
        finally:
            users_leave(&self.users)

    def test_locks(self, *, watch: bool = False, pause: bool = False, linger: str = "") -> None:
        self.store.index.pausing = pause
        self.pausing = pause or linger != ""
        cdef bytes name = linger.encode()
        must(len(name) < LINGER_NAME, b"the name of a function to linger in has room")
        memcpy(self.lock.linger_in, <const char*>name, len(name) + 1)
        self.store.depot.tested = PAUSED if pause else 0
        if watch:
            self.lock.longest_ns = 0
        self.lock.tested = (WATCHED if watch else 0) | (PAUSED if pause else 0) | (LINGERING if linger else 0)
        for disk in self._disks:
            _test_stripes(disk)

    def longest_holds(self) -> dict:
        stripes = [_longest_stripe(disk) for disk in self._disks]
        return {
            "pool": (self.lock.longest_ns, self.lock.longest_in.decode()),
            "stripe": max(stripes, default=(0, "")),
        }

    def check(self) -> None:
        check = Check(self, contents=False)
        while check.step():
            pass
