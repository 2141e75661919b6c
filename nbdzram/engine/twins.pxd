# Which objects several blocks of one stretch of an export hold: what a client may be told of sharing. That others hold
# an object too is not for it to know, and must not show, neither way: so the count of holders, which is everybody's,
# is not even looked at. A block is told to share its object while another block of the export is seen to hold it.
#
# Which other block that would be is looked up here: the first and the last block where an object was seen, and where
# content was, two maps with open addressing. To look through a stretch takes milliseconds, so who has others to serve
# does it in steps (extents.look_for_twins), and by the time that a block is told of, its client may have written over
# the other: so it is only where to look, and looked at again (extents.pyx). A fold may come in between as well. Others'
# blocks have a say in which of equal objects it keeps, and so in whether the map of objects knows that one; content
# stays what it is. The memory is the caller's, and goes by how much the export stores: how long it takes tells nothing
# of others.

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

cdef enum:
    STRETCH_BLOCKS = 1 << 16  # 256 MiB of an export
    STRETCH_BITS = 16         # of the number of a block in its stretch. A place: key, first block, last block
    LAST_MASK = STRETCH_BLOCKS - 1

cdef struct Sightings:
    uint64_t* places
    uint64_t used

cdef struct Twins:
    Sightings objects   # by handle
    Sightings contents  # by fingerprint
    uint64_t capacity   # of each: a power of two, at least twice what is used; 0: there is no memory, and no sharing is
                        # told
    uint64_t until      # where the first block that is stored is sought, which is in the stretch
    uint64_t first      # of the stretch, in blocks; 0 with the end, until it is found
    uint64_t end
    uint64_t next       # the block from which it is not looked through yet

cdef inline size_t twins_bytes(uint64_t blocks) noexcept nogil:
    """The memory that a stretch takes of an export where so many blocks are stored."""
    cdef size_t capacity = 256
    while capacity < 2 * min(blocks, <uint64_t>STRETCH_BLOCKS):
        capacity *= 2
    return 2 * capacity * sizeof(uint64_t)

cdef inline void twins_end(Twins* twins) noexcept nogil:
    """There is nothing to look for, in any stretch."""
    twins.first = 0
    twins.next = twins.end = <uint64_t>-1

cdef inline void twins_begin(Twins* twins, uint64_t block, uint64_t until, void* memory, size_t size) noexcept nogil:
    """Of the stretch of the first block that is stored from `block` to before `until`, in `size` bytes of memory (see
    twins_bytes), or in none."""
    if size:
        memset(memory, 0, size)
    twins.capacity = size // sizeof(uint64_t) // 2
    twins.objects.places = <uint64_t*>memory
    twins.contents.places = twins.objects.places + twins.capacity
    twins.objects.used = twins.contents.used = 0
    twins.next, twins.until = block, until
    twins.first = twins.end = 0
    if size == 0:
        twins_end(twins)

cdef inline void twins_found(Twins* twins, uint64_t block) noexcept nogil:
    """A block is stored: its stretch is looked through."""
    twins.first = twins.next = block // STRETCH_BLOCKS * STRETCH_BLOCKS
    twins.end = twins.first + STRETCH_BLOCKS

cdef inline bint twins_know(const Twins* twins, uint64_t block) noexcept nogil:
    """Is a block in the stretch that was looked through?"""
    return twins.next == twins.end and twins.first <= block < twins.end

cdef inline uint32_t key_of_content(uint64_t fingerprint) noexcept nogil:
    """Several contents may have one: what is looked up is looked at again. No handle is 0, and no key."""
    return <uint32_t>(fingerprint ^ fingerprint >> 32) | 1

cdef inline uint64_t* twins_place(const Twins* twins, const Sightings* sightings, uint32_t key) noexcept nogil:
    """Where a key stands, or would."""
    cdef uint64_t place = (key * <uint64_t>0x9E3779B97F4A7C15) >> 32 & (twins.capacity - 1)
    while sightings.places[place] and sightings.places[place] >> 2 * STRETCH_BITS != key:
        place = (place + 1) & (twins.capacity - 1)
    return sightings.places + place

cdef inline void twins_note(Twins* twins, Sightings* sightings, uint64_t block, uint32_t key) noexcept nogil:
    """What is stored meanwhile and finds no place is not seen."""
    cdef uint64_t* place
    cdef uint64_t last = block - twins.first
    if (sightings.used + 1) * 2 > twins.capacity:
        return
    place = twins_place(twins, sightings, key)
    if place[0] == 0:
        sightings.used += 1
        place[0] = <uint64_t>key << 2 * STRETCH_BITS | last << STRETCH_BITS
    place[0] = place[0] & ~<uint64_t>LAST_MASK | last

cdef inline void twins_add(Twins* twins, uint64_t block, uint32_t handle, uint64_t fingerprint) noexcept nogil:
    """A block of the stretch holds an object."""
    twins_note(twins, &twins.objects, block, handle)
    twins_note(twins, &twins.contents, block, key_of_content(fingerprint))

cdef inline bint twins_saw(
    const Twins* twins, const Sightings* sightings, uint32_t key, uint64_t* first, uint64_t* last
) noexcept nogil:
    """The first and the last block where it was seen, if it was."""
    cdef uint64_t place = twins_place(twins, sightings, key)[0] if twins.capacity else 0
    first[0] = twins.first + (place >> STRETCH_BITS & LAST_MASK)
    last[0] = twins.first + (place & LAST_MASK)
    return place != 0
