"""nbdzram, held at one step of a takeover: python -m tests.support.held STEP SOCKET WORDS...

At the step it connects to SOCKET, and goes on when that connection is closed: until then whoever listens there can do
what he likes, kill it or the other process. Its threads go on meanwhile, those that serve clients too.
"""

from __future__ import annotations

import functools
import inspect
import socket
import sys
from collections.abc import Callable
from typing import Any

import nbdzram.cli.takeover
import nbdzram.server.handover
import nbdzram.server.listener
import nbdzram.server.opening
import nbdzram.server.service
from nbdzram.__main__ import main

BEFORE, AFTER = "before", "after"
NEW: dict[str, tuple[Any, str, str]] = {
    "new asks": (nbdzram.cli.takeover, "_ask", BEFORE),
    "new was agreed with": (nbdzram.cli.takeover, "_accept", AFTER),
    "new takes": (nbdzram.server.handover.Handover, "_taken", BEFORE),
    "new has taken": (nbdzram.server.handover.Handover, "_taken", AFTER),
    "new has opened": (nbdzram.server.opening, "open_pools", AFTER),
    "new has placed": (nbdzram.server.service, "place_exports", AFTER),
    "new is ready": (nbdzram.cli.takeover.Takeover, "confirm", BEFORE),
}
OLD: dict[str, tuple[Any, str, str]] = {
    "old agrees": (nbdzram.server.service.Service, "takeover", AFTER),
    "old ended runs": (nbdzram.server.listener.NbdServer, "hand_over", BEFORE),
    "old is at rest": (nbdzram.server.listener.NbdServer, "hand_over", AFTER),
    "old has closed": (nbdzram.server.service.Service, "hand_over", AFTER),
    "old has given text": (socket, "send_fds", BEFORE),
    "old has given": (nbdzram.server.handover.Handover, "give", AFTER),
    "old has heard": (nbdzram.server.handover, "give_away", AFTER),
}
"""What stands at each step, in their order: where, the name, and on which side of it."""


def held(function: Callable[..., Any], side: str, place: str) -> Callable[..., Any]:
    """The function, with a stop at one side of it."""

    def stop() -> None:
        with socket.socket(socket.AF_UNIX) as whoever:
            whoever.connect(place)
            whoever.recv(1)

    @functools.wraps(function)
    async def in_turn(*given: Any, **named: Any) -> Any:
        if side == BEFORE:
            stop()
        outcome = await function(*given, **named)
        if side == AFTER:
            stop()
        return outcome

    @functools.wraps(function)
    def at_once(*given: Any, **named: Any) -> Any:
        if side == BEFORE:
            stop()
        outcome = function(*given, **named)
        if side == AFTER:
            stop()
        return outcome

    return in_turn if inspect.iscoroutinefunction(function) else at_once


def hold(step: str, place: str) -> None:
    """Put the stop there."""
    owner, name, side = (NEW | OLD)[step]
    found = inspect.getattr_static(owner, name)
    bare = found.__func__ if isinstance(found, classmethod) else found
    made = held(bare, side, place)
    setattr(owner, name, classmethod(made) if isinstance(found, classmethod) else made)


if __name__ == "__main__":
    hold(sys.argv[1], sys.argv[2])
    sys.argv[1:3] = []
    main()
