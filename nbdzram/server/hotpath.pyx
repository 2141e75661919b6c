"""The transmission phase of one connection: bytes of the socket in, engine, bytes of the socket out.

One wake-up of the event loop is one call of `buffer_updated`: every complete request in the inbox is validated, performed
and answered in C, and the answers leave with one send. What is large goes to the workers as an Operation; what is rare
(errors, block status) goes through the Python subclass, server.session.Session.

    phase    what the next bytes are
    HEADER   a request's header, and a small WRITE's payload: both in the inbox
    PAYLOAD  a large WRITE's payload, read by the socket straight into a buffer of its own
    APPLY    the same without a buffer, because the budget is used up: stored as it arrives, in turns (server.turns)
    SKIP     the payload of a request that is refused

Invariants
1. Everything here runs on the loop's thread; workers see Tasks only.
2. A request is either not yet taken from the inbox, or an Operation, or answered: never two of these.
3. While `blocked` (the peer does not read) nothing new is performed. A connection then holds at most the inbox, one
   scratch of answers, and PIECE_WINDOW of read pieces, all charged to the Budget. When that is used up, READs go on
   in steps of SMALL_PIECE on the loop: who reads its replies is served, who does not holds one step.
4. A WRITE changes nothing before its payload is complete, except in phase APPLY.
"""

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from nbdzram.engine.disk cimport Disk
from nbdzram.nbd.transmission cimport (
    BLOCK, BLOCK_STATUS, CACHE, CHUNK_DATA, CHUNK_DONE, COMMANDS, DF, DISC, EXTENDED, EXTENDED_REQUEST_SIZE, FLUSH, NO_HOLE, OK,
    POOL_FULL, READ, REPLY_OVERHEAD, SHUTTING_DOWN, SIMPLE, SIMPLE_REPLY_SIZE, TRIM, UNREADABLE, WRITE, WRITE_ZEROES,
    WRONG_SHAPE, Request, Rules, finish_read, parse_request, put_chunk, put_simple, put_success,
    read_header_size, store16, store64, validate,
)
from nbdzram.server.inbox cimport Inbox
from nbdzram.server.outlet cimport Outlet, Scratch
from nbdzram.server.traffic cimport Traffic
from nbdzram.server.workers cimport Budget, Piece, Task, TaskOwner, Workers, new_piece

from nbdzram.errors import ProtocolError
from nbdzram.nbd.verdicts import Asked

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int, timespec*)
    enum:
        CLOCK_MONOTONIC

INLINE_LIMIT = _INLINE_LIMIT
UNFRAGMENTED_LIMIT = _PIECE_SIZE

cdef enum:  # phases
    HEADER = 0
    PAYLOAD = 1
    APPLY = 2
    SKIP = 3

cdef enum:
    _INLINE_LIMIT = 64 << 10      # READ and WRITE up to here are done on the loop: about as long as a hop to a worker
    INLINE_FREE = 1 << 20         # the same for TRIM and WRITE_ZEROES, which touch tables only
    _PIECE_SIZE = 256 << 10       # one task of a READ or WRITE, and the largest unfragmented READ
    WHOLE_SIMPLE = 1 << 20        # a simple reply up to here is one task, since its pieces could not leave out of order
    SMALL_PIECE = 4 << 10         # a step of a READ when the budget is used up: 4 MiB for a thousand that never read
    FREE_STEP = 64 << 20          # one task of TRIM or WRITE_ZEROES: some milliseconds
    TASKS_IN_FLIGHT = 8           # of one operation: enough for every core, without hogging the queue
    PIECE_WINDOW = 2 << 20        # read replies of one connection that are being made or wait for the socket
    OPERATION_LIMIT = 64          # large requests of one connection under way; the rest waits in its socket
    WAKE_ALLOWANCE = 1 << 20      # bytes served in one wake-up before others have their turn
    STATUS_PAYLOAD_LIMIT = 4096   # bytes of a BLOCK_STATUS payload: an effect length and context ids


