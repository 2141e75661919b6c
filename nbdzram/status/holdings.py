"""What a server holds, and no more: most of what is told of it is not for tables."""

from __future__ import annotations

from typing import NamedTuple

from nbdzram.status.exports import ExportFigures
from nbdzram.status.pools import PoolFigures


class Holdings(NamedTuple):
    """Of a ServerStatus, what a table of pools and exports is made from."""

    pools: tuple[PoolFigures, ...]
    exports: tuple[ExportFigures, ...]
