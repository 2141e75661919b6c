"""What payloads and replies under way may hold, over all clients of a server; and a buffer that is charged to it.

When the budget is used up, READs go on in small steps without it, and WRITEs are stored as they arrive, so that nobody
stands still (session.pyx). Any thread; the count is one atomic number, which nobody reads for more than a decision that
may be a little late.

Large buffers that are freed are kept for those who ask next: fresh pages cost more than what is done with them. Each is
a mapping of its own, not memory of the C library's heap, so that no order in which clients ask and leave makes holes in
that, and what is kept and what is in use are at most the budget together. What nobody took for a second or two goes
back to the system.
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc

from posix.types cimport off_t

cdef extern from "<malloc.h>" nogil:
    int malloc_trim(size_t)
    int mallopt(int, int)
    enum:
        M_ARENA_MAX
        M_MMAP_THRESHOLD
        M_TRIM_THRESHOLD

cdef extern from "<sys/mman.h>" nogil:
    void* mmap(void*, size_t, int, int, int, off_t)
    int munmap(void*, size_t)
    void* MAP_FAILED
    enum:
        MAP_ANONYMOUS
        MAP_PRIVATE
        PROT_READ
        PROT_WRITE

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t*, void*)
    int pthread_mutex_destroy(pthread_mutex_t*)
    int pthread_mutex_lock(pthread_mutex_t*)
    int pthread_mutex_unlock(pthread_mutex_t*)

cdef enum:
    LEAST_KEPT = 64 << 10     # buffers from here on are mappings of their own, and kept
    # ... and up to here. Linux asks for 1,280 KiB at once, and since 6.17 for 4 MiB (BLK_DEF_MAX_SECTORS_CAP); a page
    # for what stands before an answer.
    LARGEST_KEPT = (4 << 20) + 4096
    MOST_KEPT = 16 << 20      # of them together
    SPARE = 4                 # one that is kept is taken for what needs less by this part of it at most
    HEAP_PART = 2 << 20       # what Python's own buffers have at most: a record of a stream, a part of a file
    HEAP_SPARE = 4 << 20      # of those, what the C library keeps at the end of its heap


def keep_memory():
    """Have the C library use the memory of Python's buffers again: by default it gives each of 128 KiB back at once,
    and the next one is made of fresh pages, which was two thirds of what it took to send a stream. It would learn to
    keep those up to 32 MiB, and of its heap it gives back the end alone; so a larger one is a mapping, and goes back
    when it is freed.

    One arena for all threads: of others the C library never gives back what is free at their end, megabytes for each
    thread after a flood. Threads that serve clients ask for memory seldom: where a peer does not read, or sends
    much."""
    mallopt(M_ARENA_MAX, 1)
    mallopt(M_MMAP_THRESHOLD, HEAP_PART)
    mallopt(M_TRIM_THRESHOLD, HEAP_SPARE)


def release_memory():
    """Give freed buffers back to the system: the C library keeps small ones otherwise, megabytes after a flood."""
    with nogil:
        malloc_trim(0)


cdef class Budget:
    """See the module's docstring."""

    def __cinit__(self):
        pthread_mutex_init(&self.mutex, NULL)

    def __init__(self, uint64_t limit):
        self.limit = limit

    def __dealloc__(self):
        self._let_go(0)
        pthread_mutex_destroy(&self.mutex)

    @property
    def used(self):
        """Bytes that are held now."""
        return budget_used(&self._used)

    @property
    def kept(self):
        """Bytes of buffers that nobody has."""
        return self.kept_bytes

    def rest(self):
        """Called now and then: keep nothing when nothing of it was taken since the last call."""
        cdef bint rested
        pthread_mutex_lock(&self.mutex)
        rested = self.rested
        self.rested = True
        pthread_mutex_unlock(&self.mutex)
        if rested:
            with nogil:
                self._let_go(0)

    def empty(self):
        """Keep nothing."""
        with nogil:
            self._let_go(0)

    cdef Piece* _take_kept(self, size_t size) noexcept nogil:
        """The smallest that has room for `size` bytes, and for not much more. NULL: none is kept."""
        cdef Piece** place = &self.kept
        cdef Piece** best = NULL
        cdef Piece* found = NULL
        pthread_mutex_lock(&self.mutex)
        self.rested = False
        while place[0] != NULL:
            if size <= place[0].room <= size + size // SPARE and (best == NULL or place[0].room < best[0].room):
                best = place
            place = &place[0].next
        if best != NULL:
            found = best[0]
            best[0] = found.next
            self.kept_bytes -= found.room
        pthread_mutex_unlock(&self.mutex)
        return found

    cdef bint _keep(self, Piece* piece) noexcept nogil:
        """For whoever asks next, if there is room for that; those that were kept longest go for it."""
        cdef uint64_t used = budget_used(&self._used)
        cdef uint64_t most = min(<uint64_t>MOST_KEPT, self.limit - min(self.limit, used))
        cdef Piece* gone
        if piece.room > most:
            return False
        pthread_mutex_lock(&self.mutex)
        piece.next = self.kept
        self.kept = piece
        self.kept_bytes += piece.room
        gone = self._beyond(most)
        pthread_mutex_unlock(&self.mutex)
        _free_all(gone)
        return True

    cdef Piece* _beyond(self, uint64_t most) noexcept nogil:
        """Keep `most` bytes at most: those that came last. What is not kept any more."""
        cdef Piece** place = &self.kept
        cdef Piece* gone
        cdef uint64_t bytes = 0
        while place[0] != NULL and bytes + place[0].room <= most:
            bytes += place[0].room
            place = &place[0].next
        gone = place[0]
        place[0] = NULL
        self.kept_bytes = bytes
        return gone

    cdef void _let_go(self, uint64_t most) noexcept nogil:
        cdef Piece* gone
        pthread_mutex_lock(&self.mutex)
        gone = self._beyond(most)
        pthread_mutex_unlock(&self.mutex)
        _free_all(gone)


