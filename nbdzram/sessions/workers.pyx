"""Large WRITEs of few clients on many processors: threads that store parts of a payload and never take the interpreter
lock.

A session hands out a Task; a worker performs it on the engine and posts it home, to the thread that serves the session.
A hop costs some microseconds, and gains something only where a processor has nothing to do, so `idle` is asked before,
and whether it did gain something is learnt (storing.pxd).
Only the queue is shared, under one mutex; a Task belongs to one side at a time.
"""

import threading


from nbdzram.engine.disk cimport Disk
from nbdzram.sessions.mail cimport STORED, mail_post

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

cdef extern from * nogil:
    """
    static inline void busy_add(int* busy, int by) { __atomic_fetch_add(busy, by, __ATOMIC_RELAXED); }
    static inline int busy_now(int* busy) { return __atomic_load_n(busy, __ATOMIC_RELAXED); }
    """
    void busy_add(int*, int)
    int busy_now(int*)


cdef class Workers:
    """One thread fewer than processors: who hands out tasks works too."""

    def __cinit__(self):
        pthread_mutex_init(&self.mutex, NULL)
        pthread_cond_init(&self.wanted, NULL)

    def __init__(self, int processors):
        self.processors = processors
        self.threads = [
            threading.Thread(target=self._run, name=f"nbdzram-store-{n}", daemon=True) for n in range(processors - 1)
        ]
        for thread in self.threads:
            thread.start()

    def __dealloc__(self):
        pthread_cond_destroy(&self.wanted)
        pthread_mutex_destroy(&self.mutex)

    def stop(self):
        """End the threads. No task is under way."""
        assert self.first == NULL
        pthread_mutex_lock(&self.mutex)
        self.stopping = True
        pthread_cond_broadcast(&self.wanted)
        pthread_mutex_unlock(&self.mutex)
        for thread in self.threads:
            thread.join()

    cdef bint idle(self) noexcept nogil:
        """Is there a processor with nothing to do, and a worker for it?"""
        return self.processors > 1 and busy_now(&self.busy) < self.processors

    cdef void begin(self) noexcept nogil:
        """An I/O thread begins a turn."""
        busy_add(&self.busy, 1)

    cdef void end(self) noexcept nogil:
        """Its turn is over."""
        busy_add(&self.busy, -1)

    cdef bint may_look(self) noexcept nogil:
        """May an I/O thread keep its processor while it waits? Of every two it may keep one; `looked` ends it."""
        if busy_now(&self.looking) >= self.processors // 2 or not self.idle():
            return False
        busy_add(&self.looking, 1)
        return True

    cdef void looked(self) noexcept nogil:
        """What `may_look` allowed is over."""
        busy_add(&self.looking, -1)

    cdef void submit(self, Task* task) noexcept nogil:
        """Queue a task."""
        task.next = NULL
        task.error = 0
        task.letter.kind = STORED
        task.letter.owner = task
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
        while True:
            pthread_mutex_lock(&self.mutex)
            while self.first == NULL and not self.stopping:
                pthread_cond_wait(&self.wanted, &self.mutex)
            task = self.first
            if task != NULL:
                self.first = task.next
                if self.first == NULL:
                    self.last = NULL
            pthread_mutex_unlock(&self.mutex)
            if task == NULL:
                return
            self.begin()
            task.error = (<Disk>task.disk).c_write(task.offset, task.length, task.source)
            self.end()
            mail_post(task.home, &task.letter)