cdef inline uint64_t monotonic() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef class Operation(TaskOwner):
    """A large request, cut into tasks for the workers."""

    cdef bint room(self, uint64_t size) noexcept:
        """May one more piece of `size` bytes be made for this connection?"""
        if self.session.outlet.blocked or self.session.lost or (
            self.exclusive and self.cursor - self.sent >= PIECE_WINDOW
        ):
            return False
        return self.session.piece_bytes + size <= PIECE_WINDOW and self.session.budget.take(size)

    cdef uint64_t next_step(self) except -1:
        """Bytes of the next task; 0: not now. A READ that must be whole becomes a stream when memory is short."""
        cdef uint64_t step = self.step
        cdef uint64_t rest = self.request.length - self.cursor
        if self.request.command == READ:
            if self.whole and not self.exclusive:
                if self.room(rest + REPLY_OVERHEAD):
                    return rest
                if not self.alone():
                    return 0
                self.begin_stream()
        step -= (self.request.offset + self.cursor) % BLOCK  # cut between blocks
        if step > rest:
            step = rest
        if self.request.command == READ and not self.room(step + REPLY_OVERHEAD):
            return 0
        return step

    cdef bint alone(self) except -1:
        """Nothing else of this connection can send a reply before this operation has ended."""
        cdef Operation other
        if self.session.pending or self.session.outlet.blocked or self.session.exclusive is not None:
            return False
        for other in self.session.operations:
            if other.cursor:
                return False
        return True

    cdef int begin_stream(self) except -1:
        """Send the header of the reply; its content follows in order, and nothing else meanwhile."""
        cdef HotPath session = self.session
        cdef uint8_t header[REPLY_OVERHEAD]
        cdef uint8_t* end
        session.outlet.flush()
        if session.rules.style == SIMPLE:
            end = put_simple(header, self.request.cookie, 0)
        else:
            end = put_chunk(
                header, session.rules.style, self.request.cookie, self.request.offset, 0, CHUNK_DATA, 8 + self.request.length
            )
            store64(end, self.request.offset)
            end += 8
        session.outlet.write(PyBytes_FromStringAndSize(<char*>header, end - header))
        session.exclusive = self
        self.exclusive = True
        self.arrived = {}
        self.step = _PIECE_SIZE
        return 0

    cdef int submit(self) except -1:
        """Hand out as many tasks as the limits allow."""
        cdef Task* task
        cdef uint64_t length
        cdef size_t size
        cdef Piece piece
        while self.cursor < self.request.length and self.in_flight < TASKS_IN_FLIGHT and self.verdict == OK:
            if self.session.exclusive is not None and self.session.exclusive is not self:
                break
            length = self.next_step()
            if length == 0:
                break
            piece = None
            if self.request.command == READ:
                size = length + REPLY_OVERHEAD
                piece = new_piece(size, self.session.budget, size)
                self.session.piece_bytes += size
            task = <Task*>malloc(sizeof(Task))
            if task == NULL:
                raise MemoryError("no memory for a task")
            task.operation = <void*>self
            task.disk = <void*>self.session.disk
            task.command = self.request.command
            task.no_hole = self.request.flags & NO_HOLE != 0
            task.whole = self.request.flags & DF != 0
            task.style = SIMPLE if self.exclusive else self.session.rules.style
            task.cookie = self.request.cookie
            task.request_offset = self.request.offset
            task.offset = self.request.offset + self.cursor
            task.length = length
            task.piece = NULL
            if piece is not None:
                Py_INCREF(piece)
                task.piece = <void*>piece
                task.target = piece.bytes
            elif self.payload is not None:
                task.source = self.payload.bytes + self.cursor
            self.cursor += length
            self.in_flight += 1
            self.session.workers.submit(task)
        if self.request.command == READ and self.session.piece_bytes == 0 and self.cursor < self.request.length:
            self.read_inline()  # nothing of ours is under way whose return would bring us back here
        return 0

    cdef int read_inline(self) except -1:
        """No memory for a piece: read on the loop, little by little, straight into what is sent."""
        cdef HotPath session = self.session
        cdef uint64_t offset
        cdef uint64_t length
        cdef uint8_t* target
        cdef size_t last = 0
        if session.lost or (self.whole and not self.exclusive):
            return 0
        if session.exclusive is not None and session.exclusive is not self:
            return 0
        while self.cursor < self.request.length and self.verdict == OK:
            if session.allowance <= 0:
                return session.continue_later()
            target = session.outlet.reserve(SMALL_PIECE + REPLY_OVERHEAD)
            if target == NULL:
                return 0
            offset = self.request.offset + self.cursor
            length = min(SMALL_PIECE - offset % BLOCK, self.request.length - self.cursor)
            if session.disk.c_read(offset, length, target if self.exclusive else target + read_header_size(session.rules.style)):
                self.verdict = UNREADABLE
                self.failed_at = offset
                break
            self.cursor += length
            self.done += length
            self.sent += length
            session.allowance -= length
            if not self.exclusive:
                length = finish_read(
                    target, session.rules.style, self.request.cookie, self.request.offset, offset, length, False, &last
                )
                if self.done == self.request.length:
                    store16(target + last + 4, CHUNK_DONE)
            session.outlet.used += length
            session.outlet.flush()
        return self.finish()

    cdef int take_back(self, Task* task) except -1:
        cdef Piece piece = None
        cdef int error = task.error
        self.in_flight -= 1
        self.done += task.length
        if task.piece != NULL:
            piece = <Piece>task.piece
            Py_DECREF(piece)
            piece.end = task.reply_size
        if error and self.verdict == OK:
            self.verdict = UNREADABLE if task.command == READ else POOL_FULL
            self.failed_at = task.offset
        if piece is not None and not error and not self.session.lost:
            if self.exclusive:
                piece.start = SIMPLE_REPLY_SIZE
                self.arrived[task.offset] = piece
            else:
                if self.session.rules.style != SIMPLE and self.done == self.request.length and self.verdict == OK:
                    store16(piece.bytes + task.last + 4, CHUNK_DONE)
                self.session.outlet.write_piece(piece)
        if task.piece != NULL:
            self.session.piece_bytes -= piece.size
        free(task)
        return 0

    cdef int proceed(self) except -1:
        if self.exclusive:
            self.send_in_order()
        if self.in_flight == 0 and (self.done == self.request.length or self.verdict != OK or self.session.lost):
            self.finish()
        if self.session.lost:
            self.session.gone()
        else:
            self.session.proceed()
        return 0

    cdef int send_in_order(self) except -1:
        """A long simple reply: its header went ahead, its pieces follow as a stream."""
        cdef uint64_t offset = self.request.offset + self.sent
        while offset in self.arrived and not self.session.lost:
            piece = self.arrived.pop(offset)
            self.sent += len(piece)
            self.session.outlet.write_piece(piece)
            offset = self.request.offset + self.sent
        return 0

    cdef int finish(self) except -1:
        """Everything handed out has come back: answer, once."""
        cdef HotPath session = self.session
        if self not in session.operations:
            return 0
        session.operations.remove(self)
        if self.payload is not None:
            session.payload_bytes -= self.payload.size
            self.payload = None
        if self.exclusive:
            session.exclusive = None
        session.traffic.count(
            self.request.command, self.verdict, self.request.length, monotonic() - self.started
        )
        if session.lost:
            return 0
        if self.verdict != OK:
            if self.exclusive:
                # Section "Simple replies": after a header without error only a disconnect can tell.
                session.protocol_error(ProtocolError("stored bytes do not decode in the middle of a reply"))
                session.abort()
                return 0
            session.emit(session.explain_failure(self.verdict, asked(&self.request), self.failed_at))
            return 0
        if self.request.command == TRIM:
            session.traffic.blocks_trimmed += self.request.length // BLOCK
        if self.request.command != READ or (self.exclusive and session.rules.style != SIMPLE):
            session.reply_success(&self.request)
        return 0


