"""The transmission phase of one connection: bytes of the socket in, engine, bytes of the socket out.

One wake-up of the event loop is one call of `buffer_updated`: every complete request in the inbox is validated, performed
and answered in C, and the answers leave with one send. Whoever asks for more than WAKE_ALLOWANCE at once goes on when
others had their turn. What is large goes to the workers as an Operation; what is rare
(errors, block status) goes through the Python subclass, server.session.Session.

    phase    what the next bytes are
    HEADER   a request's header, and a small WRITE's payload: both in the inbox
    PAYLOAD  a large WRITE's payload, read by the socket straight into a buffer of its own
    APPLY    the same without a buffer, because the budget is used up: stored as it arrives, in turns (server.turns)
    SKIP     the payload of a request that is refused

How a connection ends is told by its Stage (hotpath.pxd).

Invariants
1. Everything here runs on the loop's thread; workers see Tasks only.
2. A request is either not yet taken from the inbox, or an Operation, or answered: never two of these.
3. While `blocked` (the peer does not read) nothing new is performed. A connection then holds at most the inbox, one
   scratch of answers, and PIECE_WINDOW of read pieces, all charged to the Budget. When that is used up, READs go on
   in steps of SMALL_PIECE on the loop: who reads its replies is served, who does not holds one step.
4. A WRITE changes nothing before its payload is complete, except in phase APPLY.
5. In stage DRAINING every request that came completely is performed and answered, and none other: who connects again
   and asks again for what was not answered sees no error (QEMU's reconnect-delay, libnbd's reopening).
"""

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memcpy

from nbdzram.engine.disk cimport Disk
from nbdzram.nbd.transmission cimport (
    BLOCK, BLOCK_STATUS, CACHE, CHUNK_DONE, DF, DISC, FLUSH, FUA, NO_HOLE, OK, READ, REPLY_OVERHEAD,
    SIMPLE, TRIM, UNREADABLE, WRITE, WRITE_ZEROES, WRONG_SHAPE, Request, finish_read, parse_request,
    put_success, read_header_size, store16, validate, verdict_of,
)
from nbdzram.server.inbox cimport Inbox
from nbdzram.server.outlet cimport Outlet, Scratch
from nbdzram.server.operation cimport PIECE_SIZE, SMALL_PIECE, Operation, new_operation
from nbdzram.server.traffic cimport Traffic, monotonic
from nbdzram.server.workers cimport Budget, Piece, Workers, new_piece

from nbdzram.errors import ProtocolError
from nbdzram.nbd.verdicts import Asked

UNFRAGMENTED_LIMIT = PIECE_SIZE
STATUS_INLINE_LIMIT = INLINE_STATUS

cdef enum:  # phases
    HEADER = 0
    PAYLOAD = 1
    APPLY = 2
    SKIP = 3

cdef enum:
    INLINE_LIMIT = 64 << 10       # READ and WRITE up to here are done on the loop: about as long as a hop to a worker
    INLINE_FREE = 1 << 20         # the same for TRIM and WRITE_ZEROES, which touch tables only
    WHOLE_SIMPLE = 1 << 20        # a simple reply up to here is one task, since its pieces could not leave out of order
    FREE_STEP = 64 << 20          # one task of TRIM or WRITE_ZEROES: some milliseconds
    OPERATION_LIMIT = 64          # large requests of one connection under way; the rest waits in its socket
    INLINE_STATUS = 256 << 10     # BLOCK_STATUS on the loop: 64 table entries, up to 80 microseconds
    WAKE_ALLOWANCE = 1 << 20      # of `cost`, served in one wake-up before others have their turn: about as long
    COST_OF_STATUS = 128 << 10    # Python's work, some 100 microseconds, and more with the range
    COST_OF_REFUSAL = 64 << 10    # an error reply and its sentence: some 30 microseconds
    STATUS_PAYLOAD_LIMIT = 4096   # bytes of a BLOCK_STATUS payload: an effect length and context ids


