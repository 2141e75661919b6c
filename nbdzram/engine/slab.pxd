from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from nbdzram.engine.arena cimport Arena, Region
from nbdzram.engine.census cimport Census
from nbdzram.engine.limbo cimport Limbo
from nbdzram.engine.publish cimport look8, look64

cdef enum:
    MIN_SIZE = 32
    SIZE_STEP = 16
    MAX_CLASSES = 255
    GROUPS = 8
    NO_SLOT = 0xFFFF
    MAX_SLOTS = 2048  # UNIT_SIZE / MIN_SIZE

    # A zspage's state.
    NOT_A_ZSPAGE = 0
    LISTED = 1     # has a free slot below top, stands in the list of its fullness group
    FULL = 2       # stands in no list
    EVACUATING = 3 # compaction moves its objects away; stands in a list that nothing is allocated from
    GROWING = 4    # has room only above top, where a slot may take a page; stands in a list of its own

    # Those lists' numbers, behind those of the fullness groups.
    EVACUATION_GROUP = GROUPS
    GROWING_GROUP = GROUPS + 1
    LISTS = GROUPS + 2

    # Why a slot was given up, and on whose account its pages come back.
    RELEASED = 0
    FOLDED = 1
    COMPACTED = 2
    RECOMPRESSED = 3
    CAUSES = 4

    RECLAIMED_AT_ONCE = 16  # slots looked through for one that has to be had

cdef struct ZSpage:
    uint32_t next
    uint32_t prev
    uint16_t used
    uint16_t top        # slots from here on were never used; of whole pages: how many are used or spare
    uint16_t free_slot  # first of the list of free slots; of whole pages: a bit for each free one
    uint8_t size_class   # this and the next are looked at beside others (can_lie): amended under whatever lock
    uint8_t state_group  # state in the low 4 bits, number of its list in the high ones

cdef struct SizeClass:
    uint32_t size
    uint32_t pages
    uint32_t slots
    uint32_t head[LISTS]       # first zspage of each list; 0 is none
    uint64_t used              # slots in use over all its zspages, retired ones among them
    uint64_t retired           # that no cell names any more, and a reader may still see
    uint64_t reached           # slots below top over all its zspages
    uint64_t left              # of the reached slots: in zspages that are being emptied
    uint64_t pages_used
    uint32_t zspages
    uint32_t groups            # bit per fullness group that is not empty

# What is remembered of a retired slot.
cdef inline uint64_t retired_word(uint32_t unit, uint32_t slot, int cause) noexcept nogil:
    return <uint64_t>unit << 13 | slot << 2 | cause

cdef inline uint32_t retired_unit(uint64_t word) noexcept nogil:
    return <uint32_t>(word >> 13)

cdef inline uint32_t retired_slot(uint64_t word) noexcept nogil:
    return <uint32_t>(word >> 2) & (MAX_SLOTS - 1)

cdef inline int retired_for(uint64_t word) noexcept nogil:
    return word & (CAUSES - 1)

