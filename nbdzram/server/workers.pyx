"""Large requests off the event loop: threads that never take the interpreter lock while they work.

The loop's thread submits a Task (a C structure), a worker performs it on the engine, and the loop's thread collects it
again, woken by an eventfd. Only the two queues are shared, under one mutex; a Task belongs to one side at a time.

Also here, because a task's memory outlives the request that made it: Budget, which bounds what payloads and replies
under way may hold, and Piece, a buffer that gives its share back when the last user (a socket's queue, say) lets go.
"""

import threading

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc

from nbdzram.engine.disk cimport Disk
from nbdzram.nbd.transmission cimport READ, TRIM, WRITE, WRITE_ZEROES, finish_read, read_header_size

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t*, void*)
    int pthread_mutex_destroy(pthread_mutex_t*)
    int pthread_mutex_lock(pthread_mutex_t*)
    int pthread_mutex_unlock(pthread_mutex_t*)
    int pthread_cond_init(pthread_cond_t*, void*)
    int pthread_cond_destroy(pthread_cond_t*)
    int pthread_cond_wait(pthread_cond_t*, pthread_mutex_t*)
    int pthread_cond_signal(pthread_cond_t*)
    int pthread_cond_broadcast(pthread_cond_t*)

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int, int)
    enum:
        EFD_NONBLOCK
        EFD_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    ssize_t c_write_fd "write"(int, const void*, size_t)
    ssize_t c_read_fd "read"(int, void*, size_t)
    int c_close "close"(int)


cdef extern from "<malloc.h>" nogil:
    int malloc_trim(size_t)
    int mallopt(int, int)
    enum:
        M_MMAP_THRESHOLD
        M_TRIM_THRESHOLD

cdef enum:
    LARGEST_KEPT = 1 << 20    # buffers up to here are reused without the system: pieces are 256 KiB
    MOST_KEPT = 16 << 20      # freed memory that is kept for them


def keep_memory():
    """Reuse freed buffers. By default the C library gives each 256 KiB back at once, and the next one is made of fresh
    pages: six tenths of the time of a server that answered reads of 256 KiB went there."""
    mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
    mallopt(M_TRIM_THRESHOLD, MOST_KEPT)


def release_memory():
    """Give freed buffers back to the system: the C library keeps them otherwise, tens of megabytes after a flood."""
    with nogil:
        malloc_trim(0)


cdef enum:
    STRAIN_MARGIN = 1 << 20  # a budget with less room than this is used up: a few steps of ordinary size


cdef class Budget:
    """Bytes that payloads and replies under way may hold, over all connections. Used only on the loop's thread.

    When it is used up, READs go on in small steps without it (hotpath, SMALL_PIECE), and WRITEs are stored as they
    arrive, so that nobody stands still.
    """

    def __init__(self, uint64_t limit):
        self.limit = limit
        self.used = 0

    cdef bint take(self, uint64_t size) noexcept:
        """Charge `size` if there is room for it."""
        if self.used + size > self.limit:
            return False
        self.used += size
        return True

    cdef bint take_payload(self, uint64_t size) noexcept:
        """The same for at most half of what is left, so that a few huge payloads leave room for many small ones."""
        if self.used + 2 * size > self.limit:
            return False
        self.used += size
        return True

    cdef bint take_half(self, uint64_t size) noexcept:
        """The same from the first half only: for comfort, which must not use up what replies need."""
        if self.used + size > self.limit // 2:
            return False
        self.used += size
        return True

    cdef bint strained(self) noexcept:
        """Hardly any room is left: work in small steps."""
        return self.used + STRAIN_MARGIN > self.limit

    cdef void force(self, uint64_t size) noexcept:
        """Charge `size` in any case: bytes that are held already."""
        self.used += size

    cdef void give_back(self, uint64_t size) noexcept:
        self.used -= size


@cython.no_gc_clear  # its budget must still be there when it dies
cdef class Piece:
    """A buffer of the C heap. As a Python buffer it shows [start, end), so that a transport can queue it uncopied."""

    def __len__(self):
        return self.end - self.start

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.bytes + self.start, self.end - self.start, 0, flags)

    def __dealloc__(self):
        free(self.bytes)
        self.budget.give_back(self.charged)


cdef Piece new_piece(size_t size, Budget budget, uint64_t charged):
    """`charged` bytes were taken from the budget for it, and go back when it dies."""
    cdef Piece piece = Piece.__new__(Piece)
    piece.budget = budget
    piece.charged = charged
    piece.bytes = <uint8_t*>malloc(size)
    if piece.bytes == NULL:
        raise MemoryError(f"no memory for a buffer of {size} bytes")
    piece.size = size
    piece.start = 0
    piece.end = size
    return piece


