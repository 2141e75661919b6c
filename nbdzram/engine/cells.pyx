"""Handle cells: what a handle means, and how many hold it.

A handle is a number from 1; its cell is 16 bytes in the arena. Cells live in segments of 1 MiB (65,536 cells), so that
a cell never moves; the segments' places stand in a directory in the arena. It has no checks, so it is read once, when
it is opened and every unit gets one owner (opening.pyx): a bit that flips in it later leads nobody astray.

    word         63       55 54                27 26      16 15        4 3    0
    object      |   refs    |       unit         |   slot   | length-1  | codec |
    forward     |   refs    |            | 35    target handle        4 | 15    |
    fill        |   refs    |            | 35        check          4 | 14    |
    free        |                              0                                |
    fingerprint |  XXH3 of the block's uncompressed content (fill: the repeated word)  |

A forward is what folding leaves of an object that equalled another: the block table keeps its handle, the cell leads
on.

Invariants
1. word (without refs) and fingerprint are authoritative: a cell becomes what it is by one 8-byte store of its word.
   The entries that lead to a cell check its fingerprint, and its fingerprint checks the bytes; a fill checks itself.
2. refs is derived. It counts the block table entries that lead to a cell, directly or through forwards, so that an
   object's refs is the number of its sharers and a cell lives exactly as long as something leads to it.
3. refs above REFS_MAX continue in a chunk beside the arena: they are rare, and nine bits keep a block's cost below 32
   bytes. Whoever adds holders makes sure first that they can be counted (can_count): one that is not would free an
   object too early, or keep it for ever.
4. A link is derived: of a free cell the next free one, of an object in the index the next of its bucket.
5. A cell is free at once when nothing leads to it any more; its handle is another's only when no reader can have it in
   hand (quiescence.pyx). So for a reader a handle's fingerprint never changes, and its word is the object's, or a
   forward to an equal one that lives as long, or free: then the entry that led there has changed.

Not locked here: every call is covered by the pool's lock, or on its shared side by the depot's (kit.pyx), or it is of a
handle that is the caller's.
"""

cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from nbdzram.engine.arena cimport Arena, Region, region_ensure, region_free, region_reserve
from nbdzram.engine.ledger cimport ledger_count, ledger_give, ledger_take
from nbdzram.engine.limbo cimport LIMBO_FEW, limbo_count, limbo_due, limbo_one_less, limbo_one_more, limbo_ripen
from nbdzram.engine.must cimport must, must_debug
from nbdzram.engine.page cimport PAGE_SIZE, UNIT_SIZE
from nbdzram.engine.publish cimport amend32, amend64, look64, publish32, publish64

from nbdzram.engine.format cimport SEGMENTS_MAX

from nbdzram.errors import ArenaError


