"""Holding the engine against its own invariants (docs/design.md, "Invariants"), while clients go on.

    contents    every object is decoded and held against its fingerprint
    count       cells, zspages and nodes: each in itself, then their sums against the counters     ─┐ once for each
    names       nodes, export directory, cells and what is retired are walked: who names whom        │ window of numbers
    judge       names found against names counted, slots found against slots used                  ─┘
    chains      the index leads to objects alone, each in its bucket
    exports     blocks stored and same-filled of each export

Count. Three censuses (census.pyx) make the sums exact at the moment when nothing is open; then they are compared.

Names. A walk in many holds of the lock sees each node, entry and cell at a time of its own. But a cell whose count of
holders did not change from the beginning of the walk to its end had the same holders throughout: a name that comes,
goes or moves changes the count of what it names. So each of them was seen, and seen once; and where the census says
that a number stayed settled, what was found must be what is counted. The others were being changed by clients; they are
passed over and told as such (`changing`). A write with inline folding holds an object before its entry does: such a
hold tells the census when it ends, and those from before the walk must have ended before it is judged (Pool.shift).
Walking goes by page number, not from the roots, so that no clone or deletion can carry a node past the walk.

Each hold of the lock looks at up to HOLD things; where an entry leads through forwards, or a bucket has a chain, at all
of those. Memory: WINDOW numbers are judged in one walk, so at most 192 MiB however large the pool, and for one of a GiB
some 10; beside that the censuses, a bit a cell, zspage and page.

Known limits: what clients change in a walk is judged by the next check. Equal fingerprints make chains and holds long.
"""

cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memcpy

from nbdzram.engine.arena cimport Region, region_ensure, region_free, region_reserve
from nbdzram.engine.cells cimport KIND_FILL, KIND_FORWARD, kind_of, length_of, slot_of, target_of, unit_of
from nbdzram.engine.census cimport COMPLAINT
from nbdzram.engine.codec cimport BLOCK, CODEC_FREE
from nbdzram.engine.disk cimport Disk
from nbdzram.engine.format cimport ENTRY_FREE
from nbdzram.engine.kit cimport are_empty, gather_tallies
from nbdzram.engine.limbo cimport limbo_count
from nbdzram.engine.lock cimport HOLD, lock_leave, lock_take, lock_take_behind
from nbdzram.engine.core cimport PoolCore
from nbdzram.engine.publish cimport look64
from nbdzram.engine.recount cimport SLOT_WORDS, CellCensus, NodeCensus, ZspageCensus, judge_slots
from nbdzram.engine.run cimport Run
from nbdzram.engine.slab cimport Slab, retired_slot, retired_unit
from nbdzram.engine.store cimport FORWARDS_MAX, KINDS, ObjectStore
from nbdzram.engine.table cimport BRANCH_CHILDREN, LEAF_BLOCKS, LEVEL_SHIFT, Tables, entry_handle, page_of

from nbdzram.engine.reports import CheckReport
from nbdzram.errors import CheckFailed, EngineError

cdef enum:
    WINDOW = 1 << 24        # handles, and pages: 4 bytes each
    UNIT_WINDOW = 1 << 18   # zspages: a bit a slot, 256 bytes each
    ALL = -1                # of a sum that has no parts

    CONTENTS = 0
    COUNT = 1
    NAMES_OF_EXPORTS = 2
    NAMES_IN_NODES = 3
    PLACES = 4
    RETIRED = 5
    JUDGE_CELLS = 6
    JUDGE_NODES = 7
    JUDGE_ZSPAGES = 8
    CHAINS = 9
    EXPORTS = 10
    DONE = 11
    CONTENT_WORK = 64       # of a number that is counted: decoding and hashing take about 800 ns, counting 10

ctypedef unsigned long long ull  # for printf


