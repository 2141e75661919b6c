"""A pool: one memory limit, one folding domain, one isolation boundary.

    Pool -> Tables (which object a block is)      table.pyx
         -> ObjectStore (objects and handles)     store.pyx -> Slab, Cells, Index
         -> Arena (pages)                         arena.pyx

Lock order: maintenance (one step of a fold, compaction or recompression), a leaf's stripe (disk.pyx), the pool's lock,
a latch of the index or the depot's lock, and that of an arena that grows; never the other way, never two of a kind. The
interpreter lock is outermost: whoever holds one of these must not ask for it, so nothing runs under them that could
give it away, not even the making of a Python object. The pool's lock covers everything below it: tables, cells, index,
slots, counters. Threads that store blocks as usual take it beside each other (sides.pxd, beside.pyx, kit.pyx);
everything else has it alone, and is not about them. No compression, hashing or decoding happens under it on a client's
way. Readers take no lock at all (reading.pyx): what they may see is retired before it is freed (limbo.pxd), and who
waits for them holds neither the pool's lock nor a stripe; the maintenance lock is taken by nobody who is online.

Authoritative: superblock, both directories, block table nodes, cells, objects. Everything else is derived and rebuilt
when an arena is opened again. A process killed at any instruction leaves every block with its old or its new content,
as each change ends in one store of a word: a leaf's entry, a cell, a node's number or an export's state.
"""

cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

import os
import threading

from nbdzram.engine.arena cimport PAGE_SIZE, Arena, pages_for
from nbdzram.engine.codec cimport BLOCK, CODEC_DICTS, CODEC_LZ4, CODEC_RAW, CODEC_ZSTD, CODEC_ZSTD_DICT
from nbdzram.engine.directory cimport STATE, Directory, ExportEntry
from nbdzram.engine.drop cimport drop_tree
from nbdzram.engine.format cimport (
    ENTRY_FREE, ENTRY_LIVE, EXPORTS_MAX, FIRST_UNITS, NAME_MAX, NAME_ROOM, OLD_VERSION, READ_ONLY_FLAG, SEGMENTS_AT,
    VERSION, Superblock, dictionary_length, identity_of,
)
from nbdzram.engine.domain cimport COMMON_DOMAIN, DOMAIN_SHIFT, domain_of
from nbdzram.engine.kit cimport gather_tallies, kits_free
from nbdzram.engine.ledger cimport ledger_count, ledger_share
from nbdzram.engine.lock cimport (
    HOLD, LINGER_NAME, LINGERING, LOOKS, PAUSED, WATCHED, lock_end, lock_init, lock_leave, lock_take,
)
from nbdzram.engine.must cimport must
from nbdzram.engine.opening cimport Opening
from nbdzram.engine.publish cimport amend32, publish64
from nbdzram.engine.purse cimport Purse
from nbdzram.engine.quiescence cimport calls_ever, grace_begin, grace_wait
from nbdzram.engine.reclaim cimport keep_short, may_retire, reclaim, reclaim_ripe
from nbdzram.engine.slab cimport FOLDED
from nbdzram.engine.store cimport HUGE_LENGTH, KINDS, ObjectStore, dictionary_pages
from nbdzram.engine.table cimport (
    AGE_MASK, AGE_SECONDS, LEAF_BLOCKS, MAX_BLOCKS_SHIFT, TOP_LEVEL, Tables,
)
from nbdzram.engine.upgrade cimport OldOpening
from nbdzram.engine.users cimport users_close, users_end, users_enter, users_init, users_leave

from nbdzram.engine.stats import PoolStats
from nbdzram.errors import ArenaError, EngineError, ExportExists, UserError

HUGE_THRESHOLD = HUGE_LENGTH
ARENA_FORMAT = VERSION
cdef uint64_t SIZE_MAX = <uint64_t>BLOCK << MAX_BLOCKS_SHIFT

cdef uint64_t NO_BLOCK = <uint64_t>-1
cdef bytes MAGIC = b"NBDZRAM\n"

cdef enum:
    AGED_PAGES = 64  # looked at for entries grown old, whenever the clock is told: 30 us, LOOKS entries a hold

# Addresses that a pool reserves. A zspage may use one page of its unit's sixteen: so many times the limit always
# suffice. Without a limit that would be too much: a process has 128 TiB, and on a machine with a terabyte seven pools
# used them up. Compacted, zspages use nine pages of their units and more, so that four times the machine's memory are
# enough there.
LIMITED_FACTOR = 16
UNLIMITED_FACTOR = 4
COMPACTED_FACTOR = 2  # a limit may be raised, as long as compacted zspages fit
SMALLEST_RESERVE = 16 << 30
LARGEST_RESERVE = 16 << 40  # page numbers have 32 bits


