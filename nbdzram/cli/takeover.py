"""`serve --takeover`: ask the server that runs for its listeners and clients, and take them (server/handover)."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbdzram.control.client import ControlClient
from nbdzram.errors import ServerUnreachable, UserError
from nbdzram.server.handover import ANSWER_SECONDS, FORMAT, SERVING, Handover


@dataclass(slots=True)
class Takeover:
    """What was taken, and the way to say that it is served."""

    handover: Handover
    giver: socket.socket

    def confirm(self) -> None:
        """The other process may leave: we serve. Raises OSError, and then it serves itself: leave all to it."""
        self.giver.sendall(SERVING)


@contextlib.contextmanager
def take_over(control: Path, state_dir: Path | None) -> Iterator[Takeover | None]:
    """Everything of the server on this control socket; None where none runs. Blocks. Raises UserError: it refuses."""
    place = control.with_name(f".{os.getpid()}")  # beside it: private to its owner, and its name is short enough
    with socket.socket(socket.AF_UNIX) as listener:
        mask = os.umask(0o177)
        try:
            place.unlink(missing_ok=True)
            listener.bind(str(place))
        finally:
            os.umask(mask)
        try:
            listener.listen(1)
            listener.settimeout(ANSWER_SECONDS)
            try:
                with ControlClient(control) as client:
                    state = "" if state_dir is None else str(state_dir.absolute())
                    client.call("takeover", socket=str(place), format=FORMAT, state_dir=state)
            except ServerUnreachable:
                yield None
                return
            giver, _ = listener.accept()
        except TimeoutError:
            raise UserError(
                f"the server on {control} agreed, and gave nothing away within {ANSWER_SECONDS:g} s; it serves on"
            ) from None
        finally:
            place.unlink(missing_ok=True)
        with giver:
            giver.settimeout(ANSWER_SECONDS)
            yield Takeover(Handover.take(giver), giver)


def load_what_serves() -> None:
    """Modules that are loaded when they are needed: while clients of another server wait is too late."""
    import nbdzram.control.server  # noqa: PLC0415
    import nbdzram.metrics.http  # noqa: PLC0415
    import nbdzram.server.service  # noqa: F401, PLC0415
