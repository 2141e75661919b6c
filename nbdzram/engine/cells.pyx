"""Handle cells: what a handle means, and how many hold it.

A handle is a number from 1; its cell is 16 bytes in the arena. Cells live in segments of 1 MiB (65,536 cells), so that
a cell never moves; the segments' places stand in a directory in the arena.

    word         63       55 54                27 26      16 15        4 3    0
    object      |   refs    |       unit         |   slot   | length-1  | codec |
    forward     |   refs    |            | 35    target handle        4 | 15    |
    fill        |   refs    |            | 35        check          4 | 14    |
    free        |                              0                                |
    fingerprint |  XXH3 of the block's uncompressed content (fill: the repeated word)  |

A forward is what folding leaves of an object that equalled another: the block table keeps its handle, the cell leads on.

Invariants
1. word (without refs) and fingerprint are authoritative: a cell becomes what it is by one 8-byte store of its word.
   The entries that lead to a cell check its fingerprint, and its fingerprint checks the bytes; a fill checks itself.
2. refs is derived. It counts the block table entries that lead to a cell, directly or through forwards, so that an
   object's refs is the number of its sharers and a cell lives exactly as long as something leads to it.
3. refs above REFS_MAX continue in the spill table: they are rare, and nine bits keep a block's cost below 32 bytes.
4. A link is derived: of a free cell the next free one, of an object in the index the next of its bucket.

Not locked here: the pool's lock covers every call.
"""

cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from nbdzram.engine.arena cimport (
    PAGE_SIZE, UNIT_SIZE, Arena, pages_for, region_ensure, region_free, region_reserve,
)
from nbdzram.engine.ledger cimport ledger_count, ledger_give, ledger_take
from nbdzram.engine.publish cimport publish32, publish64

from nbdzram.engine.format cimport SEGMENTS_MAX

from nbdzram.errors import ArenaError


