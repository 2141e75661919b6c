"""Command lines, what each of them asks of the server, and what it prints: told.txt has them, and this writes it anew.

    python -m tests.unit.cli.told        after a change that is meant; then read what `git diff` says

A line `$ nbdzram ...` there is a command line more. They run in this process, against a real control socket behind
which every figure is another one: one that is handed on wrongly stands in a wrong place.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import os
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from nbdzram.cli.main import run
from nbdzram.control.methods import Changes, Operations, method_table
from nbdzram.control.server import ControlServer
from nbdzram.status import ExportLoss, ExportRenaming, ReceiveReport, ReloadReport, SendReport, ServerStatus
from nbdzram.stream.pipe import Pipe
from tests.unit.records import CLIENT, OTHER_EXPORT, REPORT, RUNNING, STREAM, TWO_OF_EACH, USAGE, WAITING

TOLD = Path(__file__).with_suffix(".txt")
PROMPT = "$ "
EXPORT = TWO_OF_EACH.exports[0]
OTHER_USAGE = dataclasses.replace(USAGE, **{f.name: getattr(USAGE, f.name) * 3 // 7 for f in dataclasses.fields(USAGE)})
ANSWERS: dict[str, Any] = {
    "status": TWO_OF_EACH,
    "usage": {EXPORT.name: USAGE, OTHER_EXPORT.name: OTHER_USAGE},
    "clients": (CLIENT, dataclasses.replace(CLIENT, number=8, export="other", read_only=True, certificate_names=())),
    "run": (REPORT, dataclasses.replace(REPORT, pool="fast", dry_run=True)),
    "reload": ReloadReport(("export disk added",), ("pool old",), ("listen",)),
    "runs": (
        RUNNING,
        WAITING,
        dataclasses.replace(RUNNING, number=9, state="paused"),
        dataclasses.replace(RUNNING, number=10, state="done", seconds_left=None),  # what was expected did not come
    ),
    "cancel_run": dataclasses.replace(RUNNING, state="cancelled"),
    "pause_run": dataclasses.replace(RUNNING, state="paused"),
    "resume_run": RUNNING,
    "add_pool": TWO_OF_EACH.pools[1],
    "change_pool": TWO_OF_EACH.pools[1],
    "rename_export": ExportRenaming("disk", OTHER_EXPORT, old_name_declared=True, remembered=False),
    "copy_export": OTHER_EXPORT,
    "take_moment": TWO_OF_EACH.exports,
    "send_stream": SendReport(("disk", "other"), 11, 12, 13 << 20, 14 << 20, 1.5),
    "receive_stream": ReceiveReport(("disk", "other"), 21, 22, 23, 24 << 20, 25 << 20, 2.5),
    "streams": (STREAM, dataclasses.replace(STREAM, stream="11" * 16, way="sent", token=None, seconds_left=None)),
} | dict.fromkeys(("add_export", "change_export", "resize_export", "reset_export", "rollback_export"), OTHER_EXPORT)


LOSSES = {
    "disk": ExportLoss("disk", size_bytes=7 << 30, stored_bytes=5 << 20, alone_bytes=3 << 20, clients=()),
    "other": ExportLoss("other", size_bytes=9 << 30, stored_bytes=6 << 20, alone_bytes=None, clients=("192.0.2.7:5",)),
}


def later(status: ServerStatus, seconds: float) -> ServerStatus:
    """The same server so many seconds later, each export with traffic of its own in them."""
    exports = []
    for factor, export in enumerate(status.exports, start=2):
        operations = {
            name: dataclasses.replace(
                one,
                requests=one.requests * (factor + 2),
                bytes=one.bytes * (factor + 3),
                latency_counts=tuple(count * (factor + 2) for count in one.latency_counts),
            )
            for name, one in export.operations.items()
        }
        exports.append(dataclasses.replace(export, operations=operations))
    return dataclasses.replace(status, uptime_seconds=status.uptime_seconds + seconds, exports=tuple(exports))


class Recorder:
    """Answers as ANSWERS say, and notes what it was asked, with every argument by its name."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        of = Operations if hasattr(Operations, name) else Changes
        declared = getattr(of, name)

        def note(*given: Any, **named: Any) -> Any:
            arguments = inspect.signature(declared).bind(self, *given, **named).arguments
            arguments = {key: value for key, value in arguments.items() if key not in {"self", "progress"}}
            arguments.pop("pipe", None)
            seen = any(one.startswith("status(") for one in self.asked)
            self.asked.append(f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})")
            if name == "lose_export":
                return LOSSES[arguments["name"]]
            return later(ANSWERS[name], 10) if name == "status" and seen else ANSWERS.get(name)

        async def act(*given: Any, pipe: Pipe | None = None, **named: Any) -> Any:
            if pipe is not None:
                named["pipe"] = pipe
            if pipe is not None and name == "receive_stream":
                while content := await asyncio.to_thread(pipe.read, 1 << 16):
                    self.asked.append(repr(content))
            elif pipe is not None:
                pipe.write(b"a stream\n")
                pipe.end()
            return note(*given, **named)

        return act if inspect.iscoroutinefunction(declared) else note


@contextlib.contextmanager
def serving() -> Iterator[tuple[Path, Recorder]]:
    """A control socket behind which a recorder answers, on an event loop of its own."""
    recorder = Recorder()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    with tempfile.TemporaryDirectory() as directory, mock.patch.dict(os.environ, plain_environment(), clear=True):
        time.tzset()
        path = Path(directory) / "control.sock"
        server = ControlServer(path, method_table(recorder, recorder))
        thread.start()
        try:
            asyncio.run_coroutine_threadsafe(server.start(), loop).result()
            yield path, recorder
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
    time.tzset()


def plain_environment() -> dict[str, str]:
    """Where times are UTC's, nothing is a setting, and no terminal has a width."""
    gone = {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"}
    kept = {name: value for name, value in os.environ.items() if name not in gone and not name.startswith("NBDZRAM_")}
    return {**kept, "TZ": "UTC"}


def tell(line: str, path: Path, recorder: Recorder) -> str:
    """One command line, what it asked, and what came of it."""
    recorder.asked.clear()
    _, *words = shlex.split(line)
    with contextlib.ExitStack() as stack:
        given, out, err = (stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in range(3))
        given.write("another stream")
        given.seek(0)
        with mock.patch.multiple(sys, stdin=given, stdout=out, stderr=err):
            code = run(["--control", str(path), *words])
        parts = [PROMPT + line, *(f"asked: {one}" for one in recorder.asked if one != "settled(changed=())")]
        for stream, mark in ((out, ""), (err, "stderr: ")):
            stream.seek(0)
            parts += [(mark + one).rstrip().replace(str(path), "SOCKET") for one in stream.read().splitlines()]
    return "\n".join([*parts, *([f"exit: {code}"] if code else [])]) + "\n"


def told() -> dict[str, str]:
    """What the file has of each command line."""
    parts = TOLD.read_text(encoding="utf-8").split("\n" + PROMPT)
    whole = [PROMPT + part.removeprefix(PROMPT).rstrip("\n") + "\n" for part in parts]
    return {one.split("\n", 1)[0].removeprefix(PROMPT): one for one in whole}


def main() -> None:
    """Write what each of them tells now."""
    with serving() as (path, recorder):
        text = "\n".join(tell(line, path, recorder) for line in told())
    TOLD.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
