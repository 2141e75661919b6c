"""Crowds that connect and never mean to be served, for `make bench`: each harasses a server while the context lasts.

An attack is a context manager that takes the server; ATTACKS names them for the table. Whoever attacks has a machine of
their own, so here its threads get what the server and its client leave.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Event, Thread, get_native_id

from tests.faults.crowd import MIB, Crowd
from tests.support.nbd_client import Client, open_socket
from tests.support.openssl import OpenSslClient
from tests.support.server import Nbdzram
from tests.wire import (
    CMD_BLOCK_STATUS,
    CMD_TRIM,
    CMD_WRITE_ZEROES,
    FLAG_NO_HOLE,
    OPT_LIST,
    OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY,
    client_hello,
    name_and_queries,
    option,
    request,
)

EXPORTS = 1000  # beside the one that is measured, so that a list is long
SILENT = 1100  # more than there are places
PAUSE_SECONDS = 0.05
UPDATES = 32  # of its keys by a client: as many as it may, again and again
QUERIES = 2700  # of an option: as many as fit it

Attack = Callable[[Nbdzram], AbstractContextManager[None]]


def many_exports(directory: Path) -> tuple[str, ...]:
    """Arguments that give a server EXPORTS empty exports more."""
    config = directory / "exports.toml"
    config.write_text("".join(f'[exports.extra{number}]\nsize = "1M"\n' for number in range(EXPORTS)))
    return ("-c", str(config))


@contextmanager
def harassing(work: Callable[[], None]) -> Iterator[None]:
    """Do `work` again and again, with pauses, on a thread of the lowest priority."""
    done = Event()

    def harass() -> None:
        os.setpriority(os.PRIO_PROCESS, get_native_id(), 19)
        while not done.wait(PAUSE_SECONDS):
            with contextlib.suppress(OSError, EOFError, AssertionError):  # it was cut: that is what it is about
                work()

    thread = Thread(target=harass)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def tcp(server: Nbdzram) -> tuple[str, int]:
    assert server.port is not None
    return ("127.0.0.1", server.port)


@contextmanager
def silent(server: Nbdzram) -> Iterator[None]:
    """SILENT sockets say nothing, and whoever is cut comes again."""
    with Crowd() as crowd:
        for _ in range(SILENT):
            crowd.members.append(open_socket(tcp(server)))

        def come_again() -> None:
            for _ in range(10):
                crowd.members.pop(0).close()
                crowd.members.append(open_socket(tcp(server)))

        with harassing(come_again):
            yield


def pipelining(said: bytes) -> Attack:
    """20 strangers at a time send `said`, take what comes, and hang up."""

    @contextmanager
    def attack(server: Nbdzram) -> Iterator[None]:
        def work() -> None:
            with Crowd() as crowd:
                crowd.connect(server, 20)
                for member in crowd.members:
                    member.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        member.send(client_hello() + said)
                for _ in range(50):
                    for member in crowd.members:
                        with contextlib.suppress(BlockingIOError):
                            member.recv(1 << 16)

        with harassing(work):
            yield

    return attack


@contextmanager
def rekeying(server: Nbdzram) -> Iterator[None]:
    """A TLS client that names no export updates its keys as often as it may, and comes again."""

    def work() -> None:
        client = Client(tcp(server), None)
        with client.socket as connected:
            client.ask_for_tls()
            tls = OpenSslClient(connected)
            connected.sendall(b"".join(tls.key_update() for _ in range(UPDATES)))
            connected.shutdown(socket.SHUT_WR)

    with harassing(work):
        yield


def asking(asked: bytes) -> Attack:
    """An attached client asks for this as often as it is answered."""

    @contextmanager
    def attack(server: Nbdzram) -> Iterator[None]:
        client = Client(server.unix_path, None)
        with client.socket as connected:
            for number, content in (
                (OPT_STRUCTURED_REPLY, b""),
                (OPT_SET_META_CONTEXT, name_and_queries(b"disk", b"base:allocation", b"nbdzram:fold")),
            ):
                client.send_option(number, content)
                while client.option_reply(number)[0] != 1:
                    pass
            client.go("disk")
            connected.setblocking(False)

            def work() -> None:
                for _ in range(20):
                    with contextlib.suppress(BlockingIOError):
                        connected.send(asked)
                    with contextlib.suppress(BlockingIOError):
                        connected.recv(1 << 20)

            with harassing(work):
                yield

    return attack


ZEROED = 896 * MIB  # in the gigabyte of the export, behind what is measured
FILLED_AND_TRIMMED = b"".join(
    request(command, ZEROED, 4 * MIB, flags=flags)
    for command, flags in ((CMD_WRITE_ZEROES, FLAG_NO_HOLE), (CMD_TRIM, 0))
)


ATTACKS: dict[str, Attack] = {
    "beside silent strangers": silent,
    "beside strangers that list": pipelining(option(OPT_LIST) * 126),
    "beside strangers that query": pipelining(
        option(OPT_STRUCTURED_REPLY)
        + option(OPT_SET_META_CONTEXT, name_and_queries(b"disk", *[b"base:x"] * QUERIES)) * 20
    ),
    "beside strangers that rekey": rekeying,
    "beside a client that asks for status": asking(request(CMD_BLOCK_STATUS, 0, 16 * MIB) * 8),
    "beside a client that fills and trims": asking(FILLED_AND_TRIMMED * 8),
}