@cython.final
cdef class Cells:
    """`directory` is the arena's offset of 65,536 segment numbers."""

    def __cinit__(self, Arena arena, uint64_t directory):
        self.arena = arena
        self.segments = <uint32_t*>(arena.base + directory)
        self.high = 1
        if not region_reserve(&self.links, handles_max(arena) * sizeof(uint32_t), &arena.ledger):
            raise ArenaError("cannot reserve addresses for handles; raise ulimit -v")

    def __dealloc__(self):
        region_free(&self.links)
        free(self.spill_handles)
        free(self.spill_counts)

    cdef Cell* cell(self, uint32_t handle) noexcept nogil:
        return <Cell*>(self.arena.base + <uint64_t>self.segments[handle >> 16] * UNIT_SIZE) + (handle & 0xFFFF)

    cdef uint32_t* link(self, uint32_t handle) noexcept nogil:
        return <uint32_t*>self.links.base + handle

    cdef void changes(self, uint32_t handle) noexcept nogil:
        """Tell a check that the cell is about to change, or whether it is pending."""
        if self.census is not None:
            self.census.change(handle)

    cdef uint32_t alloc(self) noexcept nogil:
        """A handle whose cell is free. 0 when there is no memory, or no number, for one more."""
        cdef uint32_t handle = self.free_head
        if handle:
            self.free_head = self.link(handle)[0]
        else:
            handle = self.high
            if handle == <uint32_t>-1 or not self._make_room(handle):
                return 0
            self.high += 1
        self.changes(handle)
        self.live += 1
        return handle

    cdef bint _make_room(self, uint32_t handle) noexcept nogil:
        cdef uint32_t unit
        if not region_ensure(&self.links, (<uint64_t>handle + 1) * sizeof(uint32_t)):
            return False
        if self._directory_page(handle) >= self.directory_pages:
            if not self._take_page(self.directory_at(handle >> 16) // PAGE_SIZE * PAGE_SIZE):
                return False
            self.directory_pages += 1
        if self.segments[handle >> 16] == 0:
            unit = self.arena.take_run(SEGMENT_UNITS)
            if unit == 0:
                return False
            publish32(&self.segments[handle >> 16], unit)
        if handle // CELLS_A_PAGE >= self.cell_pages:
            if not self._take_page(
                    <uint64_t>self.segments[handle >> 16] * UNIT_SIZE + (handle & 0xFFFF) // CELLS_A_PAGE * PAGE_SIZE):
                return False
            self.cell_pages += 1
        return True

    cdef uint64_t _directory_page(self, uint32_t handle) noexcept nogil:
        """Which page of the directory names the segment of a handle."""
        return (handle >> 16) * sizeof(uint32_t) // PAGE_SIZE

    cdef bint _take_page(self, uint64_t offset) noexcept nogil:
        """Make a page of the arena ours. False at the limit, or when the system has none."""
        if not ledger_take(&self.arena.ledger, 1):
            return False
        if not self.arena.commit(offset, PAGE_SIZE):
            ledger_give(&self.arena.ledger, 1)
            return False
        return True

    cdef uint64_t directory_at(self, uint32_t segment) noexcept nogil:
        """The arena's offset of a segment's number."""
        return <uint64_t>(<char*>(self.segments + segment) - <char*>self.arena.base)

    cdef uint32_t segments_held(self) noexcept nogil:
        """How many segments an arena opened again has."""
        cdef uint32_t count = 0
        while count < SEGMENTS_MAX and self.arena.holds(self.directory_at(count)) and self.segments[count]:
            count += 1
        return count

    cdef bint held(self, uint32_t handle) noexcept nogil:
        """Whether the page of a cell may be read in an arena opened again; if not, its cells are free."""
        return self.arena.holds(<uint64_t>(<char*>self.cell(handle) - <char*>self.arena.base))

    cdef bint begin(self) noexcept nogil:
        """Take what the first handles need, in a new arena. False without memory."""
        return self._make_room(1)

    cdef bint ready(self) noexcept nogil:
        """Make room for the links of handles found in an arena opened again."""
        self.directory_pages = self._directory_page(self.high - 1) + 1
        self.cell_pages = (<uint64_t>self.high + CELLS_A_PAGE - 1) // CELLS_A_PAGE
        return region_ensure(&self.links, (<uint64_t>self.high + 1) * sizeof(uint32_t))

    cdef void free(self, uint32_t handle) noexcept nogil:
        """Take a handle back; nothing leads to it any more."""
        self.changes(handle)
        publish64(&self.cell(handle).word, 0)
        self.link(handle)[0] = self.free_head
        self.free_head = handle
        self.live -= 1

    # -- reference counts ----------------------------------------------------------------------------------------

    cdef uint64_t refs(self, uint32_t handle) noexcept nogil:
        cdef uint64_t inline_refs = self.cell(handle).word >> REFS_SHIFT
        cdef uint32_t place
        if inline_refs == REFS_MAX and self.spill_used:
            place = self._spill_find(handle)
            if self.spill_handles[place] == handle:
                return inline_refs + self.spill_counts[place]
        return inline_refs

    cdef void add_refs(self, uint32_t handle, uint64_t count) noexcept nogil:
        cdef Cell* cell = self.cell(handle)
        cdef uint64_t room = REFS_MAX - (cell.word >> REFS_SHIFT)
        cdef uint64_t inline_refs = min(room, count)
        cdef uint32_t place
        self.changes(handle)
        cell.word += inline_refs << REFS_SHIFT
        count -= inline_refs
        if count == 0:
            return
        if (self.spill_used + 1) * 4 >= self.spill_capacity * 3 and not self._spill_grow():
            # Without memory to count, an object with many sharers is kept for ever rather than freed too early.
            self.spill_lost = True
            return
        place = self._spill_find(handle)
        if self.spill_handles[place] != handle:
            self.spill_handles[place] = handle
            self.spill_counts[place] = 0
            self.spill_used += 1
        self.spill_counts[place] += <uint32_t>count

    cdef bint drop_ref(self, uint32_t handle) noexcept nogil:
        """One holder less. True when it was the last."""
        cdef Cell* cell = self.cell(handle)
        cdef uint32_t place
        self.changes(handle)
        if cell.word >> REFS_SHIFT == REFS_MAX:
            if self.spill_used:
                place = self._spill_find(handle)
                if self.spill_handles[place] == handle:
                    self.spill_counts[place] -= 1
                    if self.spill_counts[place] == 0:
                        self._spill_remove(place)
                    return False
            if self.spill_lost:
                return False
        cell.word -= <uint64_t>1 << REFS_SHIFT
        return cell.word >> REFS_SHIFT == 0

    # The spill table: open addressing, linear probing, no tombstones (removal shifts back).

    cdef uint32_t _spill_find(self, uint32_t handle) noexcept nogil:
        cdef uint32_t mask = self.spill_capacity - 1
        cdef uint32_t place = (handle * <uint32_t>2654435761) & mask
        while self.spill_handles[place] != 0 and self.spill_handles[place] != handle:
            place = (place + 1) & mask
        return place

    cdef bint _spill_grow(self) noexcept nogil:
        cdef uint32_t capacity = max(<uint32_t>64, self.spill_capacity * 2)
        cdef uint32_t* old_handles = self.spill_handles
        cdef uint32_t* old_counts = self.spill_counts
        cdef uint32_t old_capacity = self.spill_capacity
        cdef uint32_t* handles = <uint32_t*>calloc(capacity, sizeof(uint32_t))
        cdef uint32_t* counts = <uint32_t*>calloc(capacity, sizeof(uint32_t))
        cdef uint32_t index, place
        if handles == NULL or counts == NULL:
            free(handles)
            free(counts)
            return False
        # A holder that is not counted is lost for ever: whatever the limit. There are 512 entries of 8 bytes for each of 8.
        ledger_count(&self.arena.ledger, _spill_pages(capacity) - _spill_pages(self.spill_capacity))
        self.spill_handles = handles
        self.spill_counts = counts
        self.spill_capacity = capacity
        for index in range(old_capacity):
            if old_handles[index]:
                place = self._spill_find(old_handles[index])
                handles[place] = old_handles[index]
                counts[place] = old_counts[index]
        free(old_handles)
        free(old_counts)
        return True

    cdef void _spill_remove(self, uint32_t place) noexcept nogil:
        cdef uint32_t mask = self.spill_capacity - 1
        cdef uint32_t hole = place
        cdef uint32_t home
        self.spill_used -= 1
        while True:
            place = (place + 1) & mask
            if self.spill_handles[place] == 0:
                break
            home = (self.spill_handles[place] * <uint32_t>2654435761) & mask
            # Move it back unless its home lies cyclically behind the hole.
            if ((place - home) & mask) >= ((place - hole) & mask):
                self.spill_handles[hole] = self.spill_handles[place]
                self.spill_counts[hole] = self.spill_counts[place]
                hole = place
        self.spill_handles[hole] = 0

    cdef uint64_t pages(self) noexcept nogil:
        """Pages of cells and their directory, links and spilled counts."""
        return self.cell_pages + self.directory_pages + self.links.pages + _spill_pages(self.spill_capacity)


cdef uint64_t _spill_pages(uint64_t capacity) noexcept nogil:
    return pages_for(capacity * 2 * sizeof(uint32_t))
