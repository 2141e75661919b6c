"""What tells a server to stop: signals, and the end of the process that started it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdzram.server.service import Service

FORCED_EXIT = 128 + signal.SIGTERM

log = logging.getLogger("nbdzram.server")


def watch_signals(service: Service, told: asyncio.Event) -> None:
    """The first SIGINT or SIGTERM sets the event, and says so. The second ends the process at once.

    SIGHUP lets the service read its configuration again.
    """
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        if told.is_set():
            os._exit(FORCED_EXIT)
        log.info("%s: %s; a second signal ends at once", signal.Signals(number).name, service.what_a_stop_does())
        _tell(service, told)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    loop.add_signal_handler(signal.SIGHUP, service.hang_up)


def stop_without_parent(service: Service, told: asyncio.Event) -> None:
    """The process that started this one has ended, and so is this one to."""
    if not told.is_set():
        log.info("the process that started this one has ended; stopping")
    _tell(service, told)


def _tell(service: Service, told: asyncio.Event) -> None:
    told.set()
    service.told_to_stop.set()  # while it starts it may be reading
