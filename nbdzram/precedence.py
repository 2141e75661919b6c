"""Who goes first where memory runs out: what is started beside a server that may be there, before the server.

Who takes over needs memory beside the one that serves, and so does a check of the configuration, with which a unit's
reload begins. The kernel ends the larger, and its disks with it, for want of what a process needs that has nothing yet.
Python itself is some of that: so this is the first that such a process does, and imports little.
"""

from __future__ import annotations

import os
from collections.abc import Callable

WORDS = frozenset(("--check-config", "--takeover", "--upgrade"))
"""Of `serve`, where a server may be there."""

FIRST_SCORE = 1000
"""The most that there is: of whoever counts, he goes first."""


def go_first(file: str = "/proc/self/oom_score_adj", *, score: int = FIRST_SCORE) -> Callable[[], None]:
    """Until what is returned is called, whoever lacks memory ends this process before any other.

    Anybody may raise his score, and take back what he raised.
    """
    try:
        before = _exchange(file, str(score))
    except OSError as error:
        _warn("raised", error)
        return lambda: None
    return lambda: _give_back(file, before)


def _give_back(file: str, score: str) -> None:
    try:
        _exchange(file, score)
    except OSError as error:
        _warn(f"set to {score.strip()} again", error)


def _exchange(file: str, score: str) -> str:
    descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    try:
        before = os.read(descriptor, 16).decode()
        os.pwrite(descriptor, score.encode(), 0)
    finally:
        os.close(descriptor)
    return before


def _warn(what: str, error: OSError) -> None:
    import logging  # noqa: PLC0415 - seldom needed, and larger than all of this

    log = logging.getLogger("nbdzram.server")
    log.warning("the score of the OOM killer cannot be %s: %s", what, error.strerror)
