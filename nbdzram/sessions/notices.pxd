from libc.stdint cimport uint64_t

from nbdzram.nbd.transmission cimport Request
from nbdzram.sessions.mail cimport Bell

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass

cdef enum:
    NOTICES = 256                # that wait to be read; more are dropped, and counted

cdef struct Notice:
    # A request that was refused, for the log.
    Request request
    uint64_t session             # its number
    uint64_t size                # of its export, bytes
    int verdict

cdef class Notices:
    cdef pthread_mutex_t mutex
    cdef Notice kept[NOTICES]
    cdef size_t first
    cdef size_t count
    cdef readonly uint64_t dropped
    cdef Bell bell
    cdef void post(self, uint64_t session, int verdict, const Request* request, uint64_t size) noexcept nogil
