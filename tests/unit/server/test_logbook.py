"""The log: bounded, written by a thread of its own, and one line a line whatever strangers say."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nbdzram.config import LogFormat, LogLevel, LogTarget
from nbdzram.errors import UserError
from nbdzram.ready import readable
from nbdzram.server import logbook
from nbdzram.server.logbook import (
    LINE_CHARACTERS,
    LINES_A_MINUTE,
    QUEUED_LINES,
    Causes,
    LineWriter,
    Logbook,
    printable,
    shaper,
)

SMALL_PIPE = 4096
PATIENCE_SECONDS = 20  # for a line that never comes


@dataclass
class Pipe:
    """A small one; `stuff` fills it, so that the next write waits for a reader."""

    reader: int
    writer: int

    def stuff(self) -> int:
        os.set_blocking(self.writer, False)
        count = 0
        try:
            while True:
                count += os.write(self.writer, b"\n" * SMALL_PIPE)
        except BlockingIOError:
            os.set_blocking(self.writer, True)
        return count

    def read_all(self) -> str:
        """Until the last writer closed it."""
        os.close(self.writer)
        self.writer = -1
        return b"".join(iter(lambda: os.read(self.reader, 65536), b"")).decode()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, SMALL_PIPE)
    made = Pipe(reader, writer)
    yield made
    for descriptor in (made.reader, made.writer):
        if descriptor >= 0:
            os.close(descriptor)


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    one = logging.getLogger("nbdzram.test")
    one.propagate = False
    one.setLevel(logging.DEBUG)
    yield one
    one.handlers.clear()


def record(message: str, *arguments: object, level: int = logging.WARNING, name: str = "nbdzram") -> logging.LogRecord:
    return logging.LogRecord(name, level, "file", 1, message, arguments, None)


def lines_of(form: LogFormat, made: logging.LogRecord, *, journal: bool = False) -> list[str]:
    return list(shaper(form, journal)(made))


def test_who_logs_never_waits_for_a_reader_and_what_is_lost_is_told(pipe: Pipe) -> None:
    stuffed = pipe.stuff()
    writer = LineWriter(pipe.writer)
    for number in range(3 * QUEUED_LINES):  # nobody reads: a writer without a bound, or without a thread, ends here
        writer.put(f"line {number}")
    assert writer.lost_total >= QUEUED_LINES
    told: list[str] = []
    reader = threading.Thread(target=lambda: told.append(pipe_text(pipe.reader, "in time")))
    reader.start()
    writer.close(60)
    reader.join(60)
    text = told[0][stuffed:]
    assert text.startswith("line 0\n")
    lost = int(re.findall(r"lost from this log: (\d+) lines", text)[0])
    assert lost == writer.lost_total
    assert len(re.findall(r"line \d+", text)) + lost == 3 * QUEUED_LINES


def pipe_text(descriptor: int, until: str) -> str:
    text = ""
    while until not in text:
        assert readable(descriptor, seconds=PATIENCE_SECONDS), f"no {until!r} in {text[-200:]!r}"
        text += os.read(descriptor, 65536).decode()
    return text


def test_a_pipe_that_another_made_nonblocking_gets_every_line(pipe: Pipe) -> None:
    os.set_blocking(pipe.writer, False)
    writer = LineWriter(pipe.writer)
    for number in range(QUEUED_LINES // 2):
        writer.put(f"{number:099}")
    text = pipe_text(pipe.reader, f"{QUEUED_LINES // 2 - 1:099}\n")
    assert [int(line) for line in text.split()] == list(range(QUEUED_LINES // 2))
    assert writer.lost_total == 0


def test_a_reader_that_went_away_is_counted_and_ends_nothing(pipe: Pipe) -> None:
    failures: list[OSError] = []
    writer = LineWriter(pipe.writer, failed=failures.append)
    os.close(pipe.reader)
    pipe.reader = -1
    writer.put("to nobody")
    writer.close(60)
    assert [type(failure) for failure in failures] == [BrokenPipeError]
    assert writer.lost_total == 1


FULL = """
import logging, os, resource, sys
from nbdzram.config import LogFormat
from nbdzram.server.logbook import Logbook, shaper
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
log = logging.getLogger("nbdzram.server")
with open(sys.argv[1], "ab") as file:
    book = Logbook(file.fileno(), shaper(LogFormat(sys.argv[2]), journal=False))
    logging.getLogger().addHandler(book)
    def say(*words, room=None):
        lost = book.writer.lost_total
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited if room is None else (file.tell() + room, unlimited[1]))
        for word in words:
            log.error(word * 9)
            while room is not None and book.writer.lost_total == lost:
                os.sched_yield()
            lost = book.writer.lost_total
    say("cut", "gone", room=60)  # the first one begins, in what room there is
    say("whole", "more")
    book.close()
