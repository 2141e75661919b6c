"""Terminals that know few letters, or cannot be drawn on, get figures and never a traceback."""

from __future__ import annotations

import contextlib
import os
import pty
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from nbdzram.cli.columns import Column, legible, render
from nbdzram.cli.view import Frame, screen
from nbdzram.rates import Rates
from tests.support.programs import require_program
from tests.support.terminal import Terminal
from tests.unit.cli.conftest import NBDZRAM, Server, clean_environment
from tests.unit.records import EXPORT, MIB, SERVER

Start = Callable[..., Server]

NAMES = ("диск", "磁盘", "naïve")
ENCODINGS = ("ascii", "latin-1", "koi8-r")


def run_encoded(encoding: str, *words: str) -> subprocess.CompletedProcess[bytes]:
    environment = clean_environment() | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    return subprocess.run([*NBDZRAM, *words], capture_output=True, check=False, env=environment)


@pytest.fixture
def named(start: Start) -> Server:
    server = start("-e", "disk=1M")
    for name in NAMES:
        assert server.run("exports", "add", name, "1M").code == 0
    return server


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "words", [("stat",), ("top", "--once", "--interval", "0.1"), ("exports", "list"), ("exports", "remove", "диск")]
)
def test_names_that_a_terminal_cannot_write_are_no_traceback(
    named: Server, encoding: str, words: tuple[str, ...]
) -> None:
    done = run_encoded(encoding, *words, "--control", str(named.control))
    assert (done.returncode, done.stderr) == (0, b"")
    told = done.stdout.decode(encoding, "replace")  # click writes UTF-8 where Python thinks ASCII
    if words[0] in {"stat", "top"}:
        assert "disk" in told


def test_stat_writes_the_numbers_of_letters_that_are_missing(named: Server) -> None:
    told = run_encoded("latin-1", "stat", "--control", str(named.control)).stdout.decode("latin-1")
    assert "naïve" in told
    assert "\\u0434\\u0438\\u0441\\u043a disk" in told
    told = run_encoded("koi8-r", "stat", "--control", str(named.control)).stdout.decode("koi8-r")
    assert "диск" in told


def test_an_escaped_letter_counts_with_all_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    class Latin:
        encoding = "latin-1"

    monkeypatch.setattr(sys, "stdout", Latin())
    columns: list[Column[str]] = [Column("NAME", "", lambda name: name), Column("N", "", len)]
    lines = render(columns, ["дом", "plain"])
    assert [line.rindex(" ") for line in lines] == [18, 18, 18]