@cython.final
cdef class Cells:
    """`directory` is the arena's offset of 65,536 segment numbers."""

    def __cinit__(self, Arena arena, uint64_t directory):
        self.arena = arena
        self.directory = <uint32_t*>(arena.base + directory)
        self.segments = <uint32_t*>calloc(SEGMENTS_MAX, sizeof(uint32_t))  # pages that nobody touches cost nothing
        if self.segments == NULL:
            raise MemoryError
        self.high = 1
        if (not region_reserve(&self.links, handles_max(arena) * sizeof(uint32_t), &arena.ledger)
                or not region_reserve(&self.chunk_of, (handles_max(arena) // CHUNK + 1) * sizeof(uint32_t), NULL)
                or not region_reserve(&self.chunks, (handles_max(arena) + 2 * CHUNK) * sizeof(uint32_t), NULL)):
            raise ArenaError("cannot reserve addresses for handles; raise ulimit -v")

    def __dealloc__(self):
        free(self.segments)
        region_free(&self.links)
        region_free(&self.chunk_of)
        region_free(&self.chunks)

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
        cdef uint32_t handle
        if self.free_head == 0 and limbo_count(&self.limbo) and (
                limbo_count(&self.limbo) >= LIMBO_FEW or self.high % CELLS_A_PAGE == 0):
            self.reclaim(LIMBO_FEW)
        handle = self.free_head
        if handle:
            self.free_head = self.link(handle)[0]
        else:
            handle = self.high
            if handle == <uint32_t>-1 or not self._make_room(handle):
                return 0
            amend32(&self.high, self.high + 1)
        self.changes(handle)
        self.live += 1
        return handle

    cdef uint32_t hand_out(self, uint32_t wanted, uint32_t* handles) noexcept nogil:
        """Handles for a kit, which takes the last first and so the lowest; not live yet: one, and as many as need no
        page more. 0: there is none."""
        cdef uint32_t count = 0, index
        while count < wanted and (count == 0 or self.free_head or self.high % CELLS_A_PAGE):
            handles[count] = self.alloc()
            if handles[count] == 0:
                break
            self.live -= 1
            count += 1
        for index in range(count // 2):
            handles[index], handles[count - 1 - index] = handles[count - 1 - index], handles[index]
        return count

    cdef void take_back(self, uint32_t handle) noexcept nogil:
        """A kit gives a handle back, which nobody can have in hand any more."""
        must_debug(self.cell(handle).word == 0, b"a handle at hand is no object's")
        self._list(handle)

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
            publish32(&self.directory[handle >> 16], unit)
            amend32(&self.segments[handle >> 16], unit)
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
        return <uint64_t>(<char*>(self.directory + segment) - <char*>self.arena.base)

    cdef uint32_t segments_held(self) noexcept nogil:
        """How many segments an arena opened again has."""
        cdef uint32_t count = 0
        while count < SEGMENTS_MAX and self.arena.holds(self.directory_at(count)) and self.learn_segment(count):
            count += 1
        return count

    cdef uint32_t learn_segment(self, uint32_t segment) noexcept nogil:
        """Where the arena says that a segment is, from now on; 0: nowhere."""
        self.segments[segment] = self.directory[segment]
        return self.segments[segment]

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

    cdef void retire(self, uint32_t handle) noexcept nogil:
        """Nothing leads to a handle any more: its cell is free, and it is another's when no reader can have it in
        hand."""
        self.changes(handle)
        publish64(&self.cell(handle).word, 0)
        self.live -= 1
        self.retire_later(handle)

    cdef void retire_later(self, uint32_t handle) noexcept nogil:
        """The same of a handle whose cell is free, and not counted as live."""
        if limbo_count(&self.limbo):
            self.link(self.retired_tail)[0] = handle
        else:
            self.retired_head = handle
        self.retired_tail = handle
        limbo_one_more(&self.limbo)
        self.reclaim(limbo_due(&self.limbo))

    cdef uint64_t reclaim(self, uint64_t limit) noexcept nogil:
        """Let up to `limit` retired handles be another's that nobody has in hand any more; how many."""
        cdef uint64_t count = 0
        cdef uint32_t handle
        while count < limit and (self.limbo.first < self.limbo.ripe or limbo_ripen(&self.limbo)):
            handle = self.retired_head
            self.retired_head = self.link(handle)[0]
            limbo_one_less(&self.limbo)
            self._list(handle)
            count += 1
        return count

    cdef void free(self, uint32_t handle) noexcept nogil:
        """Take a handle back that no reader can have: of an arena that is being opened, or one that was not used
        yet."""
        self.changes(handle)
        publish64(&self.cell(handle).word, 0)
        self.live -= 1
        self._list(handle)

    cdef void _list(self, uint32_t handle) noexcept nogil:
        self.link(handle)[0] = self.free_head
        self.free_head = handle

    # -- reference counts ----------------------------------------------------------------------------------------

    cdef uint64_t refs(self, uint32_t handle) noexcept nogil:
        cdef uint64_t inline_refs = look64(&self.cell(handle).word) >> REFS_SHIFT
        cdef uint32_t* beyond = self._beyond(handle) if inline_refs == REFS_MAX else NULL
        return inline_refs + (beyond[0] if beyond != NULL else 0)

    cdef bint can_count(self, uint32_t handle, uint64_t count) noexcept nogil:
        """Make sure that so many holders more can be added. False without memory."""
        return (self.cell(handle).word >> REFS_SHIFT) + count <= REFS_MAX or self.take_chunk(handle)

    cdef void add_refs(self, uint32_t handle, uint64_t count) noexcept nogil:
        cdef Cell* cell = self.cell(handle)
        cdef uint64_t room = REFS_MAX - (cell.word >> REFS_SHIFT)
        cdef uint64_t inline_refs = min(room, count)
        cdef uint32_t* beyond
        self.changes(handle)
        amend64(&cell.word, cell.word + (inline_refs << REFS_SHIFT))
        if count > inline_refs:
            beyond = self._beyond(handle)
            must(beyond != NULL, b"a holder is added where it can be counted")
            beyond[0] += <uint32_t>(count - inline_refs)

    cdef bint drop_ref(self, uint32_t handle) noexcept nogil:
        """One holder less. True when it was the last."""
        cdef Cell* cell = self.cell(handle)
        cdef uint32_t* beyond
        self.changes(handle)
        if cell.word >> REFS_SHIFT == REFS_MAX:
            beyond = self._beyond(handle)
            if beyond != NULL and beyond[0]:
                beyond[0] -= 1
                if beyond[0] == 0:
                    self._give_chunk(handle)
                return False
        amend64(&cell.word, cell.word - (<uint64_t>1 << REFS_SHIFT))
        return cell.word >> REFS_SHIFT == 0

    cdef uint32_t* _chunk(self, uint32_t number) noexcept nogil:
        return <uint32_t*>self.chunks.base + <uint64_t>number * CHUNK

    cdef uint32_t* _beyond(self, uint32_t handle) noexcept nogil:
        """Where a handle's holders beyond REFS_MAX are counted; NULL: no handle of its chunk has any."""
        cdef uint64_t place = handle // CHUNK
        if place * sizeof(uint32_t) >= self.chunk_of.pages * PAGE_SIZE or (<uint32_t*>self.chunk_of.base)[place] == 0:
            return NULL
        return self._chunk((<uint32_t*>self.chunk_of.base)[place]) + handle % CHUNK

    cdef bint take_chunk(self, uint32_t handle) noexcept nogil:
        """Make room for counting a handle's holders beyond REFS_MAX. False without memory.

        Whatever the limit: a fold that could not count would not make room. It is 64 bytes for 512 entries of 8 at
        least.
        """
        cdef uint32_t* place = <uint32_t*>self.chunk_of.base + handle // CHUNK
        if not self._ensure(&self.chunk_of, (<uint64_t>(handle // CHUNK) + 1) * sizeof(uint32_t)):
            return False
        if place[0]:
            return True
        if self.chunk_free:
            place[0] = self.chunk_free
            self.chunk_free = self._chunk(place[0])[0]
            self._chunk(place[0])[0] = 0
            return True
        if not self._ensure(&self.chunks, (<uint64_t>self.chunks_high + 2) * CHUNK * sizeof(uint32_t)):
            return False
        self.chunks_high += 1
        place[0] = self.chunks_high
        return True

    cdef bint _ensure(self, Region* region, uint64_t size) noexcept nogil:
        cdef uint64_t pages = region.pages
        cdef bint done = region_ensure(region, size)
        ledger_count(&self.arena.ledger, region.pages - pages)
        return done

    cdef void _give_chunk(self, uint32_t handle) noexcept nogil:
        """Take a chunk back when it counts nobody."""
        cdef uint32_t* place = <uint32_t*>self.chunk_of.base + handle // CHUNK
        cdef uint32_t* counts = self._chunk(place[0])
        cdef int index
        for index in range(CHUNK):
            if counts[index]:
                return
        counts[0] = self.chunk_free
        self.chunk_free = place[0]
        place[0] = 0

    cdef uint64_t pages(self) noexcept nogil:
        """Pages of cells and their directory, links and holders beyond REFS_MAX."""
        return self.cell_pages + self.directory_pages + self.links.pages + self.chunk_of.pages + self.chunks.pages
