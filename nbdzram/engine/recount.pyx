"""What a check counts: cells, zspages and nodes. What one weighs in the sums, and what must hold of it in itself.

A census (census.pyx) calls for both under the pool's lock, so that a thing is seen as it is between two changes.
Nothing here uses the engine's own counters: they are what the sums are held against (check.pyx).
"""

cimport cython
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.stdio cimport snprintf

from nbdzram.engine.cells cimport KIND_FILL, KIND_FORWARD, kind_of, length_of, slot_of, target_of, unit_of
from nbdzram.engine.census cimport COMPLAINT, Census
from nbdzram.engine.codec cimport CODEC_FREE, CODEC_RAW
from nbdzram.engine.page cimport PAGE_SIZE, UNIT_PAGES, UNIT_SIZE
from nbdzram.engine.slab cimport (
    FULL, GROUPS, GROWING, GROWING_GROUP, LISTED, NO_SLOT, NOT_A_ZSPAGE, SizeClass, Slab, ZSpage,
)
from nbdzram.engine.store cimport KINDS, ObjectStore
from nbdzram.engine.table cimport Tables

cdef extern from * nogil:
    int __builtin_popcount(unsigned int)
    int __builtin_popcountll(unsigned long long)


@cython.final
cdef class CellCensus(Census):
    """Handles, objects and what they share."""

    def __cinit__(self, ObjectStore store):
        self.store = store
        self.counted = 1  # there is no handle 0

    cdef void weigh(self, uint32_t number, int sign) noexcept nogil:
        cdef uint64_t word = self.store.cells.cell(number).word
        cdef uint64_t refs
        if kind_of(word) == CODEC_FREE:
            return
        self.live += sign
        if kind_of(word) >= KINDS:  # a fill, a forward, or what memory made of one
            return
        refs = self.store.cells.refs(number)
        self.objects += sign
        self.huge += sign * (kind_of(word) == CODEC_RAW)
        self.pending += sign * self.store.index.is_pending(number)
        self.bytes_of[kind_of(word)] += <int64_t>sign * length_of(word)
        self.slots_of[self.store.slab.class_of[length_of(word)]] += sign
        self.shared_objects += sign * (refs > 1)
        self.shared_bytes += sign * <int64_t>(refs - 1) * length_of(word)

    cdef uint32_t look(self, uint32_t handle, char* complaint) noexcept nogil:
        """A cell in itself: it leads to something, and stands in the index if it is to. What that cost."""
        cdef uint64_t word = self.store.cells.cell(handle).word
        cdef uint32_t other
        cdef ZSpage* page
        if kind_of(word) == CODEC_FREE or kind_of(word) == KIND_FILL:
            return 1
        if kind_of(word) == KIND_FORWARD:
            other = target_of(word)
            if other == 0 or other >= self.store.cells.high or kind_of(self.store.cells.cell(other).word) in (
                    CODEC_FREE, KIND_FILL):
                snprintf(complaint, COMPLAINT, "handle %u leads on to handle %u, which is no object", handle, other)
            return 1
        page = self.store.slab.zspage(unit_of(word))
        if not self.store.slab.holds(unit_of(word)) or not self._reaches(page, slot_of(word)) or (
                page.size_class != self.store.slab.class_of[length_of(word)]):
            snprintf(complaint, COMPLAINT, "object %u lies in slot %u of zspage %u, where none of its size can be",
                     handle, slot_of(word), unit_of(word))
            return 1
        if self.store.index.is_pending(handle):
            return 1
        other = self.store.index.first(self.store.cells.cell(handle).fingerprint)
        while other and other != handle:
            other = self.store.cells.link(other)[0]
        if other == 0:
            snprintf(complaint, COMPLAINT, "object %u is neither pending nor in its bucket of the index", handle)
        return 1

    cdef bint _reaches(self, ZSpage* page, uint32_t slot) noexcept nogil:
        """Whether an object can lie in a slot of a zspage: it is below top, or a page that is not free."""
        if self.store.slab.classes[page.size_class].size == PAGE_SIZE:
            return slot < UNIT_PAGES and not page.free_slot >> slot & 1
        return slot < page.top


