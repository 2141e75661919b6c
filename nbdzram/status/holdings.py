"""What a server holds, and no more: most of what is told of it is not for tables."""

from __future__ import annotations

from dataclasses import dataclass

from nbdzram.status.exports import ExportStatus
from nbdzram.status.pools import PoolFigures


@dataclass(frozen=True, slots=True)
class Holdings:
    """Of a ServerStatus, what a table of pools and exports is made from."""

    pools: tuple[PoolFigures, ...]
    exports: tuple[ExportStatus, ...]
