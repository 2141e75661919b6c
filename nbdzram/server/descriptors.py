"""How many descriptors the process may have, and how they are shared: clients never get those that control and health
checks need, so that the operator always gets in.
"""

from __future__ import annotations

import contextlib
import resource
from typing import NamedTuple

KEPT_DESCRIPTORS = 256
"""For the operator: 65 of control, 72 of metrics and health, listeners, arenas, threads' events, the interpreter's."""

LEAST_PLACES = 4
"""Of each stage, however few descriptors there are: a server with too few is slow to say no, and not dead."""


class Places(NamedTuple):
    """Connections of each stage at once."""

    haggling: int
    attached: int


def wanted(connections: int) -> int:
    """Descriptors that so many clients of each stage need."""
    return 2 * connections + KEPT_DESCRIPTORS


def raise_limit() -> int:
    """Raise the soft limit to the hard one, as every server may; returns what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # a hard limit above the kernel's own, in some containers
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return available()


def available() -> int:
    """The soft limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 30 if soft == resource.RLIM_INFINITY else soft


def places(connections: int, descriptors: int) -> Places:
    """Up to `connections` in each stage; where descriptors are few, strangers have a quarter of them."""
    free = max(descriptors - KEPT_DESCRIPTORS, descriptors // 4)
    haggling = min(connections, max(free - connections, free // 4, LEAST_PLACES))
    return Places(haggling, min(connections, max(free - haggling, LEAST_PLACES)))
