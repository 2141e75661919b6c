"""Python's face of the data plane: give it clients, hear what became of them, end it.

    attach ─> a thread's mail ─> the session is served ─> ... ─> GONE ─> bury ─> nothing refers to it any more
                                          └── tidings ──> `collect`, whenever `fileno` is readable

The event loop's thread only. What a session tells comes once for each time that it was told, or once for several.
"""

from libc.stdint cimport uint32_t, uint64_t

from nbdzram.engine.disk cimport Disk
from nbdzram.sessions.answers cimport syncs_tell
from nbdzram.sessions.budget cimport Budget
from nbdzram.sessions.line cimport Line
from nbdzram.sessions.mail cimport (
    Letter, bell_answer, bell_hang, bell_ring, mail_close, mail_open, mail_quiet, mail_take,
)
from nbdzram.sessions.mail cimport NOTICED, TIDINGS, WISH
from nbdzram.sessions.notices cimport Notices
from nbdzram.sessions.session cimport Session
from nbdzram.sessions.tally cimport Tally
from nbdzram.sessions.thread cimport REST, Desk
from nbdzram.sessions.throttle cimport Throttle
from nbdzram.sessions.turns cimport Turns
from nbdzram.sessions.wishes cimport ABORT, ATTACH, BURIED, BURY, DRAIN, ENDED, GONE_NOW, GO_ON, RELEASE, SYNC, SYNCED
from nbdzram.sessions.workers cimport Workers

from nbdzram.sessions.tally import MOST_THREADS
from nbdzram.sessions.thread import IoThread

MOST_IO_THREADS = MOST_THREADS - 1  # one counts for the event loop


cdef class Plane:
    """See the module's docstring."""

    def __cinit__(self):
        cdef int error
        self.box.event = -1
        error = mail_open(&self.box)
        if error:
            raise OSError(error, "eventfd")

    def __init__(self, int threads, int processors, uint64_t budget_bytes):
        assert 1 <= threads <= MOST_IO_THREADS
        self.budget = Budget(budget_bytes)
        self.workers = Workers(processors)
        self.turns = Turns()
        self.notices = Notices()
        bell_hang(&self.notices.bell, &self.box, NOTICED, NULL)
        self.sessions = {}
        self.threads = [IoThread(number, self.workers) for number in range(1, threads + 1)]

    def __dealloc__(self):
        mail_close(&self.box)

    def fileno(self):
        """Readable when `collect` has something to tell."""
        return self.box.event

    def attach(self, Line line not None, *, uint64_t number, Disk disk, Tally tally, Throttle throttle, int style,
               bint read_only, contexts, uint64_t payload_limit, uint64_t connection_limit, bint syncs, bytes greeting,
               bytes rest, size_t line_bytes=0, Desk desk=None):
        """Make a session of a client, for the thread with the fewest, or for a `desk` of the caller's own.
        `line_bytes`: what the line's own buffers take."""
        cdef Session session = Session(
            number=number, disk=disk, tally=tally, line=line, budget=self.budget, workers=self.workers,
            turns=self.turns, notices=self.notices, throttle=throttle, style=style, read_only=read_only,
            contexts=contexts, payload_limit=payload_limit, connection_limit=connection_limit, syncs=syncs,
            greeting=greeting, rest=rest,
        )
        if desk is None:
            desk = min(self.threads, key=_load)
        session.counts = tally.of(desk.number)
        bell_hang(&session.bell, &desk.box, WISH, <void*>session)
        bell_hang(&session.tidings, &self.box, TIDINGS, <void*>session)
        session.desk = desk
        # A sixteenth stays free of it: however many are attached, replies have something to go on with.
        if line_bytes and self.budget.used < self.budget.limit // 16 * 15 and self.budget.take(line_bytes):
            session.outlet.reserved = line_bytes
        desk.sessions += 1
        self.sessions[number] = session
        return session

    def begin(self, Session session not None):
        """Let its thread begin with it."""
        bell_ring(&session.bell, ATTACH)

    def go_on(self, Session session not None):
        """Its export's limits are others than they were: it need not wait as long, or longer."""
        bell_ring(&session.bell, GO_ON)

    def drain(self, Session session not None):
        """Read no more of it; answer what it asked for completely, then close."""
        bell_ring(&session.bell, DRAIN)

    def release(self, Session session not None):
        """As drain, but what it was in the middle of may come to its end, and the line stays open
        (Session.released)."""
        bell_ring(&session.bell, RELEASE)

    def abort(self, Session session not None):
        """Cut it."""
        bell_ring(&session.bell, ABORT)

    def syncs_asked(self, Session session not None):
        """The number of the last answer that waits for a sync."""
        return session.syncs_asked

    def synced(self, Session session not None, uint64_t number, bint failed):
        """A sync has ended that began when answers up to `number` waited for it."""
        session.syncs_failed = failed
        syncs_tell(&session.syncs_done, number)
        bell_ring(&session.bell, SYNCED)

    def rest(self):
        """Once a second: threads give back what quiet sessions do not need, and nobody holds others up."""
        cdef Desk desk
        self.turns.watch()
        self.budget.rest()
        for desk in self.threads:
            if desk.sessions:
                bell_ring(&desk.bell, REST)

    def collect(self):
        """(what sessions told: each a session, and whether it ENDED, waits for a SYNC, is GONE; notices for the
        log)."""
        cdef Letter* letter
        cdef Letter* following
        cdef Session session
        cdef uint32_t told
        tidings = []
        mail_quiet(&self.box)
        letter = mail_take(&self.box)
        while letter != NULL:
            following = letter.next
            if letter.kind == NOTICED:
                bell_answer(&self.notices.bell)
            else:
                session = <Session>letter.owner
                told = bell_answer(&session.tidings)
                if told & BURIED:
                    del self.sessions[session.number]
                else:
                    tidings.append((session, told & ENDED != 0, told & SYNC != 0, told & GONE_NOW != 0))
            letter = following
        # Behind the bells: what came before one was answered rang no more, and what a session said before its end that
        # is told now is among them.
        return tidings, self.notices.take()

    def bury(self, Session session not None):
        """It was told GONE, and that was seen to: nothing is wished of it any more."""
        (<Desk>session.desk).sessions -= 1
        bell_ring(&session.bell, BURY)

    def stop(self):
        """End the threads. Every session is buried, or will be as they end."""
        for thread in self.threads:
            thread.stop()
        self.workers.stop()


def _load(Desk desk not None):
    return desk.sessions