cdef class Slab:
    # What readers look at, and nobody writes beside it.
    cdef Arena arena
    cdef uint32_t slot_size[MAX_CLASSES]
    cdef uint8_t class_of[4097]
    cdef char apart[128]
    cdef Region zspages  # of ZSpage, by unit
    cdef Region adopted  # only while an arena opens: a bit a slot, MAX_SLOTS a unit
    cdef SizeClass classes[MAX_CLASSES]
    cdef int class_count
    cdef uint64_t pages_used
    cdef uint64_t pages_max
    cdef uint64_t zspage_count
    cdef uint64_t freed_ever   # slots
    cdef Limbo limbo           # of retired slots (retired_word)
    cdef uint64_t* retired     # ... a ring
    cdef int cause             # on whose account slots are taken now
    cdef int64_t returned[CAUSES]  # pages, less those that were taken
    cdef uint32_t spare_unit   # of the spare pages, where they begin in it, and how many there are
    cdef uint32_t spare_first
    cdef uint32_t spare_count
    cdef Census census   # of a check under way, else None

    cdef ZSpage* zspage(self, uint32_t unit) noexcept nogil
    cdef bint saves(self, uint32_t length, uint32_t shorter) noexcept nogil
    cdef uint64_t offset_of(self, uint32_t unit, uint32_t slot, uint32_t length) noexcept nogil
    cdef bint alloc(self, uint32_t length, uint32_t* unit, uint32_t* slot) noexcept nogil
    cdef void retire(self, uint32_t unit, uint32_t slot, int cause) noexcept nogil
    cdef void retire_later(self, uint32_t unit, uint32_t slot, int cause) noexcept nogil
    cdef uint8_t hand_out(self, int index, uint8_t wanted, uint64_t* slots) noexcept nogil
    cdef void take_back(self, uint64_t item) noexcept nogil
    cdef bint is_emptied(self, uint32_t index, uint32_t unit) noexcept nogil
    cdef uint64_t reclaim(self, uint64_t limit) noexcept nogil
    cdef uint64_t retired_item(self, uint64_t position) noexcept nogil
    cdef void return_spares(self) noexcept nogil
    cdef uint64_t evacuation_gain(self, int index) noexcept nogil
    cdef bint can_evacuate(self, int index) noexcept nogil
    cdef bint plan_evacuation(self, int index) noexcept nogil
    cdef bint end_evacuation(self, int index) noexcept nogil
    cdef bint is_evacuating(self, uint32_t unit) noexcept nogil
    cdef bint holds(self, uint32_t unit) noexcept nogil
    cdef bint adoption_begin(self) noexcept nogil
    cdef bint adopt(self, uint32_t unit, uint32_t slot, uint32_t length) noexcept nogil
    cdef void _count_slots(self, uint32_t unit, ZSpage* page) noexcept nogil
    cdef void adoption_done(self) noexcept nogil

    cdef void _changes(self, uint32_t unit) noexcept nogil
    cdef bint _needs_page(self, SizeClass* klass) noexcept nogil
    cdef void _free(self, uint32_t unit, uint32_t slot) noexcept nogil
    cdef bint _new_zspage(self, int klass, uint32_t* unit) noexcept nogil
    cdef void _list_in(self, uint32_t unit, ZSpage* page, int state, int group) noexcept nogil
    cdef void _unlist(self, uint32_t unit, ZSpage* page) noexcept nogil
    cdef void _regroup(self, uint32_t unit, ZSpage* page) noexcept nogil
    cdef int _group_of(self, ZSpage* page) noexcept nogil
    cdef uint16_t _no_slot_used(self, SizeClass* klass) noexcept nogil
    cdef uint16_t* _free_link(self, uint32_t unit, uint32_t slot, SizeClass* klass) noexcept nogil
    cdef void _release_free_pages(self, uint32_t unit, ZSpage* page) noexcept nogil
    cdef void _thread_free_slots(self, uint32_t unit, ZSpage* page) noexcept nogil
    cdef void _place(self, uint32_t unit, ZSpage* page) noexcept nogil
    cdef bint is_whole(self, SizeClass* klass) noexcept nogil
    cdef bint _take_pages(self, SizeClass* klass, uint64_t offset, uint64_t count) noexcept nogil
    cdef void _return_pages(self, SizeClass* klass, uint64_t offset, uint64_t span, uint64_t count) noexcept nogil
    cdef void _spare(self, uint32_t unit, uint32_t slot) noexcept nogil
    cdef void _end_zspage(self, uint32_t unit, ZSpage* page) noexcept nogil
    cdef bint _take_slot(self, uint32_t unit, ZSpage* page, uint32_t* slot) noexcept nogil
    cdef bint _take_page_slot(self, uint32_t unit, ZSpage* page, uint32_t* slot) noexcept nogil
    cdef void _give_zspage(self, uint32_t unit, ZSpage* page) noexcept nogil
    cdef uint32_t _next_to_evacuate(self, int index) noexcept nogil
    cdef uint64_t pages_of(self, SizeClass* klass, uint64_t slots) noexcept nogil
    cdef uint32_t unit_end(self) noexcept nogil

cdef inline bint can_lie(Slab slab, uint32_t unit, uint32_t slot, uint32_t length) noexcept nogil:
    """Whether an object of `length` bytes can lie there, beside others too: a cell that memory changed may name any
    place."""
    cdef uint8_t index = slab.class_of[length]
    cdef ZSpage* page = <ZSpage*>slab.zspages.base + unit
    return (<uint64_t>unit * sizeof(ZSpage) < look64(&slab.zspages.committed)  # whole pages
            and look8(&page.size_class) == index and look8(&page.state_group) & 15 != NOT_A_ZSPAGE
            and slot < slab.classes[index].slots)