"""


@pytest.mark.parametrize("form", LogFormat)
def test_a_line_that_is_cut_for_want_of_room_takes_no_other_with_it_and_is_told(
    tmp_path: Path, form: LogFormat
) -> None:
    """The next line went on in the middle of it, and two were none; JSON that was no JSON."""
    place = tmp_path / "log"
    subprocess.run([sys.executable, "-c", FULL, str(place), form.value], check=True, timeout=60)
    cut, told, *whole = place.read_text().splitlines()
    assert (len(cut), len(whole)) == (60, 2)
    if form is LogFormat.JSON:
        read = [json.loads(line) for line in (told, *whole)]
        told, *whole = (f"{line['level'].upper()} {line['message']}" for line in read)
    assert "WARNING" in told
    assert told.endswith("lost from this log: 2 lines, File too large")
    assert [line.rpartition(" ")[2] for line in whole] == ["whole" * 9, "more" * 9]


def test_closing_waits_for_the_line_that_is_being_written(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in no queue any more, and the process ends behind it."""
    begun, may_go_on, over = threading.Event(), threading.Event(), []
    write = os.write

    def held(descriptor: int, content: bytes) -> int:
        begun.set()
        may_go_on.wait()
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", held)
    writer = LineWriter(pipe.writer)
    writer.put("the last line")
    begun.wait()
    wait_for = writer._changed.wait_for

    def waits(predicate: Callable[[], bool], seconds: float) -> bool:
        over.append(predicate())
        may_go_on.set()
        return wait_for(predicate, seconds)

    monkeypatch.setattr(writer._changed, "wait_for", waits)
    writer.close(60)
    assert over[0] is False
    assert pipe.read_all() == "the last line\n"


