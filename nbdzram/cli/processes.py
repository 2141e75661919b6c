"""The process of a server, what it is called and allowed, and those around it: the one that started it, the one that it
runs, and the file that has its number.

They behave as nbdkit's --exit-with-parent, --run and --pidfile do (nbdkit(1), nbdkit-captive(1)).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from nbdzram.cli.hints import Address, tellable
from nbdzram.errors import UserError
from nbdzram.machine import Machine
from nbdzram.residence import earlier
from nbdzram.server.descriptors import available, raise_limit
from nbdzram.server.sockets import place_for_sockets
from nbdzram.settings import Given, Layer
from nbdzram.status import ServerStatus

log = logging.getLogger("nbdzram.server")

LEAST_DESCRIPTORS = 32  # a server with one pool and two threads has 25, and then it has no client
LONGEST_NUMBER = 64  # bytes of a file with a process's number, whoever wrote it
KILLED = 128  # and the signal's number: as shells tell it


def name_process() -> None:
    """Be nbdzram to ps, top and pgrep, and not python3 (pidof looks at how it was called, and wants -x). Threads that
    start later are called so, too.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text("nbdzram", encoding="ascii")


@contextlib.contextmanager
def enough_allowed() -> Iterator[None]:
    """Set up memory before there is any thread; the refusal of one, or of a descriptor, is a UserError."""
    from nbdzram.sessions.budget import keep_memory  # noqa: PLC0415

    keep_memory()
    if raise_limit() < LEAST_DESCRIPTORS:
        raise _too_few(errno.EMFILE)
    try:
        yield
    except RuntimeError as error:
        if "start new thread" not in str(error):  # Python has no kind of its own for it
            raise
        allowed = Machine().tasks()
        limit = f"{allowed} allows {allowed.amount} tasks" if allowed else "see `ulimit -u`, and `-v` and `-d`"
        raise UserError(
            f"cannot start the threads that serve clients: {limit}; raise TasksMax= of the unit, "
            "--pids-limit of the container, or the user's limit"
        ) from None
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        raise _too_few(error.errno) from None


def _too_few(number: int) -> UserError:
    return UserError(
        f"cannot start: {os.strerror(number)}, and this process may have {available()}; raise LimitNOFILE= of the "
        "unit, or `ulimit -n`"
    )


@contextlib.contextmanager
def pid_file(path: Path | None) -> Iterator[None]:
    """In here `path` has our number; another's that took its place meanwhile is left alone. Raises UserError."""
    if path is None:
        yield
        return
    number = f"{os.getpid()}\n"
    fresh = path.parent / f".nbdzram.{os.getpid()}"
    made = False
    try:
        _require_replaceable(path)
        fresh.unlink(missing_ok=True)  # of one of our number that was killed at this
        # Where others may write, a link could lie there, to a file that is not theirs to write.
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        made = True
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(number)
        fresh.replace(path)  # nobody reads half of it
    except OSError as error:
        if made:
            with contextlib.suppress(OSError):
                fresh.unlink()
        raise UserError(
            f"cannot write the process's number to {path}: {error.strerror}; name another file with --pidfile"
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            if stat.S_ISREG(path.lstat().st_mode) and path.read_text(encoding="ascii") == number:
                path.unlink()


def _require_replaceable(path: Path) -> None:
    """Refuse what is no file, such as /dev/null: root would have taken it from everybody; and a file that holds more
    than a number, as somebody may have named that of a disk. Raises OSError.
    """
    try:
        found = path.stat()
    except OSError:  # nothing is there, or a link that leads nowhere, or where we may not look
        return
    if not stat.S_ISREG(found.st_mode):
        raise FileExistsError(errno.EEXIST, "something that is no file stands there")
    with path.open("rb") as file:
        held = file.read(LONGEST_NUMBER + 1)
    if len(held) > LONGEST_NUMBER or not all(word.isdigit() for word in held.split()):
        raise FileExistsError(errno.EEXIST, "a file stands there that holds no such number, and would be lost")


@contextlib.contextmanager
def parent_watched(parent: int | None, ended: Callable[[], None]) -> Iterator[None]:
    """In here, on an event loop, `ended` is called when the process `parent`, ours, ends, if one is given. Raises
    UserError.

    A descriptor of it and not prctl(2)'s signal, which comes already when the thread ends that started us.
    """
    if parent is None:
        yield
        return
    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        ended()
        yield
        return
    except OSError as error:
        raise UserError(
            f"cannot watch the parent process {parent}: {error.strerror}; leave out --exit-with-parent"
        ) from error
    loop = asyncio.get_running_loop()
    if os.getppid() == parent:
        loop.add_reader(descriptor, ended)
    else:  # it has ended, and its number is another's by now
        ended()
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


@contextlib.contextmanager
def if_it_can_be(wanted: contextlib.AbstractContextManager[None], *, needed: bool) -> Iterator[None]:
    """In `wanted`, one of these. Raises UserError if it is `needed`: a server that goes on with clients, whose disks
    nobody else has by now, does so without.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(wanted)
        except UserError as error:
            if needed:
                raise
            log.error("%s; going on without", error)
        yield


@contextlib.contextmanager
def private_place() -> Iterator[Layer]:
    """For a server that only one command uses: where it listens unless it is told, in a directory that goes again.

    Raises UserError.
    """
    with place_for_sockets() as directory:
        yield {
            ("listen",): Given([f"unix:{directory / 'nbd.sock'}"], "--run"),
            ("control",): Given(str(directory / "control.sock"), "--run"),
            ("metrics",): Given("off", "--run"),
        }


def told_to_commands(status: ServerStatus, default_export: str | None, control: Path) -> dict[str, str]:
    """What a command finds in its environment: nbdkit's names, and where our own commands ask."""
    names = [export.name for export in status.exports]
    export = default_export if default_export in names else (names or [""])[0]
    addresses = [Address.of(uri) for uri in tellable(status.uris)]
    paths = [address.path for address in addresses if address.path is not None]
    ports = [str(address.port) for address in addresses if address.path is None and address.kernel_can_attach]
    return {
        "uri": addresses[0].uri(export) if addresses else "",
        "unixsocket": paths[0] if paths else "",
        "port": ports[0] if ports else "",
        "exportname": export,
        "NBDZRAM_CONTROL": str(control),
    }


async def run_command(command: str, environment: Mapping[str, str], told_to_stop: asyncio.Event) -> int:
    """Run a shell's command until it ends; its exit status. Who is told to stop tells the command, and waits for it."""
    shell = earlier(["/bin/sh", "-c", command])
    process = await asyncio.create_subprocess_exec(*shell, env={**os.environ, **environment})
    ended = asyncio.create_task(process.wait())
    stopping = asyncio.create_task(told_to_stop.wait())
    await asyncio.wait({ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not ended.done():
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    code = await ended
    return code if code >= 0 else KILLED - code


async def first_of(*events: asyncio.Event) -> asyncio.Event:
    """Whichever is set first."""
    waiting = {asyncio.create_task(event.wait()): event for event in events}
    try:
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
    return waiting[done.pop()]
