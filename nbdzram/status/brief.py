"""Of a server, what a line says."""

from __future__ import annotations

from typing import NamedTuple


class Named(NamedTuple):
    """A pool, or an export."""

    name: str


class Brief(NamedTuple):
    """Of a ServerStatus, who it is, whether it serves, and the names of what it has."""

    version: str
    pid: int
    draining: bool
    connections: int
    pools: tuple[Named, ...]
    exports: tuple[Named, ...]
    starting: bool
