"""Who did what, and what came of it: a line in the log for each administrative act, and one in the audit file.

The file lies in the state directory, one JSON object a line; at AUDIT_BYTES it becomes audit.log.1, and that which was
there before is gone. Where it cannot be written, the log still has the line, and says once that the file has not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE_NAME = "audit.log"
AUDIT_BYTES = 4 << 20  # twenty thousand acts
LOGGED_CHARACTERS = 512  # of an act's parameters: a description may be 4 KiB

log = logging.getLogger("nbdzram.audit")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who speaks on a connection, as the kernel says (unix(7), SO_PEERCRED)."""

    uid: int
    pid: int
    socket: str  # the control socket's path

    def __str__(self) -> str:
        return f"uid {self.uid} (pid {self.pid}) on {self.socket}"


@dataclass(frozen=True, slots=True)
class Act:
    """One administrative act that came to its end."""

    caller: Caller
    method: str
    params: Mapping[str, Any]
    result: str  # done, or failed: and the refusal
    seconds: float

    def sentence(self) -> str:
        """For the log."""
        given = " ".join(f"{name}={json.dumps(value)}" for name, value in self.params.items())
        if len(given) > LOGGED_CHARACTERS:
            given = given[:LOGGED_CHARACTERS] + "..."
        return f"{self.caller}: {self.method} {given}{' ' if given else ''}({self.seconds:.3f} s): {self.result}"

    def line(self, now: float) -> str:
        """For the file: one JSON object, and no line break in it."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        told = {"time": moment, **asdict(self.caller), "method": self.method, "params": dict(self.params)}
        return json.dumps({**told, "result": self.result, "seconds": round(self.seconds, 3)}) + "\n"


class Audit:
    """The log's lines, and the file in `directory` if there is one. Lives on the event loop."""

    def __init__(self, directory: Path | None) -> None:
        self._path = directory / FILE_NAME if directory is not None else None
        self._lock = asyncio.Lock()
        self._broken = False

    async def note(self, act: Act) -> None:
        """Tell of an act; the file is written on a thread, one act after another."""
        log.info("%s", act.sentence())
        if self._path is None:
            return
        async with self._lock:
            try:
                await asyncio.to_thread(_append, self._path, act.line(time.time()))
            except OSError as error:
                if not self._broken:
                    log.warning("cannot write %s: %s; acts are in this log only", self._path, error.strerror)
                self._broken = True
            else:
                self._broken = False


def _append(path: Path, line: str) -> None:
    """The whole line, or nothing of it: what of one finds room would take the next one with it. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size + len(line) > AUDIT_BYTES:
            path.replace(path.with_name(path.name + ".1"))
    # O_NONBLOCK: a pipe in its place may have no reader, and all acts would wait for one.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        size, left = os.fstat(descriptor).st_size, memoryview(line.encode())
        try:
            while left:
                left = left[os.write(descriptor, left) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
