"""What the parts of a pool have in common: its memory and who is in it, its locks, its counters.

    Pool (pool.pyx), its disks and the runs over it        know one another, and this
    PoolCore -> Tables (which object a block is)           table.pyx
             -> ObjectStore (objects and handles)          store.pyx -> Slab, Cells, Index
             -> Arena (pages)                              arena.pyx

So it knows no disk but as a thing in a list, and no way to make one: that is the pool's (pool.pyx), which stands above
disks and runs.

Lock order: maintenance (one step of a fold, compaction or recompression), a leaf's stripe (disk.pyx), the pool's lock,
a latch of the index or the depot's lock, and that of an arena that grows; never the other way, never two of a kind. The
interpreter lock is outermost: whoever holds one of these must not ask for it, so nothing runs under them that could
give it away, not even the making of a Python object. The pool's lock covers everything below it: tables, cells, index,
slots, counters. Threads that store blocks as usual take it beside each other (sides.pxd, beside.pyx, kit.pyx);
everything else has it alone, and is not about them. No compression, hashing or decoding happens under it on a client's
way. Readers take no lock at all (reading.pyx): what they may see is retired before it is freed (limbo.pxd), and who
waits for them holds neither the pool's lock nor a stripe; the maintenance lock is taken by nobody who is online.

Whoever ends gives back what it had in a pool: a disk its entry, a run what it marked. So Python's collector of cycles,
which clears what it found before it ends it, takes nothing from them, nor from what they look at then (no_gc_clear).
The one cycle among these, of a pool and its disks, goes through a list, which it does clear.
"""

from libc.stdint cimport uint64_t
from libc.string cimport memcpy

import os

from nbdzram.engine.arena cimport Arena
from nbdzram.engine.codec cimport BLOCK, CODEC_DICTS, CODEC_LZ4, CODEC_RAW, CODEC_ZSTD, CODEC_ZSTD_DICT
from nbdzram.engine.directory cimport ExportEntry
from nbdzram.engine.format cimport Superblock, dictionary_length
from nbdzram.engine.kit cimport gather_tallies, kits_free, seat_of_thread
from nbdzram.engine.ledger cimport ledger_share
from nbdzram.engine.lock cimport (
    LOOKS, lock_end, lock_init, lock_leave, lock_leave_beside, lock_take, lock_take_behind, lock_take_beside,
)
from nbdzram.engine.page cimport PAGE_SIZE, pages_for
from nbdzram.engine.publish cimport look64
from nbdzram.engine.purse cimport Purse
from nbdzram.engine.quiescence cimport calls_ever, offline, online
from nbdzram.engine.sides cimport Seat
from nbdzram.engine.reclaim cimport fit_index, keep_short, may_retire, reclaim, reclaim_ripe
from nbdzram.engine.slab cimport FOLDED
from nbdzram.engine.store cimport KINDS, dictionary_pages
from nbdzram.engine.table cimport AGE_MASK, AGE_SECONDS, LEAF_BLOCKS
from nbdzram.engine.users cimport users_end, users_enter, users_init, users_leave

from nbdzram.engine.stats import PoolStats
from nbdzram.errors import UserError

cdef uint64_t NO_BLOCK = <uint64_t>-1

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


cdef class PoolCore:
    """See pool.pyi, which is its face too."""

    def __cinit__(self, *, mem_limit: int = 0, path: str | None = None, memory: int | None = None,
                  inline_dedup: bool = False, verify: bool = True, tell_sharing: bool = False, clock: int = 0,
                  fingerprint_mask: int = 0xFFFFFFFFFFFFFFFF, together=None):
        self._disks = []
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

    def __dealloc__(self):
        if self.lock_made:
            lock_end(&self.lock)
            lock_end(&self.maintenance)
            users_end(&self.users)
            kits_free(&self.sides)

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
        if self.tables is not None and users_enter(&self.users):
            self.reclaim_ripe()
            for _ in range(AGED_PAGES * LEAF_BLOCKS // LOOKS):
                lock_take(&self.lock)
                self.tables.age_on(LOOKS // LEAF_BLOCKS, self.now)
                lock_leave(&self.lock)
            users_leave(&self.users)

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

    @property
    def failed_writes(self):
        return look64(&self.failed_count)

    def declined(self) -> tuple[int, int]:
        return look64(&self.arena.ledger.declined), look64(&self.arena.declined)

    def lacks(self) -> str:
        return self.arena.lacks()

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
        now.failed_writes = look64(&self.failed_count)
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
        """For whoever looks, and may come when the pool is closed: its file is another process's then, and what is
        taken back is written to."""
        if users_enter(&self.users):
            reclaim_ripe(&self.lock, self.store, self.tables)
            users_leave(&self.users)

    cdef void keep_short(self) noexcept nogil:
        keep_short(&self.lock, self.store, self.tables)

    cdef Seat* begin_look(self) noexcept nogil:
        """Look at what is stored, and shut out nobody who writes, for no longer than the lock may be held.

        It goes beside them (sides.pxd), so that no node changes; and the thread is online (quiescence.pyx), so that a
        handle found in an entry stays that object's. A thread that cannot have both looks alone, behind others.
        end_look takes what this gives.
        """
        cdef Seat* seat = seat_of_thread(&self.sides)
        if seat != NULL and online():
            lock_take_beside(&self.lock, seat)
            return seat
        lock_take_behind(&self.lock)
        return NULL

    cdef void end_look(self, Seat* seat) noexcept nogil:
        if seat == NULL:
            lock_leave(&self.lock)
        else:
            lock_leave_beside(&self.lock, seat)
            offline()

    cdef void fit_index(self) noexcept nogil:
        """Make the index as large as its objects ask for, which came and went beside others. What all threads had to
        tell is told then, so none of them asks for its share again."""
        lock_take(&self.lock)
        gather_tallies(&self.sides, self.store)
        lock_leave(&self.lock)
        fit_index(&self.lock, self.store)

    def taken_alone(self) -> tuple[int, int]:
        return self.lock.turns, self.lock.contended

    def lingering(self) -> int:
        return self.lock.lingering

    def buckets(self) -> int:
        return self.store.index.buckets

    def most_in_a_hold(self) -> tuple[int, int]:
        return self.lock.most_entries, self.lock.most_words

    def disks(self):
        return [disk for disk in self._disks if not disk.concealed]

    def all_disks(self):
        return list(self._disks)
