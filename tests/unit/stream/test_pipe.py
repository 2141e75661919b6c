"""A stream over a socket: whole, ended by a mark or a reason, and told from what follows on the connection."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from nbdzram.errors import StreamCut, StreamError
from nbdzram.stream import pipe
from nbdzram.stream.pipe import LARGEST_CHUNK, LENGTH, Pipe

Ends = tuple[Pipe, Pipe, socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Two pipes, and the sockets below them, which stay open behind a pipe that is closed."""
    one, other = socket.socketpair()
    with one, other:
        pipes = [Pipe(socket.socket(fileno=os.dup(end.fileno()))) for end in (one, other)]
        yield pipes[0], pipes[1], one, other
        for pipe in pipes:
            pipe.close()


def whole(pipe: Pipe) -> bytes:
    parts = []
    while part := pipe.read(1 << 16):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("size", [0, 1, LARGEST_CHUNK - 1, LARGEST_CHUNK, LARGEST_CHUNK + 1, 3 * LARGEST_CHUNK])
def test_what_is_written_is_read_up_to_the_end_mark_and_no_byte_of_what_follows(ends: Ends, size: int) -> None:
    writer, reader, below, behind = ends
    content = os.urandom(size)

    def write() -> None:
        writer.write(content)
        writer.end()
        below.sendall(b"behind")

    with ThreadPoolExecutor() as thread:
        written = thread.submit(write)
        try:
            assert whole(reader) == content
            assert reader.read(1) == b"", "what follows is none of it"
        except StreamError:
            writer.cancel("nobody reads it")  # else it waits for that, and the test for it
            raise
        written.result()
    assert behind.recv(100) == b"behind"
    assert writer.settle(inward=False)
    assert reader.settle(inward=True)


def test_a_chunk_that_is_longer_than_any_of_ours_is_refused(ends: Ends) -> None:
    _, reader, below, _ = ends
    below.sendall(LENGTH.pack(LARGEST_CHUNK + 1))
    with pytest.raises(StreamError, match="it is none of ours"):
        reader.read(1)


def test_whoever_is_waiting_hears_the_first_reason_why_it_ends(ends: Ends) -> None:
    _, reader, _, _ = ends
    with ThreadPoolExecutor() as thread:
        waiting = thread.submit(reader.read, 1)
        reader.cancel("the pool is full")
        reader.cancel("the server stops")
        with pytest.raises(StreamError, match=r"^the pool is full$"):
            waiting.result()


def test_who_reads_hears_that_it_ends_also_where_more_is_there(ends: Ends) -> None:
    writer, reader, _, _ = ends
    writer.write(b"more than that")
    assert reader.read(4) == b"more"
    reader.cancel("the pool is full")
    with pytest.raises(StreamError, match="the pool is full"):
        reader.read(4)


def test_a_stream_that_is_ended_between_two_chunks_gets_its_end_mark(ends: Ends) -> None:
    writer, reader, _, _ = ends
    writer.write(b"whole")
    writer.cancel("it was enough")
    with pytest.raises(StreamError, match="it was enough"):
        writer.write(b"more")
    with pytest.raises(StreamError, match="it was enough"):
        writer.end()
    assert writer.settle(inward=False)
    assert whole(reader) == b"whole"


def test_a_stream_that_is_ended_in_a_chunk_gets_the_rest_of_that_and_its_end_mark(ends: Ends) -> None:
    """However little of it was read by then: what follows is told from it, and can say why."""
    writer, reader, below, behind = ends
    content = os.urandom(2 * LARGEST_CHUNK)
    with ThreadPoolExecutor() as thread:
        written = thread.submit(writer.write, content)
        behind.recv(1, socket.MSG_PEEK)  # it has begun, and the other end's buffer is less than a chunk
        writer.cancel("it was enough")
        with pytest.raises(StreamError, match="it was enough"):
            written.result()
        read = thread.submit(whole, reader)
        try:
            assert writer.settle(inward=False)
        except AssertionError:
            reader.cancel("nothing more comes")  # else it waits for that, and the test for it
            raise
        assert read.result() == content[:LARGEST_CHUNK]
    below.sendall(b"behind")
    assert behind.recv(100) == b"behind"


def test_a_stream_that_is_ended_while_its_end_mark_waits_gets_one(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no room for it at the other end just then. A second one would be the first of what follows."""
    writer, reader, below, behind = ends
    writer.write(b"whole")

    def find_no_room() -> None:
        writer.cancel("it was enough")
        raise BlockingIOError

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_pass_on", find_no_room)
        with pytest.raises(StreamError, match="it was enough"):
            writer.end()
    assert writer.settle(inward=False)
    assert whole(reader) == b"whole"
    below.sendall(b"behind")
    assert behind.recv(100) == b"behind"


def test_for_a_reader_that_stands_still_nobody_waits(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, _, _, behind = ends
    monkeypatch.setattr(pipe, "SETTLING_SECONDS", 0.0)
    with ThreadPoolExecutor() as thread:
        written = thread.submit(writer.write, bytes(LARGEST_CHUNK))
        behind.recv(1, socket.MSG_PEEK)
        writer.cancel("it was enough")
        with pytest.raises(StreamError, match="it was enough"):
            written.result()
    with contextlib.suppress(BlockingIOError):  # the last of what fits
        while writer._socket.send(bytes(1 << 10), socket.MSG_DONTWAIT):
            pass
    assert not writer.settle(inward=False)


def test_who_went_away_is_told_from_who_ended(ends: Ends) -> None:
    writer, reader, below, behind = ends
    writer.write(b"half")
    assert reader.read(4) == b"half"
    below.shutdown(socket.SHUT_RDWR)
    with pytest.raises(StreamCut, match="whoever sent it went away"):
        reader.read(1)
    assert not reader.settle(inward=True)
    behind.close()
    with pytest.raises(StreamCut, match="nobody reads the stream any more"):
        writer.write(b"more")


def test_who_went_away_with_something_unread_is_told_with_the_systems_reason() -> None:
    one, other = socket.socketpair()
    reader = Pipe(one)
    one.send(b"unread")
    other.close()
    with pytest.raises(StreamCut, match="the stream was cut off: Connection reset by peer"):
        reader.read(1)
    reader.close()


@pytest.mark.parametrize("count", [1, 3, 7, 100])
def test_who_reads_gets_no_more_than_was_asked_for_and_all_in_the_end(ends: Ends, count: int) -> None:
    """However the chunks were cut."""
    writer, reader, _, _ = ends
    for content in (b"ten bytes.", b"", b"x", b"seventeen bytes.."):
        writer.write(content)
    writer.end()
    parts = list(iter(lambda: reader.read(count), b""))
    assert max(map(len, parts)) <= count
    assert b"".join(parts) == b"ten bytes.xseventeen bytes.."
