from libc.stdint cimport int64_t, uint8_t

from nbdzram.sessions.line cimport SocketLine
from nbdzram.sessions.tls_context cimport TlsContext

cdef enum:
    AHEAD_SIZE = 2 << 10      # a batch of small requests with one receive; a thousand clients hold 2 MiB of it
    OWED_SIZE = 512           # alerts and answers to key updates: some thirty bytes each

cdef class TlsLine(SocketLine):
    cdef TlsContext context
    cdef void* tls                # SSL; NULL once it hung up
    cdef bytes rest               # ciphertext that came before TLS began
    cdef const uint8_t* ahead_at  # what came and OpenSSL has not asked for: of `rest`, then of `ahead`
    cdef size_t ahead_size
    cdef uint8_t ahead[AHEAD_SIZE]
    cdef uint8_t owed[OWED_SIZE]  # OpenSSL's own words that the socket did not take while we read
    cdef size_t owed_size
    cdef bint established
    cdef bint over                # the socket's end of file came
    cdef bint dry                 # the socket had no more, in this turn
    cdef bint paused              # OpenSSL was told to wait though there may be more
    cdef bint reading             # OpenSSL reads: what it has to say must not stop it
    cdef bint follows             # another record leaves at once behind the one that is being sent
    cdef size_t unsent            # plain bytes of a record that OpenSSL has and the socket did not take whole
    cdef int64_t allowance        # of this turn: see `count`
    cdef uint8_t header[5]        # of the record that is arriving
    cdef size_t header_size       # bytes of it that came
    cdef size_t record_left       # bytes of the record still to come
    cdef size_t ended             # records that came whole, in one call of OpenSSL
    cdef size_t barren            # records without data since RENEWAL bytes of it came
    cdef size_t fruit             # bytes of data since then
    cdef size_t handshake_size    # ciphertext before TLS was established
    cdef int asked                # what the last step waits for: WATCH_READ, WATCH_WRITE, 0

    cdef void begin_turn(self) noexcept nogil
    cdef ssize_t take_record(self, uint8_t* target, size_t size) noexcept nogil
    cdef ssize_t failure(self, int result) noexcept nogil
    cdef ssize_t fetch(self, uint8_t* target, size_t size) noexcept nogil
    cdef ssize_t receive_ahead(self, uint8_t* target, size_t size) noexcept nogil
    cdef void count(self, const uint8_t* source, size_t size) noexcept nogil
    cdef ssize_t put(self, const uint8_t* source, size_t size) noexcept nogil
    cdef bint pay(self) noexcept nogil
