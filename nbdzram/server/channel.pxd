from libc.stdint cimport int64_t, uint8_t

cdef class Receiver:
    cdef uint8_t* bytes
    cdef size_t size
    cdef size_t channels          # that receive by it

cdef class TlsChannel:
    cdef readonly bint closing    # our close_notify is sent, or will be once `pending` is empty
    cdef object tls               # ssl.SSLObject
    cdef object incoming          # ssl.MemoryBIO: ciphertext of the peer
    cdef object outgoing          # ssl.MemoryBIO: ciphertext for the peer; empty between two calls
    cdef object below             # the socket's transport
    cdef object above             # the protocol that sees plain bytes
    cdef object call_soon
    cdef Receiver receiver
    cdef int fd
    cdef size_t step              # bytes of ciphertext that OpenSSL gets at once, and plain ones encrypted for one send
    cdef object rest              # list of memoryview: ciphertext that came while reading was paused
    cdef object pending           # list of memoryview: plain bytes that wait for the socket
    cdef size_t pending_size
    cdef bint established
    cdef bint paused              # the protocol above wants no bytes
    cdef bint blocked             # the socket's transport holds ciphertext that the peer does not take
    cdef bint handed_over         # it was given ciphertext, and may still hold it
    cdef bint over                # the peer's close_notify came, or TLS failed
    cdef bint hung_up             # the socket's end of file came
    cdef bint ended               # ... and the protocol above knows, or is gone
    cdef object failure           # ssl.SSLError
    cdef bint pumping
    cdef bint scheduled
    cdef bint resting             # our turn is over: the socket is not read until the next one
    cdef int64_t allowance        # of this turn, in bytes: see `charge`
    cdef uint8_t header[5]        # of the record that is arriving
    cdef size_t header_size       # bytes of it that came
    cdef size_t record_left       # bytes of the record still to come
    cdef int64_t records          # that were fed, less those that gave data
    cdef size_t barren            # records without data since RENEWAL bytes of it came
    cdef size_t fruit             # bytes of data since then
    cdef size_t handshake_size    # ciphertext before TLS was established

    cdef ssize_t send(self, const uint8_t* source, size_t size) except -2
    cdef int feed(self, const uint8_t* source, size_t size) except -1
    cdef int take_rest(self) except -1
    cdef size_t step_of(self, const uint8_t* source, size_t size) noexcept
    cdef int take(self, const uint8_t* source, size_t size) except -1
    cdef int settle_records(self) except -1
    cdef int excess(self, reason) except -1
    cdef int continue_later(self) except -1
    cdef int handshake(self) except -1
    cdef int pump(self) except -1
    cdef ssize_t fill(self, uint8_t* target, size_t size) except -2
    cdef int end(self) except -1
    cdef ssize_t send_direct(self, bytes ready) except -2
    cdef int flush(self) except -1
    cdef int drain(self) except -1
    cdef int finish(self) except -1
