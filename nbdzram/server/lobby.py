"""Who has connected and is not attached: how many there may be, who goes when there are more, and whose turn it is.

Everybody here is a stranger, whatever it may prove later, and must not use up what attached clients, the operator and
health checks need. So strangers together get one step of one of them (an option, a slice of a list, a piece of a TLS
handshake) in each turn of the event loop, one after the other, however many wait.

    connect ─> enter ─> call_soon, call_soon, ... (a step each) ─> leave: attached, refused, or gone

A newcomer always finds a place. When all are taken, the guest goes who came first of those who take the most: of the
listener with the most guests, and there of the source with the most. A client that takes milliseconds is attached long
before a flood has gone once around, and a flood on one listener never costs another listener's guests their places.

A source is what one can be held to who comes from there. An address says little: a whole company may stand behind one.
So whoever shows a certificate is somebody else than the crowd at its address, from that moment on.
"""

from __future__ import annotations

import ipaddress
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from nbdzram.server.exports import Peer

SOURCE_PREFIX = 64
"""Bits of an IPv6 address that are one source: what one customer's machine may choose freely is the rest."""


class Origin(NamedTuple):
    """Where a connection came in, and from where."""

    listener: str
    source: str
    certified: bool = False  # part of the source is what a verified certificate says


def origin_of(listener: str, peer: Peer) -> Origin:
    """Of those without an IP address each account of the machine (a virtual one's context) is a source."""
    if isinstance(peer.address, ipaddress.IPv6Address) and peer.address.ipv4_mapped is None:
        source = str(ipaddress.ip_network((peer.address, SOURCE_PREFIX), strict=False))
    else:
        source = peer.account if peer.address is None else str(peer.address)
    names = ", ".join(sorted(peer.certificate_names))
    return Origin(listener, f"{source} with the certificate of {names}" if names else source, certified=bool(names))


class Guest(Protocol):
    """What a connection that haggles must offer."""

    @property
    def origin(self) -> Origin:
        """Where it came from; it never changes while the guest is here."""

    def give_way(self) -> None:
        """A newcomer needs your place, which you no longer have: be gone."""


class Lobby:
    """One a server; the loop's thread only."""

    def __init__(self, places: int, call_soon: Callable[[Callable[[], None]], object]) -> None:
        self.places = places  # may be set: whoever is here stays
        self._call_soon = call_soon
        self._guests: dict[str, dict[str, dict[Guest, None]]] = {}  # by listener and source, in order of arrival
        self._count = 0
        self._steps: deque[Callable[[], None]] = deque()

    def __len__(self) -> int:
        return self._count

    def enter(self, guest: Guest) -> None:
        """It has connected. Somebody else goes for it when all places are taken."""
        if self._count >= self.places:
            sources = max(self._guests.values(), key=_size)
            guests = max(sources.values(), key=len)
            oldest = next(iter(guests))
            self.leave(oldest)
            oldest.give_way()
        listener, source, _ = guest.origin
        self._guests.setdefault(listener, {}).setdefault(source, {})[guest] = None
        self._count += 1

    def leave(self, guest: Guest) -> None:
        """It is attached, or gone; nothing happens if it had to give way already."""
        listener, source, _ = guest.origin
        sources = self._guests.get(listener, {})
        of_source = sources.get(source, {})
        if guest not in of_source:
            return
        del of_source[guest]
        self._count -= 1
        if not of_source:
            del sources[source]
        if not sources:
            del self._guests[listener]

    def call_soon(self, step: Callable[[], None]) -> None:
        """Run `step`, a stranger's, when it is its turn."""
        self._steps.append(step)
        if len(self._steps) == 1:
            self._call_soon(self._turn)

    def _turn(self) -> None:
        step = self._steps[0]
        try:
            step()
        finally:
            self._steps.popleft()
            if self._steps:
                self._call_soon(self._turn)


def _size(sources: dict[str, dict[Guest, None]]) -> int:
    return sum(map(len, sources.values()))