def _reserve_for(mem_limit: int) -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wanted = LIMITED_FACTOR * mem_limit if mem_limit else UNLIMITED_FACTOR * memory
    return max(SMALLEST_RESERVE, min(LARGEST_RESERVE, wanted))


@cython.final
cdef class Pool:
    """See pool.pyi."""

    def __cinit__(self, *, mem_limit: int = 0, path: str | None = None, memory: int | None = None,
                  inline_dedup: bool = False, verify: bool = True, tell_sharing: bool = False, clock: int = 0,
                  fingerprint_mask: int = 0xFFFFFFFFFFFFFFFF):
        self._disks = []
        self.making = threading.RLock()
        self.arena = Arena(path, _reserve_for(mem_limit), memory=memory)
        lock_init(&self.lock, 0)
        self.lock.sides = &self.sides
        lock_init(&self.maintenance, 0)
        users_init(&self.users)
        self.lock_made = True
        self.fingerprint_mask = fingerprint_mask
        self.inline_on = inline_dedup
        self.verify_on = verify
        self.tells_sharing = tell_sharing
        self.rotten_block = NO_BLOCK
        self.set_clock(clock)
        self.superblock = <Superblock*>self.arena.base
        if self.arena.opened:
            self._open_again()
            self.arena.ledger.used = self.pages_in_all()
            self._finish_shrinking()
        else:
            self._begin()
        self.mem_limit = mem_limit

    def __dealloc__(self):
        if self.lock_made:
            lock_end(&self.lock)
            lock_end(&self.maintenance)
            users_end(&self.users)
            kits_free(&self.sides)

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

    def _open_again(self):
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
        return ArenaError(
            f"no room for an arena at {self.arena.path}: the file system is full; free some of it, or make it larger "
            "(a tmpfs: mount -o remount,size=SIZE)"
        )

    def _foreign(self):
        return ArenaError(f"{self.arena.found} is not an nbdzram arena; {self.arena.instead}")

    def _finish_shrinking(self):
        """What an export stores behind its end is none of it: a process was killed while it shrank."""
        from nbdzram.engine.disk import _clear_behind

        for disk in self._disks:
            _clear_behind(disk)

    # -- settings and counters -----------------------------------------------------------------------------------

    @property
    def path(self):
        return self.arena.path

    @property
    def is_private(self):
        return self.arena.fd < 0

    @property
    def mem_limit(self):
        return self.arena.ledger.limit * PAGE_SIZE

    @mem_limit.setter
    def mem_limit(self, limit: int):
        self.require_limit(limit)
        cdef uint64_t pages = pages_for(limit)
        lock_take(&self.lock)
        self.arena.ledger.limit = pages
        lock_leave(&self.lock)

    def require_limit(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"mem_limit {limit} is negative")
        most = self.arena.reserved // COMPACTED_FACTOR
        if limit > most:
            raise UserError(
                f"mem_limit {limit} is over {most} bytes: this pool reserved addresses for so much when it was opened; "
                "restart the server with the larger limit"
            )

    def share(self, Purse purse) -> None:
        lock_take(&self.lock)
        ledger_share(&self.arena.ledger, NULL if purse is None else &purse.sum)
        lock_leave(&self.lock)
        self.purse = purse

    @property
    def inline_dedup(self):
        return self.inline_on

    @inline_dedup.setter
    def inline_dedup(self, on: bool):
        self.inline_on = on

    @property
    def verify(self):
        return self.verify_on

    @verify.setter
    def verify(self, on: bool):
        self.verify_on = on

    def set_clock(self, seconds: int) -> None:
        self.now = seconds // AGE_SECONDS & AGE_MASK
        if self.tables is not None:
            self.reclaim_ripe()
            for _ in range(AGED_PAGES * LEAF_BLOCKS // LOOKS):
                lock_take(&self.lock)
                self.tables.age_on(LOOKS // LEAF_BLOCKS, self.now)
                lock_leave(&self.lock)

    def last_rot(self):
        if self.rotten_block == NO_BLOCK:
            return None
        names = [disk.name for disk in self._disks if disk.number == self.rotten_export]
        return f"block {self.rotten_block} of export {names[0]!r}" if names else "of an export that was removed"

    def turns(self) -> int:
        return self.lock.turns + calls_ever()

    def turns_behind(self) -> int:
        return self.lock.turns_behind

    def readers_looked_again(self) -> tuple[int, int]:
        return self.looked_again, self.misread

    def reset_mem_used_max(self) -> None:
        self.reclaim_ripe()
        lock_take(&self.lock)
        self.store.slab.pages_max = self.store.slab.pages_used
        lock_leave(&self.lock)

    def stats(self):
        cdef Counters now
        self.reclaim_ripe()
        lock_take(&self.lock)
        gather_tallies(&self.sides, self.store)
        self.read_counters(&now)
        lock_leave(&self.lock)
        dictionary_bytes = sum([now.bytes_of[kind] for kind in range(CODEC_ZSTD_DICT, KINDS)])
        return PoolStats(
            orig_data_size=now.blocks_stored * BLOCK,
            compr_data_size=sum([now.bytes_of[kind] for kind in range(KINDS)]),
            mem_used_total=now.pages_used * PAGE_SIZE,
            mem_limit=now.pages_limit * PAGE_SIZE,
            mem_used_max=now.pages_max * PAGE_SIZE,
            same_pages=now.blocks_same,
            pages_compacted=now.pages_compacted,
            huge_pages=now.huge_now,
            huge_pages_since=now.huge_ever,
            pages_folded=now.pages_folded,
            metadata=(now.pages_in_all - now.pages_used) * PAGE_SIZE,
            objects=now.objects,
            handles=now.handles,
            shared_objects=now.shared_objects,
            shared_bytes=now.shared_bytes,
            fold_pending=now.pending,
            objects_folded=now.folded + now.inline_folded,
            inline_folded=now.inline_folded,
            objects_moved=now.moved,
            objects_recompressed=now.recompressed,
            recompress_untried=now.untried,
            compr_by_codec={
                "raw": now.bytes_of[CODEC_RAW],
                "lz4": now.bytes_of[CODEC_LZ4],
                "zstd": now.bytes_of[CODEC_ZSTD],
                "zstd-dict": dictionary_bytes,
            },
            zspages=now.zspages,
            failed_writes=now.failed_writes,
            blocks_rotten=now.rotten,
        )

    cdef void read_counters(self, Counters* now) noexcept nogil:
        """Under the lock, with all tallies gathered: all of them at one moment."""
        memcpy(now.bytes_of, self.store.bytes_of, sizeof(now.bytes_of))
        now.blocks_stored = self.blocks_stored
        now.blocks_same = self.blocks_same
        now.pages_used = self.store.slab.pages_used
        now.pages_in_all = self.arena.ledger.used
        now.pages_limit = self.arena.ledger.limit
        now.pages_max = self.store.slab.pages_max
        now.zspages = self.store.slab.zspage_count
        now.pages_compacted = self.store.pages_compacted
        now.pages_folded = self.store.slab.returned[FOLDED]
        now.huge_now = self.store.huge_now
        now.huge_ever = self.store.huge_ever
        now.objects = self.store.objects
        now.handles = self.store.cells.live
        now.shared_objects = self.store.shared_objects
        now.shared_bytes = self.store.shared_bytes
        now.pending = self.store.index.pending_count
        now.folded = self.store.folded
        now.inline_folded = self.inline_folded
        now.moved = self.store.moved
        now.recompressed = self.store.recompressed
        now.untried = self.store.bytes_of[CODEC_LZ4] - self.store.tried_bytes
        now.failed_writes = self.failed_writes
        now.rotten = self.rotten

    cdef uint64_t pages_in_all(self) noexcept nogil:
        """Under the lock: what the ledger is to say, added up from those who have the pages."""
        cdef uint64_t pages = 1 + pages_for(self.exports_high * sizeof(ExportEntry))
        cdef int number
        pages += self.store.slab.pages_used + self.store.slab.zspages.pages
        pages += self.store.cells.pages() + self.store.index.pages() + self.store.tried.pages
        pages += self.tables.pages() + self.arena.free_units.pages
        for number in range(CODEC_DICTS):
            pages += dictionary_pages(dictionary_length(self.superblock, number))
        return pages

    cdef bint may_retire(self) noexcept nogil:
        return may_retire(self.store, self.tables)

    cdef bint reclaim(self) noexcept nogil:
        return reclaim(&self.lock, self.store, self.tables)

    cdef void reclaim_ripe(self) noexcept nogil:
        reclaim_ripe(&self.lock, self.store, self.tables)

    cdef void keep_short(self) noexcept nogil:
        keep_short(&self.lock, self.store, self.tables)

    cdef void fit_index(self) noexcept nogil:
        """Make the index as large as its objects ask for, which came and went beside others."""
        lock_take(&self.lock)
        gather_tallies(&self.sides, self.store)
        self.store.index.fit(HOLD)
        lock_leave(&self.lock)

    # -- exports -------------------------------------------------------------------------------------------------

    def disks(self):
        return [disk for disk in self._disks if not disk.concealed]

    def all_disks(self):
        return list(self._disks)

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
            self.directory.publish(disk.number, STATE, ENTRY_LIVE)
        elif not source._share_with(disk):
            raise EngineError(f"cannot clone export {source.name!r}: it was deleted")
        self._disks.append(disk)
        return disk

    def _written(self, name, size_bytes, read_only, private, alike):
        """The disk of an entry that is written and no export yet, of the folding domain of `alike` if that is given.

        The caller holds `making` until the name is among those of _disks.
        """
        cdef bytes encoded = self._valid_name(name)
        cdef uint32_t number
        if not 0 <= size_bytes <= SIZE_MAX:
            raise UserError(f"export {name!r}: size {size_bytes} is outside 0 .. {SIZE_MAX} bytes")
        number = self._free_entry(name)
        cdef uint32_t flags = (self._free_domain() if private else COMMON_DOMAIN) << DOMAIN_SHIFT
        if alike is not None:
            flags = domain_of(self.directory.head(alike.number).flags) << DOMAIN_SHIFT
        self.directory.write(number, <const char*>encoded, <uint32_t>len(encoded), size_bytes,
                             flags | (READ_ONLY_FLAG if read_only else 0))
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
        """The number of an entry that is no export's, and of whose last one nobody holds the disk."""
        cdef uint32_t number
        for number in range(EXPORTS_MAX):
            if not self.directory.make_room(number):
                raise UserError(
                    f"export {name!r}: the file system of {self.arena.path} is full; free some of it, or make it larger"
                )
            if self.directory.state(number) == ENTRY_FREE and not self.held[number]:
                return number
        raise UserError(f"export {name!r}: the pool has {EXPORTS_MAX} exports, its limit; delete one first")

    def _disk_of(self, number, stored, same):
        from nbdzram.engine.disk import _open_disk

        return _open_disk(self, number, stored, same)

    cdef void _use_export_entry(self, uint32_t number) noexcept nogil:
        """Count the pages of the directory up to this entry: at most 2 MiB, whatever the limit."""
        cdef uint64_t before = pages_for(self.exports_high * sizeof(ExportEntry))
        lock_take(&self.lock)
        self.exports_high = max(self.exports_high, number + 1)
        ledger_count(&self.arena.ledger, pages_for(self.exports_high * sizeof(ExportEntry)) - before)
        lock_leave(&self.lock)

    def _valid_name(self, name: str) -> bytes:
        encoded = name.encode()
        if len(encoded) > NAME_MAX or "\0" in name:
            raise UserError(f"export name {name[:40]!r}: {len(encoded)} bytes of UTF-8; at most {NAME_MAX}, none NUL")
        if any(disk.name == name for disk in self._disks):
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
        from nbdzram.engine.disk import _test_stripes

        self.store.index.pausing = pause
        self.pausing = pause or linger != ""
        cdef bytes name = linger.encode()
        must(len(name) < LINGER_NAME, b"the name of a function to linger in has room")
        memcpy(self.lock.linger_in, <const char*>name, len(name) + 1)
        self.store.depot.tested = PAUSED if pause else 0
        self.lock.tested = (WATCHED if watch else 0) | (PAUSED if pause else 0) | (LINGERING if linger else 0)
        for disk in self._disks:
            _test_stripes(disk)

    def taken_alone(self) -> tuple[int, int]:
        return self.lock.turns, self.lock.contended

    def lingering(self) -> int:
        return self.lock.lingering

    def most_in_a_hold(self) -> tuple[int, int]:
        return self.lock.most_entries, self.lock.most_words

    def longest_holds(self) -> dict:
        from nbdzram.engine.disk import _longest_stripe

        stripes = [_longest_stripe(disk) for disk in self._disks]
        return {
            "pool": (self.lock.longest_ns, self.lock.longest_in.decode()),
            "stripe": max(stripes, default=(0, "")),
        }

    def check(self) -> None:
        from nbdzram.engine.check import Check

        check = Check(self, contents=False)
        while check.step():
            pass