@pytest.mark.parametrize("encoding", [*ENCODINGS, "utf-8"])
def test_every_line_of_the_screen_can_be_written(encoding: str) -> None:
    status = replace(SERVER, exports=tuple(replace(EXPORT, name=name * 9) for name in NAMES))
    rates = Rates(read_bytes=3 * MIB, write_bytes=MIB, requests=9, median_seconds=6e-6, p99_seconds=2e-3)
    frame = Frame(status, all_rates=rates)
    frame.history.extend([rates] * 3)
    console = Console(width=60, height=24, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(screen(frame, 60, 24, keys=True, encoding=encoding))
    told = captured.get()
    told.encode(encoding)
    assert ("█" in told) == (encoding not in {"ascii", "latin-1"})
    assert ("#" in told) == (encoding in {"ascii", "latin-1"})
    if encoding == "ascii":
        assert "6 us" in told


def test_a_row_that_is_too_long_goes_on_between_two_columns() -> None:
    columns: list[Column[str]] = [
        Column("NAME", "", lambda name: name),
        Column("LENGTH", "", len),
        Column("TWICE", "", lambda name: name * 2),
        Column("NONE", "", lambda _: None),
    ]
    rows = ["abc", "磁盘磁盘磁盘"]
    assert render(columns, rows, width=40) == [
        "NAME         LENGTH",
        "    TWICE                    NONE",
        "abc               3",
        "    abcabc",
        "磁盘磁盘磁盘      6",
        "    磁盘磁盘磁盘磁盘磁盘磁盘",
    ]
    assert render(columns, rows, width=49) == render(columns, rows)  # it fits
    assert len(render(columns, rows, width=48)) > 3
    assert len(render(columns, rows, width=1)) == 4 + 3 + 3  # a column a line, and of an empty one none


@pytest.mark.parametrize("said", ["\u00b2", "-1", "wide", "0", "1", "\u0663"])
def test_a_size_of_the_terminal_that_is_none_is_no_traceback(start: Start, said: str) -> None:
    server = start("-e", "disk=1G")
    done = subprocess.run(
        [*NBDZRAM, "top", "--once", "--interval", "0.1", "--control", str(server.control)],
        capture_output=True,
        text=True,
        check=False,
        env=clean_environment() | {"COLUMNS": said, "LINES": said},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "EXPORT" in done.stdout


@pytest.mark.parametrize("width", [40, 60, 80])
def test_no_line_of_a_table_is_wrapped_by_a_narrow_terminal(start: Start, tmp_path: Path, width: int) -> None:
    server = start("-e", "disk=1G", "-e", "a-disk-with-a-long-name=20G")
    server.run("exports", "change", "disk", "--description", "thirty characters of something")
    asked = (("ls",), ("stat",), ("pools", "list"))
    script = " && ".join(shlex.join([*NBDZRAM, *words]) for words in asked)
    environment = clean_environment() | {"NBDZRAM_CONTROL": str(server.control)}
    terminal = Terminal(tmp_path, ["sh", "-c", script], environment, width=width)
    try:
        terminal.wait_for("ended with 0")
        assert [line for line in terminal.text().splitlines() if len(line) > width] == []
    finally:
        terminal.close()
    whole = server.run("ls").out  # to a pipe every row is a line
    assert len(whole.splitlines()) == 3


def test_what_is_legible_stays_as_it_is() -> None:
    assert legible("naïve", "latin-1") == "naïve"
    assert legible("a\x1b[31m", "utf-8") == "a\\x1b[31m"
    assert legible("two words", "utf-8") == "two words"


@pytest.mark.parametrize(
    ("name", "shown"),
    [(" a", "\\x20a"), ("a  ", "a\\x20\\x20"), ("  ", "\\x20\\x20"), (" \x1b ", "\\x20\\x1b\\x20"), ("", "")],
)
def test_blanks_that_nobody_would_see_are_shown(name: str, shown: str) -> None:
    assert legible(name, "utf-8") == shown


@pytest.mark.parametrize("terminal", ["dumb", "unknown"])
def test_top_on_a_terminal_that_cannot_be_drawn_on_prints_once(start: Start, terminal: str) -> None:
    server = start("-e", "disk=1M")
    script = require_program("script", package="bsdutils")
    words = f"{sys.executable} -m nbdzram top --interval 0.1 --control {server.control}"
    done = subprocess.run(
        [script, "-qec", words, "/dev/null"],
        capture_output=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
        env=clean_environment() | {"TERM": terminal},
    )
    assert done.returncode == 0
    assert b"EXPORT" in done.stdout
    assert b"disk" in done.stdout


def drawn(server: Server, terminal: str, words: tuple[str, ...]) -> bytes:
    """What a command sends to a terminal of this kind, its third table at the most."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*NBDZRAM, *words, "--control", str(server.control)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if words[0] == "send" else theirs,
        stderr=theirs,
        env=clean_environment() | {"TERM": terminal},
    ) as process:
        os.close(theirs)
        told = b""
        with contextlib.suppress(OSError):  # as a terminal ends that nobody has open any more
            while piece := os.read(ours, 4096):
                told += piece
                if told.count(b"DISKSIZE") > 2:
                    process.send_signal(signal.SIGINT)
    os.close(ours)
    return told


@pytest.mark.parametrize("words", [("stat", "--watch", "0.1"), ("doctor",), ("send", "disk"), ("receive",)])
def test_nothing_is_drawn_on_a_terminal_that_cannot_be_drawn_on(start: Start, words: tuple[str, ...]) -> None:
    """Colours and moves of the cursor stood between the lines of an editor's shell."""
    server = start("-e", "disk=1M")
    assert [b"\x1b" in drawn(server, terminal, words) for terminal in ("xterm", "dumb")] == [True, False]


def test_a_path_that_is_no_text_is_no_traceback(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 stand in a path as surrogates, which no encoding can write."""
    words: list[str | bytes] = [*NBDZRAM, "serve", "-e", "disk=1M", "--check-config", "--state-dir"]
    words.append(bytes(tmp_path) + b"/\xff")
    done = subprocess.run(words, capture_output=True, check=False, env=clean_environment() | {"LC_ALL": "C.UTF-8"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\udcff" in done.stdout