cdef object asked(const Request* request):
    cookie = PyBytes_FromStringAndSize(<char*>&request.cookie, 8)
    return Asked(request.command, request.flags, cookie, request.offset, request.length)


cdef bint must_last(const Request* request) noexcept:
    """Its answer says that something is on the disk, where the arena lies on one: FLUSH, or a change with FUA."""
    if request.command == FLUSH:
        return True
    return request.flags & FUA != 0 and request.command in (WRITE, TRIM, WRITE_ZEROES)


cdef int64_t cost(const Request* request) noexcept:
    """What a request takes of a wake-up, told in bytes of ordinary READs and WRITEs."""
    cdef uint64_t length = request.length
    if request.command == BLOCK_STATUS:
        return WAKE_ALLOWANCE if request.payload else COST_OF_STATUS + (length // 2 if length <= INLINE_STATUS else 0)
    if request.command == TRIM or request.command == WRITE_ZEROES:
        return BLOCK + min(length, <uint64_t>INLINE_FREE) // 8
    if length == 0 or length > INLINE_LIMIT:
        return REPLY_OVERHEAD
    if request.command == WRITE and length < BLOCK:
        return 4 * BLOCK  # its block is decoded and encoded again
    return max(length, <uint64_t>BLOCK)


cdef class HotPath:
    """See the module's docstring. server.session.Session completes it."""

    def __init__(self, *, Disk disk not None, Traffic traffic not None, Budget budget not None, Workers workers not None,
                 Scratch scratch not None, turns not None, int style, bint read_only, int context_count, uint64_t payload_limit,
                 uint64_t connection_limit, bint syncs=False):
        self.disk = disk
        self.traffic = traffic
        self.budget = budget
        self.workers = workers
        self.turns = turns
        self.rules.size = disk.size
        self.rules.style = style
        self.rules.read_only = read_only
        self.syncs = syncs
        self.rules.context_count = context_count
        self.rules.payload_limit = payload_limit
        self.rules.unfragmented_limit = PIECE_SIZE
        self.connection_limit = connection_limit
        self.operations = []
        self.inbox = Inbox(budget)
        self.outlet = Outlet(None, -1, scratch, budget)
        self.stage = OPEN
        self.reading = True
        self.started = monotonic()
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
        """`size` bytes came. What is complete is performed and answered before this returns, as far as our turn goes."""
        if self.stage != OPEN:
            return
        if self.phase == PAYLOAD:
            self.remaining -= size
        else:
            self.inbox.filled += size
            self.inbox.rested = False
        if self.scheduled and self.phase == HEADER:
            self.settle()  # our turn is over, though the transport goes on reading: up to 32 times in libuv
        else:
            self.run()

    def pause_writing(self):
        """The peer does not read: the transport's queue is not empty."""
        self.outlet.blocked = True

    def resume_writing(self):
        """The transport's queue is empty again."""
        self.outlet.blocked = False
        if self.stage < LOST:
            self.outlet.weigh()
        self.proceed()

    # ---- what the subclass calls ----

    def emit(self, bytes reply not None):
        """Send a reply that Python built: a short one with others, at the latest when `proceed` follows."""
        if self.stage >= LOST:
            return
        if len(reply) <= SMALL_PIECE:
            self.outlet.put(<const uint8_t*><const char*>reply, len(reply))
        else:
            self.outlet.write(reply)

    def proceed(self):
        """Something that held this connection up is gone."""
        cdef Operation operation
        if self.stage >= LOST:
            return
        self.allowance = WAKE_ALLOWANCE
        for operation in list(self.operations):
            operation.submit()
        self.run()

    cpdef bint move(self, Stage stage) except -1:
        """Go on to `stage`. False: the connection is there already, or further."""
        if stage <= self.stage:
            return False
        assert stage < GONE or self.stage == LOST
        self.stage = stage
        return True

    def drain(self):
        """Read no more; perform and answer what was asked for completely."""
        if self.move(DRAINING):
            self.run()

    def halt(self):
        """Read no more and perform no more; answer what is under way."""
        if self.move(HALTED):
            self.run()

    @property
    def in_flight(self):
        """Requests that are under way with the workers or in Python."""
        return len(self.operations) + self.pending

    @property
    def idle_seconds(self):
        """Since the last request came, or its payload."""
        return (monotonic() - self.started) / 1e9

    def lose(self):
        """The connection is gone: nothing can be sent any more."""
        self.move(LOST)
        self.transport = None  # a TlsChannel holds us as we hold it, and megabytes would wait for the garbage collector
        self.outlet.close()
        self.inbox.close()
        self.turns.leave(self)
        self.payload = None
        self.operations = [operation for operation in self.operations if (<Operation>operation).in_flight]

    def rest(self):
        """Called now and then: give back what a connection that has become quiet does not need."""
        if self.stage < LOST:
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
        cdef object broken = None
        try:
            while self.advance():
                pass
        except ProtocolError as error:
            broken = error
        except BaseException:
            self.fail_loudly()
            raise
        self.outlet.flush()
        if self.traffic.untimed_any:
            self.traffic.time_added(monotonic() - self.started)
        if broken is None:
            self.settle()
        else:
            self.protocol_error(broken)
        return 0

    cdef int fail_loudly(self) except -1:
        """An exception that nobody foresaw is our mistake: it ends this connection, goes on to the log, and leaves
        nothing in the scratch, which others fill next."""
        self.outlet.discard()
        self.abort()
        return 0

    cdef bint advance(self) except -1:
        """Understand a little more of what came. False: nothing can be done now."""
        cdef uint64_t size
        if self.outlet.broken or (self.outlet.blocked and not (self.phase == PAYLOAD and self.remaining == 0)):
            return False
        if self.stage >= HALTED:
            self.inbox.taken = self.inbox.filled
            return False
        if self.phase == HEADER:
            if not self.take_request():
                return False
            self.requests += 1
            return True
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
        if verdict != OK:
            return self.begin_skip(size, verdict)
        self.allowance -= size + cost(request)
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
            self.move(HALTED)
        elif request.command == TRIM or request.command == WRITE_ZEROES:
            if request.length > INLINE_FREE:
                self.start_operation(None, FREE_STEP, False)
            else:
                self.free_inline()
        else:  # FLUSH and CACHE: every write that was answered is in the engine, and everything is in memory
            self.conclude()
        return True

    cdef bint take_read(self, int size) except -1:
        cdef Request* request = &self.request
        cdef size_t last = 0
        cdef size_t reply
        cdef uint8_t* target
        if request.length > INLINE_LIMIT or (request.length > SMALL_PIECE and self.budget.strained()):
            return self.take_large_read(size)
        target = self.outlet.reserve(request.length + REPLY_OVERHEAD)
        if target == NULL:
            return False
        self.inbox.taken += size
        if request.length == 0:
            self.conclude()
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
        self.traffic.add(READ, request.length)
        return True

    cdef bint take_large_read(self, int size) except -1:
        """A READ for the workers. A reply that may not be cut into chunks is one task, or has the connection for itself."""
        cdef bint whole = self.rules.style == SIMPLE or self.request.flags & DF != 0
        cdef Operation operation
        if whole and self.request.length > WHOLE_SIMPLE:
            if self.operations or self.pending or self.outlet.blocked:
                return False
            self.inbox.taken += size
            operation = new_operation(self, None, PIECE_SIZE, whole)
            operation.begin_stream()
            operation.submit()
            return self.exclusive is None
        self.inbox.taken += size
        self.start_operation(None, PIECE_SIZE, whole)
        return True

    cdef bint take_write(self, int size) except -1:
        cdef Request* request = &self.request
        cdef size_t whole = size + request.payload
        cdef int error
        if request.payload > INLINE_LIMIT or (whole > self.inbox.size and not self.inbox.grow(whole)):
            return self.begin_payload(size)
        if self.inbox.available() < whole or self.outlet.reserve(REPLY_OVERHEAD) == NULL:
            return False
        error = self.disk.c_write(request.offset, request.length, self.inbox.front() + size)
        self.inbox.taken += whole
        self.conclude_or_refuse(error)
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
        return self.conclude_or_refuse(error)

    # ---- large requests ----

    cdef int start_operation(self, Piece payload, uint64_t step, bint whole) except -1:
        new_operation(self, payload, step, whole).submit()
        return 0

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
            if length > INLINE_LIMIT:
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
        self.allowance -= COST_OF_REFUSAL
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
        if self.verdict == OK:
            self.verdict = verdict_of(self.disk.c_write(offset, size, self.inbox.front()))
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
            self.start_operation(payload, PIECE_SIZE, False)
        elif self.verdict == OK:
            self.conclude()
        else:
            self.refuse(self.verdict)
        return 0

    # ---- replies ----

    cdef int conclude(self) except -1:
        """Answer the current request without payload. The caller has reserved room, or nothing is in the scratch."""
        cdef Request* request = &self.request
        if request.command == TRIM:
            self.traffic.blocks_trimmed += request.length // BLOCK
        if self.syncs and must_last(request):
            self.answer_when_synced(asked(request), self.success(request), self.started)
            return 0
        self.reply_success(request)
        self.traffic.add(request.command, request.length)
        return 0

    cdef int conclude_or_refuse(self, int error) except -1:
        """Answer the current request as the engine's errno says."""
        if error:
            return self.refuse(verdict_of(error))
        return self.conclude()

    cdef int refuse(self, int verdict) except -1:
        cdef Request* request = &self.request
        self.traffic.count(request.command, verdict, request.length, monotonic() - self.started)
        return self.fail(request, verdict, None)

    cdef int fail(self, const Request* request, int verdict, failed_at) except -1:
        """Send the error reply to a request. `failed_at`: the offset of the failure, if it is known."""
        self.emit(self.explain_failure(verdict, asked(request), failed_at))
        return 0

    cdef int reply_success(self, const Request* request) except -1:
        cdef uint8_t reply[REPLY_OVERHEAD]
        return self.outlet.put(reply, put_success(reply, self.rules.style, request) - reply)

    cdef bytes success(self, const Request* request):
        """The same reply, for later."""
        cdef uint8_t reply[REPLY_OVERHEAD]
        return PyBytes_FromStringAndSize(<char*>reply, put_success(reply, self.rules.style, request) - reply)

    # ---- when to read, when to end ----

    cdef int settle(self) except -1:
        """Read on only while there is something we could do with it; end when there is nothing left to do."""
        cdef bint wanted
        if self.stage >= LOST or self.outlet.broken:
            return 0
        if self.inbox.taken and self.inbox.filled == self.inbox.size and not self.outlet.blocked:
            self.inbox.grow(self.inbox.size + 1)  # one read filled it: a busy connection
        wanted = self.stage == OPEN and not self.outlet.blocked and self.exclusive is None
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
        if self.stage != OPEN and self.spent():
            self.drained()
        return 0

    cdef bint spent(self) except -1:
        """Nothing is under way, and nothing that came can still be performed."""
        if self.operations or self.pending:
            return False
        if self.stage >= HALTED:
            return True
        if self.phase == APPLY and not self.turns.may_go_on(self):
            return False
        return not self.scheduled and (not self.outlet.blocked or self.inbox.available() == 0)

    cdef int continue_later(self) except -1:
        if not self.scheduled:
            self.scheduled = True
            self.call_soon(self.go_on)
        return 0

    def go_on(self):
        """The next turn of a connection that had more to do than one wake-up allows."""
        self.scheduled = False
        self.proceed()
