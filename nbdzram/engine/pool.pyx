"""A pool: one memory limit, one folding domain, one isolation boundary.

    Pool -> Tables (which object a block is)      table.pyx
         -> ObjectStore (objects and handles)     store.pyx -> Slab, Cells, Index
         -> Arena (pages)                         arena.pyx

Lock order: maintenance (one step of a fold, compaction or recompression), a leaf's stripe (disk.pyx), the pool's lock;
never the other way, never two of a kind. The interpreter lock is outermost: whoever holds one of these must not ask for
it, so nothing runs under them that could give it away, not even the making of a Python object. The pool's lock covers everything below it: tables, cells, index, slots, counters. No compression, hashing or decoding happens under it
on a client's way: those work on copies, taken and committed under the lock.

The arena of a pool

    unit 0       superblock: magic, version, seed of the fingerprints, dictionaries, strongest recompression
    units 1-4    directory of cell segments
    units 5-36   export directory: 4,096 entries of 512 bytes
    units 37-    zspages, block table nodes, cell segments, dictionaries, as they are asked for

Authoritative: superblock, both directories, block table nodes, cells, objects. Everything else is derived and rebuilt
when an arena is opened again. A process killed at any instruction leaves every block with its old or its new content,
as each change ends in one store of a word: a leaf's entry, a cell, a node's number or an export's state.
"""

cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

import os

from nbdzram.engine.arena cimport PAGE_SIZE, UNIT_SIZE, Arena, units_of
from nbdzram.engine.cells cimport (
    CELLS_A_PAGE, KIND_FILL, KIND_FORWARD, REFS_SHIFT, SEGMENT_CELLS, SEGMENT_UNITS, Cell, kind_of, length_of,
)
from nbdzram.engine.codec cimport (
    BLOCK, CODEC_DICTS, CODEC_LZ4, CODEC_RAW, CODEC_ZSTD, CODEC_ZSTD_DICT, fingerprint, zstd_new_ddict,
)
from nbdzram.engine.directory cimport (
    ENTRY_DELETING, ENTRY_FREE, ENTRY_LIVE, EXPORTS_MAX, NAME_MAX, STATE, ExportEntry, entry_publish, entry_write,
)
from nbdzram.engine.lock cimport HOLD, LOOKS, PAUSED, WATCHED, lock_end, lock_init, lock_leave, lock_take
from nbdzram.engine.publish cimport publish32, publish64
from nbdzram.engine.slab cimport ZSpage
from nbdzram.engine.store cimport HUGE_LENGTH, KINDS, ObjectStore
from nbdzram.engine.table cimport BRANCH_CHILDREN, LEAF_BLOCKS, MAX_BLOCKS_SHIFT, TOP_LEVEL, Tables, entry_handle
from nbdzram.engine.users cimport users_close, users_end, users_enter, users_init, users_leave, users_leaving

from nbdzram.engine.stats import PoolStats
from nbdzram.errors import ArenaError, EngineError, ExportExists, UserError

HUGE_THRESHOLD = HUGE_LENGTH
cdef uint64_t SIZE_MAX = <uint64_t>BLOCK << MAX_BLOCKS_SHIFT

cdef bytes MAGIC = b"NBDZRAM\n"

cdef enum:
    VERSION = 1
    SEGMENTS_AT = 1 * UNIT_SIZE
    EXPORTS_AT = 5 * UNIT_SIZE
    FIRST_UNITS = 37

# Address space reserved for each byte that the machine could hold: a zspage may use one page of its unit's sixteen.
RESERVE_FACTOR = 16
SMALLEST_RESERVE = 64 << 30
LARGEST_RESERVE = 16 << 40  # page numbers have 32 bits


def _reserve_for(mem_limit: int) -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(SMALLEST_RESERVE, min(LARGEST_RESERVE, RESERVE_FACTOR * max(2 * memory, mem_limit)))


