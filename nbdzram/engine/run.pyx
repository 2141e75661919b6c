"""What fold, compaction, recompression and check have in common: a run over a pool in bounded steps.

    step(budget)   maintenance lock ── _step(budget), without the interpreter lock ── when that is done: _go_on()

A step looks at about `budget` things (handles, zspages, entries), and holds the pool's lock for at most HOLD of them at
a time, so that no client ever waits for a run. Between two holds, and between two steps, the pool changes under it:
whatever a run remembers from one hold to the next is a hint until it is looked at again.

What a step retires it sees taken back before it ends, so that a report is exact, and what is retired stays little. The
maintenance lock is held meanwhile: whoever takes it is not online (quiescence.pyx).

Progress is told in work, not in things: what takes a thousand times as long counts a thousand times, so that the share
that is done is the share of the time. What was expected and did not come is taken off the total when a run ends.
"""

from libc.stdint cimport int64_t, uint32_t

from nbdzram.engine.lock cimport HOLD, lock_leave, lock_take
from nbdzram.engine.core cimport PoolCore
from nbdzram.engine.slab cimport RELEASED
from nbdzram.engine.users cimport users_enter, users_leave

from nbdzram.errors import EngineError


HOLD_COUNT = HOLD


cdef class Run:
    """One run, stepped by one thread at a time; its counters may be read from any."""

    def __cinit__(self, PoolCore pool, **_):
        self.pool = pool

    def step(self, uint32_t budget = 4096) -> bool:
        cdef bint more
        cdef int64_t before
        if not users_enter(&self.pool.users):
            raise EngineError("a run cannot go on: its pool was closed")
        try:
            with nogil:
                lock_take(&self.pool.maintenance)
                before = self.pool.store.slab.returned[self.cause]
                more = self._step(budget)
                if self.cause != RELEASED:
                    self.pool.reclaim()
                self.returned += self.pool.store.slab.returned[self.cause] - before
                lock_leave(&self.pool.maintenance)
            if more or self._go_on():
                return True
            self._total = self._done
            return False
        finally:
            users_leave(&self.pool.users)

    @property
    def done(self):
        return self._done

    @property
    def total(self):
        return max(self._total, self._done)

    cdef bint _step(self, uint32_t budget) noexcept nogil:
        """Do about `budget` things, under the maintenance lock. False when nothing is left to do without Python."""
        return False

    cdef bint _go_on(self) except -1:
        """With the interpreter lock, and without any other, after _step came to its end: whether there is more."""
        return False
