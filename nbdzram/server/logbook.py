"""The server's log: lines that strangers cause, written where nobody may be reading.

    whoever logs ──admit──> record ──> one line of text ──queue──> writer, a thread ──> standard error
                   │ or counted                            │ or counted

1. Who logs never waits: no system call on the way, and no lock that is held over one. The event loop logs through here.
2. A line has one line's room: what is not printable is written as an escape, what is long is cut.
3. A cause says LINES_A_MINUTE lines in a minute. What it said beyond is counted, and told when the minute is over. The
   cause is the message before its arguments are filled in, so that there are as many as there are places that log.
   Our own loggers ask before they make a record: of 5 us that a line costs which is not told, 0.5 are left.
4. The queue holds QUEUED_LINES. What finds it full, or a file system that is, is lost, counted, and told when somebody
   reads again. A line of which only a part found room is ended there: the next one is whole.

Known limits: a line that is lost is lost for all readers; a limit a cause is shared by all peers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from nbdzram.config import LogFormat, LogLevel, LogTarget
from nbdzram.errors import UserError
from nbdzram.ready import writable
from nbdzram.units import counted

STDERR = 2
SYSTEM_LOG = "/dev/log"
DAEMON = 3 << 3  # the facility, beside the level (RFC 3164, section 4.1.1)

LINES_A_MINUTE = 10
"""Of one cause: enough to see who and what it is. Whoever causes more is a crowd, of which the number is told."""

LINES_A_MINUTE_OF: Mapping[str, int] = {"nbdzram.attached": 600, "nbdzram.audit": 6000}
"""Loggers of what an operator wants line by line: a rack that boots attaches ten clients a second, and a script that
makes a thousand disks has each of its acts told."""

OURS = ("nbdzram.server", "nbdzram.attached", "nbdzram.control", "nbdzram.audit", "nbdzram.metrics")
"""The package's loggers: those that ask before they make a record."""

MINUTE_SECONDS = 60.0
CAUSES = 512  # told apart; the package has a tenth of it. Libraries that fill in their messages themselves share one
LINE_CHARACTERS = 1000  # journald takes 48 KiB, a terminal's reader far less
TRACEBACK_LINES = 60  # the last ones: where it happened
QUEUED_LINES = 1024  # a megabyte at most
OVERDUE_SECONDS = 1.0  # how often the writer looks whether a minute is over
CLOSE_SECONDS = 1.0  # for what is queued when the server ends: a reader takes milliseconds, nobody takes for ever

_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
"""Levels as journald wants them in front of a line (sd-daemon(3)); below INFO it is 7."""


