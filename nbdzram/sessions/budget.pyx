"""What payloads and replies under way may hold, over all clients of a server; and a buffer that is charged to it.

When the budget is used up, READs go on in small steps without it, and WRITEs are stored as they arrive, so that nobody
stands still (session.pyx). Any thread; the count is one atomic number, which nobody reads for more than a decision that
may be a little late.
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc

cdef extern from "<malloc.h>" nogil:
    int malloc_trim(size_t)
    int mallopt(int, int)
    enum:
        M_ARENA_MAX
        M_MMAP_THRESHOLD
        M_TRIM_THRESHOLD

cdef enum:
    # Buffers up to here are reused without the system. Linux asks for 1,280 KiB at once, and since 6.17 for 4 MiB
    # (BLK_DEF_MAX_SECTORS_CAP); a page for what stands before it in a Piece.
    LARGEST_KEPT = (4 << 20) + 4096
    MOST_KEPT = 16 << 20      # freed memory that is kept for them


def keep_memory():
    """Reuse freed buffers. By default the C library gives each 256 KiB back at once, and the next one is made of fresh
    pages: six tenths of the time of a server that answered reads of 256 KiB went there, and four tenths where it stored
    writes of 1 MiB.

    One arena for all threads: of others the C library never gives back what is free at their end, megabytes for each
    thread after a flood. Threads that serve clients ask for memory seldom: where a peer does not read, or sends
    much."""
    mallopt(M_ARENA_MAX, 1)
    mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
    mallopt(M_TRIM_THRESHOLD, MOST_KEPT)


def release_memory():
    """Give freed buffers back to the system: the C library keeps them otherwise, tens of megabytes after a flood."""
    with nogil:
        malloc_trim(0)


cdef class Budget:
    """See the module's docstring."""

    def __init__(self, uint64_t limit):
        self.limit = limit

    @property
    def used(self):
        """Bytes that are held now."""
        return budget_used(&self._used)


cdef Piece* new_piece(size_t size, uint64_t charged) noexcept nogil:
    """`charged` bytes were taken from the budget for it. NULL: there is no memory, and they are the caller's still."""
    cdef Piece* piece = <Piece*>malloc(sizeof(Piece) + size)
    if piece == NULL:
        return NULL
    piece.next = NULL
    piece.bytes = <uint8_t*>(piece + 1)
    piece.size = piece.end = size
    piece.start = 0
    piece.charged = charged
    return piece


cdef void free_piece(Piece* piece, Budget budget) noexcept nogil:
    """Also of none (NULL)."""
    if piece != NULL:
        budget.give_back(piece.charged)
        free(piece)
