"""Where the control socket is.

The server takes the first runtime directory that it may use; a client looks in all of them, because root, logged in
with a runtime directory of its own, asks after a service that systemd started under /run.
"""

from __future__ import annotations

import _socket
import contextlib
import itertools
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from nbdzram.errors import ConfigError, NoServerHere, ServerUnreachable, UserError

SOCKET_NAME = "nbdzram.sock"
SYSTEM_DIRECTORY = Path("/run/nbdzram")
ELSEWHERE = ("run/user/*/nbdzram", "tmp/nbdzram-*")  # below /: where servers of other users put theirs
MOST_TOLD = 3  # of those


def socket_for_server(environment: Mapping[str, str]) -> Path:
    """The control socket's path in the first usable runtime directory, which is made if need be. Raises UserError."""
    refusals = []
    for directory in _directories(environment):
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            _require_ours(directory)
        except (OSError, UserError) as error:
            refusals.append(str(error))
        else:
            return directory / SOCKET_NAME
    raise UserError(f"no directory for the control socket ({'; '.join(refusals)}); name one with --control PATH")


def socket_for_client(environment: Mapping[str, str]) -> Path:
    """The control socket of the server that runs here. Raises ServerUnreachable, ConfigError."""
    named = environment.get("NBDZRAM_CONTROL")
    if named:
        if "~" not in named:
            return Path(named)
        from nbdzram.values import path as read_path  # noqa: PLC0415 - which the configuration comes with

        try:
            return read_path(named)  # as `serve` reads the same variable
        except ValueError as error:
            raise ConfigError(f"NBDZRAM_CONTROL: {error}") from None
    configured = _configured(environment)
    if configured is not None:
        return configured
    looked_at = [directory / SOCKET_NAME for directory in _directories(environment)]
    ours, closed, others = list[Path](), list[Path](), list[Path]()
    for path in looked_at:
        try:
            found = path.stat()  # Path.is_socket says False of what may not be looked at, from Python 3.14 on
        except PermissionError:  # a directory that another user's server made
            closed.append(path)
        except OSError:
            continue
        else:
            if not stat.S_ISSOCK(found.st_mode):
                continue
            allowed = found.st_uid in {0, os.geteuid()} | _service_owner(path)
            (ours if allowed else others).append(path)
    if ours:
        return _answering(ours)
    if closed:
        raise not_ours(closed[0])
    if others:
        raise ServerUnreachable(
            f"the control socket {others[0]} belongs to user {others[0].stat().st_uid}, and is not asked by itself; "
            f"--control {others[0]} asks it"
        )
    places = ", ".join(map(str, looked_at))
    told = f"no server found: no control socket at {places}; start `nbdzram serve` or name it with --control"
    elsewhere = list(itertools.islice(_of_others(looked_at), MOST_TOLD))
    raise ServerUnreachable("; ".join([told, *elsewhere])) if elsewhere else NoServerHere(told)


def _answering(sockets: Sequence[Path]) -> Path:
    """The first behind which a server lives; of none the first. One that died left its socket where it was."""
    return next((path for path in sockets if len(sockets) > 1 and not _is_left_behind(path)), sockets[0])


def _is_left_behind(path: Path) -> bool:
    with contextlib.closing(_socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)) as probe:
        probe.setblocking(False)  # a server that lives but hangs does not hang us
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:  # it is busy, or not ours to open
            return False
    return False


def _of_others(looked_at: Collection[Path]) -> Iterator[str]:
    """Sentences on servers that live elsewhere, where they are seen: root sees them all.

    Nobody asks there by itself: what another user's process answers is for who means to ask it.
    """
    found = [path for place in ELSEWHERE for path in sorted(Path("/").glob(f"{place}/{SOCKET_NAME}"))]
    for path in [path for path in found if path not in looked_at]:
        with contextlib.suppress(OSError):
            whose = path.lstat()
            if stat.S_ISSOCK(whose.st_mode) and str(path).isprintable() and not _is_left_behind(path):
                yield f"user {whose.st_uid} runs one, which --control {path} asks"


def _configured(environment: Mapping[str, str]) -> Path | None:
    """What the file says that NBDZRAM_CONFIG names, as in a container, whose health check asks in this way.

    A file that this user may not read, or that is wrong, names nothing: a server that runs is still looked for.
    """
    if not environment.get("NBDZRAM_CONFIG"):
        return None
    from nbdzram.settings import load  # noqa: PLC0415 - a command without the variable does without it

    with contextlib.suppress(ConfigError):
        return load(None, {"NBDZRAM_CONFIG": environment["NBDZRAM_CONFIG"]}, {}).control
    return None


def not_ours(path: Path) -> ServerUnreachable:
    """The error for a control socket that this user may not open."""
    return ServerUnreachable(
        f"the control socket {path} may not be opened by user {os.geteuid()}; "
        "be the user that runs the server, or root (sudo), or name another with --control"
    )


def _directories(environment: Mapping[str, str]) -> Iterator[Path]:
    for variable in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):  # systemd's for a service, then the login's
        named = environment.get(variable, "").split(":")[0]
        if named:
            yield Path(named) / "" if variable == "RUNTIME_DIRECTORY" else Path(named) / "nbdzram"
    yield SYSTEM_DIRECTORY
    yield Path(f"/tmp/nbdzram-{os.geteuid()}")  # noqa: S108 - used only if it is a directory of ours that nobody else may enter


def _require_ours(directory: Path) -> None:
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise UserError(f"{directory} is not a directory")
    if found.st_uid != os.geteuid():
        raise UserError(f"{directory} belongs to another user")
    if found.st_mode & 0o022:
        raise UserError(f"{directory} may be written by others")


def _service_owner(path: Path) -> set[int]:
    """Under /run only root can have made the directory, so its owner is the service's user."""
    return {path.stat().st_uid} if path.parent == SYSTEM_DIRECTORY else set()