@cython.final
@cython.no_gc_clear
cdef class Check(Run):
    """See check.pyi."""

    cdef ObjectStore store
    cdef Slab slab
    cdef Tables tables
    cdef CellCensus cells
    cdef ZspageCensus zspages
    cdef NodeCensus nodes
    cdef int phase
    cdef uint64_t at               # where the phase goes on: a handle, page, unit, bucket or export's number
    cdef uint32_t within           # ... and inside a node
    cdef uint64_t window
    cdef uint64_t cells_end, pages_end, units_end  # of the window, where they end before it does
    cdef Region found[3]           # room for the next three, all zeroes: no memory is cleared under the lock
    cdef uint32_t* holders         # found, by handle in the window
    cdef uint32_t* parents         # found, by page in the window
    cdef uint64_t* slots           # found, a bit a slot, by unit in the window
    cdef uint64_t contents_end
    cdef uint64_t checked, changing
    cdef uint32_t rotten           # handle of an object whose bytes are not what was written, else 0
    cdef list disks                # whose blocks are still to be counted
    cdef Disk disk
    cdef bint in_export
    cdef bint no_memory
    cdef char complaint[COMPLAINT]

    def __cinit__(self, PoolCore pool, *, contents: bool = True):
        self.store = pool.store
        self.slab = pool.store.slab
        self.tables = pool.tables
        self.at = 1
        pool.reclaim_ripe()  # so that what is free is looked at as that
        lock_take(&pool.lock)
        gather_tallies(&pool.sides, pool.store)  # again: what threads owe by now may make fewer than none of it
        self.contents_end = pool.store.cells.high
        self._total = self._work_of_counting()
        if contents:
            self._total += self.contents_end + <uint64_t>CONTENT_WORK * pool.store.objects
        lock_leave(&pool.lock)
        if not contents:
            self.phase = COUNT

    def __dealloc__(self):
        if self.store is not None:
            self._end_census()
        self._free_window()

    def report(self):
        return CheckReport(objects_checked=self.checked, changing=self.changing)

    # -- steps ---------------------------------------------------------------------------------------------------

    cdef bint _step(self, uint32_t budget) noexcept nogil:
        cdef uint64_t looked, enough = self._done + budget  # in work: decoding one is counting many
        while self._done < enough and self.phase != DONE and not self.complaint[0] and not self.no_memory:
            if self.phase == EXPORTS and not self.in_export or self.phase != CONTENTS and not self._has_census():
                return False  # _go_on knows what is next
            looked = self._hold(<uint32_t>min(enough - self._done, <uint64_t>HOLD))
            self._done += looked
        return self.phase != DONE and not self.complaint[0] and not self.no_memory

    cdef bint _go_on(self) except -1:
        if self.phase == DONE:
            return False
        if self.phase == EXPORTS and self._has_census() and not self.disks and not self.complaint[0]:
            self._compare_exports()
            self.phase = DONE
        if self.complaint[0]:
            raise CheckFailed(self._whose() + self.complaint.decode())
        if self.no_memory:
            raise EngineError("a check found no memory for its own counts; free some, or check a smaller pool")
        if self.phase == DONE:
            self._end_census()
            return False
        if not self._has_census():
            self._begin_counting()  # the first time, or another check of this pool took its place
        else:
            self.disk = self.disks.pop()
            self.disk.recount()
            self.in_export = True
        return True

    def _whose(self) -> str:
        """The first block that cannot be read, in words, when something does not hold; empty if all can."""
        for disk in self.pool.all_disks():
            block = disk.first_unreadable(self.rotten)
            if block is not None:
                return f"block {block} of export {disk.name!r} is not what was written: "
        return ""

    cdef uint32_t _hold(self, uint32_t limit) noexcept nogil:
        """Go on with the phase under one hold of the lock; how many things were looked at."""
        cdef uint32_t looked = 0
        if self.phase == CONTENTS:
            return self._verify_content()
        lock_take_behind(&self.pool.lock)
        if not self._has_census():
            looked = limit
        elif self.phase == COUNT:
            looked = self._count(limit)
        elif self.phase == NAMES_OF_EXPORTS:
            looked = self._walk_exports(limit)
        elif self.phase == NAMES_IN_NODES:
            looked = self._walk_nodes(limit)
        elif self.phase == PLACES:
            looked = self._walk_cells(limit)
        elif self.phase == RETIRED:
            looked = self._walk_retired(limit)
        elif self.phase == JUDGE_CELLS:
            looked = self._judge_cells(limit)
        elif self.phase == JUDGE_NODES:
            looked = self._judge_nodes(limit)
        elif self.phase == JUDGE_ZSPAGES:
            looked = self._judge_zspages(limit)
        elif self.phase == CHAINS:
            looked = self._follow_chains(limit)
        elif self.phase == EXPORTS:
            looked = self._count_export(limit)
        lock_leave(&self.pool.lock)
        if self.phase == COUNT or self.phase == CHAINS:
            self._free_window()  # 64 MiB that were used go back to the system in milliseconds
        return max(looked, <uint32_t>1)

    cdef uint64_t _work_of_counting(self) noexcept nogil:
        """Under the lock: what all phases behind the contents will look at, if nothing changes meanwhile."""
        cdef uint64_t cells = self.store.cells.high, units = self.slab.unit_end(), pages = self.tables.page_end()
        cdef uint64_t entries = pages + <uint64_t>self.tables.nodes * LEAF_BLOCKS  # branches are few beside leaves
        cdef uint64_t walk = self.pool.exports_high + entries + cells
        cdef uint64_t windows = max(max(cells, pages) // WINDOW, units // UNIT_WINDOW) + 1
        return (cells + units + pages                                           # count
                + windows * walk                                                # names
                + cells + units + pages                                         # judge
                + self.store.index.buckets + self.store.index.linked            # chains
                + self.pool.blocks_stored)                                      # exports

    cdef void _enter(self, int phase, uint64_t at) noexcept nogil:
        self.phase = phase
        self.at = at
        self.within = 0

    # -- contents ------------------------------------------------------------------------------------------------

    cdef uint32_t _verify_content(self) noexcept nogil:
        """Decode one object, outside the lock, and hold it against its fingerprint."""
        cdef uint8_t encoded[BLOCK]
        cdef uint8_t block[BLOCK]
        cdef uint32_t handle = <uint32_t>self.at
        cdef uint64_t word, expected
        cdef bint sound
        if self.at >= self.contents_end:
            self._begin_window(0)
            return 1
        self.at += 1
        lock_take_behind(&self.pool.lock)
        word = self.store.cells.cell(handle).word
        expected = self.store.cells.cell(handle).fingerprint
        sound = _is_object(word) and self.store.is_sound(handle, handle)
        if sound:
            memcpy(encoded, self.store.bytes_at(word), length_of(word))
        lock_leave(&self.pool.lock)
        if not _is_object(word):
            return 1
        self.checked += 1
        self._done += CONTENT_WORK
        if not (sound and self.store.decode_right(kind_of(word), encoded, length_of(word), expected, block)):
            self.rotten = handle
            snprintf(self.complaint, COMPLAINT,
                     "the object of handle %u does not decode to the block whose fingerprint it has", handle)
        return 1

    # -- count ---------------------------------------------------------------------------------------------------

    def _begin_counting(self):
        """Take the censuses, from whichever check has them, and count from the beginning what nobody has in hand."""
        self.cells, self.zspages, self.nodes = CellCensus(self.store), ZspageCensus(self.slab), NodeCensus(self.tables)
        self.disks, self.in_export = self.pool.all_disks(), False
        lock_take(&self.pool.lock)
        self.store.cells.census = self.cells  # from here on nobody writes beside others (beside.pyx): hands get empty
        while self._has_census() and not are_empty(&self.pool.sides):
            lock_leave(&self.pool.lock)
            with nogil:
                self.pool.reclaim()
            lock_take(&self.pool.lock)
        if self._has_census():
            gather_tallies(&self.pool.sides, self.store)
            self.slab.census = self.zspages
            self.tables.census = self.nodes
        lock_leave(&self.pool.lock)
        self._begin_window(0)

    cdef void _end_census(self):
        lock_take(&self.pool.lock)
        if self._has_census():
            self.store.cells.census = None
            self.slab.census = None
            self.tables.census = None
        lock_leave(&self.pool.lock)

    cdef bint _has_census(self) noexcept nogil:
        return self.cells is not None and self.store.cells.census is self.cells

    cdef void _begin_window(self, uint64_t window) noexcept nogil:
        self.window = window
        self._enter(COUNT, 0)

    cdef uint32_t _count(self, uint32_t limit) noexcept nogil:
        """Count what was not yet, and again what changed; when nothing is left, compare the sums and go on."""
        cdef uint64_t cells_end = self.store.cells.high
        cdef uint64_t units_end = self.slab.unit_end()
        cdef uint64_t pages_end = self.tables.page_end()
        cdef uint32_t looked = 0
        if not (self.cells.reserve(cells_end) and self.zspages.reserve(units_end) and self.nodes.reserve(pages_end)):
            self.no_memory = True
            return 0
        looked += self.cells.count_on(cells_end, limit, self.complaint)
        if looked < limit:
            looked += self.zspages.count_on(units_end, limit - looked, self.complaint)
        if looked < limit:
            looked += self.nodes.count_on(pages_end, limit - looked, self.complaint)
        if looked < limit and self.pool.in_hand[1 - self.pool.shift] == 0 and self._sums_agree():
            self.pool.shift = 1 - self.pool.shift
            self._begin_walk(cells_end, units_end, pages_end)
        return looked

    cdef bint _sums_agree(self) noexcept nogil:
        """The moment of truth: everything is settled, and the lock is held."""
        cdef uint64_t zspages = 0, pages = 0, retired = 0
        cdef int index
        for index in range(KINDS):
            self._agree("bytes of codec", index, self.store.bytes_of[index], self.cells.bytes_of[index])
        for index in range(self.slab.class_count):
            zspages += self.zspages.zspages[index]
            pages += self.zspages.pages[index]
            self._agree("slots used in size class", index, self.slab.classes[index].used, self.zspages.used[index])
            self._agree("slots in size class", index, self.slab.classes[index].used,
                        self.cells.slots_of[index] + self.slab.classes[index].retired)
            retired += self.slab.classes[index].retired
            self._agree("zspages of size class", index, self.slab.classes[index].zspages, self.zspages.zspages[index])
            self._agree("pages of size class", index, self.slab.classes[index].pages_used, self.zspages.pages[index])
        self._agree("retired slots", ALL, retired, limbo_count(&self.slab.limbo))
        self._agree("zspages", ALL, self.slab.zspage_count, zspages)
        self._agree("pages", ALL, self.slab.pages_used, pages)
        self._agree("pages in all", ALL, self.pool.arena.ledger.used, self.pool.pages_in_all())
        self._agree("handles", ALL, self.store.cells.live, self.cells.live)
        self._agree("objects", ALL, self.store.objects, self.cells.objects)
        self._agree("huge objects", ALL, self.store.huge_now, self.cells.huge)
        self._agree("shared objects", ALL, self.store.shared_objects, self.cells.shared_objects)
        self._agree("shared bytes", ALL, self.store.shared_bytes, self.cells.shared_bytes)
        self._agree("pending objects", ALL, self.store.index.pending_count, self.cells.pending)
        self._agree("linked objects", ALL, self.store.index.linked, self.cells.objects - self.cells.pending)
        self._agree("nodes", ALL, self.tables.nodes, self.nodes.nodes)
        return not self.complaint[0]

    cdef void _agree(self, const char* what, int index, uint64_t counted, uint64_t found) noexcept nogil:
        if counted == found or self.complaint[0]:
            return
        if index == ALL:
            snprintf(self.complaint, COMPLAINT, "%s: %llu counted, %llu found", what, <ull>counted, <ull>found)
        else:
            snprintf(
                self.complaint, COMPLAINT, "%s %d: %llu counted, %llu found", what, index, <ull>counted, <ull>found)

    # -- names ---------------------------------------------------------------------------------------------------

    cdef void _begin_walk(self, uint64_t cells_end, uint64_t units_end, uint64_t pages_end) noexcept nogil:
        """Judge the numbers of this window, which are all settled now; past the last window, go on."""
        cdef uint64_t start = self.window * WINDOW
        cdef uint64_t first_unit = self.window * UNIT_WINDOW
        if start >= cells_end and start >= pages_end and first_unit >= units_end:
            self._enter(CHAINS, 0)
            return
        self.cells_end = max(start, min(cells_end, start + WINDOW))
        self.pages_end = max(start, min(pages_end, start + WINDOW))
        self.units_end = max(first_unit, min(units_end, first_unit + UNIT_WINDOW))
        self.holders = <uint32_t*>_zeroes(&self.found[0], (self.cells_end - start + 1) * sizeof(uint32_t))
        self.parents = <uint32_t*>_zeroes(&self.found[1], (self.pages_end - start + 1) * sizeof(uint32_t))
        self.slots = <uint64_t*>_zeroes(
            &self.found[2], ((self.units_end - first_unit) * SLOT_WORDS + 1) * sizeof(uint64_t))
        self.no_memory = self.holders == NULL or self.parents == NULL or self.slots == NULL
        self._enter(NAMES_OF_EXPORTS, 0)

    cdef void _free_window(self) noexcept nogil:
        cdef int index
        for index in range(3):
            region_free(&self.found[index])
        self.holders = NULL
        self.parents = NULL
        self.slots = NULL

    cdef uint32_t _walk_exports(self, uint32_t limit) noexcept nogil:
        cdef uint32_t looked = 0
        while looked < limit and self.at < self.pool.exports_high:
            if not self.pool.directory.is_right(<uint32_t>self.at):
                snprintf(self.complaint, COMPLAINT, "entry %u of the export directory is damaged", <uint32_t>self.at)
            elif self.pool.directory.state(<uint32_t>self.at) != ENTRY_FREE:
                self._found_parent(page_of(self.pool.directory.entry(<uint32_t>self.at).root))
            self.at += 1
            looked += 1
        if looked < limit:
            self._enter(NAMES_IN_NODES, 0)
        return looked

    cdef void _found_parent(self, uint32_t page) noexcept nogil:
        if page and page >= self.tables.page_end():
            snprintf(self.complaint, COMPLAINT, "a table node or an export names page %u, behind the arena's end", page)
        elif page and self.window * WINDOW <= page < self.pages_end:
            self.parents[page - self.window * WINDOW] += 1

    cdef uint32_t _walk_nodes(self, uint32_t limit) noexcept nogil:
        """What nodes name, wherever they hang. A node may change or go between two holds: what it names changes
        then."""
        cdef uint64_t end = self.tables.page_end()
        cdef uint32_t looked = 0
        cdef uint32_t page, level
        while looked < limit and self.at < end:
            page = <uint32_t>self.at
            level = self.tables.node(page)[0] >> LEVEL_SHIFT
            looked += 1
            if self.tables.node(page)[0] and self.within < <uint32_t>(BRANCH_CHILDREN if level else LEAF_BLOCKS):
                if level:
                    self._found_parent(page_of(self.tables.words(page)[self.within]))
                else:
                    self._found_holder(page, entry_handle(look64(self.tables.words(page) + self.within)))
                self.within += 1
            else:
                self.at += 1
                self.within = 0
        if looked < limit:
            self._enter(PLACES, 1)
        return looked

    cdef void _found_holder(self, uint32_t page, uint32_t handle) noexcept nogil:
        cdef uint64_t word
        cdef int steps = 0
        while handle and steps <= FORWARDS_MAX:
            steps += 1
            word = self.store.cells.cell(handle).word if handle < self.store.cells.high else 0
            if kind_of(word) == CODEC_FREE:
                snprintf(self.complaint, COMPLAINT, "entry %u of table node %u leads to handle %u, which is free",
                         self.within, page, handle)
                return
            if self.window * WINDOW <= handle < self.cells_end:
                self.holders[handle - self.window * WINDOW] += 1
            handle = target_of(word) if kind_of(word) == KIND_FORWARD else 0

    cdef uint32_t _walk_cells(self, uint32_t limit) noexcept nogil:
        """Which slots objects lie in."""
        cdef uint32_t looked = 0
        cdef uint64_t word
        while looked < limit and self.at < self.store.cells.high:
            word = self.store.cells.cell(<uint32_t>self.at).word
            if _is_object(word):
                self._found_slot("object", unit_of(word), slot_of(word))
            self.at += 1
            looked += 1
        if looked < limit and self.pool.in_hand[1 - self.pool.shift] == 0:
            self._enter(RETIRED, self.slab.limbo.first)
        return looked

    cdef void _found_slot(self, const char* what, uint32_t unit, uint32_t slot) noexcept nogil:
        cdef uint64_t first = self.window * UNIT_WINDOW
        cdef uint64_t bit = <uint64_t>1 << (slot & 63)
        cdef uint64_t* place
        if unit < first or unit >= self.units_end:
            return
        place = self.slots + (unit - first) * SLOT_WORDS + slot // 64
        if place[0] & bit and self.zspages.is_settled(unit):
            snprintf(self.complaint, COMPLAINT, "%s %llu lies in slot %u of zspage %u, as another does",
                     what, <ull>self.at, slot, unit)
        place[0] |= bit

    cdef uint32_t _walk_retired(self, uint32_t limit) noexcept nogil:
        """Which slots no object lies in any more, and a reader may still see. In a settled zspage none came or went."""
        cdef uint32_t looked = 0
        cdef uint64_t item
        self.at = max(self.at, self.slab.limbo.first)
        while looked < limit and self.at < self.slab.limbo.last:
            item = self.slab.retired_item(self.at)
            self._found_slot("retired slot", retired_unit(item), retired_slot(item))
            self.at += 1
            looked += 1
        if looked < limit:
            self._enter(JUDGE_CELLS, self.window * WINDOW)
        return looked

    # -- judge ---------------------------------------------------------------------------------------------------

    cdef uint32_t _judge_cells(self, uint32_t limit) noexcept nogil:
        cdef uint32_t looked = 0
        cdef uint32_t handle, found
        cdef uint64_t refs
        while looked < limit and self.at < self.cells_end:
            handle = <uint32_t>self.at
            found = self.holders[self.at - self.window * WINDOW]
            refs = self.store.cells.refs(handle) if handle else 0
            if not self.cells.is_settled(handle):
                self.changing += 1
            elif refs != found:
                snprintf(
                    self.complaint, COMPLAINT, "handle %u: %llu holders counted, %u found", handle, <ull>refs, found)
            elif handle and (refs == 0) != (kind_of(self.store.cells.cell(handle).word) == CODEC_FREE):
                snprintf(self.complaint, COMPLAINT, "handle %u has %llu holders and is of kind %u",
                         handle, <ull>refs, kind_of(self.store.cells.cell(handle).word))
            self.at += 1
            looked += 1
        if looked < limit:
            self._enter(JUDGE_NODES, self.window * WINDOW)
        return looked

    cdef uint32_t _judge_nodes(self, uint32_t limit) noexcept nogil:
        cdef uint32_t looked = 0
        cdef uint32_t page, found
        while looked < limit and self.at < self.pages_end:
            page = <uint32_t>self.at
            found = self.parents[self.at - self.window * WINDOW]
            if not self.nodes.is_settled(page):
                self.changing += 1
            elif self.tables.parents(page) != found:
                snprintf(self.complaint, COMPLAINT, "table node %u: %u parents counted, %u found",
                         page, self.tables.parents(page), found)
            self.at += 1
            looked += 1
        if looked < limit:
            self._enter(JUDGE_ZSPAGES, self.window * UNIT_WINDOW)
        return looked

    cdef uint32_t _judge_zspages(self, uint32_t limit) noexcept nogil:
        cdef uint32_t looked = 0
        while looked < limit and self.at < self.units_end:
            if not self.zspages.is_settled(self.at):
                self.changing += 1
            else:
                looked += judge_slots(
                    self.slab, <uint32_t>self.at, self.slots + (self.at - self.window * UNIT_WINDOW) * SLOT_WORDS,
                    self.complaint)
            self.at += 1
            looked += 1
        if looked < limit:
            self._begin_window(self.window + 1)
        return looked

    # -- chains --------------------------------------------------------------------------------------------------

    cdef uint32_t _follow_chains(self, uint32_t limit) noexcept nogil:
        """Every object that the index leads to belongs there. That no object is missing, the census saw."""
        cdef uint32_t looked = 0
        cdef uint32_t handle
        cdef uint64_t length
        while looked < limit and self.at < self.store.index.buckets:
            handle = self.store.index.bucket(<uint32_t>self.at)[0]
            length = 0
            while handle and length <= self.store.index.linked:
                length += 1
                if (not _is_object(self.store.cells.cell(handle).word) or self.store.index.is_pending(handle)
                        or self.store.index.bucket_of(self.store.cells.cell(handle).fingerprint) != self.at):
                    snprintf(self.complaint, COMPLAINT, "handle %u stands wrongly in bucket %llu of the index",
                             handle, <ull>self.at)
                    return looked
                handle = self.store.cells.link(handle)[0]
            if handle:
                snprintf(self.complaint, COMPLAINT, "bucket %llu of the index has no end", <ull>self.at)
            self.at += 1
            looked += 1 + <uint32_t>length
        if looked < limit:
            self._enter(EXPORTS, 0)
        return looked

    # -- exports -------------------------------------------------------------------------------------------------

    cdef uint32_t _count_export(self, uint32_t limit) noexcept nogil:
        cdef uint32_t looked = self.disk.count_on(limit)
        if looked == 0:
            if self.disk.found_behind:
                snprintf(self.complaint, COMPLAINT, "export number %u stores a block behind its end", self.disk.number)
            if self.disk.is_wrong():
                snprintf(
                    self.complaint, COMPLAINT, "its entry in the block table of export number %u", self.disk.number)
            if not self.disk.gone:
                self._agree("blocks stored in export number", self.disk.number,
                            self.disk.stored, self.disk.found_stored)
                self._agree("same-filled blocks in export number", self.disk.number,
                            self.disk.same, self.disk.found_same)
            self.in_export = False
        return looked

    def _compare_exports(self):
        """The pool's blocks are those of its exports.

        They are summed HOLD exports a hold, and what changes in an export that is part of the sum changes the sum too
        (Blocks._add): so at the last hold it is that of one moment. Of two checks that sum at once, the first gives up.
        """
        cdef Disk disk
        cdef uint64_t number
        cdef int left = HOLD
        disks = self.pool.all_disks()
        lock_take(&self.pool.lock)
        self.pool.sum += 1
        self.pool.sum_stored = self.pool.sum_same = 0
        number = self.pool.sum
        for disk in disks:
            if left == 0:
                lock_leave(&self.pool.lock)
                with nogil:  # others' turn; never with the pool's lock, as they take that with the interpreter's
                    pass
                lock_take(&self.pool.lock)
                left = HOLD
            if number == self.pool.sum:
                disk.sum_up()
            left -= 1
        if number == self.pool.sum:
            self._agree("blocks stored in all exports", ALL, self.pool.blocks_stored, self.pool.sum_stored)
            self._agree("same-filled blocks in all exports", ALL, self.pool.blocks_same, self.pool.sum_same)
        lock_leave(&self.pool.lock)


cdef void* _zeroes(Region* region, uint64_t size) noexcept nogil:
    """Zeroes that nobody has touched yet, so that they cost nothing now. NULL without memory."""
    if region_reserve(region, size, NULL) and region_ensure(region, size):
        return region.base
    return NULL


cdef inline bint _is_object(uint64_t word) noexcept nogil:
    return kind_of(word) != CODEC_FREE and kind_of(word) != KIND_FILL and kind_of(word) != KIND_FORWARD
