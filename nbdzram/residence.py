"""Staying in memory: a process that others swap to, or whose root disk it keeps, must need nothing of them to go on.

To write a page of a client's out, the client's machine waits for us; if we waited for a page of ours that lies behind
that very disk, both would wait for good. The kernel is asked three things, and each may be refused:

    mlockall              pages that are there stay, and those that are touched later too, once they are (MCL_ONFAULT):
                          what is only reserved costs nothing. But it counts against RLIMIT_MEMLOCK: a pool reserves
                          addresses for all that it may ever hold, which only "no limit" lets it do afterwards
    oom_score_adj         somebody else is ended first when memory runs out
    PR_SET_IO_FLUSHER     no allocation of this process starts writing dirty pages back, or waits for that

Sources: mlock(2), proc_pid_oom_score_adj(5), PR_SET_IO_FLUSHER(2const).
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
CAP_IPC_LOCK, CAP_SYS_RESOURCE = 14, 24
PR_SET_IO_FLUSHER = 57
OOM_SCORE = -900
"""As in the unit. -1000 would exempt it for good, and leave the kernel to end everything else before it."""

NOT_RUN = (126, 127)
"""The shell's words for a program that is none, or not there (POSIX, exec)."""
HELPERS_SCORE = 0
"""At the least, of a program that the server runs: what any process begins with."""
_RAISED = (
    '(read -r score <"/proc/$$/oom_score_adj" && [ "$score" -lt {score} ] && echo {score} >"/proc/$$/oom_score_adj") '
    '2>/dev/null; exec "$@"'
)

log = logging.getLogger("nbdzram.server")
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Refusal:
    """What could not be had, why, and what lets it be had."""

    what: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}; {self.remedy}"


def stay(*, late: bool = True) -> list[Refusal]:
    """Ask for all three, or for the score later (`late`); what was refused."""
    asks = (lock_memory, flush_nothing, *((go_late,) if late else ()))
    return [refusal for ask in asks for refusal in ask()]


def lock_memory() -> Iterator[Refusal]:
    """Nothing of this process is swapped out, or read again from the file that it came from."""
    refusal = may_lock()
    if refusal is None and _libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) != 0:
        refusal = _not_locked(os.strerror(ctypes.get_errno()))
    if refusal is not None:
        yield refusal


def may_lock(status: Path = Path("/proc/self/status")) -> Refusal | None:
    """Why this process may not lock all that it will ever map. The soft limit is raised to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if hard == resource.RLIM_INFINITY:
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
        return None
    if _may(CAP_IPC_LOCK, status):
        return None
    return _not_locked(f"RLIMIT_MEMLOCK is {hard} bytes, which what pools reserve is far over")


def may_go_late(own: Path = Path("/proc/self")) -> Refusal | None:
    """Why this process may not lower its score, if that is not low already."""
    if int((own / "oom_score_adj").read_text()) <= OOM_SCORE or _may(CAP_SYS_RESOURCE, own / "status"):
        return None
    return _not_late(OOM_SCORE, "this user lacks CAP_SYS_RESOURCE")


def _may(capability: int, status: Path) -> bool:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status.read_text(), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> capability & 1)


def _not_late(score: int, reason: str) -> Refusal:
    remedy = f"OOMScoreAdjust={score} in the unit, or --oom-score-adj {score}"
    return Refusal(f"the score of the OOM killer cannot be lowered to {score}", reason, remedy)


def _not_locked(reason: str) -> Refusal:
    remedy = "LimitMEMLOCK=infinity in the unit, `ulimit -l unlimited`, or --ulimit memlock=-1"
    return Refusal("memory cannot be locked", reason, remedy)


def go_late(file: Path = Path("/proc/self/oom_score_adj"), *, score: int = OOM_SCORE) -> Iterator[Refusal]:
    """Lower the score, unless it is lower already."""
    try:
        if int(file.read_text()) > score:
            file.write_text(str(score))
    except OSError as error:
        yield _not_late(score, error.strerror or str(error))


def earlier(command: Sequence[str]) -> list[str]:
    """The command as one that goes before us where memory runs out: it has nothing that would be lost with it. It would
    inherit our score, the unit's too; anybody may raise his own, and does before he starts others. (It is not locked;
    PR_SET_IO_FLUSHER stays with it, which only a capability takes back, and harms nobody.) One that cannot be run ends
    with a status of NOT_RUN, and complains of why."""
    return ["/bin/sh", "-c", _RAISED.format(score=HELPERS_SCORE), "sh", *command]


def flush_nothing(prctl: Callable[[int, int, int, int, int], int] | None = None) -> Iterator[Refusal]:
    """A thread that is started later inherits it: ask before there are any."""
    if (prctl or _libc.prctl)(PR_SET_IO_FLUSHER, 1, 0, 0, 0) != 0:
        yield Refusal(
            "allocations may wait for pages that are written back",
            os.strerror(ctypes.get_errno()),
            "AmbientCapabilities=CAP_SYS_RESOURCE in the unit, or --cap-add SYS_RESOURCE (Linux 5.6 or newer)",
        )
