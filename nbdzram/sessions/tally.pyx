"""What passed through one export: counters with one writer each, summed when somebody asks.

A request costs a handful of additions in memory that no other thread writes to.
"""

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from nbdzram.nbd.transmission cimport VERDICTS

MOST_THREADS = THREADS


cdef class Tally:
    """See the module's docstring. server.traffic.Traffic makes records of it."""

    def __dealloc__(self):
        cdef int thread
        for thread in range(THREADS):
            free(self.by_thread[thread])

    cdef Counts* of(self, int thread) except NULL:
        """Where a thread counts; made when it first serves the export, and kept as long as the tally."""
        assert 0 <= thread < THREADS
        if self.by_thread[thread] == NULL:
            self.by_thread[thread] = <Counts*>calloc(1, sizeof(Counts))
            if self.by_thread[thread] == NULL:
                raise MemoryError("no memory for an export's counters")
        return self.by_thread[thread]

    def total_requests(self):
        """Requests of all operations."""
        cdef uint64_t total = 0
        cdef int thread, operation
        for thread in range(THREADS):
            if self.by_thread[thread] != NULL:
                for operation in range(OPERATIONS):
                    total += self.by_thread[thread].requests[operation]
        return total

    def blocks_trimmed(self):
        """Blocks that TRIM gave back."""
        return sum(
            [self.by_thread[thread].blocks_trimmed for thread in range(THREADS) if self.by_thread[thread] != NULL])

    def throttled(self):
        """(requests that a limit let wait before they began, nanoseconds that they waited)."""
        cdef uint64_t requests = 0, nanoseconds = 0
        cdef int thread
        for thread in range(THREADS):
            if self.by_thread[thread] != NULL:
                requests += self.by_thread[thread].throttled
                nanoseconds += self.by_thread[thread].throttled_ns
        return requests, nanoseconds

    def add(self, int operation, uint64_t requests, uint64_t size, uint64_t nanoseconds, errors, latency):
        assert 0 <= operation < OPERATIONS
        cdef Counts* counts = self.of(0)
        cdef uint64_t count
        cdef int number
        counts.requests[operation] += requests
        counts.size[operation] += size
        counts.nanoseconds[operation] += nanoseconds
        for number, count in enumerate(errors[:VERDICTS]):
            counts.errors[operation][number] += count
        for number, count in enumerate(latency[:BUCKETS]):
            counts.latency[operation][number] += count

    def add_trimmed(self, uint64_t blocks):
        self.of(0).blocks_trimmed += blocks

    def add_throttled(self, uint64_t requests, uint64_t nanoseconds):
        cdef Counts* counts = self.of(0)
        counts.throttled += requests
        counts.throttled_ns += nanoseconds

    def operation(self, int operation):
        """(requests, bytes, nanoseconds, errors by verdict, latency counts by bucket) of one operation; None: never
        asked."""
        cdef Counts* counts
        cdef int thread, number
        cdef uint64_t requests = 0, size = 0, nanoseconds = 0
        cdef uint64_t errors[VERDICTS]
        cdef uint64_t latency[BUCKETS]
        for number in range(VERDICTS):
            errors[number] = 0
        for number in range(BUCKETS):
            latency[number] = 0
        for thread in range(THREADS):
            counts = self.by_thread[thread]
            if counts == NULL or counts.requests[operation] == 0:
                continue
            requests += counts.requests[operation]
            size += counts.size[operation]
            nanoseconds += counts.nanoseconds[operation]
            for number in range(VERDICTS):
                errors[number] += counts.errors[operation][number]
            for number in range(BUCKETS):
                latency[number] += counts.latency[operation][number]
        if requests == 0:
            return None
        return (
            requests,
            size,
            nanoseconds,
            [errors[number] for number in range(VERDICTS)],
            [latency[number] for number in range(BUCKETS)],
        )