def test_closing_waits_for_a_reader_no_longer_than_it_says(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.stuff()
    monkeypatch.setattr(logbook, "CLOSE_SECONDS", 0.01)
    with Logbook(pipe.writer, shaper(LogFormat.TEXT, journal=False)) as book:
        book.handle(record("nobody reads this"))


def test_a_cause_is_told_so_often_in_a_minute_and_then_counted() -> None:
    causes = Causes()
    admitted = [causes.admit("one", "%s: refused", LINES_A_MINUTE, 100.0) for _ in range(500)]
    assert admitted == [True] * LINES_A_MINUTE + [False] * (500 - LINES_A_MINUTE)
    causes.told(record("%s: refused", 9, name="one"))
    assert causes.admit("one", "something else", LINES_A_MINUTE, 100.0)  # each cause has its own
    assert causes.ended(159.0) == []
    (told,) = causes.ended(160.0)
    assert told.getMessage() == f"{500 - LINES_A_MINUTE} more like this within a minute: 9: refused"
    assert told.levelno == logging.WARNING
    assert causes.admit("one", "%s: refused", LINES_A_MINUTE, 161.0)  # a new minute


def test_causes_that_somebody_invents_take_no_memory_without_end() -> None:
    causes = Causes()
    for number in range(100_000):
        causes.admit(f"library {number}", f"invented {number}", LINES_A_MINUTE, 0.0)
    assert len(causes._minutes) <= 2 * logbook.CAUSES + 1


def test_a_line_that_is_not_told_is_counted_before_a_record_is_made_of_it(pipe: Pipe, logger: logging.Logger) -> None:
    made: list[str] = []

    class Record(logging.LogRecord):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            made.append(self.getMessage())

    logging.setLogRecordFactory(Record)
    try:
        with Logbook(pipe.writer, shaper(LogFormat.TEXT, journal=False)) as book:
            logger.addHandler(book)
            book.let_ask([logger])
            for number in range(LINES_A_MINUTE + 5):
                logger.warning("%d failed", number)
            logger.info("another cause")
    finally:
        logging.setLogRecordFactory(logging.LogRecord)
    assert made == [*(f"{number} failed" for number in range(LINES_A_MINUTE)), "another cause"]
    text = pipe.read_all()
    assert text.count("failed\n") == LINES_A_MINUTE + 1
    assert "5 more like this within a minute: 9 failed\n" in text
    assert type(logger) is logging.Logger  # a book that is closed asks nobody any more


def test_every_logger_of_the_package_asks_first() -> None:
    package = Path(logbook.__file__).parent.parent
    named = {name for file in package.rglob("*.py") for name in re.findall(r'getLogger\("(.+?)"\)', file.read_text())}
    assert named == set(logbook.OURS)
    with logbook.open_logbook(LogTarget.STDERR, LogLevel.WARNING, LogFormat.TEXT, {}):
        assert {type(logging.getLogger(name)) for name in named} == {logbook.AskingLogger}
    assert {type(logging.getLogger(name)) for name in named} == {logging.Logger}


def test_what_was_counted_is_told_when_the_server_ends(pipe: Pipe, logger: logging.Logger) -> None:
    with Logbook(pipe.writer, shaper(LogFormat.TEXT, journal=False)) as book:
        logger.addHandler(book)
        for number in range(LINES_A_MINUTE + 5):
            logger.warning("%d failed", number)
    text = pipe.read_all()
    assert text.count("failed\n") == LINES_A_MINUTE + 1
    assert "WARNING nbdzram.test: 5 more like this within a minute: 9 failed\n" in text


def test_the_writer_tells_by_itself_when_a_minute_is_over(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logbook, "MINUTE_SECONDS", 0.0)
    monkeypatch.setattr(logbook, "OVERDUE_SECONDS", 0.001)
    book = Logbook(pipe.writer, shaper(LogFormat.TEXT, journal=False))
    with book.lock:  # type: ignore[union-attr] # the writer does not ask between two of them
        for number in range(LINES_A_MINUTE + 3):
            book.emit(record("%d failed", number))
    assert "3 more like this" in pipe_text(pipe.reader, "more like this")
    book.close()


def test_what_is_overdue_is_asked_for_once_in_its_time_however_many_lines_come(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, asked = [1000.0], 0

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return clock[0]

    def overdue() -> list[str]:
        nonlocal asked
        asked += 1
        return []

    monkeypatch.setattr(logbook, "time", Clock)
    writer = LineWriter(pipe.writer, overdue)
    for told in (1, 2):
        clock[0] += logbook.OVERDUE_SECONDS
        for _ in range(3):
            writer.put("a line")
            assert os.read(pipe.reader, 100) == b"a line\n"
        assert asked == told
    writer.close(60)


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("a\nnbdzram is ready", r"a\nnbdzram is ready"),
        ("\x1b[2J\r\x07", r"\x1b[2J\r\x07"),
        ("\u202egnp.exe\u2028", r"\u202egnp.exe\u2028"),
        ("\x85\x9b", r"\x85\x9b"),
        ("\udc80", r"\udc80"),
        ("grün 雪", "grün 雪"),
    ],
)
def test_what_strangers_say_is_one_line_that_moves_no_cursor(said: str, written: str) -> None:
    assert printable(said) == written
    (line,) = lines_of(LogFormat.TEXT, record("%s", said), journal=True)
    assert line == f"<4>WARNING nbdzram: {written}"
    (line,) = lines_of(LogFormat.JSON, record("%s", said))
    assert json.loads(line)["message"] == written
    assert line.isprintable()


def test_a_long_line_is_cut_and_says_so() -> None:
    text = printable("x" * 100_000)
    assert len(text) < 1100
    assert text.endswith("... and 99000 characters more")


def failed() -> logging.LogRecord:
    try:
        raise ValueError("first\nsecond")
    except ValueError as error:
        made = record("it failed", level=logging.ERROR)
        made.exc_info = (ValueError, error, error.__traceback__)
        return made


def test_the_journal_gets_levels_its_way_on_every_line_and_no_time() -> None:
    lines = lines_of(LogFormat.TEXT, failed(), journal=True)
    assert lines[0] == "<3>ERROR nbdzram: it failed"
    assert len(lines) > 3
    assert all(line.startswith("<3>") for line in lines)
    levels = {logging.DEBUG: "<7>", logging.INFO: "<6>", logging.WARNING: "<4>", logging.CRITICAL: "<3>"}
    for level, prefix in levels.items():
        assert lines_of(LogFormat.TEXT, record("x", level=level), journal=True)[0].startswith(prefix)