cdef uint64_t _whole_pages(uint64_t size) noexcept nogil:
    return (size + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE


@cython.final
cdef class Pool:
    """See pool.pyi."""

    def __cinit__(self, *, mem_limit: int = 0, path: str | None = None, inline_dedup: bool = False,
                  fingerprint_mask: int = 0xFFFFFFFFFFFFFFFF):
        self._disks = []
        self.arena = Arena(path, _reserve_for(mem_limit))
        lock_init(&self.lock, 0)
        lock_init(&self.maintenance, 0)
        users_init(&self.users)
        self.lock_made = True
        if not self.arena.opened:
            self.arena.take_run(FIRST_UNITS)
        if self.arena.unit_high < FIRST_UNITS:
            raise self._foreign() if self.arena.opened else self._no_room()
        self.fingerprint_mask = fingerprint_mask
        self.inline_on = inline_dedup
        self.superblock = <Superblock*>self.arena.base
        self.store = ObjectStore(self.arena, SEGMENTS_AT)
        self.tables = Tables(self.store)
        if self.arena.opened:
            self._verify_superblock()
        else:
            self._make_superblock()
        self.seed = self.superblock.seed
        if self.arena.opened:
            broken = self._open_again()
            if broken:
                raise ArenaError(f"the arena {path} is damaged: {broken}; restore it or remove the file")
            self._finish_shrinking()
        self.mem_limit = mem_limit

    def __dealloc__(self):
        if self.lock_made:
            lock_end(&self.lock)
            lock_end(&self.maintenance)
            users_end(&self.users)

    def close(self) -> None:
        """See pool.pyi. Users that are in are waited for; those that take long go by themselves (users.pxd)."""
        with nogil:
            users_close(&self.users)
        for disk in self._disks:
            disk._retire(False)
        self._disks.clear()
        self.arena.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace) -> None:
        self.close()

    # -- the arena, new and opened again -------------------------------------------------------------------------

    def _make_superblock(self):
        if not self.arena.commit(0, PAGE_SIZE):
            raise self._no_room()
        self.superblock.version = VERSION
        self.superblock.page_size = PAGE_SIZE
        self.superblock.seed = int.from_bytes(os.urandom(8), "little")
        self.superblock.layout = self.store.slab.layout()
        memcpy(self.superblock.magic, <const char*>MAGIC, 8)

    def _verify_superblock(self):
        if not self.arena.holds(0) or memcmp(self.superblock.magic, <const char*>MAGIC, 8) != 0:
            raise self._foreign()
        if self.superblock.version != VERSION or self.superblock.layout != self.store.slab.layout():
            raise ArenaError(
                f"{self.arena.path} has format {self.superblock.version}, this program reads format {VERSION}; "
                "copy its exports over with the program that wrote it"
            )

    def _no_room(self):
        if self.arena.path is None:
            return ArenaError("no memory for a pool's first pages; end other programs, or raise ulimit -v")
        return ArenaError(
            f"no room for an arena at {self.arena.path}: the file system is full; free some of it, or make it larger "
            "(a tmpfs: mount -o remount,size=SIZE)"
        )

    def _foreign(self):
        return ArenaError(f"{self.arena.path} is not an nbdzram arena; remove it or name another state directory")

    cdef str _open_again(self):
        """Rebuild everything derived. The reason when the arena is broken, else None."""
        cdef uint32_t number, handle, unit, segment, index
        cdef uint32_t segments_held = self.store.cells.segments_held()
        cdef uint32_t entries_held = 0
        cdef bint held = False
        cdef ExportEntry* entry
        cdef Cell* cell
        cdef uint64_t stored, same
        # 1. How many handles there have been, and their counts from nought.
        for segment in range(segments_held):
            if self.store.cells.segments[segment] + SEGMENT_UNITS > self.arena.unit_high:
                return f"cell segment {segment} lies behind its end"
            for index in range(SEGMENT_CELLS):
                handle = segment * SEGMENT_CELLS + index
                if index % CELLS_A_PAGE == 0:
                    held = self.store.cells.held(handle)
                cell = self.store.cells.cell(handle)
                if held and cell.word:
                    cell.word = cell.word << 9 >> 9
                    self.store.cells.high = handle + 1
        if not self.store.cells.ready():
            return "no memory for its handles"
        # 2. What the exports lead to.
        while entries_held < EXPORTS_MAX and self.arena.holds(EXPORTS_AT + entries_held * sizeof(ExportEntry)):
            entries_held += 1  # entries are taken in their order
        for number in range(entries_held):
            entry = self.export_entry(number)
            if entry.state == ENTRY_DELETING:
                entry.root = 0
                entry_publish(entry, STATE, ENTRY_FREE)
            if entry.state == ENTRY_LIVE and not self.tables.adopt(entry.root, TOP_LEVEL):
                return f"the block table of export number {number} leads nowhere"
        # 3. What nothing leads to is free; the rest has its slot.
        self.store.tried_strength = self.superblock.tried_strength
        if not self.store.slab.adoption_begin():
            return "no memory to open it"
        for handle in range(1, self.store.cells.high):
            cell = self.store.cells.cell(handle)
            if cell.word >> REFS_SHIFT == 0:
                self.store.cells.live += 1
                self.store.cells.free(handle)
                continue
            self.store.cells.live += 1
            if kind_of(cell.word) != KIND_FILL and kind_of(cell.word) != KIND_FORWARD and not self.store.adopt(handle):
                return f"object {handle} lies where none can be"
        self.store.slab.adoption_done()
        if not self._open_dictionaries():
            return "a dictionary lies behind its end, or there is no memory for it"
        # 4. Units that hold nothing.
        taken = set()
        for number in range(segments_held):
            unit = self.store.cells.segments[number]
            taken.update(range(unit, unit + SEGMENT_UNITS))
        for number in range(CODEC_DICTS):
            unit = self.superblock.dict_unit[number]
            taken.update(range(unit, unit + units_of(self.superblock.dict_length[number])))
        for unit in range(FIRST_UNITS, self.arena.unit_high):
            if self.store.slab.holds(unit) or self.tables.adopt_unit(unit) or unit in taken:
                continue
            self.arena.release(<uint64_t>unit * UNIT_SIZE, UNIT_SIZE)
            self.arena.give(unit)
        from nbdzram.engine.disk import _open_disk

        for number in range(entries_held):
            entry = self.export_entry(number)
            if entry.state == ENTRY_LIVE:
                self.exports_high = number + 1
                stored = same = 0
                self.tables.count(entry.root, TOP_LEVEL, &stored, &same)
                self.blocks_stored += stored
                self.blocks_same += same
                self._disks.append(_open_disk(self, number, stored, same))
        return None

    cdef bint _open_dictionaries(self) except -1:
        """Those that objects need; the others' units are free."""
        cdef int number
        cdef uint32_t unit, length
        for number in range(CODEC_DICTS):
            unit = self.superblock.dict_unit[number]
            length = self.superblock.dict_length[number]
            if self.store.bytes_of[CODEC_ZSTD_DICT + number] == 0:
                publish32(&self.superblock.dict_unit[number], 0)
                self.superblock.dict_length[number] = 0
                continue
            if unit == 0 or <uint64_t>unit + units_of(length) > self.arena.unit_high:
                return False
            self.store.ddicts[number] = zstd_new_ddict(self.arena.base + <uint64_t>unit * UNIT_SIZE, length)
            if self.store.ddicts[number] == NULL:
                return False
        return True

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
    def mem_limit(self):
        return self.store.slab.pages_limit * PAGE_SIZE

    @mem_limit.setter
    def mem_limit(self, limit: int):
        if limit < 0:
            raise ValueError(f"mem_limit {limit} is negative")
        cdef uint64_t pages = (limit + PAGE_SIZE - 1) // PAGE_SIZE
        lock_take(&self.lock)
        self.store.slab.pages_limit = pages
        lock_leave(&self.lock)

    @property
    def inline_dedup(self):
        return self.inline_on

    @inline_dedup.setter
    def inline_dedup(self, on: bool):
        self.inline_on = on

    def set_clock(self, seconds: int) -> None:
        self.now = seconds & 0x7FFFFFFF

    def reset_mem_used_max(self) -> None:
        lock_take(&self.lock)
        self.store.slab.pages_max = self.store.slab.pages_used
        lock_leave(&self.lock)

    def stats(self):
        cdef Counters now
        cdef uint64_t exports = len(self._disks)
        lock_take(&self.lock)
        self.read_counters(&now, exports)
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
            metadata=now.metadata,
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
        )

    cdef void read_counters(self, Counters* now, uint64_t exports) noexcept nogil:
        """Under the lock: all of them at one moment. `metadata` is what is resident beside zspages for the pool's sake."""
        cdef int number
        memcpy(now.bytes_of, self.store.bytes_of, sizeof(now.bytes_of))
        now.blocks_stored = self.blocks_stored
        now.blocks_same = self.blocks_same
        now.pages_used = self.store.slab.pages_used
        now.pages_limit = self.store.slab.pages_limit
        now.pages_max = self.store.slab.pages_max
        now.zspages = self.store.slab.zspage_count
        now.pages_compacted = self.store.pages_compacted
        now.pages_folded = self.store.pages_folded
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
        now.metadata = 2 * PAGE_SIZE + _whole_pages(exports * sizeof(ExportEntry))
        now.metadata += _whole_pages(self.arena.unit_high * sizeof(ZSpage))
        now.metadata += self.store.cells.metadata() + self.store.index.metadata() + self.tables.metadata()
        for number in range(CODEC_DICTS):
            now.metadata += 2 * _whole_pages(self.superblock.dict_length[number])  # Zstandard keeps a copy of its own

    # -- exports -------------------------------------------------------------------------------------------------

    cdef ExportEntry* export_entry(self, uint32_t number) noexcept nogil:
        return <ExportEntry*>(self.arena.base + EXPORTS_AT) + number

    def disks(self):
        return list(self._disks)

    def create(self, name: str, size_bytes: int, *, read_only: bool = False):
        return self._add(name, size_bytes, read_only, None)

    def clone(self, source, name: str, *, read_only: bool = False):
        return self._add(name, source.size_bytes, read_only, source)

    def _add(self, name, size_bytes, read_only, source):
        encoded = self._valid_name(name)
        if not 0 <= size_bytes <= SIZE_MAX:
            raise UserError(f"export {name!r}: size {size_bytes} is outside 0 .. {SIZE_MAX} bytes")
        if source is not None and source.pool is not self:
            raise ValueError(f"export {source.name!r} is none of this pool's")
        if not users_enter(&self.users):
            raise EngineError(f"export {name!r}: its pool was closed")
        try:
            return self._make(name, encoded, size_bytes, read_only, source)
        finally:
            users_leave(&self.users)

    def _make(self, name, bytes encoded, size_bytes, read_only, source):
        from nbdzram.engine.disk import _open_disk

        cdef uint32_t number = self._free_entry(name)
        cdef ExportEntry* entry = self.export_entry(number)
        entry_write(entry, <const char*>encoded, <uint32_t>len(encoded), size_bytes, read_only)
        disk = _open_disk(self, number, 0, 0)
        self.exports_high = max(self.exports_high, number + 1)
        if source is None:
            entry_publish(entry, STATE, ENTRY_LIVE)
        elif not source._share_with(disk):
            raise EngineError(f"cannot clone export {source.name!r}: it was deleted")
        self._disks.append(disk)
        return disk

    def _free_entry(self, name) -> int:
        """The number of an entry that is no export's, and of whose last one nobody holds the disk."""
        cdef uint32_t number
        for number in range(EXPORTS_MAX):
            if number * sizeof(ExportEntry) % PAGE_SIZE == 0 and not self.arena.commit(
                    EXPORTS_AT + number * sizeof(ExportEntry), PAGE_SIZE):
                raise UserError(
                    f"export {name!r}: the file system of {self.arena.path} is full; free some of it, or make it larger"
                )
            if self.export_entry(number).state == ENTRY_FREE and not self.held[number]:
                return number
        raise UserError(f"export {name!r}: the pool has {EXPORTS_MAX} exports, its limit; delete one first")

    def _valid_name(self, name: str) -> bytes:
        encoded = name.encode()
        if len(encoded) > NAME_MAX or "\0" in name:
            raise UserError(f"export name {name[:40]!r}: {len(encoded)} bytes of UTF-8; at most {NAME_MAX}, none NUL")
        if any(disk.name == name for disk in self._disks):
            raise ExportExists(f"export {name!r} exists in this pool; choose another name or remove it first")
        return encoded

    def delete(self, disk) -> None:
        cdef ExportEntry* entry = self.export_entry(disk.number)
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
                lock_take(&self.lock)
                if self._drop_tree(&entry.root, TOP_LEVEL, &left):
                    entry_publish(entry, STATE, ENTRY_FREE)
                lock_leave(&self.lock)
        finally:
            users_leave(&self.users)

    cdef bint _drop_tree(self, uint32_t* place, int level, uint32_t* left) noexcept nogil:
        """Forget a subtree that only a dead export leads to. Holds the lock, and lets it go when what is `left` of a hold
        is used up. False when the pool closes meanwhile: then opening finishes it."""
        cdef int index
        cdef uint32_t page, handle
        if not self._still(left, LOOKS // HOLD):
            return False
        if self.tables.drop_share(place):
            return True
        page = place[0]
        for index in range(BRANCH_CHILDREN if level else LEAF_BLOCKS):
            if not self._still(left, 1):
                return False
            if level:
                if self.tables.branch(page)[index] and not self._drop_tree(
                        self.tables.branch(page) + index, level - 1, left):
                    return False
            elif self.tables.entries(page)[index]:
                if not self._still(left, LOOKS // HOLD):
                    return False
                handle = entry_handle(self.tables.entries(page)[index])
                publish64(self.tables.entries(page) + index, 0)
                if handle:
                    self.store.release(handle)
        self.tables.give_node(place)
        return True

    cdef bint _still(self, uint32_t* left, uint32_t cost) noexcept nogil:
        """Let the lock go for a moment when a hold has cost enough. Whether the pool is still open."""
        if left[0] < cost:
            lock_leave(&self.lock)
            lock_take(&self.lock)
            left[0] = LOOKS
        left[0] -= cost
        return not users_leaving(&self.users)

    def test_locks(self, *, watch: bool = False, pause: bool = False) -> None:
        from nbdzram.engine.disk import _test_stripes

        self.lock.tested = (WATCHED if watch else 0) | (PAUSED if pause else 0)
        for disk in self._disks:
            _test_stripes(disk)

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
