"""What leaves to a client: the answers of a turn are put together in a scratch and leave with one send.

What the peer does not take waits as pieces, charged to the budget, until it reads again; meanwhile nothing new is made
for it (session.pyx), so it is at most a scratch, and one reply that could not be sent in parts.
"""

from libc.stdint cimport uint8_t
from libc.string cimport memcpy, memmove

from nbdzram.engine.must cimport must
from nbdzram.sessions.budget cimport Budget, Piece, free_piece, new_piece
from nbdzram.sessions.line cimport BROKEN, LATER, Line


cdef class Outlet:
    """See the module's docstring."""

    def __cinit__(self, Line line not None, Budget budget not None):
        self.line = line
        self.budget = budget

    def __dealloc__(self):
        self.close()

    cdef uint8_t* reserve(self, size_t size) noexcept nogil:
        """Where `size` bytes of answer may be put (then add them to `used`); NULL when the peer must read first."""
        if self.used + size > SCRATCH_SIZE:
            self.send_ahead()
        if self.used + size > SCRATCH_SIZE or (self.used and self.budget.strained()):
            self.flush()
        if self.first != NULL or self.broken:
            return NULL
        must(self.used + size <= SCRATCH_SIZE, b"an answer that is not cut finds room in the scratch")
        return self.scratch.bytes + self.used

    cdef void put(self, const uint8_t* reply, size_t size) noexcept nogil:
        """Send a short reply with others, whether or not the peer must read first."""
        cdef Piece* piece
        cdef uint8_t* target = self.reserve(size)
        if target != NULL:
            memcpy(target, reply, size)
            self.used += size
        elif not self.broken:
            piece = new_piece(size, 0, self.budget)
            if piece == NULL:
                self.broken = True
                return
            memcpy(piece.bytes, reply, size)
            self._keep(piece)

    cdef void send_ahead(self) noexcept nogil:
        """Send what the scratch holds, while more is to be put behind it: what fills records of the line. A record of
        the few bytes beyond costs either side as much as a full one."""
        cdef size_t whole = self.used - self.used % self.line.grain
        cdef ssize_t given
        if whole == 0 or self.broken:
            return
        must(self.first == NULL, b"nothing is put into the scratch while pieces wait")
        given = self._give(self.scratch.bytes, whole)
        if given > 0:
            self.used -= given
            memmove(self.scratch.bytes, self.scratch.bytes + given, self.used)

    cdef void flush(self) noexcept nogil:
        """Send what the scratch holds; what the peer does not take is kept."""
        cdef size_t used = self.used
        cdef ssize_t given = 0
        cdef Piece* piece
        self.used = 0
        if used == 0 or self.broken:
            return
        if self.first == NULL:
            given = self._give(self.scratch.bytes, used)
        if given < 0 or <size_t>given == used:
            return
        piece = new_piece(used - given, 0, self.budget)
        if piece == NULL:
            self.broken = True
            return
        memcpy(piece.bytes, self.scratch.bytes + given, used - given)
        self._keep(piece)

    cdef void send(self, Piece* piece) noexcept nogil:
        """Send a whole reply behind what the scratch holds; it is ours now."""
        cdef ssize_t given = 0
        self.flush()
        if not self.broken and self.first == NULL:
            given = self._give(piece.bytes + piece.start, piece.end - piece.start)
            piece.start += max(given, 0)
        if self.broken or piece.start == piece.end:
            free_piece(piece, self.budget)
        else:
            self._keep(piece)

    cdef void drain(self) noexcept nogil:
        """The peer may read again: send what waits."""
        cdef Piece* piece
        cdef ssize_t given
        while self.first != NULL and not self.broken:
            piece = self.first
            given = self._give(piece.bytes + piece.start, piece.end - piece.start)
            if given <= 0:
                return
            piece.start += given
            if piece.start == piece.end:
                self.first = piece.next
                free_piece(piece, self.budget)

    cdef void close(self) noexcept nogil:
        """Nothing is sent any more, and nothing held."""
        cdef Piece* piece
        self.broken = True
        self.used = 0
        while self.first != NULL:
            piece = self.first
            self.first = piece.next
            free_piece(piece, self.budget)
        self.budget.give_back(self.reserved)
        self.reserved = 0

    cdef void _keep(self, Piece* piece) noexcept nogil:
        if piece.charged == 0:
            piece.charged = piece.room  # it is held already, whatever the budget says
            self.budget.force(piece.room)
        if self.first == NULL:
            self.first = piece
        else:
            self.last.next = piece
        self.last = piece

    cdef ssize_t _give(self, const uint8_t* source, size_t size) noexcept nogil:
        """Bytes that the line took; -1 when it broke."""
        cdef ssize_t given = self.line.give(source, size)
        if given == BROKEN:
            self.broken = True
            return -1
        return 0 if given == LATER else given
