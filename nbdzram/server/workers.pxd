from libc.stdint cimport uint8_t, uint64_t

from nbdzram.engine.disk cimport Disk

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass

ctypedef struct Task:
    Task* next
    void* operation          # the Operation that waits for it; referenced while the task lives
    void* disk               # Disk, kept by the operation
    void* piece              # READ: the Piece that `target` lies in; a reference
    int command
    bint no_hole
    bint whole
    int style
    uint64_t cookie
    uint64_t request_offset
    uint64_t offset          # bytes of the export
    uint64_t length
    uint8_t* target          # READ: header, then content; WRITE: unused
    const uint8_t* source    # WRITE: the content
    size_t reply_size        # READ: bytes of the finished reply
    size_t last              # READ: position of its last chunk's header
    int error                # errno of the engine, or 0

cdef class Budget:
    cdef readonly uint64_t limit
    cdef readonly uint64_t used
    cdef bint take(self, uint64_t size) noexcept
    cdef bint take_payload(self, uint64_t size) noexcept
    cdef bint take_half(self, uint64_t size) noexcept
    cdef bint strained(self) noexcept
    cdef void force(self, uint64_t size) noexcept
    cdef void give_back(self, uint64_t size) noexcept

cdef class Piece:
    cdef uint8_t* bytes
    cdef readonly size_t size
    cdef Budget budget
    cdef uint64_t charged
    cdef size_t start
    cdef size_t end

cdef Piece new_piece(size_t size, Budget budget, uint64_t charged)

cdef class TaskOwner:
    cdef int take_back(self, Task* task) except -1
    cdef int proceed(self) except -1
    cdef int fail(self, error) except -1

cdef class Workers:
    cdef pthread_mutex_t mutex
    cdef pthread_cond_t wanted
    cdef Task* first
    cdef Task* last
    cdef Task* finished
    cdef Task* finished_last
    cdef bint stopping
    cdef int event
    cdef readonly list threads
    cdef void submit(self, Task* task) noexcept
    cdef void work(self) noexcept nogil
