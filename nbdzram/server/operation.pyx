"""A large request under way: cut into tasks for the workers, taken back from them, answered once.

    new_operation ──> submit ──> workers ──> take_back ──> finish      bytes: done <= cursor <= request.length
                      cursor +=              done +=

A READ is answered in one of four ways.

    chunks    structured and extended replies: each task makes chunks of its own, which leave as they come
    whole     a simple reply, or DF: one task makes all of it
    stream    the same when it is too long for one piece of memory, or memory is short: its header goes ahead, its
              content follows in order, and nothing else of the connection in between (`exclusive`)
    steps     no memory even for a piece: SMALL_PIECE at a time, on the loop, straight into what is sent

Invariants
1. Everything here runs on the loop's thread; workers see Tasks only, and a Task in flight keeps its operation alive.
2. An operation stands in session.operations from the moment it is made to `finish`, which answers it once.
3. Every piece is charged to the Budget, and a connection's pieces together to PIECE_WINDOW; its tasks that are no READs
   weigh CONNECTION_WEIGHT at most.
4. At most one operation of a connection is exclusive, and it begins only when no other has an answer under way.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc

from nbdzram.nbd.transmission cimport (
    BLOCK, CHUNK_DATA, CHUNK_DONE, DF, NO_HOLE, OK, READ, REPLY_OVERHEAD, SIMPLE, SIMPLE_REPLY_SIZE, TRIM,
    UNREADABLE, WRITE, WRITE_ZEROES, finish_read, put_chunk, put_simple, read_header_size, store16, store64, verdict_of,
)
from nbdzram.server.hotpath cimport LOST, HotPath, asked, must_last
from nbdzram.server.traffic cimport monotonic
from nbdzram.server.workers cimport Piece, Task, TaskOwner, new_piece

from nbdzram.errors import ProtocolError

cdef enum:
    TASKS_IN_FLIGHT = 8           # of one operation: enough for every core, without hogging the queue
    CONNECTION_WEIGHT = 16        # of the tasks of one connection that are no READs: others' wait behind so few, not 512
    FREE_WEIGHT = 8               # of a task of TRIM or WRITE_ZEROES, which takes that many times as long as one of WRITE
    PIECE_WINDOW = 2 << 20        # read replies of one connection that are being made or wait for the socket


cdef Operation new_operation(HotPath session, Piece payload, uint64_t step, bint whole):
    """The session's current request, to be handed out in tasks of `step` bytes. `payload`: of a WRITE."""
    cdef Operation operation = Operation.__new__(Operation)
    operation.session = session
    operation.request = session.request
    operation.started = session.started
    operation.step = step
    operation.whole = whole
    operation.payload = payload
    session.operations.append(operation)
    return operation


cdef int weight_of(int command) noexcept:
    """What a task adds to its connection's weight; READs are bounded by PIECE_WINDOW."""
    if command == TRIM or command == WRITE_ZEROES:
        return FREE_WEIGHT
    return command == WRITE


cdef class Operation(TaskOwner):
    """See the module's docstring."""

    cdef bint room(self, uint64_t size) noexcept:
        """May one more piece of `size` bytes be made for this connection?"""
        if self.session.outlet.blocked or self.session.stage >= LOST or (
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
        self.step = PIECE_SIZE
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
            if self.session.weight + weight_of(self.request.command) > CONNECTION_WEIGHT:
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
            self.session.weight += weight_of(self.request.command)
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
        if session.stage >= LOST or (self.whole and not self.exclusive):
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
        self.session.weight -= weight_of(task.command)
        self.done += task.length
        if task.piece != NULL:
            piece = <Piece>task.piece
            Py_DECREF(piece)
            piece.end = task.reply_size
        if error and self.verdict == OK:
            self.verdict = verdict_of(error)
            self.failed_at = task.offset
        if piece is not None and not error and self.session.stage < LOST:
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
        if self.in_flight == 0 and (self.done == self.request.length or self.verdict != OK or self.session.stage >= LOST):
            self.finish()
        if self.session.stage >= LOST:
            self.session.gone()
        else:
            self.session.proceed()
        return 0

    cdef int fail(self, error) except -1:
        cdef HotPath session = self.session
        session.outlet.discard()
        session.abort()
        if self.in_flight == 0 and self in session.operations:
            session.operations.remove(self)
        session.report(error)
        session.gone()
        return 0

    cdef int send_in_order(self) except -1:
        """A long simple reply: its header went ahead, its pieces follow as a stream."""
        cdef uint64_t offset = self.request.offset + self.sent
        while offset in self.arrived and self.session.stage < LOST:
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
        if session.stage >= LOST:
            return 0
        if self.verdict != OK:
            if self.exclusive:
                # Section "Simple replies": after a header without error only a disconnect can tell.
                session.protocol_error(ProtocolError("stored bytes do not decode in the middle of a reply"))
                session.abort()
                return 0
            session.fail(&self.request, self.verdict, self.failed_at)
            return 0
        if self.request.command == TRIM:
            session.traffic.blocks_trimmed += self.request.length // BLOCK
        if self.request.command != READ or (self.exclusive and session.rules.style != SIMPLE):
            if session.syncs and must_last(&self.request):
                session.answer_when_synced(asked(&self.request), session.success(&self.request), None)
            else:
                session.reply_success(&self.request)
        return 0
