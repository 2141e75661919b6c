"""Where the control socket is.

The server takes the first runtime directory that it may use; a client looks in all of them, because root, logged in
with a runtime directory of its own, asks after a service that systemd started under /run.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from nbdzram.errors import ConfigError, ServerUnreachable, UserError

SOCKET_NAME = "nbdzram.sock"
SYSTEM_DIRECTORY = Path("/run/nbdzram")


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
    closed = []
    for path in looked_at:
        try:
            found = path.stat()  # Path.is_socket says False of what may not be looked at, from Python 3.14 on
        except PermissionError:  # a directory that another user's server made
            closed.append(path)
        except OSError:
            continue
        else:
            if stat.S_ISSOCK(found.st_mode) and found.st_uid in {0, os.geteuid()} | _service_owner(path):
                return path
    if closed:
        raise not_ours(closed[0])
    places = ", ".join(map(str, looked_at))
    raise ServerUnreachable(
        f"no server found: no control socket at {places}; start `nbdzram serve` or name it with --control"
    )


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
