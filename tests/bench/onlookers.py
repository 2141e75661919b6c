"""Crowds that never attach: scrapers without a pause, half HTTP requests, and strangers who fill the log."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Event, Thread, get_native_id
from urllib.parse import urlsplit

from tests.support.nbd_client import open_socket
from tests.support.server import Nbdzram

SCRAPERS, HALVES, SHOUTERS = 30, 40, 4
GO = 7
NAMES_A_HANDSHAKE = 100  # below the server's limit of options


@contextmanager
def _together(count: int, once: Callable[[], None]) -> Iterator[None]:
    """`count` threads that do it again and again. Attackers have machines of their own: here they get what is left."""
    done = Event()

    def again_and_again() -> None:
        os.setpriority(os.PRIO_PROCESS, get_native_id(), 19)
        while not done.is_set():
            with contextlib.suppress(OSError):
                once()

    threads = [Thread(target=again_and_again) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


def _address(server: Nbdzram) -> tuple[str, int]:
    url = urlsplit(server.metrics_url)
    assert url.hostname is not None
    assert url.port is not None
    return url.hostname, url.port


def scraping(server: Nbdzram) -> AbstractContextManager[None]:
    """30 scrapers, each again as soon as it was answered."""

    def scrape() -> None:
        with socket.create_connection(_address(server), timeout=10) as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while client.recv(65536):
                pass

    return _together(SCRAPERS, scrape)


def halving(server: Nbdzram) -> AbstractContextManager[None]:
    """40 that send half a request and wait to be cut, again and again."""

    def halve() -> None:
        with socket.create_connection(_address(server), timeout=10) as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHo")
            client.recv(1)

    return _together(HALVES, halve)


def shouting(server: Nbdzram) -> AbstractContextManager[None]:
    """Strangers who ask for exports that are not there, each of them worth a line in the log."""
    content = struct.pack(">I", 6) + b"\r\nno\x1b!" + b"\0\0"
    options = (b"IHAVEOPT" + struct.pack(">II", GO, len(content)) + content) * NAMES_A_HANDSHAKE

    def shout() -> None:
        with open_socket(server.unix_path) as client:
            client.sendall(struct.pack(">I", 3) + options)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass

    return _together(SHOUTERS, shout)


ATTACKS = {
    "beside scrapers without a pause": scraping,
    "beside half HTTP requests": halving,
    "beside strangers who fill the log": shouting,
}