cdef object asked(const Request* request):
    cookie = PyBytes_FromStringAndSize(<char*>&request.cookie, 8)
    return Asked(request.command, request.flags, cookie, request.offset, request.length)


cdef class HotPath:
    """See the module's docstring. server.session.Session completes it."""

    def __init__(self, *, Disk disk not None, Traffic traffic not None, Budget budget not None, Workers workers not None,
                 Scratch scratch not None, turns not None, int style, bint read_only, int context_count, uint64_t payload_limit,
                 uint64_t connection_limit):
        self.disk = disk
        self.traffic = traffic
        self.budget = budget
        self.workers = workers
        self.turns = turns
        self.rules.size = disk.size
        self.rules.style = style
        self.rules.read_only = read_only
        self.rules.context_count = context_count
        self.rules.payload_limit = payload_limit
        self.rules.unfragmented_limit = _PIECE_SIZE
        self.connection_limit = connection_limit
        self.operations = []
        self.inbox = Inbox(budget)
        self.outlet = Outlet(None, -1, scratch, budget)
        self.reading = True
        self.phase = HEADER

    # ---- what the transport calls ----

    def attach(self, transport, int fd, bytes rest not None):
        """Begin on `transport`, a TlsChannel or that of the socket `fd`. `rest`: bytes already read."""
        self.transport = transport
        self.outlet = Outlet(transport, fd, self.outlet.scratch, self.budget)
        if rest:
            self.inbox.make_room(len(rest))
            memcpy(self.inbox.bytes, <const char*>rest, len(rest))
            self.inbox.filled = len(rest)
            self.run()

    def get_buffer(self, sizehint):
        """Where the socket's next bytes belong: the inbox, or a large payload's own buffer."""
        if self.phase != PAYLOAD:
            self.inbox.make_room(1)
        return self

    def __getbuffer__(self, Py_buffer* view, int flags):
        if self.phase == PAYLOAD:
            PyBuffer_FillInfo(
                view, self, self.payload.bytes + (self.payload.size - self.remaining), self.remaining, 0, flags
            )
        else:
            PyBuffer_FillInfo(
                view, self, self.inbox.bytes + self.inbox.filled, self.inbox.size - self.inbox.filled, 0, flags
            )

    def buffer_updated(self, Py_ssize_t size):
        """`size` bytes came. Everything that is complete is performed and answered before this returns."""
        if self.halted:
            return
        if self.phase == PAYLOAD:
            self.remaining -= size
        else:
            self.inbox.filled += size
            self.inbox.rested = False
        self.run()

    def pause_writing(self):
        """The peer does not read: the transport's queue is not empty."""
        self.outlet.blocked = True

    def resume_writing(self):
        """The transport's queue is empty again."""
        self.outlet.blocked = False
        if not self.lost:
            self.outlet.weigh()
        self.proceed()

    # ---- what the subclass calls ----

    def emit(self, bytes reply not None):
        """Send a reply that Python built."""
        if not self.lost:
            self.outlet.write(reply)

    def proceed(self):
        """Something that held this connection up is gone."""
        cdef Operation operation
        if self.lost:
            return
        self.allowance = WAKE_ALLOWANCE
        for operation in list(self.operations):
            operation.submit()
        self.run()

    def halt(self):
        """Read no more; finish what is under way."""
        self.halted = True
        self.run()

    def lose(self):
        """The connection is gone: nothing can be sent any more."""
        self.lost = True
        self.transport = None  # a TlsChannel holds us as we hold it, and megabytes would wait for the garbage collector
        self.outlet.close()
        self.inbox.close()
        self.turns.leave(self)
        self.payload = None
        self.operations = [operation for operation in self.operations if (<Operation>operation).in_flight]

    def rest(self):
        """Called now and then: give back what a connection that has become quiet does not need."""
        if not self.lost:
            self.inbox.rest()
            if self.outlet.held:
                self.outlet.weigh()

    @property
    def strained(self):
        """The budget is used up: answer in small steps."""
        return self.budget.strained()

    def count_request(self, int command, int verdict, uint64_t length, uint64_t nanoseconds):
        """Account for a request that Python answered."""
        self.traffic.count(command, verdict, length, nanoseconds)

    @property
    def busy(self):
        """Requests are under way with the workers or in Python."""
        return bool(self.operations) or self.pending > 0

    @property
    def payload_remaining(self):
        """Bytes still to come of the payload that is arriving."""
        return self.remaining

    @property
    def midway(self):
        """The peer has begun a request and not finished it."""
        return self.phase != HEADER or self.inbox.available() > 0

    # ---- the loop over requests ----

    cdef int run(self) except -1:
        self.started = monotonic()
        self.allowance = WAKE_ALLOWANCE
        try:
            while self.advance():
                pass
        except ProtocolError as error:
            self.outlet.flush()
            self.protocol_error(error)
            return 0
        self.outlet.flush()
        self.settle()
        return 0

    cdef bint advance(self) except -1:
        """Understand a little more of what came. False: nothing can be done now."""
        cdef uint64_t size
        if self.outlet.broken or (self.outlet.blocked and not (self.phase == PAYLOAD and self.remaining == 0)):
            return False
        if self.halted:
            self.inbox.taken = self.inbox.filled
            return False
        if self.phase == HEADER:
            return self.take_request()
        if self.phase == APPLY:
            return self.apply_payload()
        if self.phase == SKIP:
            size = min(<uint64_t>self.inbox.available(), self.remaining)
            self.inbox.taken += size
            self.remaining -= size
        if self.remaining:
            return False
        self.end_payload()
        return True

    cdef bint take_request(self) except -1:
        """Take one request from the inbox: validate, then perform and reply, or start what does so later."""
        cdef Request* request = &self.request
        cdef int size
        cdef int verdict
        if self.exclusive is not None or len(self.operations) + self.pending >= OPERATION_LIMIT:
            return False
        if self.allowance <= 0:
            self.continue_later()
            return False
        size = parse_request(self.inbox.front(), self.inbox.available(), self.rules.style, request)
        if size <= 0:
            if size < 0:
                raise ProtocolError("bad request magic")
            return False
        if request.payload > self.rules.payload_limit:
            raise ProtocolError(f"a payload of {request.payload} bytes: the limit is {self.rules.payload_limit}")
        self.rules.size = self.disk.size
        verdict = validate(request, &self.rules)
        if self.draining and request.command != DISC:
            verdict = SHUTTING_DOWN
        if verdict != OK:
            return self.begin_skip(size, verdict)
        self.allowance -= <int64_t>(size + (request.length if request.length < _INLINE_LIMIT else 0))
        if request.command == READ:
            return self.take_read(size)
        if request.command == WRITE:
            return self.take_write(size)
        if request.command == BLOCK_STATUS:
            return self.take_status(size)
        if self.outlet.reserve(REPLY_OVERHEAD) == NULL:
            return False
        self.inbox.taken += size
        if request.command == DISC:
            self.halted = True
        elif request.command == TRIM or request.command == WRITE_ZEROES:
            if request.length > INLINE_FREE:
                self.start_operation(None, FREE_STEP, False)
            else:
                self.free_inline()
        else:  # FLUSH and CACHE: every write that was answered is in the engine, and everything is in memory
            self.conclude(OK)
        return True

    cdef bint take_read(self, int size) except -1:
        cdef Request* request = &self.request
        cdef size_t last = 0
        cdef size_t reply
        cdef uint8_t* target
        if request.length > _INLINE_LIMIT or (request.length > SMALL_PIECE and self.budget.strained()):
            return self.take_large_read(size)
        target = self.outlet.reserve(request.length + REPLY_OVERHEAD)
        if target == NULL:
            return False
        self.inbox.taken += size
        if request.length == 0:
            self.conclude(OK)
            return True
        if self.disk.c_read(request.offset, request.length, target + read_header_size(self.rules.style)):
            self.refuse(UNREADABLE)
            return True
        reply = finish_read(
            target, self.rules.style, request.cookie, request.offset, request.offset, request.length,
            request.flags & DF != 0, &last
        )
        if self.rules.style != SIMPLE:
            store16(target + last + 4, CHUNK_DONE)
        self.outlet.used += reply
        self.traffic.count(READ, OK, request.length, monotonic() - self.started)
        return True

    cdef bint take_large_read(self, int size) except -1:
        """A READ for the workers. A reply that may not be cut into chunks is one task, or has the connection for itself."""
        cdef bint whole = self.rules.style == SIMPLE or self.request.flags & DF != 0
        cdef Operation operation
        if whole and self.request.length > WHOLE_SIMPLE:
            if self.operations or self.pending or self.outlet.blocked:
                return False
            self.inbox.taken += size
            operation = self.new_operation(None, _PIECE_SIZE, whole)
            operation.begin_stream()
            operation.submit()
            return self.exclusive is None
        self.inbox.taken += size
        self.start_operation(None, _PIECE_SIZE, whole)
        return True

    cdef bint take_write(self, int size) except -1:
        cdef Request* request = &self.request
        cdef size_t whole = size + request.payload
        if request.payload > _INLINE_LIMIT or (whole > self.inbox.size and not self.inbox.grow(whole)):
            return self.begin_payload(size)
        if self.inbox.available() < whole or self.outlet.reserve(REPLY_OVERHEAD) == NULL:
            return False
        if self.disk.c_write(request.offset, request.length, self.inbox.front() + size):
            self.inbox.taken += whole
            self.refuse(POOL_FULL)
            return True
        self.inbox.taken += whole
        self.conclude(OK)
        return True

    cdef bint take_status(self, int size) except -1:
        cdef Request* request = &self.request
        payload = None
        if self.pending:
            return False  # one at a time: each may hold half a megabyte of reply
        if request.payload:
            if request.payload > STATUS_PAYLOAD_LIMIT:
                return self.begin_skip(size, WRONG_SHAPE)
            if self.inbox.available() < size + request.payload:
                return False
            payload = PyBytes_FromStringAndSize(<char*>self.inbox.front() + size, request.payload)
        self.inbox.taken += size + request.payload
        self.query_status(asked(request), payload, self.started)
        return True

    cdef int free_inline(self) except -1:
        cdef Request* request = &self.request
        cdef int error
        if request.command == TRIM:
            error = self.disk.c_trim(request.offset, request.length)
        else:
            error = self.disk.c_zero(request.offset, request.length, request.flags & NO_HOLE != 0)
        if error:
            self.refuse(POOL_FULL)
        else:
            self.conclude(OK)
        return 0

    # ---- large requests ----

    cdef int start_operation(self, Piece payload, uint64_t step, bint whole) except -1:
        self.new_operation(payload, step, whole).submit()
        return 0

    cdef Operation new_operation(self, Piece payload, uint64_t step, bint whole):
        cdef Operation operation = Operation.__new__(Operation)
        operation.session = self
        operation.request = self.request
        operation.started = self.started
        operation.step = step
        operation.whole = whole
        operation.payload = payload
        self.operations.append(operation)
        return operation

    cdef bint begin_payload(self, int size) except -1:
        """A payload that does not fit the inbox: into a buffer of its own, or stored as it arrives."""
        cdef size_t ready
        cdef uint64_t length = self.request.payload
        cdef bint room = self.budget.take_payload(length)
        if self.payload_bytes and (not room or self.payload_bytes + length > self.connection_limit):
            if room:
                self.budget.give_back(length)
            return False  # until payloads of our own are stored
        self.inbox.taken += size
        self.remaining = length
        self.verdict = OK
        if not room:
            self.phase = APPLY
            if length > _INLINE_LIMIT:
                self.turns.enter(self, length)
            return True
        self.payload = new_piece(length, self.budget, length)
        self.payload_bytes += length
        ready = min(<uint64_t>self.inbox.available(), length)
        memcpy(self.payload.bytes, self.inbox.front(), ready)
        self.inbox.taken += ready
        self.remaining -= ready
        self.phase = PAYLOAD
        if self.remaining:
            self.turns.hold(self)
        return True

    cdef bint begin_skip(self, int size, int verdict) except -1:
        """Refuse a request; the answer follows its payload, as a client expects that is still sending."""
        self.inbox.taken += size
        self.remaining = self.request.payload
        self.verdict = verdict
        self.phase = SKIP
        self.allowance -= size
        return True

    cdef bint apply_payload(self) except -1:
        """Store what has come of a payload that has no buffer, whole blocks at a time."""
        cdef uint64_t size = min(<uint64_t>self.inbox.available(), self.remaining)
        cdef uint64_t offset = self.request.offset + self.request.length - self.remaining
        if not self.turns.may_go_on(self):
            return False
        if size < self.remaining:
            size -= min(size, (offset + size) % BLOCK)
        if size == 0 and self.remaining:
            return False
        if self.verdict == OK and self.disk.c_write(offset, size, self.inbox.front()):
            self.verdict = POOL_FULL
        self.inbox.taken += size
        self.remaining -= size
        if self.remaining == 0:
            self.end_payload()
        return True

    cdef int end_payload(self) except -1:
        cdef int phase = self.phase
        self.phase = HEADER
        if phase == APPLY or phase == PAYLOAD:
            self.turns.leave(self)
        if phase == PAYLOAD:
            payload, self.payload = self.payload, None
            self.start_operation(payload, _PIECE_SIZE, False)
        elif self.verdict == OK:
            self.conclude(OK)
        else:
            self.refuse(self.verdict)
        return 0

    # ---- replies ----

    cdef int conclude(self, int verdict) except -1:
        """Answer the current request without payload. The caller has reserved room, or nothing is in the scratch."""
        cdef Request* request = &self.request
        self.reply_success(request)
        if request.command == TRIM:
            self.traffic.blocks_trimmed += request.length // BLOCK
        self.traffic.count(request.command, verdict, request.length, monotonic() - self.started)
        return 0

    cdef int refuse(self, int verdict) except -1:
        cdef Request* request = &self.request
        self.traffic.count(request.command, verdict, request.length, monotonic() - self.started)
        self.emit(self.explain_failure(verdict, asked(request), None))
        return 0

    cdef int reply_success(self, const Request* request) except -1:
        cdef uint8_t reply[REPLY_OVERHEAD]
        cdef size_t size = put_success(reply, self.rules.style, request) - reply
        cdef uint8_t* target = self.outlet.reserve(size)
        if target == NULL:
            self.outlet.write(PyBytes_FromStringAndSize(<char*>reply, size))
        else:
            memcpy(target, reply, size)
            self.outlet.used += size
        return 0

    # ---- when to read, when to end ----

    cdef int settle(self) except -1:
        """Read on only while there is something we could do with it; end when there is nothing left to do."""
        cdef bint wanted
        if self.lost or self.outlet.broken:
            return 0
        if self.inbox.taken and self.inbox.filled == self.inbox.size and not self.outlet.blocked:
            self.inbox.grow(self.inbox.size + 1)  # one read filled it: a busy connection
        wanted = not (self.outlet.blocked or self.halted or self.exclusive is not None)
        if wanted and self.phase == APPLY:
            wanted = self.turns.may_go_on(self)
        if wanted and self.phase == HEADER:
            wanted = len(self.operations) + self.pending < OPERATION_LIMIT and (
                self.inbox.available() < self.inbox.size
            )
        if wanted != self.reading:
            self.reading = wanted
            if wanted:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()
        if not self.operations and self.pending == 0 and (self.halted or self.draining):
            self.drained()
        return 0

    cdef int continue_later(self) except -1:
        if not self.scheduled:
            self.scheduled = True
            self.call_soon(self.go_on)
        return 0

    def go_on(self):
        """The next turn of a connection that had more to do than one wake-up allows."""
        self.scheduled = False
        self.proceed()
