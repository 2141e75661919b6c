from libc.stdint cimport uint8_t, uint64_t

from nbdzram.sessions.mail cimport Letter, Mailbox

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass

cdef struct Task:
    Letter letter            # by which it comes home
    Task* next
    Mailbox* home
    void* store              # the Store that it is a part of
    void* disk               # Disk: the session keeps it
    uint64_t offset          # bytes of the export
    uint64_t length
    const uint8_t* source
    int error                # errno of the engine, or 0

cdef class Workers:
    cdef pthread_mutex_t mutex
    cdef pthread_cond_t wanted
    cdef Task* first
    cdef Task* last
    cdef bint stopping
    cdef int busy            # threads at work: I/O threads in a turn, and workers at a task
    cdef int looking         # I/O threads that wait and do not sleep
    cdef readonly int processors
    cdef readonly list threads
    cdef bint idle(self) noexcept nogil
    cdef void begin(self) noexcept nogil
    cdef void end(self) noexcept nogil
    cdef bint may_look(self) noexcept nogil
    cdef void looked(self) noexcept nogil
    cdef void submit(self, Task* task) noexcept nogil
    cdef void work(self) noexcept nogil
