"""Large payloads while memory is short: who may store one as it arrives, and who is cut for not sending.

When the budget has no room for a large WRITE's payload, it can only be stored as it comes. If everyone did so at once,
clients that stop half-way would fill the pool with halves of their payloads, without limit. So only payloads of
STORED_LIMIT bytes together do so, the shortest first; the others wait in their sockets. While somebody waits, whoever
is in the middle of a payload, with a buffer or with a turn, must keep sending, or is cut. What that costs and saves, in
numbers: docs/decisions/0009-take-turns-when-memory-is-short.md.

    hold  -> buffered --.
    enter -> waiting -> admitted -> leave (complete, or gone) -> whose turn is it now?
"""

from __future__ import annotations

import logging
from typing import Protocol

STORED_LIMIT = 16 << 20
"""Bytes of payloads that are stored as they arrive, together; a longer one has its turn alone."""

PACE_SECONDS = 5
"""Calls of `watch`, one a second, within which a payload must grow by PACE_BYTES, or end, while others wait."""

PACE_BYTES = 512 << 10
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
        """You held others up: the connection is cut, which must lead to `leave`."""


class Turns:
    """One a server; the loop's thread only."""

    def __init__(self) -> None:
        self._buffered: set[Turn] = set()
        self._waiting: dict[Turn, int] = {}  # bytes of the payload; in order of arrival
        self._admitted: dict[Turn, int] = {}
        self._watched: dict[Turn, int] = {}  # bytes that were still to come when the pace began to count
        self._seconds = 0

    @property
    def waiting(self) -> int:
        """Connections that nobody reads until their turn comes."""
        return len(self._waiting)

    def hold(self, connection: Turn) -> None:
        """Its payload has a buffer."""
        self._buffered.add(connection)

    def enter(self, connection: Turn, size: int) -> None:
        """Its payload of `size` bytes has no buffer."""
        self._waiting[connection] = size
        self._admit(connection)

    def may_go_on(self, connection: Turn) -> bool:
        """It is admitted, or needs no turn."""
        return connection not in self._waiting

    def leave(self, connection: Turn) -> None:
        """Its payload is complete, or it is gone; nothing happens if it neither entered nor holds a buffer."""
        self._buffered.discard(connection)
        self._waiting.pop(connection, None)
        if self._admitted.pop(connection, None) is not None:
            self._admit(None)

    def watch(self) -> None:
        """Once a second: cut who keeps others waiting and sends too little."""
        self._seconds += 1
        under_way = {turn: turn.payload_remaining for turn in (*self._buffered, *self._admitted)}
        if self._waiting and self._seconds < PACE_SECONDS:
            return
        for turn, remaining in under_way.items() if self._waiting else ():
            sent = self._watched.get(turn, remaining + PACE_BYTES) - remaining
            if 0 <= sent < PACE_BYTES:  # below zero: another payload began
                turn.expel(
                    f"{sent} bytes of a payload came in {PACE_SECONDS} s while {self.waiting} clients wait for room: "
                    f"at least {PACE_BYTES} are asked"
                )
        self._watched, self._seconds = under_way, 0

    def _admit(self, newcomer: Turn | None) -> None:
        """Let the shortest go on as long as there is room; a newcomer goes on by itself."""
        for connection, size in sorted(self._waiting.items(), key=lambda entry: entry[1]):
            if self._admitted and sum(self._admitted.values()) + size > STORED_LIMIT:
                return
            self._admitted[connection] = self._waiting.pop(connection)
            if connection is not newcomer:
                connection.go_on_soon()
