"""TLS on a connection: a protocol to the socket's transport below, a transport to the protocol above.

    socket -> Receiver -> incoming -> SSLObject -> the buffer of the protocol above, many records a wake-up
    socket <- or the transport's queue <- outgoing <- SSLObject <- the protocol above, a step at a time

OpenSSL does the work through Python's ssl (MemoryBIO, SSLObject). asyncio's and uvloop's own layer does the same with
256 KiB of buffers for each connection and a call of the protocol for each record; the numbers stand in
docs/decisions/0007-tls-through-a-channel-of-our-own.md.

Invariants
1. Ciphertext is made only when the socket's transport holds none that the peer does not take; until then plain bytes
   wait in `pending`, where those of a Piece stay charged to the Budget.
2. `incoming` holds at most `step` beyond a record, and `outgoing` as much; what a pause leaves over of one
   socket read waits in `rest`. OpenSSL's buffers grow so far and never shrink: the more channels a server has, the
   smaller is the step of the next one.
3. The protocol above gets bytes only from `pump`, which never runs inside itself.
4. Only bytes that TLS has authenticated reach the protocol above.
5. Whatever the peer sends is charged to a turn, TURN of it, and others have theirs in between: ciphertext by the byte,
   records by the piece, those without data (a KeyUpdate computes new keys) and steps of a handshake most of all. A peer
   that sends too many records without data is cut, and nobody sends more than HANDSHAKE_LIMIT before TLS stands.
"""

import ssl

from cpython.buffer cimport (
    PyBUF_READ, PyBUF_WRITABLE, PyBUF_WRITE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t
from libc.stdlib cimport free, malloc

cdef extern from "Python.h":
    object PyMemoryView_FromMemory(char*, Py_ssize_t, int)

cdef extern from "<sys/socket.h>" nogil:
    ssize_t c_send "send"(int, const void*, size_t, int)
    enum:
        MSG_NOSIGNAL
        MSG_DONTWAIT

cdef enum:
    RECEIVE_SIZE = 256 << 10  # one read of a busy socket
    # What is copied, decrypted and parsed, or encrypted and sent, at once: 64 KiB are four records, and stay in the cache.
    LARGEST_STEP = 64 << 10
    SMALLEST_STEP = 2 << 10   # a thousand busy channels hold less than 64 MiB then, and not 130, at the price of more sends
    STEP_RATION = 512 << 10   # of the channel that is the n-th to come: an n-th of it
    TURN = 256 << 10          # what one turn may cost, in bytes of ciphertext in large records: half a millisecond
    STEP_RECORDS = 16         # that OpenSSL gets at once: what a turn may cost beyond its end
    COST_OF_RECORD = 1 << 10  # two or three microseconds, however short it is
    COST_OF_BARREN = 16 << 10     # a record without data: a KeyUpdate takes 40 microseconds
    COST_OF_HANDSHAKE = 64 << 10  # a step of a handshake: a signature, or some tens of microseconds
    BARREN_LIMIT = 32         # records without data in RENEWAL bytes; a client rekeys once in millions of records
    RENEWAL = 64 << 10
    HANDSHAKE_LIMIT = 128 << 10   # a ClientHello and a chain of certificates take some kilobytes
    HEADER_SIZE = 5           # of a record: section 5.1 of RFC 8446


cdef class Receiver:
    """Where ciphertext arrives. One a server: it is empty between two wake-ups."""

    def __cinit__(self):
        self.size = RECEIVE_SIZE
        self.bytes = <uint8_t*>malloc(self.size)
        if self.bytes == NULL:
            raise MemoryError("no memory for a receive buffer")

    def __dealloc__(self):
        free(self.bytes)

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.bytes, self.size, 0, flags)


