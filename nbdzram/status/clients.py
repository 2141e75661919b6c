"""Of who is attached."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClientStatus:
    """One attached client."""

    number: int  # in the order in which they attached, never used again
    peer: str
    certificate_names: tuple[str, ...]  # verified: common name and DNS names
    export: str
    read_only: bool
    since: float  # seconds since the epoch
    requests: int  # taken since then
    in_flight: int
    idle_seconds: float  # since its last request came
