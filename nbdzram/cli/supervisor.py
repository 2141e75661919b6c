"""What systemd is told (Type=notify)."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Sequence

from nbdzram.ready import readable

log = logging.getLogger("nbdzram.server")

BARRIER_SECONDS = 5.0
"""For systemd to have read what it was told before; it is quick, unless it hangs."""


def notify_supervisor(message: str, descriptors: Sequence[int] = ()) -> None:
    """Tell systemd (Type=notify) how far we are; nothing without it. Never raises: whoever has just taken over from
    another server, and may have as many clients as descriptors, is the only one who has their disks."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.connect("\0" + address[1:] if address.startswith("@") else address)
            socket.send_fds(notify, [message.encode()], descriptors)
    except OSError as error:
        log.warning("cannot notify %s: %s", address, error.strerror)


def wait_for_supervisor() -> None:
    """Return once all that it was told has been read: who ends before that may end unknown (sd_notify_barrier(3)).
    Never raises."""
    try:
        reads, writes = os.pipe()
    except OSError as error:
        log.warning("cannot wait for systemd to read what it was told: %s", error.strerror)
        return
    try:
        notify_supervisor("BARRIER=1", [writes])
    finally:
        os.close(writes)
    with contextlib.closing(os.fdopen(reads, "rb", buffering=0)):
        readable(reads, seconds=BARRIER_SECONDS)
