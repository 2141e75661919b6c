"""The line of a client behind TLS: OpenSSL over a socket, record by record, straight from and to where bytes belong.

    take    socket ─> OpenSSL's record ─> target        one receive a record, or one for many small ones
    give    source ─> OpenSSL's record ─> socket        one send a record, MSG_MORE on all but the last

OpenSSL reads and writes the socket through functions of ours (a BIO), so that every record is counted on its way, a
closed peer raises no signal, and what comes behind a record is not asked for in a second receive.

Who may touch it: the event loop from STARTTLS until its session is begun, its thread from then on, nobody at once. The
SSL* is freed by `hang_up`, by whoever serves it at that moment, or with the object itself when nobody hung up.

Invariants
1. OpenSSL keeps no buffer of an idle line (SSL_MODE_RELEASE_BUFFERS), and one record of each direction of a busy one.
2. What it was given and could not send, `unsent`, is offered again first: the outlet keeps bytes in their order.
3. A socket's end of file is told by `take` alone. OpenSSL hears that nothing has come: told of the end, it would refuse
   to send what the peer still waits for.
4. Only bytes that TLS has authenticated are taken.
5. Whatever the peer sends is charged to a turn, TURN of it, and others have theirs in between: ciphertext by the byte,
   records by the piece, those without data (a KeyUpdate computes new keys) most of all. A peer that sends too many
   records without data is cut, and nobody sends more than HANDSHAKE_LIMIT before TLS stands.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, ECONNRESET, EINTR, ENOTCONN, EPROTO, errno
from libc.string cimport memcpy, memmove, memset

from nbdzram.sessions.line cimport BROKEN, LATER, WATCH_READ, WATCH_WRITE, SocketLine
from nbdzram.sessions.openssl cimport (
    BIO_CTRL_FLUSH, BIO_FLAGS_ALL_RETRY, BIO_FLAGS_READ, BIO_FLAGS_SHOULD_RETRY, BIO_FLAGS_WRITE, BIO_TYPE_SOURCE_SINK,
    SSL_ERROR_SYSCALL, SSL_ERROR_WANT_READ, SSL_ERROR_WANT_WRITE, SSL_ERROR_ZERO_RETURN, openssl,
)
from nbdzram.sessions.stage cimport BARREN_RECORDS
from nbdzram.sessions.tls_context cimport TlsContext, names_of, reason_of

import os

from nbdzram.errors import TlsError

cdef extern from "<sys/socket.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len
    struct msghdr:
        iovec* msg_iov
        size_t msg_iovlen
    ssize_t recvmsg(int, msghdr*, int)
    enum:
        MSG_DONTWAIT
        MSG_MORE

cdef enum:
    RECORD = 16 << 10         # plain bytes of one record at most (section 5.1 of RFC 8446)
    TURN = 256 << 10          # what one turn may cost, in bytes of ciphertext in large records: half a millisecond
    BURST = 16                # records that OpenSSL gets in one call: what a turn may cost beyond its end
    COST_OF_RECORD = 1 << 10  # two or three microseconds, however short it is
    COST_OF_BARREN = 16 << 10     # a record without data: a KeyUpdate takes 40 microseconds
    BARREN_LIMIT = 32         # records without data in RENEWAL bytes; a client rekeys once in millions of records
    RENEWAL = 64 << 10
    HANDSHAKE_LIMIT = 128 << 10   # a ClientHello and a chain of certificates take some kilobytes
    HEADER_SIZE = 5           # of a record: section 5.1 of RFC 8446

MOST_BARREN_RECORDS = BARREN_LIMIT

cdef void* method = NULL      # BIO_METHOD: one for all lines, made with the first


cdef class TlsLine(SocketLine):
    """See the module's docstring."""

    def __init__(self, int fd, TlsContext context not None, bytes rest not None):
        cdef void* bio
        self.context = context
        self.grain = RECORD
        self.rest = rest
        self.ahead_at, self.ahead_size = <const uint8_t*>PyBytes_AS_STRING(rest), PyBytes_GET_SIZE(rest)
        self.tls = openssl.SSL_new(context.context)
        bio = openssl.BIO_new(_method()) if self.tls != NULL else NULL
        if bio == NULL:
            raise MemoryError("no memory for one more client under TLS")
        openssl.BIO_set_data(bio, <void*>self)
        openssl.BIO_set_init(bio, 1)
        openssl.SSL_set_bio(self.tls, bio, bio)  # it is the connection's from here on
        openssl.SSL_set_accept_state(self.tls)
        SocketLine.__init__(self, fd)

    def __dealloc__(self):
        if self.tls != NULL:
            openssl.SSL_free(self.tls)

    # ---- while its client haggles ----

    @property
    def holds_more(self):
        """It holds bytes that came, of which no poller tells."""
        return self.more

    @property
    def waits_to_write(self):
        """The last step goes on when the socket can be written to, and not when it can be read."""
        return self.asked == WATCH_WRITE

    def handshake(self):
        """A step of the handshake: whether TLS stands. Raises TlsError, OSError, and EOFError when the peer is gone."""
        cdef int result
        self.begin_turn()
        openssl.ERR_clear_error()
        result = openssl.SSL_do_handshake(self.tls)
        self.more = self.paused or self.ahead_size > 0
        if self.handshake_size > HANDSHAKE_LIMIT:
            raise TlsError(f"{self.handshake_size} bytes before TLS stands: at most {HANDSHAKE_LIMIT} are taken")
        if result == 1:
            self.established = True
            return True
        if self.failure(result) == BROKEN:
            if self.error == EPROTO:
                raise TlsError(reason_of(self.tls))
            raise OSError(self.error, os.strerror(self.error))
        if self.over and not self.paused:
            raise EOFError
        return False

    def receive(self, target):
        """Plain bytes into `target`: how many, 0 at the end, None when there are none now. Raises TlsError, OSError."""
        cdef Py_buffer view
        cdef ssize_t taken
        PyObject_GetBuffer(target, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            taken = self.take(<uint8_t*>view.buf, view.len)
        finally:
            PyBuffer_Release(&view)
        if taken >= 0:
            return taken
        if taken == LATER:
            return None
        if self.cause == BARREN_RECORDS:
            raise TlsError(f"{self.error} TLS records without data: at most {BARREN_LIMIT} are taken")
        if self.error == EPROTO:
            raise TlsError(reason_of(NULL))
        raise OSError(self.error, os.strerror(self.error))

    def send(self, source):
        """Of plain bytes, how many the peer takes now. Raises OSError."""
        cdef Py_buffer view
        cdef ssize_t given
        PyObject_GetBuffer(source, &view, PyBUF_SIMPLE)
        try:
            given = self.give(<const uint8_t*>view.buf, view.len)
        finally:
            PyBuffer_Release(&view)
        if given == BROKEN:
            raise OSError(self.error, os.strerror(self.error))
        return max(given, 0)

    def names(self):
        """Common name and DNS names of the peer's verified certificate; empty where none is asked for."""
        return names_of(self.tls) if self.context.certified else frozenset()

    def say_goodbye(self):
        """Everything was given: say close_notify. False: not now."""
        return self.finish()

    def close(self, *, bint orderly):
        """End it. Orderly: what came and was not asked for is dropped, so that the peer gets all that was given."""
        self.hang_up(orderly)

    # ---- what a session calls ----

    cdef ssize_t take(self, uint8_t* target, size_t size) noexcept nogil:
        """As many records as there is room for, and as our turn goes."""
        cdef size_t filled = 0
        cdef ssize_t taken = 0
        self.begin_turn()
        if self.tls == NULL:
            self.error = ENOTCONN
            return BROKEN
        while filled < size and self.allowance > 0:
            taken = self.take_record(target + filled, size - filled)
            if taken <= 0:
                break
            filled += taken
        if filled == 0:
            self.more = taken == LATER and self.paused
            return taken
        if taken > 0:
            self.more = self.ahead_size > 0 or openssl.SSL_pending(self.tls) > 0
        else:
            self.more = taken != LATER or self.paused  # the end, or a failure, is told the next time
        return filled

    cdef ssize_t give(self, const uint8_t* source, size_t size) noexcept nogil:
        """Records, as many as the socket takes."""
        cdef size_t given = 0
        cdef size_t part
        cdef int result
        if self.tls == NULL or self.unsent > size:
            self.error = ENOTCONN
            return BROKEN
        self.reading = False
        while given < size:
            part = self.unsent or min(size - given, <size_t>RECORD)
            self.follows = given + part < size
            openssl.ERR_clear_error()
            result = openssl.SSL_write(self.tls, source + given, part)
            if result > 0:
                given += result
                self.unsent = 0
                continue
            if self.failure(result) == LATER and self.asked == WATCH_WRITE:
                self.unsent = part
                return given or LATER
            self.error = self.error or EPROTO
            return BROKEN
        return given

    cdef bint finish(self) noexcept nogil:
        """close_notify (section 6.1 of RFC 8446). The peer's own has not come, perhaps, and is not waited for."""
        cdef int result
        if self.tls == NULL or not self.established:
            return True
        self.reading = self.follows = False
        openssl.ERR_clear_error()
        result = openssl.SSL_shutdown(self.tls)
        return result >= 0 or self.failure(result) != LATER

    cdef void hang_up(self, bint orderly) noexcept nogil:
        if self.tls != NULL:
            self.pay()  # the alert that says why, perhaps
            openssl.SSL_free(self.tls)
            self.tls = NULL
            self.more = False
            openssl.ERR_clear_error()  # as in reason_of, of a failure whose words nobody asked for
        SocketLine.hang_up(self, orderly)

    # ---- records ----

    cdef void begin_turn(self) noexcept nogil:
        self.allowance = TURN
        self.ended = 0
        self.dry = self.paused = False

    cdef ssize_t take_record(self, uint8_t* target, size_t size) noexcept nogil:
        """Plain bytes of one record, or of what is left of one; 0 at the end, LATER, BROKEN."""
        cdef bint fresh = openssl.SSL_pending(self.tls) == 0
        cdef size_t without
        cdef int result
        self.ended = 0
        self.reading = True
        openssl.ERR_clear_error()
        result = openssl.SSL_read(self.tls, target, min(size, <size_t>RECORD))
        self.reading = False
        without = self.ended - (1 if self.ended and result > 0 and fresh else 0)
        self.barren += without
        self.allowance -= without * COST_OF_BARREN
        if result > 0:
            self.fruit += result
            if self.fruit >= RENEWAL:
                self.fruit = self.barren = 0
        if self.barren > BARREN_LIMIT:
            self.cause = BARREN_RECORDS
            self.error = self.barren
            return BROKEN
        return result if result > 0 else self.failure(result)

    cdef ssize_t failure(self, int result) noexcept nogil:
        """Why OpenSSL did not do what it was asked for."""
        cdef int why = openssl.SSL_get_error(self.tls, result)
        if why == SSL_ERROR_WANT_READ:
            self.asked = WATCH_READ
            return 0 if self.over and self.established and not self.paused else LATER
        if why == SSL_ERROR_WANT_WRITE:
            self.asked = WATCH_WRITE
            return LATER
        if why == SSL_ERROR_ZERO_RETURN:
            return 0
        if why == SSL_ERROR_SYSCALL:
            self.error = self.error or ECONNRESET
        else:
            self.error = EPROTO
        return BROKEN

    # ---- what OpenSSL calls, by its BIO ----

    cdef ssize_t fetch(self, uint8_t* target, size_t size) noexcept nogil:
        """Ciphertext for OpenSSL, up to the end of a record, if it may have one more."""
        cdef size_t part
        cdef ssize_t came
        if self.record_left == 0 and self.header_size == 0 and (self.ended >= BURST or self.allowance <= 0):
            self.paused = True
            return LATER
        if self.ahead_size:
            part = min(size, self.ahead_size)
            memcpy(target, self.ahead_at, part)
            self.ahead_at += part
            self.ahead_size -= part
        else:
            came = self.receive_ahead(target, size)
            if came < 0:
                return came
            part = came
        self.count(target, part)
        return part

    cdef ssize_t receive_ahead(self, uint8_t* target, size_t size) noexcept nogil:
        """From the socket, what OpenSSL asks for and a little of what comes behind. The poller tells of the rest."""
        cdef iovec parts[2]
        cdef msghdr message
        cdef ssize_t came
        if self.dry or self.over:
            return LATER
        parts[0].iov_base, parts[0].iov_len = target, size
        parts[1].iov_base, parts[1].iov_len = self.ahead, AHEAD_SIZE
        memset(&message, 0, sizeof(message))
        message.msg_iov, message.msg_iovlen = parts, 2
        while True:
            came = recvmsg(self.fd, &message, MSG_DONTWAIT)
            if came > 0:
                break
            if came == 0:
                self.over = True
                return LATER
            if errno == EAGAIN:
                self.dry = True
                return LATER
            if errno != EINTR:
                self.error = errno
                return BROKEN
        self.dry = <size_t>came < size + AHEAD_SIZE
        if <size_t>came > size:
            self.ahead_at = self.ahead
            self.ahead_size = came - size
            came = size
        return came

    cdef void count(self, const uint8_t* source, size_t size) noexcept nogil:
        """Ciphertext goes to OpenSSL: what it costs, and which records end in it."""
        cdef size_t position = 0
        cdef size_t part
        self.allowance -= size
        if not self.established:
            self.handshake_size += size
        while position < size:
            if self.record_left == 0:
                self.header[self.header_size] = source[position]
                self.header_size += 1
                position += 1
                if self.header_size < HEADER_SIZE:
                    continue
                self.header_size = 0
                self.record_left = self.header[3] << 8 | self.header[4]
            else:
                part = min(self.record_left, size - position)
                position += part
                self.record_left -= part
            if self.record_left == 0:
                self.ended += 1
                self.allowance -= COST_OF_RECORD

    cdef ssize_t put(self, const uint8_t* source, size_t size) noexcept nogil:
        """Ciphertext of OpenSSL. While it reads, its few own words wait here rather than stop it."""
        cdef ssize_t sent = LATER
        if self.pay():
            sent = self.transmit(source, size, MSG_MORE if self.follows else 0)
        if sent != LATER or not self.reading or not self.established:
            return sent
        if size > OWED_SIZE - self.owed_size:
            self.error = EPROTO  # it asks for answers, and reads none
            return BROKEN
        memcpy(self.owed + self.owed_size, source, size)
        self.owed_size += size
        return size

    cdef bint pay(self) noexcept nogil:
        """Send what is owed; False: the socket does not take it now."""
        cdef ssize_t sent
        if self.owed_size == 0:
            return True
        sent = self.transmit(self.owed, self.owed_size, 0)
        if sent > 0:
            self.owed_size -= sent
            memmove(self.owed, self.owed + sent, self.owed_size)
        return self.owed_size == 0


cdef void* _method() except NULL:
    global method
    if method == NULL:
        method = openssl.BIO_meth_new(BIO_TYPE_SOURCE_SINK, "nbdzram")
        if method == NULL:
            raise MemoryError("no memory for TLS")
        openssl.BIO_meth_set_write(method, _write)
        openssl.BIO_meth_set_read(method, _read)
        openssl.BIO_meth_set_ctrl(method, _control)
    return method


cdef int _write(void* bio, const char* source, int size) noexcept nogil:
    cdef ssize_t sent = (<TlsLine>openssl.BIO_get_data(bio)).put(<const uint8_t*>source, size)
    openssl.BIO_clear_flags(bio, BIO_FLAGS_ALL_RETRY)
    if sent == LATER:
        openssl.BIO_set_flags(bio, BIO_FLAGS_WRITE | BIO_FLAGS_SHOULD_RETRY)
    return max(sent, <ssize_t>-1)


cdef int _read(void* bio, char* target, int size) noexcept nogil:
    cdef ssize_t came = (<TlsLine>openssl.BIO_get_data(bio)).fetch(<uint8_t*>target, size)
    openssl.BIO_clear_flags(bio, BIO_FLAGS_ALL_RETRY)
    if came == LATER:
        openssl.BIO_set_flags(bio, BIO_FLAGS_READ | BIO_FLAGS_SHOULD_RETRY)
    return max(came, <ssize_t>-1)


cdef long _control(void* bio, int command, long number, void* pointer) noexcept nogil:
    return command == BIO_CTRL_FLUSH
