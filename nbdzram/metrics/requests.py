"""An HTTP request's head, from bytes: h11 reads it, this says what may be asked and under which name.

Knows no socket. What is refused is a Refused with the status that fits (RFC 9110, section 15).
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from types import MappingProxyType
from urllib.parse import urlsplit

import h11

MAX_HEAD_BYTES = 8192  # browsers with cookies of other services on localhost send up to a few KiB
MAX_PIECES = 64  # that a head comes in: one or two are usual, and each costs a turn of the event loop
METHODS = {b"GET", b"HEAD"}
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Refused(Exception):
    """The answer to a request that is not served: a status, and a sentence."""

    def __init__(self, status: HTTPStatus, sentence: str, headers: Mapping[str, str] = NO_HEADERS) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers = headers


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked."""

    path: str  # without its query
    host: str  # as it was named, without the port; "" if it was not, which HTTP/1.0 may
    head_only: bool


class Head:
    """Bytes in, one request out."""

    def __init__(self) -> None:
        self._connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._begun = False
        self._pieces = 0

    def receive(self, piece: bytes) -> Request | None:
        """The request, once it is complete. Raises Refused."""
        self._pieces += 1
        if not self._begun:
            piece = piece.lstrip(b"\r\n")  # RFC 9112, section 2.2: an empty line before a request is ignored
            self._begun = bool(piece)
        if not piece:
            self._require_progress()
            return None
        try:
            self._connection.receive_data(piece)
            event = self._connection.next_event()
        except h11.RemoteProtocolError as error:
            raise _refusal(error) from None
        if isinstance(event, h11.Request):
            return _request(event)
        self._require_progress()
        return None

    def _require_progress(self) -> None:
        if self._pieces >= MAX_PIECES:
            raise Refused(HTTPStatus.BAD_REQUEST, f"the request's head comes in more than {MAX_PIECES} pieces")


def _refusal(error: h11.RemoteProtocolError) -> Refused:
    if error.error_status_hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
        sentence = f"the request's head is longer than {MAX_HEAD_BYTES} bytes"
        return Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, sentence)
    return Refused(HTTPStatus.BAD_REQUEST, f"this is not an HTTP/1.1 request: {error}")


def _request(event: h11.Request) -> Request:
    if event.method not in METHODS:
        told = {"Allow": b", ".join(sorted(METHODS)).decode()}  # RFC 9110, section 15.5.6
        raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD are served", told)
    target = event.target.decode("latin-1")
    host = next((value.decode("latin-1") for name, value in event.headers if name == b"host"), "")
    if not target.startswith("/"):  # RFC 9112, section 3.2.2: in absolute form the target names the host
        host, target = _absolute(target)
    return Request(target.partition("?")[0], _without_port(host), event.method == b"HEAD")


def _absolute(target: str) -> tuple[str, str]:
    """The host and the path of a URL. Raises Refused."""
    try:
        url = urlsplit(target)
    except ValueError:  # a bracket without its other one, or with something between them that is no address
        url = urlsplit("")
    if url.scheme.lower() != "http" or not url.netloc:
        raise Refused(HTTPStatus.BAD_REQUEST, "the request's target is neither a path nor an http URL")
    return url.netloc, url.path or "/"


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


class Hosts:
    """The names under which requests are answered.

    A page of a stranger can make its own name lead here once it has been loaded (DNS rebinding), and then read what the
    browser that shows it may reach. So a name is answered only if no stranger can have it: an address, a name without a
    dot, what ends in .localhost (RFC 6761), this machine's own; and what the operator allows.
    """

    def __init__(self, allowed: Iterable[str]) -> None:
        self._allowed = {socket.gethostname().lower(), *allowed}

    def admit(self, host: str) -> bool:
        """Whether a request may name this host. Nothing but HTTP/1.0 names none, and no browser speaks it."""
        name = host.lower().removesuffix(".")
        if "." not in name or name.endswith(".localhost") or _is_address(name):
            return True
        below = {f"*.{name[at + 1 :]}" for at, letter in enumerate(name) if letter == "."}
        return not self._allowed.isdisjoint({name, "*"} | below)

    def require(self, host: str) -> None:
        """Raises Refused."""
        if not self.admit(host):
            sentence = (
                f"{host[:255]!r} is no name of this server: ask for its address, or allow the name with metrics_hosts "
                "(--metrics-hosts, NBDZRAM_METRICS_HOSTS)"
            )
            raise Refused(HTTPStatus.MISDIRECTED_REQUEST, sentence)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
