"""Large payloads without a buffer: stored as they arrive, one connection at a time.

When the budget has no room for a large WRITE's payload, it can only be stored as it comes. If everyone did so at once,
clients that stop half-way would fill the pool with halves of their payloads, without limit. So they take turns: one
stores, the others wait in their sockets. Whoever holds the turn must keep sending while others wait, or is cut.

    enter -> waiting, in order of arrival -> holder -> leave (complete, or gone) -> the next one's turn
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Protocol

PACE_SECONDS = 10
"""Calls of `watch`, one a second, that a holder has for PACE_BYTES while others wait."""

PACE_BYTES = 1 << 20
"""0.8 Mbit/s: slower than any link that a disk is attached over."""

log = logging.getLogger("nbdzram.server")


class Turn(Protocol):
    """What a connection must offer to take turns."""

    @property
    def payload_remaining(self) -> int:
        """Bytes still to come."""

    def go_on_soon(self) -> None:
        """Your turn has come: go on in the loop's next turn."""

    def expel(self, reason: str) -> None:
        """You held everybody up: the connection is cut, which must lead to `leave`."""


class Turns:
    """One a server; the loop's thread only."""

    def __init__(self) -> None:
        self._queue: OrderedDict[Turn, None] = OrderedDict()  # the first one holds the turn
        self._watched: Turn | None = None
        self._seconds = 0
        self._remaining = 0

    def __len__(self) -> int:
        """Connections that hold or await the turn."""
        return len(self._queue)

    def enter(self, connection: Turn) -> None:
        """Queue up; the first one goes on at once."""
        assert connection not in self._queue
        self._queue[connection] = None

    def may_go_on(self, connection: Turn) -> bool:
        """It holds the turn, or needs none."""
        return connection not in self._queue or next(iter(self._queue)) is connection

    def leave(self, connection: Turn) -> None:
        """Its payload is complete, or it is gone; nothing happens if it never entered."""
        if connection not in self._queue:
            return
        held = next(iter(self._queue)) is connection
        del self._queue[connection]
        if held and self._queue:
            next(iter(self._queue)).go_on_soon()

    def watch(self) -> None:
        """Once a second: cut a holder that keeps others waiting and sends too little."""
        holder = next(iter(self._queue), None)
        if holder is None or len(self._queue) == 1 or holder is not self._watched:
            self._watched, self._seconds = holder, 0
            self._remaining = holder.payload_remaining if holder else 0
            return
        self._seconds += 1
        if self._seconds < PACE_SECONDS:
            return
        sent = self._remaining - holder.payload_remaining
        self._seconds, self._remaining = 0, holder.payload_remaining
        if sent < PACE_BYTES:
            holder.expel(
                f"{sent} bytes of a payload in {PACE_SECONDS} s while {len(self._queue) - 1} others wait for their turn: "
                f"at least {PACE_BYTES} are asked"
            )
