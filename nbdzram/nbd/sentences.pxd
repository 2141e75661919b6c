from libc.stdint cimport uint64_t

from nbdzram.nbd.transmission cimport Request

cdef enum:
    SENTENCE_SIZE = 256           # bytes of the longest, with its final zero, and some to spare

cdef int error_of(int verdict, int command) noexcept nogil
cdef size_t put_sentence(
    char* target, int verdict, const Request* request, uint64_t size, uint64_t limit
) noexcept nogil