def test_elsewhere_each_line_says_when() -> None:
    made = record("x")
    made.created = 1.7e9 + 0.25
    assert lines_of(LogFormat.TEXT, made) == ["2023-11-14T22:13:20.250Z WARNING nbdzram: x"]


def test_json_is_an_object_a_line_with_the_traceback_inside() -> None:
    (line,) = lines_of(LogFormat.JSON, failed())
    told = json.loads(line)
    assert (told["level"], told["logger"], told["message"]) == ("error", "nbdzram", "it failed")
    assert "Traceback" in told["traceback"][0]
    assert "traceback" not in json.loads(lines_of(LogFormat.JSON, record("x"))[0])


@pytest.mark.parametrize("right", [True, False])
def test_the_journal_is_known_by_the_socket_that_systemd_names(tmp_path: Path, right: bool) -> None:
    with (tmp_path / "stderr").open("w") as file:
        status = os.fstat(file.fileno())
        told = f"{status.st_dev}:{status.st_ino + (not right)}"
        assert logbook.goes_to_journal(file.fileno(), {"JOURNAL_STREAM": told}) is right
        assert not logbook.goes_to_journal(file.fileno(), {})


def test_a_message_that_cannot_be_made_ends_nobody(pipe: Pipe) -> None:
    with Logbook(pipe.writer, shaper(LogFormat.TEXT, journal=False)) as book:
        book.handle(record("%d", "no number"))
        book.handle(record("%d" + "x" * 3 * LINE_CHARACTERS, "no number"))
    first, second = pipe.read_all().splitlines()
    assert first == "a log line could not be made from '%d'"
    assert (second[:40], len(second)) == ("a log line could not be made from '%dxxx", LINE_CHARACTERS)


def test_the_machines_own_log_gets_a_datagram_a_line_and_finds_it_again_when_it_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "log"
    monkeypatch.setattr(logbook, "SYSTEM_LOG", str(place))
    root, name = logging.getLogger(), "nbdzram.server"
    before = root.level
    try:
        with pytest.raises(UserError, match=r"no system log answers at .*; start one, or say --log stderr"):
            logbook.open_logbook(LogTarget.SYSLOG, LogLevel.INFO, LogFormat.TEXT, {})
        system_log = _listening(place)
        with logbook.open_logbook(LogTarget.SYSLOG, LogLevel.INFO, LogFormat.TEXT, {}) as book:
            logging.getLogger(name).warning("first\nline")
            logging.getLogger(name).info("second")
            told = [system_log.recv(4096).decode() for _ in range(2)]
            system_log.close()
            place.unlink()
            logging.getLogger(name).info("while it restarts")
            while not book.writer.lost_total:
                os.sched_yield()
            system_log = _listening(place)
            logging.getLogger(name).info("what tells of that finds no reader, and the next one")
            told.append(system_log.recv(4096).decode())
            logging.getLogger(name).info("fourth")
            told += [system_log.recv(4096).decode() for _ in range(2)]
        system_log.close()
    finally:
        root.setLevel(before)
    heading = rf"<(\d+)>\w{{3}} [ \d]\d \d\d:\d\d:\d\d nbdzram\[{os.getpid()}\]: "
    found = [re.fullmatch(heading + r"(.*)\n", line) for line in told]
    assert [match and match.groups() for match in found] == [
        ("28", r"WARNING nbdzram.server: first\nline"),
        ("30", "INFO nbdzram.server: second"),
        ("30", "INFO nbdzram.server: what tells of that finds no reader, and the next one"),
        ("28", "WARNING nbdzram.server: lost from this log: 1 line, Connection refused"),
        ("30", "INFO nbdzram.server: fourth"),
    ]


def _listening(place: Path) -> socket.socket:
    system_log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    system_log.settimeout(PATIENCE_SECONDS)
    system_log.bind(str(place))
    return system_log


def test_the_level_is_the_one_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.level
    try:
        with logbook.open_logbook(LogTarget.STDERR, LogLevel.WARNING, LogFormat.TEXT, {}):
            logging.getLogger("nbdzram.server").info("unsaid")
            logging.getLogger("nbdzram.server").warning("said")
    finally:
        root.setLevel(before)
    assert re.fullmatch(r"\S+Z WARNING nbdzram.server: said\n", capfd.readouterr().err)
