"""What threads that serve clients have to say for the log: a bounded ring of records of one size.

A thread posts and goes on; the event loop reads and writes the lines. When it does not keep up, notices are dropped and
counted, and nobody waits.
"""

from libc.stdint cimport uint64_t

from nbdzram.nbd.transmission cimport Request
from nbdzram.sessions.mail cimport bell_ring

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t*, void*)
    int pthread_mutex_destroy(pthread_mutex_t*)
    int pthread_mutex_lock(pthread_mutex_t*)
    int pthread_mutex_unlock(pthread_mutex_t*)


cdef class Notices:
    """See the module's docstring."""

    def __cinit__(self):
        pthread_mutex_init(&self.mutex, NULL)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.mutex)

    cdef void post(self, uint64_t session, int verdict, const Request* request, uint64_t size) noexcept nogil:
        """Tell of a refused request. Any thread."""
        cdef Notice* notice
        pthread_mutex_lock(&self.mutex)
        if self.count == NOTICES:
            self.dropped += 1
        else:
            notice = &self.kept[(self.first + self.count) % NOTICES]
            notice.request = request[0]
            notice.session = session
            notice.size = size
            notice.verdict = verdict
            self.count += 1
        pthread_mutex_unlock(&self.mutex)
        bell_ring(&self.bell, 1)

    def take(self):
        """All that wait: (session's number, verdict, command, flags, offset, length, size of the export) each."""
        cdef Notice notice
        cdef bint found = True
        taken = []
        while True:
            pthread_mutex_lock(&self.mutex)
            found = self.count > 0
            if found:
                notice = self.kept[self.first]
                self.first = (self.first + 1) % NOTICES
                self.count -= 1
            pthread_mutex_unlock(&self.mutex)
            if not found:
                return taken
            taken.append((
                notice.session, notice.verdict, notice.request.command, notice.request.flags, notice.request.offset,
                notice.request.length, notice.size,
            ))