class Logbook(logging.Handler):
    """Takes records from any thread. A context manager: what it holds is written before it ends."""

    def __init__(
        self,
        descriptor: int,
        shape: Callable[[logging.LogRecord], Iterator[str]],
        *,
        line_a_write: bool = False,
        failed: Callable[[OSError], None] = lambda _: None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._release = release
        self._shape = shape
        self._causes = Causes()
        self._asked: frozenset[str] = frozenset()  # loggers that ask first
        self._closed = True  # until somebody writes: at exit logging closes every handler, that of a failed start too
        self.writer = LineWriter(descriptor, self._overdue, tell=self._shaped, line_a_write=line_a_write, failed=failed)
        self._closed = False

    def let_ask(self, loggers: Iterable[logging.Logger]) -> None:
        """Let loggers, which were made as their modules were imported, ask first until the book is closed."""
        for logger in loggers:
            logger.__class__ = AskingLogger
            assert isinstance(logger, AskingLogger)
            logger.book = self
            self._asked |= {logger.name}

    def admit(self, logger: str, message: object) -> bool:
        """Whether a logger's message is to be told; else it is counted. From any thread."""
        with self.lock:  # type: ignore[union-attr] # Handler makes one
            limit = LINES_A_MINUTE_OF.get(logger, LINES_A_MINUTE)
            return self._causes.admit(logger, message, limit, time.monotonic())

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the record's lines, or count it. Under the handler's lock."""
        if record.name not in self._asked and not self.admit(record.name, record.msg):
            return
        self._causes.told(record)
        try:
            lines = list(self._shape(record))
        except Exception:  # noqa: BLE001 - a message that cannot be made is our bug, and no reason to end a client
            lines = [f"a log line could not be made from {record.msg!r}"[:LINE_CHARACTERS]]
        for line in lines:
            self.writer.put(line)

    def close(self) -> None:
        """Tell what was counted, and wait for the writer as long as somebody reads."""
        if self._closed:  # logging closes every handler once more at exit
            return
        self._closed = True
        for name in self._asked:
            logging.getLogger(name).__class__ = logging.Logger
        for line in self._tell(float("inf")):
            self.writer.put(line)
        self.writer.close(CLOSE_SECONDS)
        self._release()
        super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger().removeHandler(self)
        self.close()

    def _shaped(self, sentence: str) -> list[str]:
        """Of the writer's own, as any other line."""
        record = logging.LogRecord("nbdzram.server", logging.WARNING, __file__, 0, "%s", (sentence,), None)
        return list(self._shape(record))

    def _overdue(self) -> list[str]:
        """What the writer has to tell by itself. On its thread."""
        return self._tell(time.monotonic())

    def _tell(self, now: float) -> list[str]:
        with self.lock:  # type: ignore[union-attr] # Handler makes one
            ended = self._causes.ended(now)
        return [line for record in ended for line in self._shape(record)]


class AskingLogger(logging.Logger):
    """Asks its book before it makes a record. What logs calls it as any other."""

    book: Logbook

    def _log(self, level: int, msg: object, args: Any, *more: Any, **given: Any) -> None:
        if self.book.admit(self.name, msg):
            super()._log(level, msg, args, *more, **given)


class Causes:
    """How often each cause was told in its minute. The caller holds a lock."""

    def __init__(self) -> None:
        self._minutes: dict[tuple[str, str], _Minute] = {}

    def admit(self, logger: str, message: object, limit: int, now: float) -> bool:
        """Whether a message is to be told. `now`: monotonic seconds."""
        cause = (logger, str(message))
        minute = self._minutes.get(cause)
        if minute is None:
            minute = self._minutes.setdefault(self._shared(cause), _Minute(now))
        minute.count += 1
        if minute.count > limit:
            minute.untold += 1
            return False
        return True

    def told(self, record: logging.LogRecord) -> None:
        """A message that was admitted is told: what was the last of its cause."""
        cause = (record.name, str(record.msg))
        minute = self._minutes.get(cause) or self._minutes.get(self._shared(cause))
        if minute:  # else it was over in between
            minute.last = record

    def _shared(self, cause: tuple[str, str]) -> tuple[str, str]:
        """What a new cause is counted as: where there are too many, with its logger's others, or with all."""
        if len(self._minutes) < CAUSES:
            return cause
        return (cause[0] if len(self._minutes) < 2 * CAUSES else "", "")

    def ended(self, now: float) -> list[logging.LogRecord]:
        """Forget the minutes that are over; a record for each that has something to tell."""
        over = [cause for cause, minute in self._minutes.items() if now - minute.began >= MINUTE_SECONDS]
        minutes = [self._minutes.pop(cause) for cause in over]
        return [_more_like(minute.last, minute.untold) for minute in minutes if minute.untold and minute.last]


class _Minute:
    """One cause's, from its first line on."""

    __slots__ = ("began", "count", "last", "untold")

    def __init__(self, began: float) -> None:
        self.began = began
        self.count = 0
        self.untold = 0
        self.last: logging.LogRecord | None = None


def _more_like(last: logging.LogRecord, count: int) -> logging.LogRecord:
    text = f"{count} more like this within a minute: {last.getMessage()}"
    return logging.LogRecord(last.name, last.levelno, last.pathname, last.lineno, "%s", (text,), None)


class LineWriter:
    """A bounded queue of lines and the thread that writes them to a descriptor, however slow that is.

    The thread is a daemon: a write that nobody reads does not keep the process.
    """

    def __init__(
        self,
        descriptor: int,
        overdue: Callable[[], list[str]] = list,
        *,
        tell: Callable[[str], list[str]] = lambda sentence: [sentence],
        encoding: str = "utf-8",
        line_a_write: bool = False,
        failed: Callable[[OSError], None] = lambda _: None,
    ) -> None:
        """`overdue` gives lines of its own accord, `tell` makes some of a sentence on those that are lost."""
        self._descriptor = descriptor
        self._overdue = overdue
        self._tell = tell
        self._encoding = encoding
        self._line_a_write = line_a_write
        self._failed = failed
        self._lines: deque[str] = deque()
        self._lost = 0  # and not yet told
        self._unwritten = 0  # nor these, which found no room where they were written
        self._reason = ""
        self._broken = False  # the last one, in its middle
        self.lost_total = 0
        self._writing = False
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Queue a line. Never waits."""
        with self._changed:
            if len(self._lines) >= QUEUED_LINES:
                self._lost += 1
                self.lost_total += 1
                return
            self._lines.append(line)
            self._changed.notify_all()

    def close(self, seconds: float) -> None:
        """Take no more, and wait until everything is written, but no longer than that."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._lines and not self._lost and not self._writing, seconds)

    def _run(self) -> None:
        asked = time.monotonic()
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._lines or self._lost or self._closing, OVERDUE_SECONDS)
                if self._closing and not self._lines and not self._lost:
                    return
                lines, lost = list(self._lines), self._lost
                self._lines.clear()
                self._lost, self._writing = 0, True
            if lost:
                lines += self._tell(f"lost from this log: {counted(lost, 'line')}, as nobody read them in time")
            if time.monotonic() - asked >= OVERDUE_SECONDS:
                lines += self._overdue()
                asked = time.monotonic()
            if lines and self._unwritten:
                told = self._tell(f"lost from this log: {counted(self._unwritten, 'line')}, {self._reason}")
                if not self._write("\n".join(told) + "\n"):
                    self._unwritten = 0
            for piece in lines if self._line_a_write else ["\n".join(lines)] if lines else []:
                failed = self._write(piece + "\n")
                self._unwritten += failed
                with self._changed:
                    self.lost_total += failed

    def _write(self, text: str) -> int:
        """All of it, or as much as can be; how many lines are lost."""
        content = ("\n" * self._broken + text).encode(self._encoding, "backslashreplace")
        left = memoryview(content)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # somebody else who has the same pipe made it so
                writable(self._descriptor)
            except OSError as error:  # the reader went away, or the file system is full
                written = content[: len(content) - len(left)]
                lost = text.count("\n") - max(written.count(b"\n") - self._broken, 0)
                self._broken = not written.endswith(b"\n") if written else self._broken
                if not self._unwritten:  # else it is told with the first ones
                    self._reason = error.strerror or str(error)
                self._failed(error)
                return lost
        self._broken = False
        return 0