cdef void perform(Task* task) noexcept nogil:
    """Do one task on the engine. Any thread."""
    cdef size_t header
    if task.command == READ:
        header = read_header_size(task.style)
        task.error = (<Disk>task.disk).c_read(task.offset, task.length, task.target + header)
        if task.error == 0:
            task.reply_size = finish_read(
                task.target, task.style, task.cookie, task.request_offset, task.offset, task.length, task.whole, &task.last
            )
    elif task.command == WRITE:
        task.error = (<Disk>task.disk).c_write(task.offset, task.length, task.source)
    elif task.command == TRIM:
        task.error = (<Disk>task.disk).c_trim(task.offset, task.length)
    elif task.command == WRITE_ZEROES:
        task.error = (<Disk>task.disk).c_zero(task.offset, task.length, task.no_hole)


cdef class TaskOwner:
    """Whoever submits tasks: told on the loop's thread when they are done."""

    cdef int take_back(self, Task* task) except -1:
        """One task is done; its memory is the owner's again."""
        raise NotImplementedError

    cdef int proceed(self) except -1:
        """All tasks that were done have been taken back."""
        raise NotImplementedError

    cdef int fail(self, error) except -1:
        """The others' tasks go on, whatever `error` came of this one: end what it belongs to, and be loud."""
        raise NotImplementedError


cdef class Workers:
    """`count` threads, and the loop's thread calls `collect` whenever `fileno` is readable."""

    def __cinit__(self):
        pthread_mutex_init(&self.mutex, NULL)
        pthread_cond_init(&self.wanted, NULL)
        self.event = -1

    def __init__(self, int count):
        self.event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.event < 0:
            raise OSError(errno, "eventfd")
        self.threads = [threading.Thread(target=self._run, name=f"nbdzram-io-{n}", daemon=True) for n in range(count)]
        for thread in self.threads:
            thread.start()

    def __dealloc__(self):
        pthread_cond_destroy(&self.wanted)
        pthread_mutex_destroy(&self.mutex)
        if self.event >= 0:
            c_close(self.event)

    def fileno(self):
        """Readable when collect has something to do."""
        return self.event

    def stop(self):
        """End the threads. The caller has collected every task."""
        assert self.first == NULL
        pthread_mutex_lock(&self.mutex)
        self.stopping = True
        pthread_cond_broadcast(&self.wanted)
        pthread_mutex_unlock(&self.mutex)
        for thread in self.threads:
            thread.join()

    def collect(self):
        """Hand finished tasks to their operations. Loop's thread only."""
        cdef uint64_t count
        cdef Task* task
        cdef Task* next
        c_read_fd(self.event, &count, 8)
        pthread_mutex_lock(&self.mutex)
        task = self.finished
        self.finished = NULL
        pthread_mutex_unlock(&self.mutex)
        cdef TaskOwner owner
        owners = []
        while task != NULL:
            next = task.next
            owner = <TaskOwner>task.operation
            owners.append(owner)
            Py_DECREF(owner)
            try:
                owner.take_back(task)
            except BaseException as error:
                owner.fail(error)
            task = next
        for owner in owners:
            try:
                owner.proceed()
            except BaseException as error:
                owner.fail(error)

    cdef void submit(self, Task* task) noexcept:
        """Queue a task. It holds a reference to its operation until it is collected."""
        Py_INCREF(<object>task.operation)
        task.next = NULL
        task.error = 0
        pthread_mutex_lock(&self.mutex)
        if self.last == NULL:
            self.first = task
        else:
            self.last.next = task
        self.last = task
        pthread_cond_signal(&self.wanted)
        pthread_mutex_unlock(&self.mutex)

    def _run(self):
        with nogil:
            self.work()

    cdef void work(self) noexcept nogil:
        cdef Task* task
        cdef uint64_t one = 1
        cdef bint first
        while True:
            pthread_mutex_lock(&self.mutex)
            while self.first == NULL and not self.stopping:
                pthread_cond_wait(&self.wanted, &self.mutex)
            if self.first == NULL:
                pthread_mutex_unlock(&self.mutex)
                return
            task = self.first
            self.first = task.next
            if self.first == NULL:
                self.last = NULL
            pthread_mutex_unlock(&self.mutex)
            perform(task)
            pthread_mutex_lock(&self.mutex)
            task.next = NULL
            first = self.finished == NULL
            if first:
                self.finished = task
            else:
                self.finished_last.next = task
            self.finished_last = task
            pthread_mutex_unlock(&self.mutex)
            if first:
                c_write_fd(self.event, &one, 8)
