from libc.stdint cimport uint8_t, uint32_t, uint64_t

from nbdzram.engine.arena cimport Arena
from nbdzram.engine.format cimport NAME_ROOM

cdef enum Field:
    # What of an entry changes while it is in use; the root is its block table's (Tables).
    STATE
    SIZE
    SHRINKING_FROM
    CONCEALED
    IDENTITY

cdef struct Head:
    uint32_t state
    uint32_t flags
    uint64_t size
    uint64_t shrinking_from  # above size: blocks from the size up to here may still be stored
    uint32_t generation      # of those that this entry has been, the how manieth this one is
    uint32_t name_length
    uint32_t name_place      # n: it begins at byte n - 1 of its room, and is checked alone; 0: at 0, with all the room
    uint32_t concealed       # beside DELETING: see format.pxd
    uint64_t identity        # of the content, while it may not change: see Directory.identity; 0: none
    uint64_t serial
    uint64_t check           # of all before it, and of the name

cdef struct ExportEntry:
    uint32_t old_state       # format 1, to the name's end
    uint32_t old_flags
    uint64_t old_size
    uint32_t old_root
    uint32_t old_name_length
    char name[NAME_ROOM]
    Head heads[2]
    uint64_t current         # serial 63..17 | which head 16 | check 15..0; 0: never used
    uint64_t root            # of the block table (table.pyx)
    uint8_t rest[88]

cdef class Directory:
    cdef Arena arena
    cdef uint64_t seed

    cdef ExportEntry* entry(self, uint32_t number) noexcept nogil
    cdef Head* head(self, uint32_t number) noexcept nogil
    cdef uint32_t state(self, uint32_t number) noexcept nogil
    cdef bint is_held(self, uint32_t number) noexcept nogil
    cdef uint32_t next_held(self, uint32_t number) noexcept nogil
    cdef bint is_right(self, uint32_t number) noexcept nogil
    cdef bint make_room(self, uint32_t number) noexcept nogil
    cdef void write(
        self, uint32_t number, const char* name, uint32_t name_length, uint64_t size, uint32_t flags
    ) noexcept nogil
    cdef void write_head(
        self, uint32_t number, uint32_t state, uint32_t flags, uint64_t size, uint32_t name_length
    ) noexcept nogil
    cdef void share(self, uint32_t number, uint64_t size, uint64_t shrinking_from) noexcept nogil
    cdef void publish(self, uint32_t number, Field field, uint64_t value) noexcept nogil
    cdef bint is_kept(self, uint32_t number) noexcept nogil
    cdef uint64_t identity(self, uint32_t number) noexcept nogil
    cdef void identify(self, uint32_t number, uint64_t identity) noexcept nogil
    cdef void finish_deletion(self, uint32_t number) noexcept nogil
    cdef str name_of(self, uint32_t number)
    cdef uint64_t _life(self, uint32_t number) noexcept nogil
    cdef bint rename(self, uint32_t number, const char* name, uint32_t name_length) noexcept nogil
    cdef bint _has_name(self, const Head* head) noexcept nogil
    cdef uint32_t _room_beside(self, const Head* head, uint32_t length) noexcept nogil
    cdef Head* _next(self, uint32_t number) noexcept nogil
    cdef void _turn(self, uint32_t number, Head* head) noexcept nogil
    cdef uint64_t _check(self, uint32_t number, const Head* head) noexcept nogil