cdef class TlsChannel:
    """See the module's docstring."""

    def __init__(self, *, below, above, int fd, context, Receiver receiver not None, call_soon):
        self.below = below
        self.above = above
        self.fd = fd
        self.receiver = receiver
        receiver.channels += 1
        self.step = min(max(STEP_RATION // receiver.channels, SMALLEST_STEP), LARGEST_STEP)
        self.call_soon = call_soon
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.rest = []  # lists, and not deques of 0.6 KiB: both are short
        self.pending = []
        self.handed_over = True  # the answer to STARTTLS, perhaps
        self.allowance = TURN

    def start(self, bytes rest not None):
        """Take the transport over and begin TLS; `rest`: bytes that came behind STARTTLS."""
        self.below.set_protocol(self)
        if rest:
            self.feed(<const uint8_t*>PyBytes_AS_STRING(rest), PyBytes_GET_SIZE(rest))

    @property
    def ssl_object(self):
        """What was negotiated, and with whom."""
        return self.tls

    # ---- what the socket's transport calls ----

    def connection_made(self, transport):
        """Never called: the transport is older than the channel."""

    def get_buffer(self, sizehint):
        """Where the next ciphertext goes."""
        return self.receiver

    def buffer_updated(self, Py_ssize_t size):
        """Ciphertext came. Before TLS stands, a stranger's: its turn is among strangers'."""
        if self.established and not self.scheduled:
            self.allowance = TURN
        self.feed(self.receiver.bytes, size)

    def eof_received(self):
        """The peer sends no more, with or without close_notify: what it asked for completely is still answered."""
        if not self.established:
            return False
        self.hung_up = True
        if not self.paused:
            self.pump()
        return True  # the channel closes when the protocol above says so

    def pause_writing(self):
        """The peer does not read."""
        self.blocked = True
        self.above.pause_writing()

    def resume_writing(self):
        """It reads again."""
        self.blocked = False
        self.handed_over = False
        self.drain()

    def connection_lost(self, exc):
        """The socket is gone."""
        self.ended = True
        self.receiver.channels -= 1
        self.pending.clear()
        self.pending_size = 0
        self.rest.clear()
        self.above.connection_lost(exc)

    # ---- what the protocol above calls ----

    def write(self, plain):
        """Encrypt and send, or queue, `plain`; a memoryview is kept, not copied."""
        cdef Py_buffer view
        cdef ssize_t sent = 0
        if self.closing:
            return
        if not self.pending and not self.blocked:
            PyObject_GetBuffer(plain, &view, 0)
            try:
                sent = self.send(<const uint8_t*>view.buf, view.len)
            finally:
                PyBuffer_Release(&view)
        if sent < len(plain):
            self.pending.append(memoryview(plain)[sent:])
            self.pending_size += len(plain) - sent

    def get_write_buffer_size(self):
        """Bytes that wait for the socket, plain and encrypted."""
        return self.pending_size + self.below.get_write_buffer_size()

    def set_protocol(self, protocol):
        """Who gets plain bytes from now on."""
        self.above = protocol

    def pause_reading(self):
        """Deliver no bytes, and take none from the socket."""
        self.paused = True
        self.below.pause_reading()

    def resume_reading(self):
        """Deliver what has come, and read on."""
        self.paused = False
        if not self.resting:
            self.below.resume_reading()
        if not self.pumping and not self.scheduled:
            self.scheduled = True
            self.call_soon(self.go_on)

    def go_on(self):
        """The next turn."""
        self.scheduled = False
        self.allowance = TURN
        if self.resting:
            self.resting = False
            if not self.paused and not self.closing and not self.ended and not self.hung_up:
                self.below.resume_reading()
        if not self.paused and not self.ended:
            self.pump()

    def take_turns(self, call_soon):
        """From now on this channel's turns come by `call_soon`: its peer is no stranger any more."""
        self.call_soon = call_soon

    def get_extra_info(self, name):
        """What the socket's transport knows."""
        return self.below.get_extra_info(name)

    def close(self):
        """Send what is queued, say close_notify, and close; the peer's close_notify is not waited for."""
        if not self.closing:
            self.closing = True
            if not self.pending:
                self.finish()

    def abort(self):
        """Cut the connection."""
        self.below.abort()

    # ---- inwards ----

    cdef int feed(self, const uint8_t* source, size_t size) except -1:
        """Take ciphertext, a step at a time, as far as our turn goes and the protocol above wants plain bytes."""
        cdef size_t taken = 0
        cdef size_t part
        while (
            self.established and taken < size and self.allowance > 0
            and not self.rest and not self.paused and not self.over
        ):
            part = self.step_of(source + taken, min(size - taken, self.step))
            self.take(source + taken, part)
            taken += part
            self.pump()
        if taken < size and not self.over:
            self.rest.append(memoryview(PyBytes_FromStringAndSize(<const char*>source + taken, size - taken)))
        if not self.paused and not self.over and (self.rest or self.allowance <= 0):
            self.continue_later()
        return 0

    cdef size_t step_of(self, const uint8_t* source, size_t size) noexcept:
        """How many of these bytes OpenSSL gets at once: up to the end of STEP_RECORDS records, which are counted."""
        cdef size_t position = 0
        cdef size_t part
        cdef size_t ended = 0
        while position < size and ended < STEP_RECORDS:
            if self.record_left == 0:
                self.header[self.header_size] = source[position]
                self.header_size += 1
                position += 1
                if self.header_size == HEADER_SIZE:
                    self.header_size = 0
                    self.record_left = self.header[3] << 8 | self.header[4]
            else:
                part = min(self.record_left, size - position)
                position += part
                self.record_left -= part
                if self.record_left == 0:
                    ended += 1
        if self.established:
            self.records += ended
        self.allowance -= position + ended * COST_OF_RECORD
        return position

    cdef int take(self, const uint8_t* source, size_t size) except -1:
        self.incoming.write(PyMemoryView_FromMemory(<char*>source, size, PyBUF_READ))
        return 0

    cdef int take_rest(self) except -1:
        cdef Py_buffer view
        cdef size_t part
        waiting = self.rest[0]
        PyObject_GetBuffer(waiting, &view, 0)
        try:
            part = self.step_of(<const uint8_t*>view.buf, min(<size_t>view.len, self.step))
            self.take(<const uint8_t*>view.buf, part)
        finally:
            PyBuffer_Release(&view)
        if <size_t>len(waiting) > part:
            self.rest[0] = waiting[part:]
        else:
            self.rest.pop(0)
        if not self.established:
            self.handshake_size += part
            self.allowance -= COST_OF_HANDSHAKE
            if self.handshake_size > HANDSHAKE_LIMIT:
                return self.excess(f"{self.handshake_size} bytes before TLS stands: at most {HANDSHAKE_LIMIT} are taken")
            self.handshake()
        return 0

    cdef int settle_records(self) except -1:
        """OpenSSL has used all that it was fed: what gave no data was a record without."""
        if self.records > 0:
            self.barren += self.records
            self.allowance -= self.records * COST_OF_BARREN
        self.records = 0
        if self.fruit >= RENEWAL:
            self.fruit = self.barren = 0
        if self.barren > BARREN_LIMIT:
            return self.excess(f"{self.barren} TLS records without data: at most {BARREN_LIMIT} are taken")
        return 0

    cdef int excess(self, reason) except -1:
        """The peer costs more than it may: nothing more of it is taken."""
        self.over = self.ended = True
        self.rest.clear()
        self.above.expel(reason)
        return 0

    cdef int continue_later(self) except -1:
        """Our turn is over: the socket is not read, and nothing is decrypted, until the next."""
        if not self.resting:
            self.resting = True
            self.below.pause_reading()
        if not self.scheduled:
            self.scheduled = True
            self.call_soon(self.go_on)
        return 0

    cdef int handshake(self) except -1:
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            self.flush()
            return 0
        except ssl.SSLError as error:
            self.over = self.ended = True
            self.flush()  # the alert that says why
            self.above.tls_failed(error)
            return 0
        self.established = True
        self.flush()
        self.above.tls_established()
        return 0

    cdef int pump(self) except -1:
        """Decrypt into the buffer of the protocol above, as many records as fit, and let it work on them."""
        cdef Py_buffer view
        cdef ssize_t filled
        if self.pumping:
            return 0
        self.pumping = True
        try:
            while not self.established and self.rest and not self.paused and not self.over and self.allowance > 0:
                self.take_rest()
            if not self.established and self.rest and not self.over:
                self.continue_later()
            while self.established and not self.paused and not self.ended:
                PyObject_GetBuffer(self.above.get_buffer(-1), &view, PyBUF_WRITABLE)
                try:
                    filled = self.fill(<uint8_t*>view.buf, view.len)
                finally:
                    PyBuffer_Release(&view)
                if self.ended:
                    break
                if filled > 0:
                    self.above.buffer_updated(filled)
                elif self.over:
                    self.end()
                elif self.rest:
                    if self.allowance <= 0:
                        self.continue_later()
                        break
                    self.take_rest()
                elif self.hung_up:
                    self.end()
                else:
                    break
        finally:
            self.pumping = False
        if not self.closing:
            self.flush()  # a key update asks for an answer
        return 0

    cdef ssize_t fill(self, uint8_t* target, size_t size) except -2:
        """Plain bytes put at `target`; 0 when more ciphertext is needed, or when the stream is over."""
        cdef size_t filled = 0
        cdef size_t part
        try:
            while filled < size and not self.over and (self.incoming.pending or self.tls.pending()):
                part = self.tls.read(
                    size - filled, PyMemoryView_FromMemory(<char*>target + filled, size - filled, PyBUF_WRITE)
                )
                filled += part
                self.records -= part > 0
                self.over = part == 0  # close_notify
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self.failure = error
            self.over = True
        self.fruit += filled
        if filled < size:
            self.settle_records()
        return filled

    cdef int end(self) except -1:
        """Everything that came is delivered, and no more will come."""
        self.ended = True
        if self.failure is not None:
            self.flush()  # the alert that says why
            self.abort()
        elif not self.above.eof_received():
            self.close()
        return 0

    # ---- outwards ----

    cdef ssize_t send(self, const uint8_t* source, size_t size) except -2:
        """Encrypt and send as much as the socket takes, and at most a step more; returns the bytes of `source` used."""
        cdef size_t sent = 0
        cdef size_t end
        try:
            while sent < size and not self.blocked:
                end = min(sent + self.step, size)
                while sent < end:  # one record a call
                    sent += self.tls.write(PyMemoryView_FromMemory(<char*>source + sent, end - sent, PyBUF_READ))
                self.flush()
        except ssl.SSLError:  # after a failure of TLS, when what is under way comes back
            self.abort()
            return size
        return sent

    cdef int flush(self) except -1:
        """Send the ciphertext there is; what the socket does not take goes to its transport."""
        cdef ssize_t sent = 0
        cdef bytes ready
        if not self.outgoing.pending:
            return 0
        ready = self.outgoing.read()
        if self.handed_over:
            self.handed_over = self.below.get_write_buffer_size() > 0
        if not self.handed_over and not self.blocked:
            sent = self.send_direct(ready)
        if sent < PyBytes_GET_SIZE(ready):
            self.handed_over = True
            self.below.write(memoryview(ready)[sent:])
        return 0

    cdef ssize_t send_direct(self, bytes ready) except -2:
        cdef ssize_t sent
        while True:
            sent = c_send(self.fd, PyBytes_AS_STRING(ready), PyBytes_GET_SIZE(ready), MSG_NOSIGNAL | MSG_DONTWAIT)
            if sent >= 0:
                return sent
            if errno != EINTR:
                return 0  # full, or broken: its transport will find out which

    cdef int drain(self) except -1:
        """The socket takes bytes again: first what waits here, then what the protocol above has."""
        cdef Py_buffer view
        cdef ssize_t sent
        while self.pending and not self.blocked:
            waiting = self.pending[0]
            PyObject_GetBuffer(waiting, &view, 0)
            try:
                sent = self.send(<const uint8_t*>view.buf, view.len)
            finally:
                PyBuffer_Release(&view)
            self.pending_size -= sent
            if sent < len(waiting):
                self.pending[0] = waiting[sent:]
            else:
                self.pending.pop(0)
        if self.pending or self.blocked:
            return 0
        if self.closing:
            self.finish()
        else:
            self.above.resume_writing()
        return 0

    cdef int finish(self) except -1:
        """Say close_notify (section 6.1 of RFC 8446) and close."""
        try:
            self.tls.unwrap()
        except ssl.SSLError:
            pass  # the peer's own close_notify has not come, and is not waited for
        self.flush()
        self.below.close()
        return 0