@cython.final
cdef class ZspageCensus(Census):
    """Zspages, their pages and slots, by size class."""

    def __cinit__(self, Slab slab):
        self.slab = slab

    cdef void weigh(self, uint32_t number, int sign) noexcept nogil:
        cdef ZSpage* page = self.slab.zspage(number)
        if page.state_group == NOT_A_ZSPAGE:
            return
        self.zspages[page.size_class] += sign
        self.used[page.size_class] += <int64_t>sign * page.used
        self.pages[page.size_class] += <int64_t>sign * self.slab.pages_of(&self.slab.classes[page.size_class], page.top)

    cdef uint32_t look(self, uint32_t unit, char* complaint) noexcept nogil:
        """A zspage in itself: its free slots, and its place in its list. What that cost."""
        cdef ZSpage* page = self.slab.zspage(unit)
        cdef SizeClass* klass = &self.slab.classes[page.size_class]
        cdef int state = page.state_group & 15
        cdef int group = page.state_group >> 4
        cdef uint32_t free_slots = 0
        cdef uint32_t slot = page.free_slot
        if state == NOT_A_ZSPAGE:
            return 1
        if klass.size == PAGE_SIZE:  # a bit for each free page; top counts the others and the spare ones
            free_slots = klass.slots - page.used - __builtin_popcount(page.free_slot) + (
                self.slab.spare_count if unit == self.slab.spare_unit else 0)
            slot = NO_SLOT
        while slot != NO_SLOT and slot < page.top and free_slots <= klass.slots:
            free_slots += 1
            slot = (<uint16_t*>(self.slab.arena.base + <uint64_t>unit * UNIT_SIZE + slot * klass.size))[0]
        if slot != NO_SLOT or page.used + free_slots != page.top or page.used == 0:
            snprintf(complaint, COMPLAINT, "zspage %u: %u used and %u free of %u slots, and a list that ends in %u",
                     unit, <uint32_t>page.used, free_slots, <uint32_t>page.top, slot)
        elif (state == FULL and page.used != klass.slots or state != FULL and page.used == klass.slots
                or state == LISTED and (free_slots == 0 and klass.size != PAGE_SIZE
                                        or group != page.used * GROUPS // klass.slots)
                or state == GROWING and (free_slots or group != GROWING_GROUP)):
            snprintf(complaint, COMPLAINT, "zspage %u: %u of %u slots used, in state %d and group %d",
                     unit, <uint32_t>page.used, klass.slots, state, group)
        elif state != FULL and ((page.prev == 0 and klass.head[group] != unit)
                                or (page.prev != 0 and self.slab.zspage(page.prev).next != unit)
                                or (page.next != 0 and self.slab.zspage(page.next).prev != unit)):
            snprintf(complaint, COMPLAINT, "zspage %u stands wrongly in group %d of size class %u",
                     unit, group, klass.size)
        return 1 + free_slots


@cython.final
cdef class NodeCensus(Census):
    """Nodes of block tables, by page."""

    def __cinit__(self, Tables tables):
        self.tables = tables

    cdef void weigh(self, uint32_t number, int sign) noexcept nogil:
        self.nodes += sign * (self.tables.node(number)[0] != 0)


cdef uint32_t judge_slots(Slab slab, uint32_t unit, uint64_t* slots, char* complaint) noexcept nogil:
    """Complain of a zspage whose used slots are not those that were found (a bit a slot); what that cost.

    That its list of free ones ends, the census saw.
    """
    cdef ZSpage* page = slab.zspage(unit)
    cdef uint32_t found = 0
    cdef uint32_t free_slots = 0
    cdef uint32_t slot = page.free_slot
    cdef int index
    if page.state_group == NOT_A_ZSPAGE:
        return 0
    for index in range(SLOT_WORDS):
        found += __builtin_popcountll(slots[index])
    if found != page.used:
        snprintf(complaint, COMPLAINT, "zspage %u: %u slots counted, %u objects found",
                 unit, <uint32_t>page.used, found)
    if slab.classes[page.size_class].size == PAGE_SIZE:
        if slots[0] & page.free_slot:
            snprintf(complaint, COMPLAINT, "zspage %u: pages %x are free, and objects lie in some of them",
                     unit, <uint32_t>page.free_slot)
        return 0
    while slot != NO_SLOT and not complaint[0]:
        if slots[slot // 64] >> (slot & 63) & 1:
            snprintf(complaint, COMPLAINT, "zspage %u: slot %u is free, and an object lies in it", unit, slot)
        slot = (<uint16_t*>(slab.arena.base + <uint64_t>unit * UNIT_SIZE
                            + slot * slab.classes[page.size_class].size))[0]
        free_slots += 1
    return free_slots