cdef void _free_all(Piece* piece) noexcept nogil:
    cdef Piece* following
    while piece != NULL:
        following = piece.next
        _free(piece)
        piece = following


cdef Piece* _allocate(size_t room) noexcept nogil:
    """NULL: there is no memory."""
    cdef void* place
    if room < LEAST_KEPT:
        return <Piece*>malloc(sizeof(Piece) + room)
    place = mmap(NULL, sizeof(Piece) + room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    return NULL if place == MAP_FAILED else <Piece*>place


cdef void _free(Piece* piece) noexcept nogil:
    if piece.room < LEAST_KEPT:
        free(piece)
    else:
        munmap(piece, sizeof(Piece) + piece.room)


cdef Piece* new_piece(size_t size, uint64_t charged, Budget budget) noexcept nogil:
    """`charged` bytes were taken from the budget for it; what a kept one has beyond is charged, too. NULL: there is no
    memory, and they are the caller's still."""
    cdef Piece* piece = NULL
    cdef uint64_t used
    if LEAST_KEPT <= size <= LARGEST_KEPT:
        piece = budget._take_kept(size)
        if piece != NULL and charged:
            charged += piece.room - size
            budget.force(piece.room - size)
    if piece == NULL:
        used = budget_used(&budget._used)
        budget._let_go(budget.limit - min(budget.limit, used))
        piece = _allocate(size)
        if piece == NULL:
            return NULL
        piece.bytes = <uint8_t*>(piece + 1)
        piece.room = size
    piece.next = NULL
    piece.size = piece.end = size
    piece.start = 0
    piece.charged = charged
    return piece


cdef void free_piece(Piece* piece, Budget budget) noexcept nogil:
    """Also of none (NULL)."""
    if piece != NULL:
        budget.give_back(piece.charged)
        if not (LEAST_KEPT <= piece.room <= LARGEST_KEPT and budget._keep(piece)):
            _free(piece)
