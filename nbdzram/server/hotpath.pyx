"""The transmission phase of one connection: bytes of the socket in, engine, bytes of the socket out.

One wake-up of the event loop is one call of `buffer_updated`: every complete request in the inbox is validated, performed
and answered in C, and the answers leave with one send. What is large goes to the workers as an Operation; what is rare
(errors, block status) goes through the Python subclass, server.session.Session.

    phase    what the next bytes are
    HEADER   a request's header, and a small WRITE's payload: both in the inbox
    PAYLOAD  a large WRITE's payload, read by the socket straight into a buffer of its own
    APPLY    the same without a buffer, because the budget is used up: stored as it arrives
    SKIP     the payload of a request that is refused

Invariants
1. Everything here runs on the loop's thread; workers see Tasks only.
2. A request is either not yet taken from the inbox, or an Operation, or answered: never two of these.
3. While `blocked` (the peer does not read) nothing new is performed. A connection then holds at most the inbox, one
   scratch of answers, and PIECE_WINDOW of read pieces; all pieces and payloads are charged to the Budget.
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
    BLOCK, BLOCK_STATUS, CACHE, CHUNK_DONE, COMMANDS, DF, DISC, EXTENDED, EXTENDED_REQUEST_SIZE, FLUSH, NO_HOLE, OK,
    POOL_FULL, READ, REPLY_OVERHEAD, SHUTTING_DOWN, SIMPLE, SIMPLE_REPLY_SIZE, TRIM, UNREADABLE, WRITE, WRITE_ZEROES,
    WRONG_SHAPE, Request, Rules, finish_read, parse_request, put_simple, put_success, read_header_size, store16, validate,
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
        if self.session.piece_bytes == 0:
            self.session.budget.force(size)
            return True
        return self.session.piece_bytes + size <= PIECE_WINDOW and self.session.budget.take(size)

    cdef int submit(self) except -1:
        """Hand out as many tasks as the limits allow."""
        cdef Task* task
        cdef uint64_t length
        cdef size_t size
        cdef Piece piece
        while self.cursor < self.request.length and self.in_flight < TASKS_IN_FLIGHT and self.verdict == OK:
            length = self.step - (self.request.offset + self.cursor) % BLOCK  # cut between blocks
            if length > self.request.length - self.cursor:
                length = self.request.length - self.cursor
            piece = None
            if self.request.command == READ:
                size = length + REPLY_OVERHEAD
                if not self.room(size):
                    break
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
            task.style = self.session.rules.style
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
        return 0

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
                session.protocol_error(ProtocolError("stored bytes do not decode in the middle of a simple reply"))
                session.abort()
                return 0
            session.emit(session.explain_failure(self.verdict, asked(&self.request), self.failed_at))
            return 0
        if self.request.command == TRIM:
            session.traffic.blocks_trimmed += self.request.length // BLOCK
        if self.request.command != READ:
            session.reply_success(&self.request)
        return 0


cdef object asked(const Request* request):
    cookie = PyBytes_FromStringAndSize(<char*>&request.cookie, 8)
    return Asked(request.command, request.flags, cookie, request.offset, request.length)


cdef class HotPath:
    """See the module's docstring. server.session.Session completes it."""

    def __init__(self, *, Disk disk not None, Traffic traffic not None, Budget budget not None, Workers workers not None,
                 Scratch scratch not None, int style, bint read_only, int context_count, uint64_t payload_limit,
                 uint64_t connection_limit):
        self.disk = disk
        self.traffic = traffic
        self.budget = budget
        self.workers = workers
        self.rules.size = disk.size
        self.rules.style = style
        self.rules.read_only = read_only
        self.rules.context_count = context_count
        self.rules.payload_limit = payload_limit
        self.rules.unfragmented_limit = _PIECE_SIZE
        self.connection_limit = connection_limit
        self.operations = []
        self.inbox = Inbox(budget)
        self.outlet = Outlet(None, -1, scratch)
        self.reading = True
        self.phase = HEADER

    # ---- what the transport calls ----

    def attach(self, transport, int fd, bytes rest not None):
        """Begin on `transport`, a TlsChannel or that of the socket `fd`. `rest`: bytes already read."""
        self.transport = transport
        self.outlet = Outlet(transport, fd, self.outlet.scratch)
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
        self.run()

    def pause_writing(self):
        """The peer does not read: the transport's queue is not empty."""
        self.outlet.blocked = True

    def resume_writing(self):
        """The transport's queue is empty again."""
        self.outlet.blocked = False
        self.outlet.handed_over = False
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
        self.outlet.broken = True
        self.inbox.taken = self.inbox.filled
        self.payload = None
        self.operations = [operation for operation in self.operations if (<Operation>operation).in_flight]

    def count_request(self, int command, int verdict, uint64_t length, uint64_t nanoseconds):
        """Account for a request that Python answered."""
        self.traffic.count(command, verdict, length, nanoseconds)

    @property
    def busy(self):
        """Requests are under way with the workers or in Python."""
        return bool(self.operations) or self.pending > 0

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
                self.start_operation(None, FREE_STEP)
            else:
                self.free_inline()
        else:  # FLUSH and CACHE: every write that was answered is in the engine, and everything is in memory
            self.conclude(OK)
        return True

    cdef bint take_read(self, int size) except -1:
        cdef Request* request = &self.request
        cdef uint64_t step = _PIECE_SIZE
        cdef size_t last = 0
        cdef size_t reply
        cdef uint8_t* target
        if request.length > _INLINE_LIMIT:
            if self.rules.style == SIMPLE and request.length > WHOLE_SIMPLE:
                return self.start_exclusive(size)
            self.inbox.taken += size
            if self.rules.style == SIMPLE:
                step = WHOLE_SIMPLE + BLOCK  # one task, wherever it begins: each task has a header of its own
            elif request.flags & DF:
                step = _PIECE_SIZE + BLOCK
            self.start_operation(None, step)
            return True
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

    cdef int start_operation(self, Piece payload, uint64_t step) except -1:
        cdef Operation operation = Operation.__new__(Operation)
        operation.session = self
        operation.request = self.request
        operation.started = self.started
        operation.step = step
        operation.payload = payload
        self.operations.append(operation)
        operation.submit()
        return 0

    cdef bint start_exclusive(self, int size) except -1:
        """A simple reply too long for one piece: it has the connection for itself."""
        cdef Operation operation
        cdef uint8_t* target
        if self.operations or self.pending:
            return False
        target = self.outlet.reserve(REPLY_OVERHEAD)
        if target == NULL:
            return False
        self.inbox.taken += size
        put_simple(target, self.request.cookie, 0)
        self.outlet.used += SIMPLE_REPLY_SIZE
        self.outlet.flush()
        operation = Operation.__new__(Operation)
        operation.session = self
        operation.request = self.request
        operation.started = self.started
        operation.step = _PIECE_SIZE
        operation.exclusive = True
        operation.arrived = {}
        self.exclusive = operation
        self.operations.append(operation)
        operation.submit()
        return False

    cdef bint begin_payload(self, int size) except -1:
        """A payload that does not fit the inbox: into a buffer of its own, or stored as it arrives."""
        cdef size_t ready
        cdef uint64_t length = self.request.payload
        if self.payload_bytes and self.payload_bytes + length > self.connection_limit:
            return False
        self.inbox.taken += size
        self.remaining = length
        self.verdict = OK
        if not self.budget.take(length):
            self.phase = APPLY
            return True
        self.payload = new_piece(length, self.budget, length)
        self.payload_bytes += length
        ready = min(<uint64_t>self.inbox.available(), length)
        memcpy(self.payload.bytes, self.inbox.front(), ready)
        self.inbox.taken += ready
        self.remaining -= ready
        self.phase = PAYLOAD
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
        if phase == PAYLOAD:
            payload, self.payload = self.payload, None
            self.start_operation(payload, _PIECE_SIZE)
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
        if not self.lost:
            self.run()
