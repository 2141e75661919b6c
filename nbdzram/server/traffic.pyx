"""What passed through one export: plain counters in C, written only by the event loop's thread.

A request costs a handful of additions here; everything that a scrape needs is computed when it asks.
"""

cimport cython

from nbdzram.nbd.constants import Command
from nbdzram.nbd.verdicts import Verdict
from nbdzram.server.counts import IoStat
from nbdzram.status import OperationStatus


cdef dict _NAMES = {int(command): command.name.lower() for command in Command if command is not Command.DISC}
_NAMES[OPERATIONS - 1] = "other"
cdef list _CAUSE_NAMES = [verdict.name.lower() for verdict in Verdict]
cdef bint[CAUSES] _INVALID
for _verdict in Verdict:  # asking the enumerations at each count would cost more than the counting
    _INVALID[int(_verdict)] = _verdict.invalid_io
cdef int _READ = Command.READ
cdef int _BLOCK_STATUS = Command.BLOCK_STATUS
_UNUSED = OperationStatus(
    requests=0, bytes=0, errors={}, latency_counts=(0,) * BUCKETS, latency_sum_seconds=0.0
)  # one record for all: of a hundred exports' operations most were never asked for


@cython.auto_pickle(False)
cdef class Traffic:
    """Counters of one export since it was made."""

    def total_requests(self):
        """Requests of all operations."""
        cdef uint64_t total = 0
        cdef int number
        for number in range(OPERATIONS):
            total += self.requests[number]
        return total

    def operations(self):
        """Counts by operation name (read, write...; other: commands that do not exist)."""
        return {
            name: self._operation(number) if self.requests[number] else _UNUSED for number, name in _NAMES.items()
        }

    def _operation(self, int number):
        cdef int cause
        errors = {
            _CAUSE_NAMES[cause]: self.errors[number][cause]
            for cause in range(1, CAUSES)
            if self.errors[number][cause]
        }
        return OperationStatus(
            requests=self.requests[number],
            bytes=self.size[number],
            errors=errors,
            latency_counts=tuple([self.latency[number][k] for k in range(BUCKETS)]),
            latency_sum_seconds=self.nanoseconds[number] / 1e9,
        )

    def io_stat(self):
        """The four fields of zram's io_stat."""
        cdef uint64_t failed_reads = 0
        cdef uint64_t failed_writes = 0
        cdef uint64_t invalid_io = 0
        cdef int number
        cdef int cause
        for number in range(OPERATIONS):
            for cause in range(1, CAUSES):
                if _INVALID[cause]:
                    invalid_io += self.errors[number][cause]
                elif number == _READ or number == _BLOCK_STATUS:
                    failed_reads += self.errors[number][cause]
                else:
                    failed_writes += self.errors[number][cause]
        return IoStat(failed_reads, failed_writes, invalid_io, self.blocks_trimmed)