def open_logbook(target: LogTarget, level: LogLevel, form: LogFormat, environment: Mapping[str, str]) -> Logbook:
    """Send what this process logs from `level` on to `target`. Raises UserError."""
    if target is LogTarget.SYSLOG:
        book = _system_log(form)
    elif target is LogTarget.NULL:
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        book = Logbook(nowhere, shaper(form, journal=False), release=lambda: os.close(nowhere))
    else:
        book = Logbook(STDERR, shaper(form, goes_to_journal(STDERR, environment)))
    book.let_ask(map(logging.getLogger, OURS))
    root = logging.getLogger()
    root.addHandler(book)
    root.setLevel(level.name)
    return book


def _system_log(form: LogFormat) -> Logbook:
    """The machine's own log, as syslog(3) writes to it: a datagram a line. What is said while it restarts is lost."""
    log_socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def connect_again(_: OSError) -> None:
        with contextlib.suppress(OSError):
            log_socket.connect(SYSTEM_LOG)

    try:
        log_socket.connect(SYSTEM_LOG)
    except OSError as error:
        log_socket.close()
        raise UserError(
            f"no system log answers at {SYSTEM_LOG} ({error.strerror}); start one, or say --log stderr"
        ) from error
    return Logbook(
        log_socket.fileno(), _for_syslog(form), line_a_write=True, failed=connect_again, release=log_socket.close
    )


def _for_syslog(form: LogFormat) -> Callable[[logging.LogRecord], Iterator[str]]:
    body = _json if form is LogFormat.JSON else _text

    def lines(record: logging.LogRecord) -> Iterator[str]:
        heading = (
            f"<{DAEMON + _priority(record.levelno)}>{time.strftime('%b %e %H:%M:%S', time.localtime(record.created))}"
        )
        return (f"{heading} nbdzram[{os.getpid()}]: {line}" for line in body(record))

    return lines


def goes_to_journal(descriptor: int, environment: Mapping[str, str]) -> bool:
    """Whether a descriptor is the socket that systemd connected to the journal (systemd.exec(5), $JOURNAL_STREAM)."""
    status = os.fstat(descriptor)
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def shaper(form: LogFormat, journal: bool) -> Callable[[logging.LogRecord], Iterator[str]]:
    """What makes a record's lines: the journal adds the time and wants the level its own way, others get both."""
    body = _json if form is LogFormat.JSON else _text if journal else _text_with_time
    if not journal:
        return body
    return lambda record: (f"<{_priority(record.levelno)}>{line}" for line in body(record))


def printable(text: str) -> str:
    """In one line and without what moves a cursor or turns text round; cut to LINE_CHARACTERS."""
    left = len(text) - LINE_CHARACTERS
    if left > 0:
        text = text[:LINE_CHARACTERS]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return f"{text}... and {left} characters more" if left > 0 else text


def _text_with_time(record: logging.LogRecord) -> Iterator[str]:
    for line in _text(record):
        yield f"{_moment(record)} {line}"


def _text(record: logging.LogRecord) -> Iterator[str]:
    yield f"{record.levelname} {record.name}: {printable(record.getMessage())}"
    for line in _traceback(record):
        yield f"  {printable(line)}"


def _json(record: logging.LogRecord) -> Iterator[str]:
    told = {
        "time": _moment(record),
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": printable(record.getMessage()),
    }
    trace = _traceback(record)
    yield json.dumps(told | ({"traceback": [printable(line) for line in trace]} if trace else {}))


def _moment(record: logging.LogRecord) -> str:
    """RFC 3339, in UTC, to the millisecond."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _traceback(record: logging.LogRecord) -> list[str]:
    if not record.exc_info or record.exc_info[0] is None:
        return []
    return "".join(traceback.format_exception(*record.exc_info)).splitlines()[-TRACEBACK_LINES:]


def _priority(level: int) -> int:
    return next((priority for least, priority in _PRIORITIES if level >= least), 7)
