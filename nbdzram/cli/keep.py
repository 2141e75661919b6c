"""A device of the kernel's that keeps its disk: whoever attached it stays, and connects again when a connection dies.

         connect                a connection dies: the kernel tells
    free ───────> attached <─────────────────────────────────> waiting     after `dead` seconds requests are I/O errors,
                      │         new sockets, in place of the dead          and it waits all the same
                      └──> free     by us when nobody uses it, or by somebody else

1. Only the kernel sends again: what was in flight on a dead connection goes over a new one, and is answered once.
2. A disk of another size is another disk, and is never put below what uses the first; nor is one that may be read alone
   put below what writes: each of its writes would be an I/O error, where it waits otherwise.
3. Nothing that is needed to connect again is fetched meanwhile: no name, no page of this program, no module. Nor does
   it wait for whoever reads what it says (voice.py).
4. The device outlives this process, whatever ends that. Started again it goes on, also with what nbd-client attached.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from nbdzram.cli.greeting import Dialled, Refused
from nbdzram.cli.netlink import Device, Patience
from nbdzram.errors import UserError, reason_of
from nbdzram.nbd.constants import TransmissionFlag

LOOK_SECONDS = 1.0
"""Between two looks at whether somebody else detached the device: the kernel tells nobody."""
RETRY_SECONDS = 0.2
"""From one try to the next while requests wait: a restart takes about a second, and a refused connection nothing."""


@dataclass(slots=True)
class Keeper:
    """One device, and the export that it is to be."""

    device: Device
    name: str
    dial: Callable[[], Dialled]
    connections: int
    patience: Patience
    wake: int  # a descriptor that can be read once a signal came
    told_to_leave: Callable[[], bool]
    say: Callable[[str], None]
    size_bytes: int | None = None
    read_only: bool | None = None

    def attach(self) -> bool:
        """Attach the device (True), or take over one that is attached. Raises UserError."""
        if self.device.attached():
            self.say(f"{self.name} is attached already; its connections are looked after from now on")
            if not self.device.is_named():
                self.say(
                    f"whoever attached {self.name} left no name: that it is this export is known by its size alone; if "
                    f"it is another one, end this, and detach it before: nbd-client -d {self.name}"
                )
            self.size_bytes, self.read_only = self.device.size_bytes(), self.device.read_only()
            self.repair()
            return False
        try:
            dialled = self._dial_all()
        except OSError as error:
            raise UserError(f"cannot connect: {error.strerror or error}") from None
        try:
            first = dialled[0]
            self.device.connect([one.socket for one in dialled], first.size_bytes, first.flags, self.patience)
        except OSError as error:
            raise UserError(f"the kernel does not attach {self.name}: {reason_of(error)}") from None
        finally:
            _let_go(dialled)  # the kernel holds what it took
        return True

    def keep(self) -> bool:
        """Until somebody detaches the device (False), or we are told to leave (True)."""
        while not self.told_to_leave():
            if self.device.wait(LOOK_SECONDS, wake=self.wake):
                self.repair()
            elif not self.device.attached():
                return False
        return True

    def leave(self) -> bool:
        """Detach it if nobody uses it, and say which. Raises UserError."""
        if not self.device.attached() or self.device.in_use():
            return False
        try:
            self.device.disconnect()
        except OSError as error:
            if self.device.attached():  # else somebody else detached it in this moment
                raise UserError(f"the kernel does not detach {self.name}: {reason_of(error)}") from None
        return True

    def repair(self) -> None:
        """Give it living connections, however long that takes; until it is detached, or we are told to leave."""
        began, reason = time.monotonic(), ""
        while not self.told_to_leave() and self.device.attached():
            try:
                dialled = self._dial_all()
            except (OSError, Refused) as error:
                says = str(error.strerror or error) if isinstance(error, OSError) else str(error)
                if says != reason:
                    self.say(f"{self.name} has lost a connection, and its requests wait: {says}")
                    reason = says
                self.device.wait(RETRY_SECONDS, wake=self.wake)
                continue
            try:
                self.device.replace([one.socket for one in dialled], self.patience)
            except OSError as error:
                raise UserError(
                    f"the kernel takes no new connection for {self.name}: {reason_of(error)}; it was attached by ioctl "
                    "(nbd-client -nonetlink), as another export, or is being detached"
                ) from None
            finally:
                _let_go(dialled)
            self.say(f"{self.name} is connected, after {time.monotonic() - began:.1f} s")
            return

    def _dial_all(self) -> list[Dialled]:
        """As many as there may be dead ones: the kernel takes those that it needs. Raises OSError, Refused."""
        dialled: list[Dialled] = []
        try:
            for _ in range(self.connections):
                dialled.append(self.dial())
                self._hold_to_what_it_was(dialled[-1])
        except BaseException:
            _let_go(dialled)
            raise
        return dialled

    def _hold_to_what_it_was(self, one: Dialled) -> None:
        read_only = bool(one.flags & TransmissionFlag.READ_ONLY)
        if self.size_bytes is None:
            self.size_bytes, self.read_only = one.size_bytes, read_only
        elif one.size_bytes != self.size_bytes:
            raise Refused(
                f"the export has {one.size_bytes} bytes now and had {self.size_bytes}; "
                f"unmount {self.name}, detach it, and attach it anew"
            )
        elif read_only and not self.read_only:
            raise Refused(
                f"the export is read-only now, and {self.name} is written; let clients write again, or unmount it, "
                "detach it, and attach it anew"
            )


def _let_go(dialled: list[Dialled]) -> None:
    for one in dialled:
        one.socket.close()
