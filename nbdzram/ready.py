"""Waiting for descriptors, whatever their numbers: select(2) takes none above 1,023, and a server has more clients."""

from __future__ import annotations

import math
import select


def readable(*descriptors: int, seconds: float | None = None) -> set[int]:
    """Those that can be read, or at their end, or broken; none once `seconds` are over (None: for as long as it takes).

    Waits without any descriptor too.
    """
    return _ready(descriptors, select.POLLIN | select.POLLPRI, seconds)


def writable(descriptor: int, *, seconds: float | None = None) -> bool:
    """Whether it takes something, or is broken; as `readable`."""
    return bool(_ready((descriptor,), select.POLLOUT, seconds))


def _ready(descriptors: tuple[int, ...], events: int, seconds: float | None) -> set[int]:
    asked = select.poll()
    for descriptor in descriptors:
        asked.register(descriptor, events)
    found = asked.poll(None if seconds is None else math.ceil(max(seconds, 0) * 1000))
    return {descriptor for descriptor, _ in found}
