"""When a request may begin; and long ones: one Job at a time, which goes on over several turns, and large WRITEs that
workers store meanwhile.

    may_begin ──> begin_request                       or else the session waits until its place is due (throttle.pyx)
    start_job ──> step, step, ... ──> finish_job        what follows in the inbox waits
    start_store ──> hand_out ──> workers ──> take_home, take_home, ... ──> finish_store

Invariants
1. Everything here runs on the session's thread; workers see Tasks, and a Task under way keeps its Store, and the
   session.
2. A Job that has begun is finished once, or dropped with the session; a Store likewise, when its last Task is home.
3. Behind a header that went ahead comes its content, and no other answer: nothing else is under way from there to its
   last byte, as nothing more is taken from the inbox meanwhile.
4. Of a READ no more is made than the peer takes: a step of it, or a reply that may not be cut, charged to the budget.
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free, malloc

from nbdzram.engine.extents cimport look_for_twins
from nbdzram.engine.must cimport must
from nbdzram.engine.twins cimport twins_begin
from nbdzram.nbd.transmission cimport (
    BLOCK, CHUNK_DATA, DF, NO_HOLE, NOT_AN_OFFSET, OK, READ, REPLY_OVERHEAD, SIMPLE, TRIM, UNREADABLE, WRITE, Request,
    finish_read, put_chunk, put_simple, read_header_size, store64, verdict_of,
)
from nbdzram.sessions.answers cimport must_last
from nbdzram.sessions.block_status cimport (
    DESCRIPTORS, STATUS_HOLDS, STATUS_ROOM, STRAINED_DESCRIPTORS, Contexts, Telling, begin_telling, forget_telling,
    put_statuses, tell_next, tell_on,
)
from nbdzram.sessions.budget cimport Piece, free_piece, new_piece
from nbdzram.sessions.costs cimport COST_OF_LOOK, COST_OF_STORING, INLINE_FREE, INLINE_LIMIT, cost_of_range
from nbdzram.sessions.stage cimport HALF_A_REPLY, LOST
from nbdzram.sessions.storing cimport storing_learn
from nbdzram.sessions.tally cimport count_timed, monotonic
from nbdzram.sessions.throttle cimport bytes_moved, is_measured
from nbdzram.sessions.workers cimport Task

cdef enum:
    STORE_STEP = 64 << 10         # of a large WRITE that is stored here: some 50 microseconds
    FREE_STEP = 4 << 20           # of TRIM and WRITE_ZEROES, which touch tables only: about as long
    LOOK_HOLDS = 16               # looks at the table, for what is shared or at all: 1,024 blocks, 10 to 18 us
    TASKS_OF_STORE = 8            # of one large WRITE: enough for every core, without hogging the queue
    TASKS_OF_SESSION = 16         # others' tasks wait behind so few


cdef class Work(Answers):
    """See the module's docstring."""

    @property
    def in_flight(self):
        """Requests that are under way."""
        return self.store_count + self.unsynced_count + (self.job.way != NONE)

    @property
    def storing(self):
        """Large WRITEs that the workers store."""
        return self.store_count

    cdef bint may_begin(self) noexcept nogil:
        """May the request that is next go on, of an export that is limited? Else the session waits until its place is
        due."""
        if self.hurried or not is_measured(&self.request):
            return True
        self.throttle.take(&self.place, bytes_moved(&self.request), self.started)
        self.throttled = self.place.due > self.started
        return not self.throttled

    cdef void begin_request(self) noexcept nogil:
        """It is taken from the inbox."""
        self.requests += 1
        self.outlet.scratch.served += 1
        if self.place.epoch == 0:
            return
        if self.place.due > self.place.taken:
            self.counts.throttled += 1
            self.counts.throttled_ns += self.started - self.place.taken
        if self.place.scarce:
            self.allowance = 0  # the export's other clients have their turns, request by request
        self.place.epoch = 0

    cdef void start_job(self, Way way, Piece* piece) noexcept nogil:
        must(way != STREAM or not self.busy(), b"no answer can come into the content of a READ whose header is sent")
        self.job.request = self.request
        self.job.started = self.started
        self.job.cursor = 0
        self.job.piece = piece
        self.job.way = way

    cdef bint start_read(self) noexcept nogil:
        """A long READ. A simple reply, and one with DF, has one header before all of its content: it is made whole
        where there is memory, and else its header goes ahead. False: not before what is under way is answered."""
        cdef Request* request = &self.request
        cdef uint64_t whole = request.length + REPLY_OVERHEAD
        cdef Piece* piece
        cdef uint8_t header[REPLY_OVERHEAD]
        cdef uint8_t* end
        if self.rules.style != SIMPLE and not request.flags & DF:
            self.start_job(CHUNKS, NULL)
            return True
        if self.budget.take(whole):
            piece = new_piece(whole, whole, self.budget)
            if piece != NULL:
                self.start_job(WHOLE, piece)
                return True
            self.budget.give_back(whole)
        if self.busy():
            return False
        if self.rules.style == SIMPLE:
            end = put_simple(header, request.cookie, 0)
        else:
            end = put_chunk(
                header, self.rules.style, request.cookie, request.offset, 0, CHUNK_DATA, 8 + request.length
            )
            store64(end, request.offset)
            end += 8
        self.outlet.put(header, end - header)
        self.start_job(STREAM, NULL)
        return True

    cdef bint step(self) noexcept nogil:
        """Do a part of the job. False: the peer must read first, or our turn is over."""
        cdef Request* request = &self.job.request
        cdef uint64_t offset = request.offset + self.job.cursor
        cdef uint64_t rest = request.length - self.job.cursor
        cdef uint64_t length = STEP
        cdef int error
        if self.allowance <= 0:
            self.later = True
            return False
        if self.job.way == LOOKS:
            return self.step_look()
        if rest == 0:
            self.finish_job(OK, 0)
            return True
        if request.command == READ:
            if self.job.way != WHOLE and self.budget.strained():
                length = SMALL_STEP
            return self.step_read(min(rest, length - offset % BLOCK))  # cut between blocks
        if request.command == WRITE:
            length = min(rest, <uint64_t>STORE_STEP - offset % BLOCK)
            error = self.disk.c_write(offset, length, self.job.piece.bytes + self.job.cursor)
            self.allowance -= COST_OF_STORING * length
        else:
            length = min(rest, <uint64_t>FREE_STEP - offset % BLOCK)
            if request.command == TRIM:
                error = self.disk.c_trim(offset, length)
            else:
                error = self.disk.c_zero(offset, length, request.flags & NO_HOLE != 0)
            if request.length > INLINE_FREE:
                self.allowance -= BLOCK + length // 8
        self.job.cursor += length
        if error:
            self.finish_job(verdict_of(error), offset)
        elif length == rest:
            self.finish_job(OK, 0)
        return True

    cdef bint step_read(self, uint64_t length) noexcept nogil:
        """The next `length` bytes of a long READ."""
        cdef Request* request = &self.job.request
        cdef uint64_t offset = request.offset + self.job.cursor
        cdef size_t header = read_header_size(self.rules.style)
        cdef uint8_t* target
        if self.job.way == WHOLE:
            target = self.job.piece.bytes + header + self.job.cursor
        else:
            target = self.outlet.reserve(length + REPLY_OVERHEAD)
            if target == NULL:
                return False
            if self.job.way == CHUNKS:
                target += header
        self.allowance -= length
        if self.disk.c_read(offset, length, target):
            self.finish_job(UNREADABLE, offset)
            return True
        self.job.cursor += length
        if self.job.way == STREAM:
            self.outlet.used += length
        elif self.job.way == CHUNKS:
            target -= header
            self.outlet.used += finish_read(
                target, self.rules.style, request, offset, length, False, self.job.cursor == request.length
            )
        if self.job.cursor == request.length:
            self.finish_job(OK, 0)
        elif self.job.way != WHOLE:
            self.outlet.send_ahead()
        return True

    cdef void start_look(self, const Contexts* contexts, size_t room) noexcept nogil:
        """A BLOCK_STATUS of what the export's blocks share. Without memory to look for that, nothing is told of it."""
        cdef Piece* piece = NULL
        if self.budget.take(room):
            piece = new_piece(room, room, self.budget)
            if piece == NULL:
                self.budget.give_back(room)
        self.start_job(LOOKS, piece)
        self.job.contexts = contexts[0]
        begin_telling(&self.job.telling, &self.request, self.descriptors())
        twins_begin(
            &self.job.twins, self.request.offset // BLOCK,
            (self.request.offset + self.request.length + BLOCK - 1) // BLOCK,
            NULL if piece == NULL else piece.bytes, 0 if piece == NULL else room)

    cdef bint step_look(self) noexcept nogil:
        """Look on; then gather what all of the stretch tells, as the look at it is the longest part; then answer."""
        cdef Job* job = &self.job
        cdef uint8_t* target
        if job.telling.told < job.contexts.count:
            self.allowance -= COST_OF_LOOK
            if look_for_twins(self.disk, &job.twins, LOOK_HOLDS) and tell_on(
                    self.disk, &job.request, &job.contexts, &job.twins, LOOK_HOLDS, &job.telling):
                self.finish_job(UNREADABLE, NOT_AN_OFFSET)
            return True
        target = self.outlet.reserve(STATUS_ROOM)
        if target == NULL:
            return False
        self.finish_job(self.put_told(&job.request, &job.contexts, &job.telling, target), NOT_AN_OFFSET)
        return True

    cdef size_t descriptors(self) noexcept nogil:
        """How many a reply has at most in a context."""
        return STRAINED_DESCRIPTORS if self.budget.strained() else DESCRIPTORS

    cdef int tell_status(self, const Request* request, const Contexts* contexts, uint8_t* target) noexcept nogil:
        """Put the reply to a BLOCK_STATUS that needs no look where STATUS_ROOM is reserved for it. A verdict."""
        cdef Telling telling
        cdef int error = 0
        cdef int verdict
        cdef int index
        self.allowance -= cost_of_range(request.length, contexts.count)
        begin_telling(&telling, request, self.descriptors())
        for index in range(contexts.count):
            if error == 0:
                error = tell_on(self.disk, request, contexts, NULL, STATUS_HOLDS // contexts.count, &telling)
            if telling.told == index:
                tell_next(&telling, request)
        verdict = UNREADABLE if error else self.put_told(request, contexts, &telling, target)
        forget_telling(&telling)
        return verdict

    cdef int put_told(
        self, const Request* request, const Contexts* contexts, Telling* telling, uint8_t* target
    ) noexcept nogil:
        """Put what was gathered. A verdict."""
        cdef size_t size
        if put_statuses(target, request, self.rules.style, contexts, telling, &size):
            return UNREADABLE
        self.outlet.used += size
        return OK

    cdef void finish_job(self, int verdict, uint64_t failed_at) noexcept nogil:
        """Answer it, once."""
        cdef Job job = self.job
        self.job.way = NONE
        self.job.piece = NULL
        if job.way == LOOKS:
            forget_telling(&job.telling)
        if verdict != OK:
            free_piece(job.piece, self.budget)
            if job.way == STREAM:
                # Section "Simple replies": after a header without error only a disconnect can tell; a chunk's too.
                count_timed(self.counts, READ, verdict, job.request.length, monotonic() - job.started)
                self.end(HALF_A_REPLY, failed_at)
                self.outlet.broken = True
                return
            self.refuse(&job.request, verdict, job.started, failed_at)
            return
        if job.way == WHOLE:
            job.piece.end = finish_read(
                job.piece.bytes, self.rules.style, &job.request, job.request.offset, job.request.length, True, True
            )
            count_timed(self.counts, READ, OK, job.request.length, monotonic() - job.started)
            self.outlet.send(job.piece)
            return
        elif job.way == STREAM and self.rules.style != SIMPLE:
            self.reply_success(&job.request)
        elif job.way == LOOKS:
            free_piece(job.piece, self.budget)
        elif job.way == STEPS:
            free_piece(job.piece, self.budget)
            self.learn(&job.request, False)
            if job.request.command == TRIM:
                self.counts.blocks_trimmed += job.request.length // BLOCK
            if self.syncs and must_last(&job.request):
                self.wait_for_sync(&job.request, job.started)
                return
            self.reply_success(&job.request)
        count_timed(self.counts, job.request.command, OK, job.request.length, monotonic() - job.started)

    cdef void start_store(self, Piece* payload) noexcept nogil:
        cdef Store* store = <Store*>calloc(1, sizeof(Store))
        cdef Store** end = &self.stores
        if store == NULL:  # then without
            self.start_job(STEPS, payload)
            return
        store.session = <void*>self
        store.request = self.request
        store.started = self.started
        store.payload = payload
        while end[0] != NULL:
            end = &end[0].next
        end[0] = store
        self.store_count += 1
        self.payload_bytes += payload.size
        self.hand_out()

    cdef void hand_out(self) noexcept nogil:
        """Give the workers as many tasks as the limits allow."""
        cdef Store* store = self.stores
        cdef Task* task
        while store != NULL:
            while (store.cursor < store.request.length and store.verdict == OK and store.in_flight < TASKS_OF_STORE
                   and self.tasks < TASKS_OF_SESSION):
                task = <Task*>malloc(sizeof(Task))
                if task == NULL:
                    if self.tasks == 0:  # nothing comes home that would bring us here again
                        self.fall_apart()
                    return
                task.home = self.bell.home
                task.store = store
                task.disk = <void*>self.disk
                task.offset = store.request.offset + store.cursor
                task.length = min(<uint64_t>STEP - task.offset % BLOCK, store.request.length - store.cursor)
                task.source = store.payload.bytes + store.cursor
                store.cursor += task.length
                store.in_flight += 1
                self.tasks += 1
                self.workers.submit(task)
            store = store.next

    cdef void finish_store(self, Store* store) noexcept nogil:
        """All of it came home: answer, once."""
        cdef Store** place = &self.stores
        cdef Store done = store[0]
        must(store.in_flight == 0, b"a payload is there as long as a worker reads it")
        while place[0] != store:
            place = &place[0].next
        place[0] = store.next
        free(store)
        self.store_count -= 1
        self.payload_bytes -= done.payload.size
        free_piece(done.payload, self.budget)
        if self.stage_now >= LOST:
            return
        if done.verdict != OK:
            self.refuse(&done.request, done.verdict, done.started, done.failed_at)
            return
        self.learn(&done.request, True)
        if self.syncs and must_last(&done.request):
            self.wait_for_sync(&done.request, done.started)
        else:
            self.reply_success(&done.request)
            count_timed(self.counts, WRITE, OK, done.request.length, monotonic() - done.started)

    cdef void learn(self, const Request* request, bint beside) noexcept nogil:
        """A long request is done. Of a large WRITE: how soon, and in which way."""
        if request.command == WRITE and request.length > INLINE_LIMIT:
            storing_learn(&self.learnt, beside, request.length, monotonic())

    cdef void take_home(self, Task* task) noexcept nogil:
        """A part of a large WRITE was stored, or not."""
        cdef Store* store = <Store*>task.store
        self.tasks -= 1
        store.in_flight -= 1
        store.done += task.length
        if task.error and store.verdict == OK:
            store.verdict = verdict_of(task.error)
            store.failed_at = task.offset
        free(task)
        if store.in_flight == 0 and (
            store.done == store.request.length or store.verdict != OK or self.stage_now >= LOST
        ):
            self.finish_store(store)
        if self.stage_now < LOST:
            self.hand_out()

    cdef bint busy(self) noexcept nogil:
        """Requests are with the workers, or wait for a sync."""
        return self.stores != NULL or self.unsynced != NULL

    cdef void drop_work(self) noexcept nogil:
        """The session is lost: what nobody works on any more is forgotten."""
        cdef Store* store = self.stores
        cdef Store* following
        free_piece(self.job.piece, self.budget)
        if self.job.way == LOOKS:
            forget_telling(&self.job.telling)
        self.job.piece = NULL
        self.job.way = NONE
        self.later = False
        while store != NULL:
            following = store.next
            if store.in_flight == 0:
                self.finish_store(store)
            store = following
