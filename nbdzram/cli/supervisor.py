"""What systemd is told (Type=notify)."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger("nbdzram.server")


def notify_supervisor(message: str) -> None:
    """Tell systemd (Type=notify) how far we are; nothing without it."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        try:
            notify.connect("\0" + address[1:] if address.startswith("@") else address)
            notify.send(message.encode())
        except OSError as error:
            log.warning("cannot notify %s: %s", address, error.strerror)
