"""What leaves a connection: answers of a wake-up are put together in a scratch and leave with one send.

While the transport's own queue is empty, bytes go to the socket from here; only what the socket does not take is handed
to the transport, which then tells us (pause_writing, resume_writing) when the peer reads again. Under TLS the same
holds of the TlsChannel. What they hold is charged to the budget.

The scratch is shared by all connections of a server: whoever fills it flushes it before the wake-up ends.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from nbdzram.server.channel cimport TlsChannel
from nbdzram.server.workers cimport Piece

cdef extern from "<sys/socket.h>" nogil:
    ssize_t send(int, const void*, size_t, int)
    enum:
        MSG_NOSIGNAL
        MSG_DONTWAIT

cdef enum:
    SCRATCH_SIZE = 256 << 10  # larger gains nothing: sockets take about as much at once
    TLS_SIZE = 44 << 10       # what a TlsChannel holds, measured over a thousand with OpenSSL 3.5: 33 KiB idle, the rest once it has sent


cdef class Scratch:
    """Where the answers of a wake-up are put together. One a server: it is empty between two wake-ups."""

    def __cinit__(self):
        self.size = SCRATCH_SIZE
        self.bytes = <uint8_t*>malloc(self.size)
        if self.bytes == NULL:
            raise MemoryError("no memory for the answers' buffer")

    def __dealloc__(self):
        free(self.bytes)


cdef class Outlet:
    """See the module's docstring."""

    def __init__(self, transport, int fd, Scratch scratch not None, Budget budget not None):
        self.transport = transport
        self.channel = transport if isinstance(transport, TlsChannel) else None
        self.fd = fd
        self.scratch = scratch
        self.budget = budget
        self.handed_over = True  # the handshake's last reply, perhaps
        # A sixteenth stays free of it: however many are attached, replies have something to go on with.
        if self.channel is not None and budget.used < budget.limit // 16 * 15 and budget.take(TLS_SIZE):
            self.charged = TLS_SIZE

    cdef uint8_t* reserve(self, size_t size) except? NULL:
        """Where `size` bytes of answer may be put (then add them to `used`); NULL when the peer must read first."""
        assert size <= self.scratch.size
        if self.used + size > self.scratch.size or (self.used and self.budget.strained()):
            self.flush()
        if self.blocked or self.broken:
            return NULL
        return self.scratch.bytes + self.used

    cdef int put(self, const uint8_t* reply, size_t size) except -1:
        """Send a short reply with others; by itself when the peer must read first."""
        cdef uint8_t* target = self.reserve(size)
        if target == NULL:
            self.write(PyBytes_FromStringAndSize(<const char*>reply, size))
        else:
            memcpy(target, reply, size)
            self.used += size
        return 0

    cdef int flush(self) except -1:
        """Send what the scratch holds."""
        cdef ssize_t sent = 0
        cdef size_t used = self.used
        self.used = 0
        if used == 0 or self.broken:
            return 0
        if self.can_send():
            sent = self.send_now(self.scratch.bytes, used)
            if sent < 0:
                return 0
        if <size_t>sent < used:
            self.hand_over(PyBytes_FromStringAndSize(<char*>self.scratch.bytes + sent, used - sent))
        return 0

    cdef void discard(self) noexcept:
        """Send nothing more, and nothing of what the scratch holds: the connection is about to be cut."""
        self.used = 0
        self.broken = True

    cdef int write(self, bytes reply) except -1:
        """Send a reply that Python built, behind what the scratch holds."""
        self.flush()
        if not self.broken:
            self.hand_over(reply)
        return 0

    cdef int write_piece(self, Piece piece) except -1:
        """Send a read reply that a worker made; the transport queues the piece itself, not a copy."""
        cdef ssize_t sent
        self.flush()
        if self.broken:
            return 0
        if self.can_send():
            sent = self.send_now(piece.bytes + piece.start, piece.end - piece.start)
            if sent < 0:
                return 0
            piece.start += sent
        if piece.start < piece.end:
            self.hand_over(memoryview(piece), weigh=False)  # it lives, and is charged, until it is sent
        return 0

    cdef int hand_over(self, buffer, bint weigh=True) except -1:
        """Leave bytes to the transport."""
        self.handed_over = True
        self.transport.write(buffer)
        return self.weigh() if weigh else 0

    cdef int weigh(self) except -1:
        """Charge what the transport, or the channel and the transport below it, hold now."""
        cdef size_t waiting = self.transport.get_write_buffer_size()
        if waiting > self.held:
            self.budget.force(waiting - self.held)
        else:
            self.budget.give_back(self.held - waiting)
        self.held = waiting
        return 0

    cdef void close(self) noexcept:
        """The connection is gone, and what was held with it."""
        self.broken = True
        self.budget.give_back(self.held + self.charged)
        self.held = self.charged = 0
        self.transport = self.channel = None

    cdef bint can_send(self) except -1:
        """The transport holds nothing that our bytes would overtake."""
        if self.blocked:
            return False
        if self.handed_over:
            self.weigh()
            self.handed_over = self.held > 0
        return not self.handed_over

    cdef ssize_t send_now(self, const uint8_t* source, size_t size) except -2:
        """Bytes that the socket or the channel took; -1 when the connection is broken."""
        cdef ssize_t sent
        if self.channel is not None:
            return self.channel.send(source, size)
        while True:
            sent = send(self.fd, source, size, MSG_NOSIGNAL | MSG_DONTWAIT)
            if sent >= 0:
                return sent
            if errno == EAGAIN:
                return 0
            if errno != EINTR:
                self.broken = True
                self.transport.abort()
                return -1
