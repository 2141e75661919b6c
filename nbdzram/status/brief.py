"""Of a server, what a line says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Named:
    """A pool, or an export."""

    name: str


@dataclass(frozen=True, slots=True)
class Brief:
    """Of a ServerStatus, who it is, whether it serves, and the names of what it has."""

    version: str
    pid: int
    draining: bool
    connections: int
    pools: tuple[Named, ...]
    exports: tuple[Named, ...]
    starting: bool = False
